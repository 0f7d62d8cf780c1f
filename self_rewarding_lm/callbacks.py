"""What a trainer calls between its stages. Knows nothing of what callbacks do."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.run import Run
from self_rewarding_lm.store import StageDir


@runtime_checkable
class Callback(Protocol):
    """Called on the main process."""

    def on_stage_end(self, run: Run, stage: str, model: nn.Module) -> None:
        """The stage's weights are in `model` and on disk."""
        ...


@runtime_checkable
class StageCallback(Protocol):
    """Called on all processes, with what the stage could reach."""

    def check(self, ctx: Context) -> None:
        """Raise where something is wrong that can be known before stage 1; asked of each stage."""
        ...

    def on_stage_trained(self, ctx: Context, out: StageDir) -> None:
        """The stage's weights are in the model and on disk; the stage is not yet done, so that
        metrics and `out.summary` are still its own. Called again where a run stops in it."""
        ...


def tell_trained(callbacks: Iterable[object], ctx: Context, out: StageDir) -> None:
    """Call those that work with a stage's context."""
    for callback in callbacks:
        if isinstance(callback, StageCallback):
            callback.on_stage_trained(ctx, out)


def tell_ended(callbacks: Iterable[object], run: Run, stage: str, model: nn.Module) -> None:
    """Call those that look at a stage that is done; for the main process."""
    for callback in callbacks:
        if isinstance(callback, Callback):
            callback.on_stage_end(run, stage, model)
