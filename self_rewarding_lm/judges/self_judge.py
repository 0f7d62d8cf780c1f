"""The pairwise judge: a model is shown two candidates and says which is better."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.judges.asking import Asker, Asks, Question
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.parsing import (
    VerdictForm,
    call_parse_reward,
    comparison_form,
    score_form,
)
from self_rewarding_lm.judges.templates import compile_comparison_template, compile_prompt_template
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.scores import ParsedScore


class SelfJudge(Judge):
    """A model asked with a reward prompt, several times a candidate (arXiv:2401.10020, 2.2).

    num_judgements: 1 whatever is asked where `reward.forced_ending` is "at_once", for nothing is
    sampled then and all would be the same. model: another judge than the policy (the LLM annotator
    of arXiv:2402.04792), None for the policy itself. It reads the policy's tokens. first: the
    number of its first judgement of a candidate, where other judges have made some. asker: who is
    asked in place of a model.
    """

    def __init__(
        self,
        reward: RewardConfig,
        sampling: SamplingConfig,
        num_judgements: int,
        *,
        name: str = "self",
        model: TokenModel | None = None,
        first: int = 0,
        asker: Asks | None = None,
    ) -> None:
        self.name = name
        self.reads_weights = model is None and asker is None
        self.num_judgements = 1 if reward.forced_ending == "at_once" else num_judgements
        self.first = first
        self.render = compile_prompt_template(
            reward.prompt_template, auto_dedent=reward.auto_dedent
        )
        self.asker: Asks = asker or Asker(
            form_of(reward),
            sampling,
            name=name,
            score_mode=reward.score_mode,
            forced_ending=reward.forced_ending,
            model=model,
        )

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        questions = []
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            for candidate in candidates:
                text = self.render(prompt.text or "", candidate.text or "")
                ids = self.judgement_ids([candidate])
                questions += [Question(record_id, (candidate.id,), text) for record_id in ids]
        yield from self.asker.ask(ctx, questions)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        numbers = range(self.first, self.first + self.num_judgements)
        return [f"{candidate.id}/j{k}" for candidate in candidates for k in numbers]


class SeveralJudges(Judge):
    """Judges that each judge every candidate; in its score they count alike.

    Their judgements of a candidate must have different ids, see SelfJudge's `first`.
    """

    def __init__(self, judges: Sequence[SelfJudge]) -> None:
        self.judges = tuple(judges)
        self.name = ", ".join(judge.name for judge in judges)
        self.reads_weights = any(judge.reads_weights for judge in judges)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        for judge in self.judges:
            yield from judge.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return [i for judge in self.judges for i in judge.judgement_ids(candidates)]


def form_of(reward: RewardConfig) -> VerdictForm:
    """How a reward config's judge says its score: `parse_reward` reads it, else the template."""
    parse = reward.parse_reward
    if parse is not None:

        def read(text: str) -> ParsedScore:
            return call_parse_reward(parse, text)

        return VerdictForm("", {}, numeric=True, find=lambda text: None, read=read)
    assert reward.reward_regex_template is not None
    counts = reward.score_mode == "expected" or reward.forced_ending
    return score_form(
        reward.reward_regex_template,
        numbers=reward.allowed_numbers() if counts else (),
        score_range=reward.score_range,
        allowed_scores=reward.allowed_scores,
    )


def score_parser(reward: RewardConfig) -> Callable[[str], ParsedScore]:
    """How a reward config reads a judge's text: `parse_reward` first, else the template."""
    return form_of(reward).read


def check_judge_prompt(reward: RewardConfig, tokens: Tokens, limit: int | None) -> None:
    """Raise where a reward prompt cannot be used with a tokenizer and a model.

    ConfigError where its templates are wrong or the tokenizer does not tell its numbers apart;
    JudgeError where the empty prompt already fills the judge's context.
    """
    judge = SelfJudge(reward, SamplingConfig(), 1)
    assert isinstance(judge.asker, Asker)
    judge.asker.check(judge.render("", ""), tokens, limit)


class PairwiseJudge(Judge):
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
        self.reads_weights = model is None and asker is None
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
