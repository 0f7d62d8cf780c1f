"""What a stage that is done shows in the terminal and in the trackers: numbers and samples.

They are the report's, under the names that metrics.jsonl has.
"""

import logging
from itertools import zip_longest

from self_rewarding_lm.reporting.examples import SAMPLE, sample_rows
from self_rewarding_lm.reporting.figures import StageFigures, stage_figures
from self_rewarding_lm.reporting.words import CURVES, ROUNDS, in_order
from self_rewarding_lm.run import Run
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.show import aligned

logger = logging.getLogger(__name__)

SAMPLES = 8
"""Prompts of a stage in the trackers' table, evenly spread over it."""


def show_stage(run: Run, stage: str, runtime: Runtime, step: int) -> None:
    """Log a stage's table, and its samples to the trackers at `step`."""
    if runtime.shows:
        logger.info("%s", stage_table(run, stage))
    if runtime.trackers and (rows := sample_rows(run, stage, SAMPLES)):
        runtime.log_table(f"{stage}/samples", SAMPLE, rows, step)


def stage_table(run: Run, stage: str) -> str:
    """A stage in lines: what it took; its data's numbers to the left, its curves' first and last
    values to the right. In several rounds `first` is of the first one. Records are not read.
    """
    found = stage_figures(run, stage, records=False)
    data = [(key, _number(found.data[key])) for key in in_order(set(found.data), ROUNDS, "anchor/")]
    curves = []
    for key in in_order(set(found.curves), CURVES, "\0"):
        values = [value for _, value in found.curves[key]]
        first = _number(values[0]) if len(values) > 1 else ""
        curves.append((key, first, _number(values[-1])))
    right = aligned([("", "first", "last"), *curves], 1) if curves else []
    left = aligned([("", ""), *data], 1)[0 if curves else 1 :]
    width = max(map(len, left), default=0)
    lines = [f"  {a:{width}}    {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return "\n".join([_heading(found), *lines])


def _heading(found: StageFigures) -> str:
    times = [f"{name} {_time(seconds)}" for name, seconds in found.seconds.items()]
    return f"{found.name}: {found.state}" + (f" in {' + '.join(times)}" if times else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _time(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
