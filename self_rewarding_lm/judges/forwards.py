"""What a model gives for the tokens of responses that are there: one forward of each, in batches.

The candidates of a prompt go through the model together and with no others. So a number is the same
bit for bit, whatever else is judged and however the work is stopped or shared.
"""

from collections.abc import Iterator, Sequence

from self_rewarding_lm.context import Context
from self_rewarding_lm.models.batching import grouped
from self_rewarding_lm.models.logprobs import Measure
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Candidate, Prompt


def of_response_tokens(
    ctx: Context,
    prompts: Sequence[Prompt],
    candidates_PG: Sequence[Sequence[Candidate]],
    *,
    token_budget: int,
    measure: Measure | None = None,
) -> Iterator[tuple[Candidate, tuple[float, ...]]]:
    """Each candidate that fits into the model, with the log-probs of its tokens.

    token_budget: tokens that go through the model at once. measure: of the distribution at each
    token, in place of its log-prob.
    """
    limit, policy = ctx.model.max_len, ctx.runtime.unwrapped(ctx.policy)
    for prompt, candidates in zip(prompts, candidates_PG, strict=True):
        fits = [c for c in candidates if limit is None or len(prompt.ids) + len(c.ids) <= limit]
        rows = [[(*prompt.ids, *c.ids)] for c in fits]
        for group in grouped(ctx.model, rows, token_budget=token_budget):
            some = [fits[i] for i in group]
            sequences = [(prompt.ids, candidate.ids) for candidate in some]
            yield from zip(some, response_logprobs(policy, sequences, measure=measure), strict=True)
            ctx.runtime.stopping.heed()
