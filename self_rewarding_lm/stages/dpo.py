"""DPO on the preference pairs of a dataset (arXiv:2305.18290)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import preference_row, truncated
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.base import read_once
from self_rewarding_lm.stages.lengths import pair_lengths
from self_rewarding_lm.stages.preference import PreferenceConfig
from self_rewarding_lm.stages.work import Counting, Work


class DPOConfig(PreferenceConfig):
    """DPO on given pairs: rows of texts, messages or ids, or `from_stage(...)`.

    Rows: `{"prompt", "chosen", "rejected"}`; or `{"chosen", "rejected"}`, two lists of messages
    that begin alike (rows.preference_row).
    """

    folder_name: ClassVar[str] = "dpo"

    train_dataset: Object
    """Pairs to train on."""
    valid_dataset: Object = None
    """Held-out pairs; their loss is logged every optim.eval_every steps."""

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        self._read_pair(row, where, ctx)

    def shown(
        self, field: str, row: Any, where: str, tokens: Tokens
    ) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
        pair = preference_row(row, where, tokens)
        sides = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
        before = pair.prompt_ids
        return [
            (side, (*before, *ids), [False] * len(before) + [True] * len(ids))
            for side, ids in sides.items()
        ]

    def run(self, ctx: Context, out: StageDir) -> None:
        pairs = self._read_pairs(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        valid = None
        if "valid_dataset" in ctx.rows:
            held_out = self._read_pairs(ctx, ctx.rows["valid_dataset"], f"{ctx.stage}/valid", out)
            valid = self.objective(ctx, out, held_out)
        out.summary["pairs"] = len(pairs)
        out.summary["steps"] = self.fit(ctx, out, self.objective(ctx, out, pairs), valid=valid)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        pairs = self._read_pairs(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        self.try_fit(ctx, out, self.objective(ctx, out, pairs))

    def work(self, counting: Counting) -> Work:
        return self.work_on(self.train_dataset, counting, pair_lengths, answers=2)

    def _read_pairs(
        self, ctx: Context, rows: Rows, name: str, out: StageDir
    ) -> Sequence[PreferencePair]:
        """Read a dataset's rows as pairs, each stored under the id `<name>/<row>`."""

        def make(row: int, record_id: str) -> PreferencePair:
            return replace(self._read_pair(rows.read(row), rows.where(row), ctx), id=record_id)

        return read_once(ctx, out, rows, PreferencePair, name, make, on_bad_row=self.on_bad_row)

    def _read_pair(self, row: Any, where: str, ctx: Context) -> PreferencePair:
        """Read a row as a pair. Raises DataError if it is none or its prompt fills the limit."""
        pair = preference_row(row, where, ctx.tokens)
        ids, limit = (*pair.prompt_ids, *pair.chosen_ids), ctx.limit(self.max_seq_len)
        truncated(ids, len(pair.prompt_ids), limit, where)  # raises if no room for a response
        return pair
