"""A dry run of every stage before the first one begins: a few rows, two tokens, one gradient.

Knows what a stage is given to rehearse with; what it tries is the stage's own `rehearse`. Each
process rehearses everything by itself, with files of its own, and waits for another only where
weights are spread (FSDP). Afterwards weights, random numbers and the run directory are as before.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from self_rewarding_lm.checks import OFF
from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import PromptRow
from self_rewarding_lm.errors import (
    DataError,
    RehearsalError,
    SelfRewardingError,
    TokenizerError,
    said,
)
from self_rewarding_lm.models.inference import modes_kept
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.runs.stage_files import StageFiles
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runtime import Runtime, random_numbers_kept

FEW = 8  # rows of each dataset


def rehearse_stages(trainer: Any, begun: Sequence[str] = ()) -> list[str]:
    """Rehearse the stages of a SelfRewardingTrainer; a line about each that says what was tried.

    begun: the folders of its stages within its own; a stage that is done there is left out. An
    error of this library is raised again with the stage's name after it, any other (a reward
    function's) as a RehearsalError; all processes raise. Nothing was begun then.
    """
    num_done = sum(StageFiles(trainer.folder / name).is_done for name in begun)
    to_rehearse = list(zip(trainer.stages, trainer.contexts, strict=True))[num_done:]
    lines = []
    with trainer.runtime.progress(len(to_rehearse), "rehearsal", "stage") as bar:
        for stage, ctx in to_rehearse:
            lines.append(_rehearse(stage, ctx))
            bar.update()
    return lines


def stand_in(ctx: Context) -> PreferencePair:
    """A pair in place of a row that only an earlier stage will make."""
    first, second = ctx.tokens.decode((0,)), ctx.tokens.decode((1,))
    return PreferencePair("stand-in", (0,), (0,), (1,), first, first, second)


class _Alone(Runtime):
    """A runtime that acts as if this process were alone: it neither waits nor tracks nor steps."""

    def __init__(self, runtime: Runtime) -> None:
        self.__dict__.update(runtime.__dict__)
        self.real, self.has_met = runtime, False
        self.rank, self.world, self.is_main, self.shows = 0, 1, True, False

    def meet(self, failure: SelfRewardingError | None = None) -> None:
        """Wait for all processes, once a stage; if one of them failed, raise on all."""
        self.has_met = True
        failures = [each for each in self.real.gather([failure]) if each is not None]
        if failures:
            raise failure or failures[0]

    def training(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        if self.shards:  # from here on each waits for the others
            self.meet()
        return super().training(module)

    def barrier(self) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return optimizer

    def step(self, optimizers: Sequence[Any], norm: float) -> None:
        pass  # the scale of float16 stays as it is too


class _FewRows(Rows):
    """A few rows, each with the place where it stands in its dataset, and what it is as a prompt.

    That is None if no check made one of it.
    """

    def __init__(self, name: str, placed: Sequence[tuple[str, Any, PromptRow | None]]) -> None:
        super().__init__(tuple(row for _, row, _ in placed), name)
        self._places = [where for where, _, _ in placed]
        for index, (_, _, prompt) in enumerate(placed):
            if prompt is not None:
                self.keep_prompt(index, prompt)

    def where(self, index: int) -> str:
        return self._places[index]


def _rehearse(stage: FinetuneConfig, ctx: Context) -> str:
    """Rehearse one stage. Returns a line that says what was tried."""
    if type(stage).rehearse is FinetuneConfig.rehearse:
        return f"{ctx.stage}: not tried, it has no rehearse of its own"
    runtime, notes, folder = _Alone(ctx.runtime), list[str](), ""
    try:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, _kept(ctx):
            rows = {name: _few(stage, ctx, r, notes) for name, r in ctx.rows.items()}
            engine = ctx.local_engine()
            if engine is not ctx.engine:
                notes.append("sampled here, not by the server")
            name = f"{ctx.stage} (rehearsal)"
            parts = {"runtime": runtime, "policy": runtime.unwrapped(ctx.policy), "engine": engine}
            trial = replace(ctx, stage=name, rows=rows, **parts)
            out = StageDir(Path(folder), runtime)
            out.begin({})
            stage.model_copy(update={"checks": OFF}).rehearse(trial, out)
    except Exception as error:
        failure = _in_words(error, ctx.stage, folder)
        if not runtime.has_met:
            with suppress(type(failure)):
                runtime.meet(failure)
        raise failure from (None if failure is error else error)
    if not runtime.has_met:
        runtime.meet()
    notes += stage.remarks(ctx)
    return f"{ctx.stage}: well" + "".join(f"; {note}" for note in notes)


def _in_words(error: Exception, stage: str, folder: str) -> SelfRewardingError:
    """The error with its stage. folder: the temporary one, which is gone."""
    words = str(error).replace(folder, "a temporary folder") if folder else str(error)
    if "(Rehearsal of stage" in str(error):  # another process's
        assert isinstance(error, SelfRewardingError)
        return error
    without = said("rehearse=False", "--no-rehearsal of `run`")
    end = f"(Rehearsal of stage {stage!r}: nothing was started. {without} skips it.)"
    if isinstance(error, SelfRewardingError):
        return type(error)(f"{words}\n{end}")
    return RehearsalError(
        f"a function, module or object that the stage was given raised {type(error).__name__}: "
        f"{words}. Its traceback is above.\n{end}"
    )


def _few(stage: FinetuneConfig, ctx: Context, rows: Rows, notes: list[str]) -> Rows:
    """The first rows that can be used; if there is none, a stand-in, which `notes` tell of."""
    placed = list(islice(_usable(stage, ctx, rows), FEW))
    if not placed:
        placed = [(f"{rows.name}, a stand-in", stand_in(ctx), None)]
        notes.append(f"{rows.name}: a stand-in")
    return _FewRows(rows.name, placed)


def _usable(
    stage: FinetuneConfig, ctx: Context, rows: Rows
) -> Iterator[tuple[str, Any, PromptRow | None]]:
    """Rows that the stage can use, each with its place and with the prompt that a check made."""
    check = getattr(stage, "check_row", None)
    for place in rows.preview():
        with suppress(DataError, TokenizerError):
            where, row = rows.where(place), rows.peek(place)
            prompt = rows.kept_prompt(place)  # what has one was checked when the trainer was made
            if check is not None and prompt is None:
                prompt = check(row, where, ctx)
            yield where, row, prompt


@contextmanager
def _kept(ctx: Context) -> Iterator[None]:
    """Random numbers, modes and buffers are as before; nothing but errors is logged.

    Parameters are not copied: a rehearsal takes no step.
    """
    logger, module = logging.getLogger("self_rewarding_lm"), ctx.model.module
    level, numbers = logger.level, numpy.random.get_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    logger.setLevel(logging.ERROR)
    try:
        with random_numbers_kept(), modes_kept(ctx.policy):
            yield
    finally:
        numpy.random.set_state(numbers)
        logger.setLevel(level)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
