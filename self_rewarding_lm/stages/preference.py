"""Fitting on preference pairs: what every stage that has pairs shares."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

from self_rewarding_lm.checks import Checker, ChecksConfig
from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import PairingError
from self_rewarding_lm.lines import Picked
from self_rewarding_lm.loss_settings import losses_in, read_by
from self_rewarding_lm.objectives import PreferenceObjective
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.reference import StoredReference
from self_rewarding_lm.rows import truncated
from self_rewarding_lm.stages.base import TrainingConfig, see_cut
from self_rewarding_lm.store import StageDir

Ids = tuple[int, ...]


class PreferenceConfig(TrainingConfig):
    """A stage that trains on pairs by DPO, against the weights it started from."""

    dpo_beta: float = Field(default=0.1, gt=0)
    """beta of Eq. 7 of arXiv:2305.18290; 0.1 in arXiv:2401.10020. Given, of every loss."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the winner's length-normalised NLL (alpha of arXiv:2404.19733, there 1)."""
    loss: Object = "dpo"
    """What is minimised: a name of docs/losses.md, a function of a PairBatch,
    LossConfig(name, weight=..., its parameters), in a recipe {name: ..., weight: ...}, or a list
    of these, which are summed."""

    @field_validator("loss")
    @classmethod
    def _loss_known(cls, loss: Any, info: Any) -> Any:
        losses_in(loss, info.data.get("nll_weight", 0.0))
        return loss

    def objective(
        self,
        ctx: Context,
        out: StageDir,
        pairs: Sequence[PreferencePair],
        *,
        beta: float | None = None,
        round: int = 0,
    ) -> PreferenceObjective:
        """Pairs and their log-probs under the present weights, where a loss reads a reference."""
        given = beta or (self.dpo_beta if "dpo_beta" in self.model_fields_set else None)
        losses = [one.with_beta(given) for one in losses_in(self.loss, self.nll_weight)]
        shown, wanted = losses[0].parameters.get("beta", given or self.dpo_beta), read_by(losses)
        cut = cut_pairs(ctx, out, pairs, self.max_seq_len, checks=self.checks)
        if not wanted.reference:
            return PreferenceObjective(cut, None, shown, losses=losses)
        budget = self.optim.micro_batch_tokens
        reference = StoredReference(ctx, out, token_budget=budget, round=round)
        sums = reference.sums(cut)
        tokens = reference.tokens(cut) if wanted.tokens else None
        return PreferenceObjective(cut, sums, shown, losses=losses, reference_tokens=tokens)

    def try_pair(
        self, ctx: Context, out: StageDir, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids
    ) -> None:
        """`try_fit` on one pair; where both responses are the same, another token ends one."""
        if chosen_ids == rejected_ids:
            other = (chosen_ids[-1] + 1) % ctx.model.vocab
            rejected_ids = (*chosen_ids[:-1], other)
        pair = PreferencePair(f"{ctx.stage}/pair", prompt_ids, chosen_ids, rejected_ids)
        self.try_fit(ctx, out, self.objective(ctx, out, [pair]))


def cut_pairs(
    ctx: Context,
    out: StageDir,
    pairs: Sequence[PreferencePair],
    max_seq_len: int | None,
    *,
    checks: ChecksConfig | None = None,
) -> Sequence[PreferencePair]:
    """Pairs with both responses cut alike to the length limit, each cut when it is asked for.

    Those that become equal are left out. Raises PairingError where none is left, and where the
    checks `rows_truncated` (a DataError) and `equal_after_cut` are set to "error".
    """
    limit, cut, kept = ctx.limit(max_seq_len), 0, array("q")

    def cut_pair(pair: PreferencePair) -> PreferencePair:
        return _cut(pair, limit)[0]

    for place, pair in enumerate(pairs):
        short, lost = _cut(pair, limit)
        cut += lost
        if short.chosen_ids != short.rejected_ids:
            kept.append(place)
    out.log({"step": 0, "rows/truncated": cut})
    checker = Checker(checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
    see_cut(checker, cut, 2 * len(pairs), limit)
    if kept:
        checker.see(
            "equal_after_cut",
            1 - len(kept) / len(pairs),
            f"{len(pairs) - len(kept)} of {len(pairs)} pairs left out: chosen and rejected are "
            f"equal once cut to max_seq_len {limit}. Raise it, or make responses differ sooner.",
        )
    else:
        raise PairingError(
            f"{ctx.stage}: no pair is left to train on ({len(pairs)} before cutting to "
            f"max_seq_len {limit})."
        )
    return pairs if len(kept) == len(pairs) and not cut else Picked(pairs, kept, cut_pair)


def _cut(pair: PreferencePair, limit: int | None) -> tuple[PreferencePair, int]:
    """A pair cut to the limit, and how many of its two responses lost their end."""
    prompt, sides, cut = pair.prompt_ids, {}, 0
    for side in ("chosen_ids", "rejected_ids"):
        whole = (*prompt, *getattr(pair, side))
        ids, was_cut = truncated(whole, len(prompt), limit, f"pair {pair.id}")
        sides[side] = ids[len(prompt) :]
        cut += was_cut
    return (replace(pair, **sides) if cut else pair), cut
