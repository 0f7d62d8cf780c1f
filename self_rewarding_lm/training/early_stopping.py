"""Early stopping: a score of the user's own, and the weights that had the best one."""

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

    It stands in place of a function of the model; the library's own are in
    `evaluation/held_out.py`.
    """

    def check(self, ctx: Context) -> None:
        """Raise an error for whatever can be known to be wrong before the first stage."""
        ...

    def begin(self, ctx: Context) -> None:
        """A training begins: forget earlier ones."""
        ...

    def measure(self, ctx: Context) -> dict[str, float]:
        """The `score` of the present weights, the same on all processes.

        Further numbers are logged as early_stopping/<name>.
        """
        ...

    def standing(self) -> Any:
        """What a resumed training needs to know, as JSON."""
        ...

    def resume(self, standing: Any) -> None:
        """Go on from what `standing` returned; called after `begin`."""
        ...


@dataclass(frozen=True)
class EarlyStopping:
    """evaluate: a module or function of the model that gives one number, or a StageEvaluation.

    It is asked before the first step, every `eval_every` steps and after the last one. Training
    stops after `patience` scores that are no better than the best, whose weights are restored.
    """

    evaluate: Callable[[nn.Module], Any] | StageEvaluation
    mode: Literal["max", "min"] = "max"
    patience: int = 1


class Stopper:
    """Early stopping of one training, decided on the main process for all."""

    def __init__(
        self, ctx: Context, out: StageDir, settings: EarlyStopping, first_step: int
    ) -> None:
        self.ctx, self.out, self.settings = ctx, out, settings
        self.first_step = first_step
        self.best: float | None = None
        self.best_step = 0
        self.checks_without_better = 0
        evaluate = settings.evaluate
        self.evaluation = evaluate if isinstance(evaluate, StageEvaluation) else None
        if self.evaluation is not None:
            self.evaluation.begin(ctx)

    def standing(self) -> dict[str, Any]:
        """What a resumed training needs to know, beside the best weights on disk."""
        standing = {
            "best": self.best,
            "best_step": self.best_step,
            "worse": self.checks_without_better,
        }
        if self.evaluation is not None:
            standing["evaluation"] = self.evaluation.standing()
        return standing

    def resume(self, standing: dict[str, Any]) -> None:
        """Go on from what `standing` returned."""
        self.best, self.best_step = standing["best"], standing["best_step"]
        self.checks_without_better = standing["worse"]
        if self.evaluation is not None:
            self.evaluation.resume(standing["evaluation"])

    def check(self, step: int) -> bool:
        """Evaluate and keep the weights if they are the best so far; returns whether to stop."""
        step += self.first_step
        # 1. the score of the present weights
        if self.evaluation is not None:
            metrics = self.evaluation.measure(self.ctx)
        else:
            own_metrics = {"score": self._score()} if self.ctx.runtime.is_main else {}
            metrics = self.ctx.runtime.from_main(own_metrics)
        score = _finite_number(metrics["score"])
        is_better = self.best is None or (
            score > self.best if self.settings.mode == "max" else score < self.best
        )
        # 2. log it
        line = {"step": step, **{f"early_stopping/{k}": v for k, v in metrics.items()}}
        self.out.log(line, again=False)
        logger.info(
            "%s: early stopping at step %d: %.6g (best so far: %s, mode %r)",
            self.ctx.stage,
            step,
            score,
            "none" if self.best is None else f"{self.best:.6g}",
            self.settings.mode,
        )
        # 3. keep the weights, or count the checks since the best ones
        if is_better:
            self.best, self.best_step, self.checks_without_better = score, step, 0
            self.out.save_weights(self.ctx.model, BEST)
            return False
        self.checks_without_better += 1
        return self.checks_without_better >= self.settings.patience

    def restore_best(self) -> None:
        """Load the best weights, and note their step and score in the stage's summary."""
        path = self.out.weights(BEST)
        assert path is not None
        self.ctx.model.load(path)
        self.out.summary["early_stopping"] = {"best_step": self.best_step, "score": self.best}

    @torch.no_grad()
    def _score(self) -> float:
        module, evaluate = self.ctx.model.module, self.settings.evaluate
        assert callable(evaluate)
        with evaluating(module):
            return _finite_number(evaluate(module))


def _finite_number(score: Any) -> float:
    """The score as a float; ConfigError if it is no number, TrainingError if it is not finite."""
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"early_stopper_eval_module(model) must give one number; got {score!r:.200}."
        ) from error
    if not math.isfinite(number):
        raise TrainingError(f"early_stopper_eval_module(model) gave {number}; nothing to compare.")
    return number
