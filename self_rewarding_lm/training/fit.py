"""The one training loop: steps, clipping, schedule, evaluation, early stopping, its state.

The loss of a step is the sum over its whole batch divided by the batch's count, over all
processes, so that the gradient does not depend on micro-batches or on the number of processes.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.checks import Checker, ChecksConfig, not_finite
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import Interrupted, StoreError
from self_rewarding_lm.models.inference import modes_kept
from self_rewarding_lm.models.policy import dropout_set
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.weights import Tensors
from self_rewarding_lm.runtime import random_numbers_kept
from self_rewarding_lm.training.early_stopping import EarlyStopping, Stopper
from self_rewarding_lm.training.forwards import Forwards, Sums
from self_rewarding_lm.training.objectives import Objective
from self_rewarding_lm.training.optimizers import (
    learning_rate_at,
    make_optimizers,
    warn_of_lost_updates,
)
from self_rewarding_lm.training.reference import LiveReference
from self_rewarding_lm.training.state import (
    WEIGHTS,
    Kept,
    optimizer_state,
    prefixed,
    restore_optimizers,
    unprefixed,
)
from self_rewarding_lm.training.watch import Watcher

logger = logging.getLogger(__name__)


class Fit:
    """Trains the policy on an objective. `optim` is complete: no field is None.

    round: stages that train several times have other row orders and dropout each time, and their
    steps are counted on. kept: what such trainings hand on where they are one training in rounds;
    without it each begins anew. A training that was stopped goes on from the state in its stage's
    folder, where that is of this round. Raises TrainingError where the loss or a gradient is not
    finite; the weights are then those before that step.
    """

    def __init__(
        self,
        ctx: Context,
        out: StageDir,
        objective: Objective,
        optim: OptimConfig,
        *,
        num_train_steps: int | None = None,
        dropout: float = 0.0,
        valid: Objective | None = None,
        early_stopping: EarlyStopping | None = None,
        round: int = 0,
        first_step: int = 0,
        checks: ChecksConfig | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.ctx, self.out, self.objective, self.optim = ctx, out, objective, optim
        self.checker = Checker(checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
        self.dropout, self.valid, self.round = dropout, valid, round
        self.first_step = first_step
        self.steps_per_epoch = math.ceil(len(objective) / optim.batch_size)
        self.total = num_train_steps or (optim.epochs or 1) * self.steps_per_epoch
        self.kept, self.nth = kept or Kept(), 0
        self.forwards = Forwards(ctx, optim)
        self.stopper = Stopper(ctx, out, early_stopping, first_step) if early_stopping else None

    def run(self) -> int:
        """Train; the number of steps that were done."""
        self.nth = self.out.count_training(self.round)
        standing = self._standing()
        self.out.cut_metrics(self.first_step + (standing[1]["step"] if standing else 0))
        self.ctx.model.refresh()
        self.out.tell("training")
        with ExitStack() as changed:
            changed.enter_context(random_numbers_kept())
            changed.enter_context(modes_kept(self.ctx.policy))
            module = changed.enter_context(self.ctx.runtime.training(self.ctx.policy))
            changed.enter_context(dropout_set(module, self.dropout, warns=not self.kept.states))
            if self.optim.gradient_checkpointing:
                model = self.ctx.runtime.unwrapped(module).token_model
                changed.enter_context(model.checkpointing())
            made = make_optimizers(module, self.optim, self.ctx.model.vocab)
            optimizers = [self.ctx.runtime.prepare_optimizer(o) for o in made]
            if not self.kept.states:  # else it was said in an earlier round
                warn_of_lost_updates(module, self.optim, self.ctx.stage, checker=self.checker)
            self._begin_reference(module)
            self.kept.hand_on(optimizers)
            done = 0 if standing is None else self._go_on(module, optimizers, standing)
            try:
                steps = self._steps(module, optimizers, done)
                if self.kept.rounds > 1:
                    self.kept.take(optimizers)
                self.out.tell("trained")
                return steps
            finally:
                self.ctx.runtime.release(optimizers)
                for parameter in module.parameters():
                    parameter.grad = None

    def _begin_reference(self, module: nn.Module) -> None:
        """Copy the weights for a reference that moves, unless there is a copy already."""
        settings = getattr(self.objective, "live", None)
        if settings is not None:
            self.kept.live = self.kept.live or LiveReference(settings)
            self.kept.live.begin(self.ctx.runtime.unwrapped(module))
            self.forwards.live = self.kept.live

    def _standing(self) -> tuple[Tensors, dict[str, Any]] | None:
        """The state in which this training was stopped, its weights in the model; None: none."""
        words = self.out.state_words()
        if words is None or any(words.get(k) != v for k, v in self._place().items()):
            if words is not None and self.kept.rounds > 1 and words["round"] >= self.round:
                raise StoreError(
                    f"{self.ctx.stage}: the state of training is of other pairs than those on disk "
                    f"in {self.out.path}. Delete state.safetensors to train the stage again from "
                    "its start."
                )
            return None
        found = self.out.state()
        self.ctx.model.module.load_state_dict(unprefixed(WEIGHTS, found[0]), strict=False)
        return found

    def _place(self) -> dict[str, int]:
        """Which training of its stage this is."""
        place = {"round": self.round, "first_step": self.first_step, "total": self.total}
        return {**place, "nth": self.nth}

    def _go_on(
        self, module: nn.Module, optimizers: Sequence[Any], standing: tuple[Tensors, dict[str, Any]]
    ) -> int:
        """Bring optimisers and early stopping to where training stood; its steps so far."""
        tensors, words = standing
        own = self.ctx.runtime.unwrapped(module)
        restore_optimizers(own, optimizers, tensors, words["optimizers"])
        self.ctx.runtime.scale_as(words["scaling"])
        if self.kept.live:
            self.kept.live.restore(tensors, words["reference_steps"])
        if self.stopper:
            self.stopper.resume(words["early_stopping"])
        logger.info("%s: goes on behind step %d of %d", self.ctx.stage, words["step"], self.total)
        return words["step"]

    def _save(self, module: nn.Module, optimizers: Sequence[Any], step: int) -> None:
        """Save the state of training behind a step."""
        runtime, live, self.kept.saved_at = self.ctx.runtime, self.kept.live, time.monotonic()
        with runtime.whole():
            found = optimizer_state(runtime.unwrapped(module), optimizers, keep=runtime.is_main)
            weights = self.ctx.model.state() if runtime.is_main else {}
            reference = live.state(keep=runtime.is_main) if live else {}
            if found is not None:
                tensors = {**prefixed(WEIGHTS, weights), **found[0], **reference}
                self.out.save_state(tensors, self._words(found[1], step))
        if found is None:
            logger.warning(
                "%s: the optimiser keeps things that are neither tensors nor numbers; the state of "
                "training is not saved, and a stopped stage is trained again from its start.",
                self.ctx.stage,
            )

    def _words(self, optimizers: dict[str, Any], step: int) -> dict[str, Any]:
        """What is no tensor of the state behind a step."""
        words = {**self._place(), "step": step, "optimizers": optimizers}
        words["scaling"] = self.ctx.runtime.scaling()
        words["reference_steps"] = self.kept.live.steps if self.kept.live else None
        words["early_stopping"] = self.stopper.standing() if self.stopper else None
        return words

    def _look_up(self, module: nn.Module, optimizers: Sequence[Any], step: int) -> None:
        """Between two steps: save where it is time, and stop where a signal asks for it."""
        runtime, optim = self.ctx.runtime, self.optim
        late = time.monotonic() - self.kept.saved_at > 60 * (optim.save_state_minutes or math.inf)
        asked, late = runtime.any(bool(runtime.stopping.asked), runtime.is_main and late)
        if asked or late or step % (optim.save_state_every or self.total + 1) == 0:
            self._save(module, optimizers, step)
        if asked:
            raise Interrupted(f"{self.ctx.stage}: stopped behind step {step} of {self.total}")

    def _steps(self, module: nn.Module, optimizers: Sequence[Any], done: int) -> int:
        label = f"{self.ctx.stage}: training"
        even = getattr(self.objective, "begins_even", True)
        watcher = Watcher(self.checker, begins_even=even)
        if self.stopper and not done:
            with self.ctx.runtime.whole():
                self.stopper.check(0)
        step = done
        with self.ctx.runtime.progress(self.total, label, "step", done) as bar:
            for step, batch in enumerate(self._batches(done), done + 1):
                metrics = self._step(module, optimizers, batch, step - 1)
                self._log(metrics, step)
                watcher.see(metrics, step=step, rows=len(batch))
                bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
                bar.update()
                if step % (self.optim.checkpoint_every or self.total + 1) == 0:
                    name = f"checkpoint-{self.first_step + step}"
                    with self.ctx.runtime.whole():
                        self.out.save_weights(self.ctx.model, name)
                if step % self.optim.eval_every == 0 or step == self.total:
                    self._evaluate(module, step)
                    if self._stops(step):
                        logger.info("%s: stopped early after %d steps", self.ctx.stage, step)
                        break
                self._look_up(module, optimizers, step)
        if self.stopper:
            with self.ctx.runtime.whole():
                self.stopper.restore_best()
        return step

    def _stops(self, step: int) -> bool:
        if self.stopper is None:
            return False
        with self.ctx.runtime.whole():
            return self.stopper.check(step)

    def _batches(self, done: int) -> Iterator[list[int]]:
        """The rows of each step behind those that are done."""
        size, order = self.optim.batch_size, list[int]()
        for step in range(done, self.total):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or not order:
                order = self._order(epoch)
            yield order[place * size : (place + 1) * size]

    def _order(self, epoch: int) -> list[int]:
        seed = stable_hash(self.ctx.seed, self.ctx.stage, "order", self.round, epoch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.objective), generator=generator).tolist()

    def _step(
        self, module: nn.Module, optimizers: Sequence[Any], batch: list[int], step: int
    ) -> dict[str, float]:
        runtime = self.ctx.runtime
        torch.manual_seed(
            stable_hash(self.ctx.seed, self.ctx.stage, "dropout", self.round, step, runtime.rank)
        )
        module.train()
        divisor = sum(map(self.objective.count, batch))
        sums, bad = Sums(), list[int]()
        groups = self.forwards.micro_batches(module, self.objective, batch)
        for i, (rows, counts) in enumerate(groups):
            losses, tokens, metrics = self.forwards.losses(module, self.objective, rows)
            scale = runtime.world / divisor if counts else 0.0
            runtime.backward(module, losses.sum() * scale, sync=i == len(groups) - 1)
            if counts:
                sums.add(losses, tokens, metrics)
                finite = losses.isfinite().tolist() if not math.isfinite(sums.loss) else ()
                bad += [row for row, is_finite in zip(rows, finite, strict=False) if not is_finite]
        rounds = self.kept.rounds
        before = self.round * self.total if rounds > 1 else 0  # as if all rounds were as long
        rate = learning_rate_at(before + step, rounds * self.total, self.optim)
        found = self.forwards.means(sums, divisor)
        for name, value in found.items():
            if not math.isfinite(value):
                self._not_finite(name, value, runtime.gather(bad) or batch, step)
        norm = runtime.clip_gradients(module.parameters(), self.optim.max_grad_norm)
        if not math.isfinite(norm) and runtime.loss_scale <= 1:
            self._not_finite("gradient norm", norm, batch, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        runtime.step(optimizers, norm)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if self.kept.live:
            self.kept.live.follow(runtime.unwrapped(module))
        return {"loss": found.pop("loss"), "grad_norm": norm, "learning_rate": rate, **found}

    def _evaluate(self, module: nn.Module, step: int) -> None:
        if self.valid is not None:
            found = self.forwards.evaluated(module, self.valid)
            self._log({f"eval/{name}": value for name, value in found.items()}, step)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.out.log({"step": self.first_step + step, **metrics})

    def _not_finite(self, what: str, value: float, rows: list[int], step: int) -> None:
        raise not_finite(
            f"stage {self.ctx.stage!r}, step {step + 1} of {self.total}",
            f"the {what} is {value}",
            [self.objective.name(row) for row in rows],
            "The weights are those before this step; what was saved before is in "
            f"{self.out.path}. Try a lower optim.learning_rate, optim.warmup_steps, or a higher "
            "precision; if it happens at step 1, the model's own weights or logits are not finite.",
        )


class Trial(Fit):
    """One loss with its gradient, of the first row; no step."""

    def _steps(self, module: nn.Module, optimizers: Sequence[Any], done: int) -> int:
        self._step(module, [], [0], 0)
        return 0
