"""The one training loop: optimiser steps, evaluation, early stopping, the state it resumes from.

The loss of a step is the sum over its whole batch divided by the batch's count, over all
processes, so that the gradient does not depend on micro-batches or on the number of processes.
`Fit.run` sets a training up, `Fit._train` is the loop, `Fit._step` one optimiser step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from self_rewarding_lm.checks import Checker, ChecksConfig, not_finite
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import Interrupted, StoreError
from self_rewarding_lm.models.fused import cast_once
from self_rewarding_lm.models.inference import modes_kept
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.models.policy import dropout_set, rates_at_work
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.weights import Tensors
from self_rewarding_lm.runtime import (
    MemoryUsedUpError,
    give_back_memory,
    memory_told,
    random_numbers_kept,
)
from self_rewarding_lm.text import amount
from self_rewarding_lm.training.early_stopping import EarlyStopping, Stopper
from self_rewarding_lm.training.forwards import ROWS_AT_ONCE, Forwards, Sums
from self_rewarding_lm.training.memory import MICRO_BATCH
from self_rewarding_lm.training.objectives import Objective
from self_rewarding_lm.training.optimizers import (
    learning_rate_at,
    make_optimizers,
    warn_of_lost_updates,
)
from self_rewarding_lm.training.reference import SMALLER, LiveReference
from self_rewarding_lm.training.state import (
    WEIGHTS,
    RoundState,
    optimizer_state,
    prefixed,
    restore_optimizers,
    unprefixed,
)
from self_rewarding_lm.training.watch import Watcher

logger = logging.getLogger(__name__)


T = TypeVar("T")


class Fit:
    """Trains the policy on an objective. `optim` is complete: none of its fields is None.

    round: a stage may train several times; row order and dropout differ between its rounds, and
    steps are logged from `first_step` on. round_state: what the rounds of one training hand to each
    other; without it each round begins anew. If the stage's folder holds the state of this same
    training, it goes on from there. Raises TrainingError if the loss or a gradient is not finite;
    the weights are then those before that step.
    """

    changes_weights = True

    # Held while `run` runs: the module as it is trained (under FSDP its sharded twin), its
    # optimisers, the forwards of rows through it, and what puts it into training mode.
    module: nn.Module
    optimizers: list[Any]
    forwards: Forwards
    to_training_mode: Callable[[], None]
    rates: dict[str, bool]  # see `rates_at_work`

    def __init__(
        self,
        ctx: Context,
        out: StageDir,
        objective: Objective,
        optim: OptimConfig,
        *,
        num_train_steps: int | None = None,
        dropout: float = 0.0,
        dropout_of_adapters: bool = True,
        valid: Objective | None = None,
        early_stopping: EarlyStopping | None = None,
        round: int = 0,
        first_step: int = 0,
        checks: ChecksConfig | None = None,
        round_state: RoundState | None = None,
    ) -> None:
        self.ctx, self.out, self.objective, self.optim = ctx, out, objective, optim
        self.checker = Checker(checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
        self.dropout, self.dropout_of_adapters = dropout, dropout_of_adapters
        self.valid = valid
        self.round, self.first_step = round, first_step
        self.steps_per_epoch = math.ceil(len(objective) / optim.batch_size)
        self.total = num_train_steps or (optim.epochs or 1) * self.steps_per_epoch
        self.round_state = round_state or RoundState()
        self.stopper = Stopper(ctx, out, early_stopping, first_step) if early_stopping else None
        self.nth = 0  # trainings of this round that began before it in this process
        self.was_watched = False  # a forward, for noise that is no row's own
        self.was_lowered = False  # the number of tokens that go through the model at once

    def run(self) -> int:
        """Train; returns how many steps are done, those before an interruption included."""
        runtime, round_state = self.ctx.runtime, self.round_state
        # 1. if this training was stopped, load the weights it had; forget what was logged later
        self.nth = self.out.count_training(self.round)
        saved = self._load_saved_state()
        done = 0 if saved is None else saved[1]["step"]
        self.out.cut_metrics(self.first_step + done)
        self.ctx.model.refresh()
        self.out.tell("training")
        with ExitStack() as restored:
            # 2. prepare the module: random numbers, modes and dropout are afterwards as before
            restored.enter_context(random_numbers_kept())
            restored.enter_context(modes_kept(self.ctx.policy))
            self.module = restored.enter_context(runtime.training(self.ctx.policy))
            warns = not round_state.optimizer_states  # an earlier round has warned already
            adapters = self.dropout_of_adapters
            self.to_training_mode = restored.enter_context(
                dropout_set(self.module, self.dropout, adapters=adapters, warns=warns)
            )
            self.rates = rates_at_work(self.module)
            restored.enter_context(cast_once(self.module, runtime))
            if self.optim.gradient_checkpointing:
                restored.enter_context(self._policy.token_model.checkpointing())
            # 3. make the optimisers
            self.optimizers = [
                runtime.prepare_optimizer(optimizer)
                for optimizer in make_optimizers(self.module, self.optim, self.ctx.model.vocab)
            ]
            if warns:
                warn_of_lost_updates(self.module, self.optim, self.ctx.stage, checker=self.checker)
            # 4. copy the weights of a moving reference, unless an earlier round did
            moving = getattr(self.objective, "live", None)
            if moving is not None:
                round_state.live = round_state.live or LiveReference(moving)
                round_state.live.begin(self._policy)
            self.forwards = Forwards(self.ctx, self.optim, self.module, round_state.live)
            # 5. go on from the optimisers of the round before, or from the saved state
            round_state.give_to(self.optimizers)
            if saved is not None:
                self._resume(saved)
            # 6. train
            try:
                steps = self._train(done)
                if round_state.rounds > 1:
                    round_state.take_from(self.optimizers)
                self.out.tell("trained")
                return steps
            finally:
                runtime.release(self.optimizers)
                for parameter in self.module.parameters():
                    parameter.grad = None
                del self.module, self.optimizers, self.forwards
                give_back_memory()

    def _train(self, done: int) -> int:
        """The steps after the first `done`; returns how many are done at the end."""
        runtime, step = self.ctx.runtime, done
        begins_even = getattr(self.objective, "begins_even", True)
        watcher = Watcher(self.checker, begins_even=begins_even)
        if self.stopper and not done:
            self._should_stop(0)
        with runtime.progress(self.total, f"{self.ctx.stage}: training", "step", done) as bar:
            for step, rows in enumerate(self._batches(done), done + 1):
                # 1. one optimiser step
                metrics = self._step(rows, step - 1)
                # 2. log it and check it
                self._log(metrics, step)
                self.ctx.told("on_step_end", metrics, self.first_step + step)
                watcher.see(metrics, step=step, rows=len(rows))
                bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
                bar.update()
                # 3. save a checkpoint of the weights
                if step % (self.optim.checkpoint_every or self.total + 1) == 0:
                    with runtime.whole():
                        name = f"checkpoint-{self.first_step + step}"
                        self.out.save_weights(self.ctx.model, name)
                # 4. evaluate; stop early
                if step % self.optim.eval_every == 0 or step == self.total:
                    self._evaluate(step)
                    if self._should_stop(step):
                        early = amount(step, "step")
                        logger.info("%s: stopped early after %s", self.ctx.stage, early)
                        break
                # 5. save the state of training if it is time; end here if a signal asked for it
                self._save_if_due(step)
        # 6. put the best weights back
        if self.stopper:
            with runtime.whole():
                self.stopper.restore_best()
        return step

    def _step(self, rows: list[int], step: int) -> dict[str, float]:
        """One optimiser step on these rows of the objective, and its metrics. step: from 0."""
        runtime, round_state = self.ctx.runtime, self.round_state
        # 1. the gradients of the batch, of all processes
        divisor = sum(map(self.objective.count, rows))  # of the whole batch, over all processes
        sums, bad_rows = self._within_memory(
            "training", self.objective, rows, lambda: self._gradients(rows, step, divisor)
        )
        runtime.sum_gradients(self.module)

        # 2. means over all processes; what is not finite stops here, before the weights change
        means = self.forwards.means(sums, divisor)
        for name, value in means.items():
            if not math.isfinite(value):
                self._check_reference(step)
                self._raise_not_finite(name, value, runtime.gather(bad_rows) or rows, step)

        # 3. clip the gradient, set the learning rate, take the optimiser step
        norm = runtime.clip_gradients(self.module.parameters(), self.optim.max_grad_norm)
        if not math.isfinite(norm) and runtime.loss_scale <= 1:
            self._raise_not_finite("gradient norm", norm, rows, step)
        # one schedule over all rounds, as if they were equally long
        steps_before = self.round * self.total if round_state.rounds > 1 else 0
        rate = learning_rate_at(steps_before + step, round_state.rounds * self.total, self.optim)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with memory_told("taking an optimiser's step", SMALLER.format(self.forwards.token_budget)):
            runtime.step(self.optimizers if self.changes_weights else [], norm)
        self.module.zero_grad()

        # 4. a moving reference follows the weights
        if round_state.live:
            round_state.live.follow(self._policy)
        return {"loss": means.pop("loss"), "grad_norm": norm, "learning_rate": rate, **means}

    def _gradients(self, rows: list[int], step: int, divisor: int) -> tuple[Sums, list[int]]:
        """Add up the gradients of this process's rows; their sums, and rows that are not finite."""
        runtime = self.ctx.runtime
        # 1. dropout's noise, this process's rows in micro-batches, what a moving reference says
        noise = self._noise(step)
        self.to_training_mode()
        micro_batches = self.forwards.micro_batches(self.objective, rows)
        self.forwards.ask_reference(self.objective, micro_batches)

        # 2. forward and backward by micro-batches, whose gradients add up
        sums, bad_rows = Sums(), list[int]()
        for i, (micro_rows, counts) in enumerate(micro_batches):
            with noise or nullcontext():
                is_watched = noise is not None and not self.was_watched
                with noise.watching(runtime.device) if is_watched else nullcontext():  # type: ignore[union-attr]
                    result = self.forwards.losses(self.objective, micro_rows, noise)
                self.was_watched = True
                scale = 1 / divisor if counts else 0.0
                runtime.backward(result.losses.sum() * scale, is_last=i == len(micro_batches) - 1)
            if counts:
                sums.add(result)
            if counts and not math.isfinite(sums.loss):
                finite = result.losses.isfinite().tolist()
                bad_rows += [row for row, ok in zip(micro_rows, finite, strict=False) if not ok]
        return sums, bad_rows

    def _within_memory(
        self, what: str, objective: Objective, rows: list[int], work: Callable[[], T]
    ) -> T:
        """What `work` gives, which puts an objective's rows through the model.

        If memory is used up, one process alone tries again with half of the tokens at once. Of
        several, all raise MemoryUsedUpError together; under FSDP, whose forwards are collectives,
        the one whose memory it is raises it, and its launcher ends the others.
        """
        runtime = self.ctx.runtime
        while True:
            failure, result = "", None
            try:
                with memory_told(what, SMALLER.format(self.forwards.token_budget)):
                    result = work()
            except MemoryUsedUpError as error:
                failure = str(error)
                if runtime.shards:
                    raise
            (has_failed,) = runtime.any(bool(failure))
            if not has_failed:
                return result  # type: ignore[return-value]
            failures = runtime.gather([f"process {runtime.rank}: {failure}"] if failure else [])
            self.module.zero_grad()
            give_back_memory(after_error=True)
            if runtime.world > 1 or not self.forwards.lower_budget(objective, rows):
                raise MemoryUsedUpError(failure if runtime.world == 1 else failures[0])
            self._tell_lower(failure)

    def _tell_lower(self, failure: str) -> None:
        """Say once that micro-batches are smaller from now on; a stage that goes on keeps it."""
        self.out.tell(MICRO_BATCH, tokens=self.forwards.token_budget)
        if not self.was_lowered:
            self.was_lowered = True
            words = failure.partition(". Lower ")[0]
            logger.warning("%s: %s. Tried again with half of the tokens.", self.ctx.stage, words)

    def _noise(self, step: int) -> RowNoise | None:
        """The noise of a step's dropout, and the global random state for all other noise.

        None in runs of version 0.1.0, whose dropout is drawn from that state, too.
        """
        place = (self.ctx.seed, self.ctx.stage, "dropout", self.round, step)
        if self.ctx.format == 1:
            torch.manual_seed(stable_hash(*place, self.ctx.runtime.rank))
            return None
        torch.manual_seed(stable_hash(*place))
        drops = bool(self.rates)
        for name in (name for name, of_units in self.rates.items() if not of_units):
            self._tell_unseeded(f"{name} leaves out more than units")
        return RowNoise(stable_hash(*place, "rows"), self._tell_unseeded, drops)

    def _tell_unseeded(self, what: str) -> None:
        """Say once a stage what in a forward cannot be seeded by row."""
        if self.round_state.unseeded or not self.ctx.runtime.is_main:
            return
        self.round_state.unseeded = True
        logger.warning(
            "%s: %s in training, and these cannot be drawn for each row by itself: they depend on "
            "the micro-batches and processes in which rows go through the model.",
            self.ctx.stage,
            what,
        )

    @property
    def _policy(self) -> Any:
        """The trained module without its wrappers for several processes."""
        return self.ctx.runtime.unwrapped(self.module)

    def _batches(self, done: int) -> Iterator[list[int]]:
        """The rows of each step after the first `done`, in an order shuffled anew each epoch."""
        size, order = self.optim.batch_size, list[int]()
        for step in range(done, self.total):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if batch == 0 or not order:
                order = self._shuffled_rows(epoch)
            yield order[batch * size : (batch + 1) * size]

    def _shuffled_rows(self, epoch: int) -> list[int]:
        seed = stable_hash(self.ctx.seed, self.ctx.stage, "order", self.round, epoch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.objective), generator=generator).tolist()

    def _evaluate(self, step: int) -> None:
        if self.valid is None:
            return
        valid, sums = self.valid, Sums()
        for start in range(0, len(valid), ROWS_AT_ONCE):
            rows = list(range(start, min(start + ROWS_AT_ONCE, len(valid))))
            evaluate = partial(self.forwards.evaluate, valid, rows)
            sums.join(self._within_memory("evaluating", valid, rows, evaluate))
        metrics = self.forwards.means(sums, sum(map(valid.count, range(len(valid)))))
        of_rows = {k: v for k, v in metrics.items() if k not in ("num_tokens", "padding_share")}
        self._log({f"eval/{name}": value for name, value in of_rows.items()}, step)

    def _should_stop(self, step: int) -> bool:
        """Whether early stopping ends training here; it keeps the weights if they are the best."""
        if self.stopper is None:
            return False
        with self.ctx.runtime.whole():
            return self.stopper.check(step)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.out.log({"step": self.first_step + step, **metrics}, again=False)

    def _check_reference(self, step: int) -> None:
        """Raise TrainingError if it is a moving reference that gave no finite numbers."""
        doubtful = self.forwards.doubtful_references(self.objective)
        if doubtful:
            raise not_finite(
                f"stage {self.ctx.stage!r}, step {step + 1} of {self.total}",
                "log-probs of the moving reference are not finite",
                doubtful,
                "The policy's own may be right. Start again: the stage goes on from its last "
                f"state in {self.out.path}. If it happens again, the reference's weights are not "
                "finite, or too large for their type.",
            )

    def _raise_not_finite(self, what: str, value: float, rows: list[int], step: int) -> NoReturn:
        raise not_finite(
            f"stage {self.ctx.stage!r}, step {step + 1} of {self.total}",
            f"the {what} is {value}",
            [self.objective.name(row) for row in rows],
            "The weights are those before this step; what was saved before is in "
            f"{self.out.path}. Try a lower optim.learning_rate, optim.warmup_steps, or a higher "
            "precision; if it happens at step 1, the model's own weights or logits are not finite.",
        )

    # The state of training on disk: saved between two steps, read when a stage is begun again.

    def _save_if_due(self, step: int) -> None:
        """Save the state if it is time for it or a signal came; then, Interrupted is raised."""
        runtime, optim = self.ctx.runtime, self.optim
        seconds = time.monotonic() - self.round_state.saved_at
        is_late = seconds > 60 * (optim.save_state_minutes or math.inf)
        asked, is_late = runtime.any(bool(runtime.stopping.asked), runtime.is_main and is_late)
        if asked or is_late or step % (optim.save_state_every or self.total + 1) == 0:
            self._save_state(step)
        if asked:
            raise Interrupted(f"{self.ctx.stage}: stopped after step {step} of {self.total}")

    def _save_state(self, step: int) -> None:
        """Write weights, optimisers, a moving reference and early stopping after `step` steps."""
        runtime, live = self.ctx.runtime, self.round_state.live
        self.round_state.saved_at = time.monotonic()
        with runtime.whole():
            optimizers = optimizer_state(self._policy, self.optimizers, keep=runtime.is_main)
            weights = self.ctx.model.state() if runtime.is_main else {}
            reference = live.state(keep=runtime.is_main) if live else {}
            if optimizers is not None:
                tensors, words = optimizers
                self.out.save_state(
                    {**prefixed(WEIGHTS, weights), **tensors, **reference},
                    {
                        **self._identity(),
                        "step": step,
                        "optimizers": words,
                        "scaling": runtime.scaling(),
                        "reference_steps": live.steps if live else None,
                        "early_stopping": self.stopper.standing() if self.stopper else None,
                    },
                )
        if optimizers is None:
            logger.warning(
                "%s: the optimiser's state has more than tensors and numbers, so the state of "
                "training is not saved, and a stopped stage trains again from its start.",
                self.ctx.stage,
            )

    def _load_saved_state(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Load the weights of this training if it was stopped; returns its state, or None."""
        words = self.out.state_words()
        if words is None:
            return None
        if any(words.get(name) != value for name, value in self._identity().items()):
            if self.round_state.rounds > 1 and words["round"] >= self.round:
                raise StoreError(
                    f"{self.ctx.stage}: the state of training is of other pairs than those on disk "
                    f"in {self.out.path}. Delete state.safetensors to train the stage again from "
                    "its start."
                )
            return None
        tensors, words = self.out.state()
        self.ctx.model.module.load_state_dict(unprefixed(WEIGHTS, tensors), strict=False)
        return tensors, words

    def _resume(self, saved: tuple[Tensors, dict[str, Any]]) -> None:
        """Bring optimisers, a moving reference and early stopping to where training was stopped."""
        tensors, words = saved
        restore_optimizers(self._policy, self.optimizers, tensors, words["optimizers"])
        self.ctx.runtime.scale_as(words["scaling"])
        if self.round_state.live:
            self.round_state.live.restore(tensors, words["reference_steps"])
        if self.stopper:
            self.stopper.resume(words["early_stopping"])
        logger.info("%s: resumes after step %d of %d", self.ctx.stage, words["step"], self.total)

    def _identity(self) -> dict[str, int]:
        """What tells this training from the others of its stage."""
        place = {"round": self.round, "first_step": self.first_step, "total": self.total}
        return {**place, "nth": self.nth}


class Trial(Fit):
    """The loss and the gradient of the first row, to see that both can be computed.

    No weight changes.
    """

    changes_weights = False

    def _train(self, done: int) -> int:
        self._step([0], 0)
        return 0
