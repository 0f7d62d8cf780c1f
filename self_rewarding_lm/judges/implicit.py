"""The intrinsic reward of DPO: how much likelier a response is than some reference says.

r = log pi(y | x) - log pi_ref(y | x) ranks a model's own responses without a judge's words (CREAM,
arXiv:2410.12735; DICE, arXiv:2406.09760). Knows log-probs and whose weights are asked; no pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from self_rewarding_lm.context import Context
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.models.batching import grouped
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.runs.run import INITIAL

CURRENT = "current"


Sums = Mapping[str, float]
"""Summed log-probs by candidate id."""


class ImplicitJudge(Judge):
    """log pi(y|x) - log pi_ref(y|x), summed over the response's tokens, without the beta of DPO.

    reference: "initial", an earlier stage's name or a path; None: no reference, log pi alone.
    weights: pi, the present weights or others. length_mean: the reward divided by the response's
    tokens; default only without a reference (the first round of arXiv:2410.12735, where pi_ref is
    pi). micro_batch_tokens: that go through the model at once (default as in OptimConfig). A
    response without tokens has no score (`empty`), nor has one that the model cannot take
    (`too_long`).

    The candidates of a prompt go through the model together and with no others, so a reward is bit
    for bit the same whatever else is asked, stopped, or worked by other processes.
    """

    name = "implicit"

    def __init__(
        self,
        *,
        reference: str | Path | None = INITIAL,
        weights: str | Path = CURRENT,
        length_mean: bool | None = None,
        micro_batch_tokens: int = 16_384,
    ) -> None:
        self.reference = None if reference is None else str(reference)
        self.weights = str(weights)
        self.length_mean = reference is None if length_mean is None else length_mean
        self.micro_batch_tokens = micro_batch_tokens

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        return implicit_judgements(ctx, [self], prompts, candidates_PG)[0]

    def weights_used(self) -> set[str]:
        return {which for which in self.asked if which != CURRENT}

    @property
    def asked(self) -> tuple[str, ...]:
        """Whose log-probs make the reward: pi's, and the reference's."""
        return (self.weights,) if self.reference is None else (self.weights, self.reference)

    def of(self, candidate: Candidate, sums: Mapping[str, Sums]) -> Judgement:
        """The judgement of a candidate. sums: by weights; without it where it has no room."""
        score, reason = None, "empty" if not candidate.ids else "too_long"
        found = [sums[which].get(candidate.id) for which in self.asked]
        known = [value for value in found if value is not None]
        if candidate.ids and len(known) == len(found):
            score, reason = known[0] - sum(known[1:]), None
            score = score / len(candidate.ids) if self.length_mean else score
        return Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score, reason)


def implicit_judgements(
    ctx: Context,
    judges: Sequence[ImplicitJudge],
    prompts: Sequence[Prompt],
    candidates_PG: Sequence[Sequence[Candidate]],
) -> list[list[Judgement]]:
    """What several judges say; weights that some of them share are put into the model once."""
    wanted = dict.fromkeys(which for judge in judges for which in judge.asked)
    budget, sums = min(judge.micro_batch_tokens for judge in judges), dict[str, Sums]()
    for which in wanted:
        with nullcontext() if which == CURRENT else ctx.weights(which):
            found = _sums(ctx, prompts, candidates_PG, token_budget=budget)
            sums[which] = dict(found)
    flat = [candidate for candidates in candidates_PG for candidate in candidates]
    return [[judge.of(candidate, sums) for candidate in flat] for judge in judges]


def _sums(
    ctx: Context,
    prompts: Sequence[Prompt],
    candidates_PG: Sequence[Sequence[Candidate]],
    *,
    token_budget: int,
) -> Iterator[tuple[str, float]]:
    """The summed log-prob of each response that fits, under the weights in the model."""
    limit, policy = ctx.model.max_len, ctx.runtime.unwrapped(ctx.policy)
    for prompt, candidates in zip(prompts, candidates_PG, strict=True):
        fits = [c for c in candidates if limit is None or len(prompt.ids) + len(c.ids) <= limit]
        rows = [[(*prompt.ids, *c.ids)] for c in fits]
        for group in grouped(ctx.model, rows, token_budget=token_budget):
            some = [fits[i] for i in group]
            for c, found in zip(
                some, response_logprobs(policy, [(prompt.ids, c.ids) for c in some]), strict=True
            ):
                yield c.id, sum(found)
            ctx.runtime.stopping.heed()
