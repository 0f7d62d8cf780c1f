"""What is shown of a run while it goes on: a stage's numbers at its end, to the trackers too."""

import logging

from self_rewarding_lm.report.examples import SAMPLE, sample_rows
from self_rewarding_lm.report.terminal import stage_table
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runtime import Runtime

logger = logging.getLogger(__name__)


SAMPLES = 8
"""Prompts of a stage in the trackers' table, evenly spread over it."""


def show_stage(run: Run, stage: str, runtime: Runtime, step: int) -> None:
    """Log a stage's table, and its samples to the trackers at `step`."""
    if runtime.shows:
        logger.info("%s", stage_table(run, stage))
    if runtime.trackers and (rows := sample_rows(run, stage, SAMPLES)):
        runtime.log_table(f"{stage}/samples", SAMPLE, rows, step)
