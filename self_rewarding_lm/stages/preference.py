"""Fitting on preference pairs: what every stage that has pairs shares."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from self_rewarding_lm.checks import Checker, ChecksConfig
from self_rewarding_lm.config import Object
from self_rewarding_lm.context import START, Context
from self_rewarding_lm.data.rows import truncated
from self_rewarding_lm.errors import ConfigError, NoPairError
from self_rewarding_lm.records import Ids, PreferencePair, ReferenceLogprobs
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.base import TrainingConfig, see_cut
from self_rewarding_lm.stages.ranges import NOTHING, Range
from self_rewarding_lm.stages.work import Training
from self_rewarding_lm.text import amount
from self_rewarding_lm.training.loss_config import losses_in, read_by
from self_rewarding_lm.training.objectives import PreferenceObjective
from self_rewarding_lm.training.reference import (
    EMAReference,
    MixedReference,
    MovingReference,
    PairSums,
    StoredReference,
)

NO_REFERENCE, OF_ROUND = "none", "round"


OWN = (START, OF_ROUND, NO_REFERENCE)
"""References that name no other weights."""


class PreferenceConfig(TrainingConfig):
    """A stage that trains on pairs by DPO, by default against the weights it started from."""

    dpo_beta: float | tuple[float, ...] = 0.1
    """beta of Eq. 7 of arXiv:2305.18290; 0.1 in arXiv:2401.10020. If given, it is that of every
    loss. Several: one for each round; the last holds for all later rounds."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the winner's length-normalised NLL (alpha of arXiv:2404.19733, there 1)."""
    loss: Object = "dpo"
    """What is minimised: a name of docs/losses.md, a function of a PairBatch,
    LossConfig(name, weight=..., its parameters), in a recipe {name: ..., weight: ...}, or a list
    of these, which are summed."""
    reference: Object = START
    """Weights with which the policy is compared (docs/references.md): "start", those the stage
    starts from; "round", those a round starts from; "initial", an earlier stage's name or a path;
    "none", whose log-probs count as 0; or weights that follow the policy, EMAReference(decay=0.99)
    or MixedReference(alpha=0.6, every=512), in a recipe {decay: 0.99} or {alpha: 0.6, every:
    512}."""

    @field_validator("loss")
    @classmethod
    def _loss_known(cls, loss: Any, info: Any) -> Any:
        losses_in(loss, info.data.get("nll_weight", 0.0))
        return loss

    @field_validator("reference")
    @classmethod
    def _reference_known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            given = (MixedReference if "alpha" in given else EMAReference)(**given)
        if not isinstance(given, str | Path | MovingReference):
            raise ConfigError(
                "reference must be 'start', 'round', 'initial', 'none', the name of an earlier "
                "stage, a path, EMAReference(...) or MixedReference(...); got "
                f"{type(given).__name__} {given!r:.100}"
            )
        return str(given) if isinstance(given, Path) else given

    @model_validator(mode="after")
    def _reference_read(self) -> "PreferenceConfig":
        losses = losses_in(self.loss, self.nll_weight)
        if self.reference not in (START, NO_REFERENCE) and not read_by(losses).reference:
            names = ", ".join(repr(one.label) for one in losses)
            raise ValueError(f"no loss here reads a reference ({names}); leave reference out")
        return self

    @model_validator(mode="after")
    def _betas_of_rounds(self) -> "PreferenceConfig":
        betas = self.dpo_beta if isinstance(self.dpo_beta, tuple) else (self.dpo_beta,)
        rounds = getattr(self, "rounds", 1)
        if not betas or not all(beta > 0 for beta in betas):
            raise ValueError(f"dpo_beta must be greater than 0; got {self.dpo_beta}")
        if len(betas) > rounds:
            raise ValueError(
                f"dpo_beta has {len(betas)} values, one a round, and the stage has {rounds}. Give "
                f"one value, or rounds={len(betas)} if the stage makes its pairs itself; of "
                "several stages in a row each has a dpo_beta of its own"
            )
        return self

    def weights_used(self) -> set[str]:
        named = isinstance(self.reference, str) and self.reference not in OWN
        return super().weights_used() | ({self.reference} if named else set())

    def objective(
        self,
        ctx: Context,
        out: StageDir,
        pairs: Sequence[PreferencePair],
        *,
        beta: float | None = None,
        round: int = 0,
    ) -> PreferenceObjective:
        """Pairs, with their log-probs under the reference if a loss reads one."""
        own = of_round(self.dpo_beta, round)
        given = beta or (own if "dpo_beta" in self.model_fields_set else None)
        losses = [one.with_beta(given) for one in losses_in(self.loss, self.nll_weight)]
        shown, wanted = losses[0].parameters.get("beta", given or own), read_by(losses)
        cut = cut_pairs(ctx, out, pairs, self.max_seq_len, checks=self.checks)
        found = PreferenceObjective(cut, None, shown, losses=losses)
        if not wanted.reference:
            return found
        if isinstance(self.reference, MovingReference):
            heard: dict[int, ReferenceLogprobs] | None = {} if wanted.tokens else None
            moving = replace(found, live=self.reference, begins_even=round == 0)
            return replace(moving, reference={}, reference_tokens=heard)
        if self.reference == NO_REFERENCE:
            sums, tokens = Picked(cut, change=_no_sums), Picked(cut, change=_no_tokens)
            even = False
        else:
            budget = self.micro_batch_tokens(ctx, out, found)
            which = self._reference_weights(ctx)
            asked = StoredReference(ctx, out, token_budget=budget, round=round, weights=which)
            sums, tokens = asked.sums(cut), asked.tokens(cut) if wanted.tokens else None
            even = which is None or (which == START and round == 0)
        tokens = tokens if wanted.tokens else None
        return replace(found, reference=sums, reference_tokens=tokens, begins_even=even)

    def _reference_weights(self, ctx: Context) -> str | None:
        """The weights of the reference as `ctx.weights` names them; None: the present ones."""
        present = (OF_ROUND,) if ctx.start is not None else (START, OF_ROUND)
        return None if ctx.run is None or self.reference in present else self.reference

    def reference_from_start(self) -> bool:
        """Whether the reference is the weights that the stage starts from."""
        return self.reference == START and read_by(losses_in(self.loss)).reference

    def reference_tokens(self, training: Training) -> Range:
        reads = self.reference != NO_REFERENCE and read_by(losses_in(self.loss)).reference
        if not training.pairs or not reads:
            return NOTHING
        moves = isinstance(self.reference, MovingReference)
        return training.tokens if moves else training.rows.times(training.row.tokens)

    def try_pair(
        self, ctx: Context, out: StageDir, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids
    ) -> None:
        """`try_fit` on one pair; if both responses are equal, one gets another last token."""
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

    Pairs whose responses become equal are left out. Raises NoPairError if no pair is left, and the
    errors of the checks `rows_truncated` and `equal_after_cut` if they are set to "error".
    """
    limit, cut, kept = ctx.limit(max_seq_len), 0, array("q")

    def cut_pair(pair: PreferencePair) -> PreferencePair:
        return _cut(pair, limit)[0]

    for place, pair in enumerate(pairs):
        short, lost = _cut(pair, limit)
        cut += lost
        if short.chosen_ids != short.rejected_ids:
            kept.append(place)
    out.log({"step": ctx.round.first_step, "rows/truncated": cut})
    checker = Checker(checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
    see_cut(checker, cut, 2 * len(pairs), limit)
    if kept:
        checker.see(
            "equal_after_cut",
            1 - len(kept) / len(pairs),
            f"{len(pairs) - len(kept)} of {amount(len(pairs), 'pair')} left out: chosen and "
            f"rejected are equal once cut to max_seq_len {limit}. Raise it, or make responses "
            "differ sooner.",
        )
    else:
        raise NoPairError(
            f"{ctx.stage}: no pair is left to train on ({len(pairs)} before cutting to "
            f"max_seq_len {limit})."
        )
    return pairs if len(kept) == len(pairs) and not cut else Picked(pairs, kept, cut_pair)


def of_round(values: float | tuple[float, ...], round: int) -> float:
    """A round's value. Of several values each round has its own; the last one goes on."""
    return values[min(round, len(values) - 1)] if isinstance(values, tuple) else values


def _no_sums(pair: PreferencePair) -> PairSums:
    return PairSums(0.0, 0.0)


def _no_tokens(pair: PreferencePair) -> ReferenceLogprobs:
    chosen, rejected = (0.0,) * len(pair.chosen_ids), (0.0,) * len(pair.rejected_ids)
    return ReferenceLogprobs(pair.id, chosen, rejected)


def _cut(pair: PreferencePair, limit: int | None) -> tuple[PreferencePair, int]:
    """A pair cut to the limit, and how many of its two responses lost their end."""
    prompt, sides, cut = pair.prompt_ids, {}, 0
    for side in ("chosen_ids", "rejected_ids"):
        whole = (*prompt, *getattr(pair, side))
        ids, was_cut = truncated(whole, len(prompt), limit, f"pair {pair.id}")
        sides[side] = ids[len(prompt) :]
        cut += was_cut
    return (replace(pair, **sides) if cut else pair), cut
