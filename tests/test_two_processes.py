"""Two processes on one machine (gloo) give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import Run

HERE = Path(__file__).parent


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_records_and_weights_of_one(settings, tmp_path):
    script = ["-m", "tests.two_process_run"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    one = [sys.executable, *script, str(tmp_path / "one")]
    two = [sys.executable, *launch, *script, str(tmp_path / "two")]
    for command, added in ((one, {}), (two, settings)):
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env={**os.environ, **added},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for stage in alone.stages:
        for records in ("prompts", "candidates", "judgements", "pairs", "rows"):
            assert getattr(alone, records)(stage) == getattr(together, records)(stage)
        assert not list((tmp_path / "two").glob("*/*.[0-9]*.jsonl"))
        mine = [m for m in alone.metrics(stage) if "loss" in m]
        theirs = [m for m in together.metrics(stage) if "loss" in m]
        assert len(mine) == len(theirs)
        for one_step, other_step in zip(mine, theirs, strict=True):
            assert one_step.keys() == other_step.keys()
            for name, value in one_step.items():
                if name == "rewards/accuracies":
                    continue  # margins that are 0 but for rounding have no sign
                torch.testing.assert_close(other_step[name], value, rtol=1e-6, atol=1e-9)
    assert together.summary("sft")["early_stopping"] == {"best_step": 1, "score": 2.0}
    weights = [
        torch.load(tmp_path / f, weights_only=True)
        for f in ("one/weights.0.pt", "two/weights.0.pt", "two/weights.1.pt")
    ]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], value, rtol=1e-7, atol=1e-9)
