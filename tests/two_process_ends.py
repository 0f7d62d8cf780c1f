"""What processes run to see how they end and go on: a judge that fails on one, or that waits."""

import os
import sys
import time
from pathlib import Path

from tests.test_trainer import external, model64, sft, trainer_of


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


def main(judge: str, folder: str, *only: str) -> None:
    """only: "sft" for a run of the first stage alone."""
    function = {"fails": fails_on_one, "waits": takes_its_time, "counts": counts}[judge]
    stages = [sft(), external(reward_model=function)]
    stages = stages[: len(only)] or stages
    options = dict(accelerate_kwargs=dict(cpu=True))
    trainer_of(Path(folder) / "run", stages, model64(), **options)(rehearse=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
