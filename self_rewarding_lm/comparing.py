"""The pairwise judge: a model is shown two candidates and says which is better."""

from collections.abc import Iterator, Sequence
from itertools import permutations

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.asking import Asker, Asks, Question
from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.judging import (
    VerdictForm,
    comparison_form,
    compile_comparison_template,
)
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.tokens import Tokens


class PairwiseJudge:
    """A model asked which of two candidates is better, in both orders, once each.

    A Judgement names the two in the order in which they were shown; its score is 1 where the first
    wins, 0 where the second does, 0.5 for a tie, or the probability of the first (and half a
    tie's) where the comparison has expected or forced scores. `judging.candidate_scores` makes
    scores of candidates of them. N candidates take N (N - 1) judgements.

    sampling: default temperature 0.7, top-p 0.9 (arXiv:2401.10020, 3.1.3). model: another judge
    than the policy, None for the policy itself. asker: who is asked in place of a model.
    """

    def __init__(
        self,
        comparison: ComparisonConfig | None = None,
        sampling: SamplingConfig | None = None,
        *,
        name: str = "self",
        model: TokenModel | None = None,
        asker: Asks | None = None,
    ) -> None:
        comparison = comparison or ComparisonConfig()
        self.name = name
        self.render = compile_comparison_template(
            comparison.prompt_template, auto_dedent=comparison.auto_dedent
        )
        self.asker: Asks = asker or Asker(
            form_of_comparison(comparison),
            sampling or SamplingConfig(),
            name=name,
            score_mode=comparison.score_mode,
            forced_ending=comparison.forced_ending,
            model=model,
            source="compared",
        )

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        questions = []
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            for one, other in permutations(candidates, 2):
                text = self.render(prompt.text or "", one.text or "", other.text or "")
                questions.append(Question(_id(one, other), (one.id, other.id), text))
        yield from self.asker.ask(ctx, questions)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return [_id(one, other) for one, other in permutations(candidates, 2)]


def form_of_comparison(comparison: ComparisonConfig) -> VerdictForm:
    """How a comparison's judge says its verdict."""
    return comparison_form(comparison.verdict_prefix, comparison.labels, comparison.tie_label)


def check_comparison(comparison: ComparisonConfig, tokens: Tokens, limit: int | None) -> None:
    """Raise where a comparison cannot be used; as `judges.check_judge_prompt`."""
    judge = PairwiseJudge(comparison)
    assert isinstance(judge.asker, Asker)
    judge.asker.check(judge.render("", "", ""), tokens, limit)


def _id(one: Candidate, other: Candidate) -> str:
    return f"{one.id}/vs/{other.id.rsplit('/', 1)[-1]}"
