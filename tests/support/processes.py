"""Runs of two processes on one machine (gloo), as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launched(*script: object, **settings: str) -> subprocess.Popen:
    """Two processes of `script`, a file or "-m" and a module, and its arguments; on a free port."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, script)],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": str(HOME), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two(*script: object, **settings: str) -> str:
    """What two processes of `script` print; they must end well."""
    process = launched(*script, **settings)
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output[-5000:]
    return output
