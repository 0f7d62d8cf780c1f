"""How sure a model is of a response, token by token: a reward that needs no words and no answer.

INTUITOR (arXiv:2505.19590) trains on it. What it rewards is not what is right, and trained for long
it collapses: docs/judging.md says how, and what to watch.
"""

import math
from collections.abc import Iterator, Sequence

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.forwards import of_response_tokens
from self_rewarding_lm.models.logprobs import Measure, kl_from_uniform, negative_entropy
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.scores import ParsedScore, score_of

MEASURES: dict[str, Measure | None] = {
    "kl_uniform": kl_from_uniform,
    "entropy": negative_entropy,
    "logprob": None,
}
"""Of the distribution at a token; None: the log-prob of the token."""


class CertaintyJudge(Judge):
    """Scores a response by how sure the current weights are of it, as a mean over its tokens.

    The end token is included. measure: "kl_uniform", KL(uniform || pi(. | tokens before)), the
    self-certainty of arXiv:2505.19590; "entropy", the negative entropy of pi; "logprob", log pi of
    the token. All are in nats; higher is surer. pi is the model's own distribution over its whole
    vocabulary, at temperature 1 and without filters. micro_batch_tokens: tokens that go through the
    model at once (default as in OptimConfig). A response has no score if it has no tokens
    (`empty`), is longer than the model's limit (`too_long`), or the mean is infinite (`not_finite`:
    with "kl_uniform" if the model gives a token no probability at all). Raises JudgeError for an
    unknown measure.

    The candidates of a prompt go through the model together and with no others, once.
    """

    def __init__(self, measure: str = "kl_uniform", *, micro_batch_tokens: int = 16_384) -> None:
        if measure not in MEASURES:
            raise JudgeError(
                f"CertaintyJudge: measure must be {', '.join(map(repr, MEASURES))}; got "
                f"{measure!r:.200}."
            )
        self.measure = measure
        self.micro_batch_tokens = micro_batch_tokens
        self.name = f"certainty:{measure}"

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        measure = MEASURES[self.measure]
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            of_tokens = of_response_tokens(
                ctx,
                [prompt],
                [candidates],
                token_budget=self.micro_batch_tokens,
                measure=measure,
            )
            values_of = {candidate.id: values for candidate, values in of_tokens}
            yield from (self._judgement(c, values_of.get(c.id)) for c in candidates)

    def _judgement(self, candidate: Candidate, values: Sequence[float] | None) -> Judgement:
        """The judgement of a candidate. values: of its tokens; None if it is too long."""
        parsed = ParsedScore(None, "empty" if not candidate.ids else "too_long")
        if values:
            parsed = score_of(math.fsum(values) / len(values))
        return Judgement(
            f"{candidate.id}/j0", (candidate.id,), self.name, parsed.score, parsed.reason
        )
