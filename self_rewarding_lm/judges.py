"""Candidates to judgements: a model with a reward prompt, a text function, a reward module."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.adapters.base import device_of
from self_rewarding_lm.adapters.inference import evaluating
from self_rewarding_lm.asking import FIRST_LOOK, MIN_ANSWER_TOKENS, Asker, Asks, Question
from self_rewarding_lm.config import RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judging import (
    ParsedScore,
    VerdictForm,
    call_parse_reward,
    candidate_scores,
    compile_prompt_template,
    score_form,
    score_of,
)
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.tokens import Tokens

__all__ = [
    "FIRST_LOOK",
    "MIN_ANSWER_TOKENS",
    "FunctionJudge",
    "Judge",
    "ModuleJudge",
    "SelfJudge",
    "SeveralJudges",
    "check_judge_prompt",
    "filtered_out",
    "ids_of_judgements",
    "judge_of",
    "judged_scores",
    "reward_scores",
    "score_parser",
    "weights_of_judge",
]


@runtime_checkable
class Judge(Protocol):
    """Scores candidates. `candidates_PG`: for each prompt the list of its candidates.

    It may have `num_judgements`, those of each candidate (default 1), or
    `judgement_ids(candidates)`, the ids of all judgements of one prompt's candidates; a stage that
    goes on asks for the prompts that miss some. It may have `scores(candidates, judgements)`, what
    its judgements come to for one prompt's candidates (by id, None where unknown; default
    `judging.candidate_scores`), `filtered(candidates, judgements)`, the ids of those that it lets
    through to no pair, and `weights_used()`, names of the weights that it asks the context for.
    """

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        """Judgements of all candidates, in any order; ids <candidate id>/j<k>."""
        ...


def ids_of_judgements(judge: Judge, candidates: Sequence[Candidate]) -> list[str]:
    """Ids of all judgements that a judge makes of one prompt's candidates."""
    told = getattr(judge, "judgement_ids", None)
    if told is not None:
        return told(candidates)
    numbers = range(getattr(judge, "num_judgements", 1))
    return [f"{candidate.id}/j{k}" for candidate in candidates for k in numbers]


def judged_scores(
    judge: Judge, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> dict[str, float | None]:
    """What a judge's judgements come to for each of one prompt's candidates, by its id."""
    return getattr(judge, "scores", candidate_scores)(candidates, judgements)


def filtered_out(
    judge: Judge, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> set[str]:
    """Ids of the candidates that a judge lets through to no pair, whatever their score."""
    told = getattr(judge, "filtered", None)
    return set() if told is None else told(candidates, judgements)


def weights_of_judge(judge: Any) -> set[str]:
    """Names of the weights that a judge asks for: "initial", stages, paths."""
    return getattr(judge, "weights_used", set)()


class SelfJudge:
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


class SeveralJudges:
    """Judges that each judge every candidate; in its score they count alike.

    Their judgements of a candidate must have different ids, see SelfJudge's `first`.
    """

    def __init__(self, judges: Sequence[SelfJudge]) -> None:
        self.judges = tuple(judges)
        self.name = ", ".join(judge.name for judge in judges)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        for judge in self.judges:
            yield from judge.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return [i for judge in self.judges for i in judge.judgement_ids(candidates)]


class FunctionJudge:
    """A text function in TRL's form: f(prompts, completions, **columns) -> list[float | None]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        flat = [(p, c) for p, group in zip(prompts, candidates_PG, strict=True) for c in group]
        columns = self._columns([p for p, _ in flat])
        texts = [c.text for _, c in flat]
        scores = self.function(prompts=[p.text for p, _ in flat], completions=texts, **columns)
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, Sequence) or len(scores) != len(flat):
            came = f"{len(scores)}" if isinstance(scores, Sequence) else f"{scores!r:.200}"
            raise JudgeError(
                f"reward function {self.name} must return one score (or None) for each of the "
                f"{len(flat)} completions; got {came}."
            )
        return [
            Judgement(f"{c.id}/j0", (c.id,), self.name, parsed.score, parsed.reason)
            for (_, c), parsed in zip(flat, map(score_of, scores), strict=True)
        ]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The rows' other columns that the function asks for by name, or all with **columns."""
        names = {key for p in prompts for key in (p.columns or {})} - {"prompts", "completions"}
        asked = signature(self.function).parameters
        if not any(p.kind is Parameter.VAR_KEYWORD for p in asked.values()):
            names &= set(asked)
        return {key: [(p.columns or {}).get(key) for p in prompts] for key in sorted(names)}


class ModuleJudge:
    """A reward module (or function) ids (b, t) -> (b,), (b, 1) or (b, classes).

    It sees prompt and response, unpadded, in batches of equal length. Of classes, the expected
    class number under their softmax is the score.
    """

    def __init__(self, reward: Callable[[Tensor], Tensor], *, max_rows: int = 64) -> None:
        self.reward = reward
        self.max_rows = max_rows
        self.name = getattr(reward, "__name__", type(reward).__name__)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        by_length: dict[int, list[tuple[Candidate, tuple[int, ...]]]] = {}
        for prompt, group in zip(prompts, candidates_PG, strict=True):
            for candidate in group:
                ids = (*prompt.ids, *candidate.ids)
                by_length.setdefault(len(ids), []).append((candidate, ids))
        for rows in by_length.values():
            for start in range(0, len(rows), self.max_rows):
                part = rows[start : start + self.max_rows]
                scores = self._scores([ids for _, ids in part], ctx.runtime.device)
                for (candidate, _), score in zip(part, scores, strict=True):
                    parsed = score_of(score)
                    yield Judgement(
                        f"{candidate.id}/j0",
                        (candidate.id,),
                        self.name,
                        parsed.score,
                        parsed.reason,
                    )

    @torch.no_grad()
    def _scores(self, rows: list[tuple[int, ...]], device: torch.device) -> list[float]:
        if not isinstance(self.reward, nn.Module):
            return reward_scores(self.reward(torch.tensor(rows, device=device)), len(rows))
        ids = torch.tensor(rows, device=device_of(self.reward))
        with evaluating(self.reward):
            return reward_scores(self.reward(ids), len(rows))


def reward_scores(output: Any, batch: int) -> list[float]:
    """Scores from a reward module's output; JudgeError for a shape that is none of the three."""
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and output.shape[:1] == (batch,):
        if output.ndim == 1:
            return output.double().tolist()
        if output.ndim == 2 and output.shape[1] == 1:
            return output[:, 0].double().tolist()
        if output.ndim == 2:
            classes = torch.arange(output.shape[1], device=output.device, dtype=torch.float64)
            return (output.double().softmax(dim=-1) @ classes).tolist()
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise JudgeError(
        f"a reward model of ids ({batch}, t) must return ({batch},), ({batch}, 1) or "
        f"({batch}, classes); got {came}."
    )


def judge_of(reward_model: Any) -> Judge:
    """The judge of a `reward_model`: a Judge, a text function in TRL's form, or ids -> scores."""
    if hasattr(reward_model, "judge"):
        return reward_model
    if (
        not isinstance(reward_model, nn.Module)
        and "completions" in signature(reward_model).parameters
    ):
        return FunctionJudge(reward_model)
    return ModuleJudge(reward_model)


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
