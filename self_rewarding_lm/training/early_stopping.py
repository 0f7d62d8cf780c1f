"""Early stopping: a user's number, and the weights that had the best one."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError, TrainingError
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.runs.stage_folder import StageDir

logger = logging.getLogger(__name__)


BEST = "best"


@runtime_checkable
class StageEvaluation(Protocol):
    """An evaluation that works in the stage's context, on all processes at once.

    In place of a function of the model: see `evaluation/held_out.py` for those of the library.
    """

    def check(self, ctx: Context) -> None:
        """Raise where something is wrong that can be known before stage 1."""
        ...

    def begin(self, ctx: Context) -> None:
        """A training begins; nothing of an earlier one counts."""
        ...

    def measure(self, ctx: Context) -> dict[str, float]:
        """The present weights' `score`, the same on all processes, and what else is to be logged
        as early_stopping/<name>."""
        ...

    def standing(self) -> Any:
        """What a training that goes on needs to know, as JSON."""
        ...

    def resume(self, standing: Any) -> None:
        """Go on from what `standing` gave, after `begin`."""
        ...


@dataclass(frozen=True)
class EarlyStopping:
    """evaluate: a module or function of the model that gives one number, or a StageEvaluation.

    Checked before the first step, every `eval_every` steps and after the last one; after `patience`
    checks without a better score training stops. The best weights are restored.
    """

    evaluate: Callable[[nn.Module], Any] | StageEvaluation
    mode: Literal["max", "min"] = "max"
    patience: int = 1


class Stopper:
    """Early stopping, decided on the main process and told to all."""

    def __init__(
        self, ctx: Context, out: StageDir, settings: EarlyStopping, first_step: int
    ) -> None:
        self.ctx, self.out, self.settings = ctx, out, settings
        self.first_step = first_step
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0
        given = settings.evaluate
        self.evaluation = given if isinstance(given, StageEvaluation) else None
        if self.evaluation is not None:
            self.evaluation.begin(ctx)

    def standing(self) -> dict[str, Any]:
        """What a training that goes on needs to know, beside the best weights on disk."""
        found = {"best": self.best, "best_step": self.best_step, "worse": self.worse}
        if self.evaluation is not None:
            found["evaluation"] = self.evaluation.standing()
        return found

    def resume(self, standing: dict[str, Any]) -> None:
        """Go on from what `standing` gave."""
        self.best, self.best_step = standing["best"], standing["best_step"]
        self.worse = standing["worse"]
        if self.evaluation is not None:
            self.evaluation.resume(standing["evaluation"])

    def check(self, step: int) -> bool:
        """Evaluate, keep the weights if they are the best so far; whether to stop."""
        step += self.first_step
        if self.evaluation is not None:
            found = self.evaluation.measure(self.ctx)
        else:
            alone = {"score": self._score()} if self.ctx.runtime.is_main else {}
            found = self.ctx.runtime.from_main(alone)
        score = _number(found["score"])
        better = self.best is None or (
            score > self.best if self.settings.mode == "max" else score < self.best
        )
        self.out.log({"step": step, **{f"early_stopping/{k}": v for k, v in found.items()}})
        logger.info(
            "%s: early stopping at step %d: %.6g (best so far: %s, mode %r)",
            self.ctx.stage,
            step,
            score,
            "none" if self.best is None else f"{self.best:.6g}",
            self.settings.mode,
        )
        if better:
            self.best, self.best_step, self.worse = score, step, 0
            self.out.save_weights(self.ctx.model, BEST)
            return False
        self.worse += 1
        return self.worse >= self.settings.patience

    def restore_best(self) -> None:
        """Load the best weights."""
        path = self.out.weights(BEST)
        assert path is not None
        self.ctx.model.load(path)
        self.out.summary["early_stopping"] = {"best_step": self.best_step, "score": self.best}

    @torch.no_grad()
    def _score(self) -> float:
        module, evaluate = self.ctx.model.module, self.settings.evaluate
        assert callable(evaluate)
        with evaluating(module):
            return _number(evaluate(module))


def _number(score: Any) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"early_stopper_eval_module(model) must give one number; got {score!r:.200}."
        ) from error
    if not math.isfinite(number):
        raise TrainingError(f"early_stopper_eval_module(model) gave {number}; nothing to compare.")
    return number
