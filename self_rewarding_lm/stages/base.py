"""What stages share: how long they train, rows that are read once, and their checks."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from self_rewarding_lm.checks import Checker, ChecksConfig
from self_rewarding_lm.config import FinetuneConfig, Object, OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import BadRows, OnBadRow, Rows
from self_rewarding_lm.data.rows import PromptRow, prompt_of, training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, SelfRewardingError, TokenizerError
from self_rewarding_lm.records import Candidate, Record
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Stored
from self_rewarding_lm.stages.lengths import Measure
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range
from self_rewarding_lm.stages.work import (
    Counting,
    RowShape,
    Training,
    Work,
    unknown_work,
)
from self_rewarding_lm.text import amount
from self_rewarding_lm.training.early_stopping import EarlyStopping, StageEvaluation
from self_rewarding_lm.training.fit import Fit, Trial
from self_rewarding_lm.training.memory import micro_batch_tokens
from self_rewarding_lm.training.objectives import Objective
from self_rewarding_lm.training.optimizers import check_optimizer
from self_rewarding_lm.training.state import RoundState

logger = logging.getLogger(__name__)


class TrainingConfig(FinetuneConfig):
    """A stage that trains weights.

    It trains for `num_train_steps` or `optim.epochs`, not both; early stopping may end it sooner.
    """

    default_learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-7)
    default_epochs: ClassVar[int] = 1

    max_seq_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and response together; longer rows are cut at the end. Default: the model's
    limit."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in training (the paper's 0.1); sampling, judging and the reference have none. 0 also
    switches off router jitter and layer drop. An adapter keeps its own rate (lora_dropout) unless
    it is given here."""
    num_train_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the stage, in place of optim.epochs."""
    early_stopper_eval_module: Object = None
    """A module or function of the model -> one number, called every optim.eval_every steps; or
    HeldOutReward, WinRateOverLast, VerifierAccuracy (docs/evaluation.md)."""
    early_stopper_mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower number is better."""
    early_stopper_patience: int = Field(default=1, ge=1)
    """Checks without a better number before training stops."""
    optim: OptimConfig = OptimConfig()
    """How the stage trains."""
    on_bad_row: OnBadRow = "raise"
    """A row that cannot be used: "raise", an error that names it; "skip", it is left out and
    counted."""
    checks: ChecksConfig = ChecksConfig()
    """Limits for numbers that go wrong, and what happens beyond them."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if self.num_train_steps is not None and self.optim.epochs is not None:
            raise ValueError(
                "num_train_steps and optim.epochs both say how long to train; give one of them"
            )
        return self

    def check(self, ctx: Context) -> None:
        module = self.early_stopper_eval_module
        if isinstance(module, StageEvaluation):
            module.check(ctx)
        elif module is not None and not callable(module):
            raise ConfigError(
                f"{ctx.stage}: early_stopper_eval_module must be a module or function of the "
                f"model; got {type(module).__name__}."
            )
        scaled = ctx.runtime.loss_scale > 0
        check_optimizer(ctx.model.module, self.optim, scaled=scaled, sharded=ctx.runtime.shards)
        if self.optim.gradient_checkpointing:
            with ctx.model.checkpointing():  # raises where the model cannot
                pass
        if not any(p.requires_grad for p in ctx.model.module.parameters()):
            raise ConfigError(
                f"{ctx.stage}: no weight of the model requires a gradient, so nothing can be "
                "trained. Call requires_grad_(True) on the weights to train."
            )
        for rows in ctx.rows.values():
            check_rows(rows, self.on_bad_row, lambda row, where: self.check_row(row, where, ctx))

    def check_row(self, row: Any, where: str, ctx: Context) -> PromptRow | None:
        """Raise DataError or TokenizerError if the stage could not use a row.

        Returns the prompt that it made of it, if it makes one.
        """

    def shown(
        self, field: str, row: Any, where: str, tokens: Tokens
    ) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
        if field == "prompt_dataset":
            ids = prompt_of(row, where, tokens).ids
            return [("a prompt", ids, [False] * len(ids))]
        return [("a row", *training_row(row, where, tokens))]

    def planned_steps(self, rows: int) -> int:
        """Optimiser steps on so many rows, unless early stopping ends them."""
        epochs = self.optim.epochs or self.default_epochs
        return self.num_train_steps or epochs * math.ceil(rows / self.optim.batch_size)

    def fit(
        self,
        ctx: Context,
        out: StageDir,
        objective: Objective,
        *,
        valid: Objective | None = None,
        round: int = 0,
        first_step: int = 0,
        kept: RoundState | None = None,
    ) -> int:
        """Train on an objective with the stage's settings. Returns the steps that were done."""
        tokens = self.micro_batch_tokens(ctx, out, objective)
        stopping = None
        if self.early_stopper_eval_module is not None:
            stopping = EarlyStopping(
                self.early_stopper_eval_module, self.early_stopper_mode, self.early_stopper_patience
            )
        training = Fit(
            ctx,
            out,
            objective,
            self.completed_optim.model_copy(update={"micro_batch_tokens": tokens}),
            num_train_steps=self.planned_steps(len(objective)),
            dropout=self.dropout,
            dropout_of_adapters=self.sets_adapters,
            valid=valid,
            early_stopping=stopping,
            round=round,
            first_step=first_step,
            checks=self.checks,
            round_state=kept,
        )
        rows, steps = amount(len(objective), "row"), amount(training.total, "step")
        logger.info("%s: %s, %s", ctx.stage, rows, steps)
        if (pairs := getattr(objective, "pairs", None)) is not None:
            ctx.told("on_pairs", pairs)
        return training.run()

    def see_result(self, ctx: Context, out: StageDir) -> None:
        """The check `few_steps`, of all that the stage did."""
        steps = out.summary.get("steps")
        if steps is not None:
            Checker(self.checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell).see(
                "few_steps",
                steps,
                f"the stage took {steps} optimiser step{'s' if steps != 1 else ''}, which hardly "
                f"change{'s' if steps == 1 else ''} the model: nothing can be concluded from it. "
                "More rows, pairs or epochs (optim.epochs) and a smaller optim.batch_size give "
                "more steps.",
            )

    def try_fit(self, ctx: Context, out: StageDir, objective: Objective) -> None:
        """Compute the loss of an objective's first row and its gradient, and take no step."""
        optim = self.completed_optim
        Trial(ctx, out, objective, optim, num_train_steps=1, dropout=self.dropout).run()

    @property
    def completed_optim(self) -> OptimConfig:
        """`optim` with the stage's defaults."""
        return self.optim.completed(*self.default_learning_rates, self.default_epochs)

    def micro_batch_tokens(self, ctx: Context, out: StageDir, objective: Objective) -> int:
        """How many tokens of an objective go through the model at once in this stage."""
        settings = {"dropout": self.dropout, "adapters": self.sets_adapters}
        return micro_batch_tokens(ctx, out, objective, self.optim, **settings)

    @property
    def sets_adapters(self) -> bool:
        """Whether `dropout` is the rate of adapters too."""
        return "dropout" in self.model_fields_set

    def work(self, counting: Counting) -> Work:
        row = RowShape().capped(counting.limit(self.max_seq_len))
        return Work(training=self.planned_training(UNKNOWN, row), notes=(unknown_work(self),))

    def work_on(self, dataset: Any, counting: Counting, measure: Measure, answers: int) -> Work:
        """The work of a stage that trains on a dataset. answers: how many each row has."""
        data = counting.data(dataset, measure)
        row = counting.row(dataset, data, answers).capped(counting.limit(self.max_seq_len))
        return Work(training=self.planned_training(data.rows, row), made=data.rows)

    def planned_training(self, rows: Range, row: RowShape) -> Training:
        """Training on so many rows of one shape."""
        batch = self.optim.batch_size
        if self.num_train_steps is not None:
            steps = Range.of(self.num_train_steps)
            trained = NOTHING if rows.most == 0 else steps.times(batch)
        else:
            most = None if rows.most is None else self.planned_steps(rows.most)
            steps = Range(self.planned_steps(rows.least), most)
            trained = rows.times(self.optim.epochs or self.default_epochs)
        if self.early_stopper_eval_module is not None:
            first_check = min(self.optim.eval_every, steps.least)
            steps = Range(first_check, steps.most)
            trained = Range(min(first_check * batch, trained.least), trained.most)
        return Training(rows, row, steps, trained.times(row.tokens))

    def reference_tokens(self, training: Training) -> Range:
        """Tokens of forwards without a gradient, whose log-probs the loss reads."""
        return NOTHING

    def own_weights(self) -> int:
        """Folders of weights that the stage keeps for itself until it is done."""
        return 0


def check_rows(
    rows: Rows, on_bad_row: OnBadRow, check: Callable[[Any, str], PromptRow | None]
) -> None:
    """Check all rows that can be looked at before the run. check: takes a row and its place.

    A prompt that it returns is kept for whoever reads the row. Raises DataError or TokenizerError
    for a bad row (with "skip": if all are bad), and DataError with the row's place if the dataset
    or the tokenizer itself raises something else.
    """
    bad = BadRows(on_bad_row)
    for place in rows.preview():
        where = rows.where(place)
        try:
            with bad.tolerated(where):
                prompt = check(rows.peek(place), where)
                if prompt is not None:
                    rows.keep_prompt(place, prompt)
        except SelfRewardingError:
            raise
        except Exception as error:
            raise DataError(
                f"{where}: {type(error).__name__}: {error}. The dataset or the tokenizer raised "
                "this for the row."
            ) from error
    if bad.count:
        bad.report(rows.name, len(rows), warn=False)


def read_once(
    ctx: Context,
    out: StageDir,
    rows: Rows,
    record_type: type[Record],
    name: str,
    make: Callable[[int, str], Record],
    *,
    on_bad_row: OnBadRow = "raise",
    check: Callable[[], None] | None = None,
) -> Stored[Record]:
    """A dataset's rows as records `<name>/<row>`: from disk, or read, stored and used.

    make: (row, record id) -> record. With on_bad_row="skip" the rows are on disk in full once the
    records of all processes were merged, however many were left out; those are logged as
    `rows/skipped`. check: called on the main process when all rows were made; if it raises, no row
    is stored. Raises DataError on every process if the dataset is empty.
    """

    def is_ours(record_id: str) -> bool:
        return record_id.startswith(f"{name}/") and record_id.count("/") == name.count("/") + 1

    if len(rows) == 0:
        raise DataError(f"{rows.name} is empty; it needs at least one row.")
    skips = on_bad_row == "skip"
    is_merged = skips and any(map(is_ours, out.merged_ids(record_type)))
    found = out.known(record_type, is_ours)
    if len(found) < len(rows) and not is_merged:
        failure = None
        if ctx.runtime.is_main:
            try:
                out.append(_made(rows, name, make, on_bad_row, check))
            except (DataError, TokenizerError) as error:
                failure = error
        failure = ctx.runtime.from_main(failure)
        if failure is not None:
            raise failure
    out.merge(record_type)
    if skips:
        out.log({"step": 0, "rows/skipped": len(rows) - len(found)})
    return found


def _made(
    rows: Rows,
    name: str,
    make: Callable[[int, str], Record],
    on_bad_row: OnBadRow,
    check: Callable[[], None] | None,
) -> Iterator[Record]:
    """Records of all rows that can be used."""
    bad = BadRows(on_bad_row)
    for row in range(len(rows)):
        made = None
        with bad.tolerated(rows.where(row)):
            made = make(row, f"{name}/{row}")
        if made is not None:
            yield made
    bad.report(rows.name, len(rows))
    if check is not None:
        check()


def report_unanswered(ctx: Context, out: StageDir, candidates: Iterable[Candidate]) -> None:
    """Log how many candidates no server answered, by reason, and warn of them."""
    missing = Counter(c.reason for c in candidates if c.reason is not None)
    if missing:
        out.log({"step": 0, **{f"pairs/dropped_{k}": n for k, n in sorted(missing.items())}})
        found = ", ".join(f"{n} {reason}" for reason, n in missing.most_common())
        logger.warning("%s: rows without a response from the server: %s", ctx.stage, found)


def see_cut(checker: Checker, cut: int, sequences: int, limit: int | None) -> None:
    """Check `rows_truncated`: sequences that lost their end."""
    checker.see(
        "rows_truncated",
        cut / max(1, sequences),
        f"{cut} of {amount(sequences, 'sequence')} cut at {limit} tokens (max_seq_len): without "
        "their end token the model does not learn to end. Raise max_seq_len, or leave long rows "
        "out.",
    )


def stage_names(stages: Sequence[FinetuneConfig]) -> list[str]:
    """The stages' names: `name=`, or the kind; -2, -3 are added if a kind comes again."""
    seen: Counter[str] = Counter()
    names = []
    for stage in stages:
        kind = stage.name or type(stage).folder_name
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}-{seen[kind]}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"two stages are named {twice[0]!r}; give them different names.")
    return names
