"""A model judges with a prompt: it scores one candidate, or says which of two is better."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.judges.asking import Asker, Asks, Question
from self_rewarding_lm.judges.base import Judge, as_in_format_1
from self_rewarding_lm.judges.marks import marks_form
from self_rewarding_lm.judges.parsing import (
    VerdictForm,
    comparison_form,
    parser_form,
    score_form,
)
from self_rewarding_lm.judges.templates import compile_comparison_template, compile_prompt_template
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.scores import ParsedScore


class SelfJudge(Judge):
    """A model scores each candidate with a reward prompt (arXiv:2401.10020, 2.2).

    sampling: how judgements are sampled. num_judgements: of each candidate; always 1 if
    `reward.forced_ending` is "at_once", because nothing is sampled then. name: in the judgements.
    model: the judge (the LLM annotator of
    arXiv:2402.04792), which reads the policy's tokens; None for the policy itself. first: the
    number of the first judgement of a candidate, if other judges make those before. asker: answers
    the judge prompts in place of a model.
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
    """Judges that each judge every candidate; their scores count alike.

    Unlike the members of an EnsembleJudge they keep their names, and number their judgements of a
    candidate one after the other: each has a `first` of its own.
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
    """How the judge of a reward config states its score, and how that is read.

    Its `marks` read it, or `parse_reward` if it is set, else the template.
    """
    marks = reward.marks
    if marks is not None:
        return marks_form(marks.yes, marks.no, marks.worth, marks.names)
    if reward.parse_reward is not None:
        return parser_form(reward.parse_reward)
    assert reward.reward_regex_template is not None
    counts = reward.score_mode == "expected" or reward.forced_ending
    return score_form(
        reward.reward_regex_template,
        numbers=reward.allowed_numbers() if counts else (),
        score_range=reward.score_range,
        allowed_scores=reward.allowed_scores,
    )


def score_parser(reward: RewardConfig) -> Callable[[str], ParsedScore]:
    """The function that reads the score in a judge's text."""
    return form_of(reward).read


def check_judge_prompt(reward: RewardConfig, tokens: Tokens, limit: int | None) -> None:
    """Raise an error if a reward prompt cannot be used with a tokenizer and a model.

    ConfigError if a template is wrong or the tokenizer gives two scores the same ids; JudgeError if
    the judge prompt of empty texts already fills the model. limit: the model's, in tokens.
    """
    judge = SelfJudge(reward, SamplingConfig(), 1)
    assert isinstance(judge.asker, Asker)
    judge.asker.check(judge.render("", ""), tokens, limit)


class PairwiseJudge(Judge):
    """A model says which of two candidates is better, once in each order.

    A Judgement names the two candidates in the order in which they were shown. Its score is 1 if
    the first wins, 0 if the second wins, 0.5 for a tie; with expected or forced scores it is the
    probability of the first plus half that of a tie. `scores.candidate_scores` makes scores of
    candidates from them. N candidates take N (N - 1) judgements, `num_judgements` times.

    sampling: default temperature 0.7, top-p 0.9 (arXiv:2401.10020, 3.1.3). model: the judge; None
    for the policy itself. asker: answers the judge prompts in place of a model.
    """

    def __init__(
        self,
        comparison: ComparisonConfig | None = None,
        sampling: SamplingConfig | None = None,
        num_judgements: int = 1,
        *,
        name: str = "self",
        model: TokenModel | None = None,
        asker: Asks | None = None,
    ) -> None:
        self.num_judgements = num_judgements
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
                for name in self._ids(one, other):
                    if ctx.format == 1 and self.num_judgements == 1:
                        name = as_in_format_1(name)
                    questions.append(Question(name, (one.id, other.id), text))
        yield from self.asker.ask(ctx, questions)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return [i for two in permutations(candidates, 2) for i in self._ids(*two)]

    def _ids(self, one: Candidate, other: Candidate) -> list[str]:
        """Ids of the judgements of two candidates in one order; a number is added to several."""
        name, numbers = _comparison_id(one, other), range(self.num_judgements)
        return [name] if self.num_judgements == 1 else [f"{name}/j{k}" for k in numbers]


def form_of_comparison(comparison: ComparisonConfig) -> VerdictForm:
    """How the judge of a comparison states its verdict, and how that is read."""
    return comparison_form(comparison.verdict_prefix, comparison.labels, comparison.tie_label)


def check_comparison(comparison: ComparisonConfig, tokens: Tokens, limit: int | None) -> None:
    """Raise an error if a comparison cannot be used; errors as in `check_judge_prompt`."""
    judge = PairwiseJudge(comparison)
    assert isinstance(judge.asker, Asker)
    judge.asker.check(judge.render("", "", ""), tokens, limit)


def _comparison_id(one: Candidate, other: Candidate) -> str:
    """<the first's id>/vs/<what is after the prompt's id in the second's>."""
    return f"{one.id}/vs/{other.id.removeprefix(f'{other.prompt_id}/')}"
