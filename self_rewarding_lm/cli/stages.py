"""The argument RUN[:STAGE] of several commands."""

from pathlib import Path
from typing import TYPE_CHECKING

from self_rewarding_lm.errors import StoreError

if TYPE_CHECKING:
    from self_rewarding_lm.runs.run import Run

STAGE_HELP = "a run's folder, and a stage by name or number (default: the last that is done)"


def named_model(named: str) -> str:
    """What is said of a model, with the stage if it is a run's: RUN becomes RUN:<last stage>."""
    if not (Path(named) / "run.json").exists():
        return named
    return f"{named}:{named_stage(named)[1]}"


def named_stage(named: str) -> "tuple[Run, str]":
    """The run and the stage that RUN:STAGE names; of RUN alone the last stage that is done.

    Raises StoreError if there is no such run or stage, or if no stage is done.
    """
    from self_rewarding_lm.report.terminal import stage_name
    from self_rewarding_lm.runs.run import Run

    folder, colon, stage = named.rpartition(":")
    if not colon or not (Path(folder) / "run.json").exists():
        folder, stage = named, ""
    run = Run.open(folder)
    if stage:
        return run, stage_name(run, stage)
    done = [name for name in run.stages if run.is_done(name)]
    if not done:
        raise StoreError(f"no stage of {folder} is done yet; `run` with its recipe resumes it.")
    return run, done[-1]
