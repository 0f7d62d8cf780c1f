"""Supervised fine-tuning: M0 -> M1 of arXiv:2401.10020, section 2.1."""

from collections.abc import Sequence
from typing import Any, ClassVar

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import training_row, truncated
from self_rewarding_lm.records import TrainingRow
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.base import TrainingConfig, read_once, see_cut
from self_rewarding_lm.stages.lengths import training_row_lengths
from self_rewarding_lm.stages.work import Counting, Work
from self_rewarding_lm.training.objectives import SupervisedObjective


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on prompts and responses; only the responses are learnt.

    Rows: `(ids, prompt_len)`, `(ids, prompt_mask)`, `{"prompt", "completion"}`, `{"messages"}`,
    `{"conversations"}`, `{"instruction", "input", "output"}`, `{"question", "choices", "answer"}`
    or `{"text"}` (rows.training_row); or `from_stage(...)`.
    Defaults: learning rate 5.5e-6 -> 1.1e-6, batch 16 (arXiv:2401.10020, 3.1.3); 3 epochs (ours).
    """

    folder_name: ClassVar[str] = "sft"
    default_learning_rates: ClassVar[tuple[float, float]] = (5.5e-6, 1.1e-6)
    default_epochs: ClassVar[int] = 3

    train_dataset: Object
    """Rows to train on."""
    valid_dataset: Object = None
    """Held-out rows; their loss is logged every optim.eval_every steps."""

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        ids, targets = training_row(row, where, ctx.tokens)
        truncated(ids, targets.index(True), ctx.limit(self.max_seq_len), where)

    def run(self, ctx: Context, out: StageDir) -> None:
        rows = self.training_rows(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        valid = None
        if "valid_dataset" in ctx.rows:
            held_out = self.training_rows(ctx, ctx.rows["valid_dataset"], f"{ctx.stage}/valid", out)
            valid = SupervisedObjective(held_out)
        out.summary["rows"] = len(rows)
        out.summary["steps"] = self.fit(ctx, out, SupervisedObjective(rows), valid=valid)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        rows = self.training_rows(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        self.try_fit(ctx, out, SupervisedObjective(rows))

    def work(self, counting: Counting) -> Work:
        return self.work_on(self.train_dataset, counting, training_row_lengths, answers=1)

    def training_rows(
        self, ctx: Context, rows: Rows, name: str, out: StageDir
    ) -> Sequence[TrainingRow]:
        """Read a dataset's rows as training rows, each stored under the id `<name>/<row>`.

        Rows longer than the limit are cut; how many are is logged.
        """
        limit, cuts = ctx.limit(self.max_seq_len), 0

        def make(row: int, record_id: str) -> TrainingRow:
            nonlocal cuts
            where = rows.where(row)
            ids, targets = training_row(rows.read(row), where, ctx.tokens)
            ids, was_cut = truncated(ids, targets.index(True), limit, where)
            cuts += was_cut
            return TrainingRow(record_id, ids, targets[: len(ids)])

        checker = Checker(self.checks, ctx.stage, tell=out.tell)
        training_rows = read_once(
            ctx,
            out,
            rows,
            TrainingRow,
            name,
            make,
            on_bad_row=self.on_bad_row,
            check=lambda: see_cut(checker, cuts, len(rows), limit),
        )
        out.log({"step": 0, "rows/truncated": cuts})
        return training_rows
