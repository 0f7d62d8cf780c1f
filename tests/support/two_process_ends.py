"""What processes run to see how they end and go on: a judge that fails on one, or that waits.

And training that is told to stop after a step.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from self_rewarding_lm import Interrupted, OptimConfig
from tests.test_trainer import ROWS, external, model64, sft, trainer_of


def fails_on_one(ids):
    if os.environ["RANK"] == "1":
        raise ValueError("this judge fails here")
    return ids.double().sum(dim=-1)


def takes_its_time(ids):
    Path(sys.argv[2], f"judging.{os.environ['RANK']}").touch()
    time.sleep(float(os.environ.get("JUDGE_SECONDS", "0")))
    return ids.double().sum(dim=-1)


def counts(ids):
    return ids.double().sum(dim=-1)


def trains(folder: str, stop_after: str) -> None:
    """Six steps of SFT with early stopping. stop_after: steps until SIGTERM comes, "0" for never.

    Beside the run: how many steps this process made.
    """
    steps = 0

    def count(*_) -> None:
        nonlocal steps
        steps += 1
        if steps == int(stop_after):
            os.kill(os.getpid(), signal.SIGTERM)

    def score(model: torch.nn.Module) -> float:
        return float(next(iter(model.parameters())).sum())

    register_optimizer_step_post_hook(count)
    optim = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=1)
    stops = dict(early_stopper_eval_module=score, early_stopper_patience=9)
    stage = sft(optim=optim, num_train_steps=6, valid_dataset=ROWS[:2], **stops)
    trainer = trainer_of(Path(folder) / "run", [stage], model64(), accelerate_kwargs=dict(cpu=True))
    with contextlib.suppress(Interrupted):
        trainer(rehearse=False)
    Path(folder, f"steps.{trainer.runtime.rank}").write_text(str(steps))


def judges(judge: str, folder: str, *only: str) -> None:
    """only: "sft" for a run of the first stage alone."""
    function = {"fails": fails_on_one, "waits": takes_its_time, "counts": counts}[judge]
    stages = [sft(), external(reward_model=function)]
    stages = stages[: len(only)] or stages
    options = dict(accelerate_kwargs=dict(cpu=True))
    trainer_of(Path(folder) / "run", stages, model64(), **options)(rehearse=False)


if __name__ == "__main__":
    if sys.argv[1] == "trains":
        trains(*sys.argv[2:])
    else:
        judges(*sys.argv[1:])
