"""The implicit reward of DPO: how much likelier a model finds a response than a reference does.

r = log pi(y | x) - log pi_ref(y | x) ranks a model's own responses without a judge's words (CREAM,
arXiv:2410.12735; DICE, arXiv:2406.09760). Knows log-probs and names of weights; nothing of pairs.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from self_rewarding_lm.context import Context
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.forwards import of_response_tokens
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.runs.run import INITIAL

CURRENT = "current"
"""The name of the present weights."""


Sums = Mapping[str, float]
"""The summed log-prob of each response, by candidate id."""


class ImplicitJudge(Judge):
    """Scores by DPO's implicit reward, log pi(y|x) - log pi_ref(y|x), summed, without beta.

    reference: the weights of pi_ref: "initial", an earlier stage's name or a path; None leaves log
    pi_ref out. weights: those of pi, named in the same way; default the current ones. length_mean:
    divide the reward by the number of the response's tokens; by default only without a reference
    (the first round of arXiv:2410.12735, where pi_ref is pi). micro_batch_tokens: tokens that go
    through the model at once (default as in OptimConfig). A response has no score if it has no
    tokens (`empty`) or is longer than the model's limit (`too_long`).

    The candidates of a prompt go through the model together and with no others. So a reward is the
    same bit for bit, whatever else is judged, for any number of processes and interruptions.
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
        """Names of the weights whose log-probs the reward uses: pi's, then the reference's."""
        return (self.weights,) if self.reference is None else (self.weights, self.reference)

    def of(self, candidate: Candidate, sums: Mapping[str, Sums]) -> Judgement:
        """The judgement of a candidate.

        sums: by name of the weights; a candidate that is too long is missing in them.
        """
        score, reason = None, "empty" if not candidate.ids else "too_long"
        logprobs = [sums[which].get(candidate.id) for which in self.asked]
        known = [value for value in logprobs if value is not None]
        if candidate.ids and len(known) == len(logprobs):
            score, reason = known[0] - sum(known[1:]), None
            score = score / len(candidate.ids) if self.length_mean else score
        return Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score, reason)


def implicit_judgements(
    ctx: Context,
    judges: Sequence[ImplicitJudge],
    prompts: Sequence[Prompt],
    candidates_PG: Sequence[Sequence[Candidate]],
) -> list[list[Judgement]]:
    """The judgements of each judge; weights that judges share are loaded into the model once."""
    names = dict.fromkeys(which for judge in judges for which in judge.asked)
    budget, sums = min(judge.micro_batch_tokens for judge in judges), dict[str, Sums]()
    for which in names:
        with nullcontext() if which == CURRENT else ctx.weights(which):
            of_tokens = of_response_tokens(ctx, prompts, candidates_PG, token_budget=budget)
            sums[which] = {candidate.id: sum(logprobs) for candidate, logprobs in of_tokens}
    flat = [candidate for candidates in candidates_PG for candidate in candidates]
    return [[judge.of(candidate, sums) for candidate in flat] for judge in judges]
