"""DPO on pairs that are there already (arXiv:2305.18290)."""

from dataclasses import replace
from typing import Any, ClassVar

from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import Rows, preference_row, truncated
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.stages.base import PreferenceConfig, read_once
from self_rewarding_lm.store import StageDir


class DPOConfig(PreferenceConfig):
    """Pairs from a dataset: `{"prompt", "chosen", "rejected"}` rows, or `from_stage(...)`."""

    folder_name: ClassVar[str] = "dpo"

    train_dataset: Object
    valid_dataset: Object = None

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        pair = preference_row(row, where, ctx.tokens)
        ids, limit = (*pair.prompt_ids, *pair.chosen_ids), ctx.limit(self.max_seq_len)
        truncated(ids, len(pair.prompt_ids), limit, where)

    def run(self, ctx: Context, out: StageDir) -> None:
        pairs = self._pairs(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        valid = None
        if "valid_dataset" in ctx.rows:
            held_out = self._pairs(ctx, ctx.rows["valid_dataset"], f"{ctx.stage}/valid", out)
            valid = self.objective(ctx, out, held_out)
        out.summary["pairs"] = len(pairs)
        out.summary["steps"] = self.fit(ctx, out, self.objective(ctx, out, pairs), valid=valid)

    def _pairs(self, ctx: Context, rows: Rows, name: str, out: StageDir) -> list[PreferencePair]:
        def make(row: int, record_id: str) -> PreferencePair:
            pair = preference_row(rows.read(row), rows.where(row), ctx.tokens)
            return replace(pair, id=record_id)

        return read_once(ctx, out, rows, PreferencePair, name, make)
