"""Processes beside that of the tests: one, or two on one machine (gloo)."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

HOME = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LIMIT = 300  # seconds


def launched(*script: object, **settings: str) -> subprocess.Popen:
    """torchrun with two processes of `script`, a file or "-m" and a module, and its arguments."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, script)],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": str(HOME), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@cache
def nursery(rank: int) -> subprocess.Popen:
    """Where the processes of a rank come from; each rank has its own hashes of texts."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.nursery"],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def one(*script: object) -> str:
    """What a process of its own prints, which runs `script`; it must end well."""
    return _told(script, [{}])


def two(*script: object, **settings: str) -> str:
    """What two processes of `script` print, as for `launched`; they must end well.

    They find the variables that torchrun sets. If one fails, the other is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **settings}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return _told(script, ranks)


def _told(script: tuple[object, ...], settings: list[dict[str, str]]) -> str:
    """What processes of `script` print, each with its settings in the environment."""
    nurseries = [nursery(rank) for rank in range(len(settings))]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"output.{rank}") for rank in range(len(settings))]
        for house, output, own in zip(nurseries, outputs, settings, strict=True):
            output.touch()
            env = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", **own}
            order = {"argv": [*map(str, script)], "env": env, "output": str(output)}
            print(json.dumps(order), file=house.stdin, flush=True)
        ids = [int(house.stdout.readline()) for house in nurseries]
        statuses = _ended(nurseries, ids)
        told = "".join(output.read_text(errors="replace") for output in outputs)
    assert not any(statuses), (statuses, told[-5000:])
    return told


def _ended(nurseries: list[subprocess.Popen], ids: list[int]) -> list[int]:
    """The exit statuses; after a failure, and after LIMIT, those that still run are killed."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    with selectors.DefaultSelector() as selector:
        for rank, house in enumerate(nurseries):
            selector.register(house.stdout, selectors.EVENT_READ, rank)
        while len(statuses) < len(nurseries):
            for key, _ in selector.select(max(0.0, until - time.monotonic())):
                statuses[key.data] = int(key.fileobj.readline())
                selector.unregister(key.fileobj)
            if any(statuses.values()) or time.monotonic() > until:
                for rank in set(range(len(nurseries))) - statuses.keys():
                    os.kill(ids[rank], signal.SIGKILL)
                until = time.monotonic() + LIMIT
    return [statuses[rank] for rank in range(len(nurseries))]
