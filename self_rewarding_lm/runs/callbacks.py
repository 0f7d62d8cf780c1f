"""What a user's object may be told while a run goes on. Knows nothing of the trainer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.runs.run import Run


class Callback:
    """Methods that a run calls: write those that you want; the others do nothing.

    An object of any other class with some of these methods is a callback too. `ctx` is the stage's
    context, as `run` of a stage of your own gets it. An error that a method raises ends the run,
    which can be resumed from there.
    """

    def check(self, ctx: Any) -> None:
        """Called once for each stage before the first begins, on all processes.

        Raise an error for everything that is known to be wrong by then.
        """

    def on_pairs(self, ctx: Any, pairs: Sequence[PreferencePair]) -> None:
        """The pairs that a stage trains on next; called on all processes.

        Once for each round of a stage, also of pairs that were made before an interruption.
        """

    def on_step_end(self, ctx: Any, metrics: Mapping[str, float], step: int) -> None:
        """An optimiser step is done and logged; called on all processes.

        metrics: its line in metrics.jsonl: loss, grad_norm, learning_rate, ... step: from 1, over
        all rounds of the stage.
        """

    def on_stage_trained(self, ctx: Any, out: Any) -> None:
        """The stage's weights are in the model and on disk, and it is not yet done; called on all
        processes.

        `out.log` and `out.summary` can still be written. Called again if the run is stopped in it.
        """

    def on_stage_end(self, run: Run, stage: str, model: nn.Module) -> None:
        """The stage is done; called on the main process. Its weights are in `model` and on disk."""


METHODS = ("on_pairs", "on_step_end", "on_stage_trained", "on_stage_end")
"""Of which a callback has one at least."""


class Callbacks:
    """The callbacks of a run, asked by the name of a method."""

    def __init__(self, given: Sequence[Any] = ()) -> None:
        for callback in given:
            if isinstance(callback, type) or not any(hasattr(callback, name) for name in METHODS):
                what = f"the {type(callback).__name__} {callback!r:.100}"
                if (name := getattr(callback, "__qualname__", None)) is not None:
                    what = f"the {'class' if isinstance(callback, type) else 'function'} {name}"
                raise ConfigError(
                    f"a callback is an object with some of the methods {', '.join(METHODS)}; got "
                    f"{what}. Write a class with those that you want (Callback "
                    "has them all) and give callbacks=[YourClass()]."
                )
        self.given = tuple(given)

    def of(self, method: str) -> list[Callable[..., None]]:
        """The methods of that name which do something."""
        methods = [getattr(callback, method, None) for callback in self.given]
        idle = getattr(Callback, method)
        return [m for m in methods if m is not None and getattr(m, "__func__", m) is not idle]
