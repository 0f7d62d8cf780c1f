"""Candidates to judgements: a model with a reward prompt, a text function, a reward module."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.adapters.base import device_of, evaluating
from self_rewarding_lm.config import RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.engine import Request
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judging import (
    ParsedScore,
    call_parse_reward,
    compile_prompt_template,
    compile_score_pattern,
    parse_score,
    score_of,
)
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.rollout import decoding_of
from self_rewarding_lm.sampling import stable_hash
from self_rewarding_lm.tokens import Tokens

MIN_ANSWER_TOKENS = 16
FIRST_LOOK = 64  # judgements after which the parse rate is checked for the first time


@runtime_checkable
class Judge(Protocol):
    """Scores candidates. `candidates_PG`: for each prompt the list of its candidates."""

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        """Judgements of all candidates, in any order; ids <candidate id>/j<k>."""
        ...


class SelfJudge:
    """A model asked with a reward prompt, several times a candidate (arXiv:2401.10020, 2.2).

    model: another judge than the policy (the LLM annotator of arXiv:2402.04792), None for the
    policy itself. It reads the policy's tokens.
    """

    def __init__(
        self,
        reward: RewardConfig,
        sampling: SamplingConfig,
        num_judgements: int,
        *,
        name: str = "self",
        model: TokenModel | None = None,
    ) -> None:
        self.name = name
        self.sampling = sampling
        self.num_judgements = num_judgements
        self.model = model
        self._looked = False
        self.render = compile_prompt_template(
            reward.prompt_template, auto_dedent=reward.auto_dedent
        )
        self.parse = score_parser(reward)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        model = self.model or ctx.model
        asked: list[tuple[Candidate, int, Request]] = []
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            for candidate in candidates:
                ids = ctx.tokens.encode(self.render(prompt.text or "", candidate.text or ""))
                limit = model.max_len
                room = self.sampling.max_new_tokens if limit is None else limit - len(ids)
                if room < min(MIN_ANSWER_TOKENS, self.sampling.max_new_tokens):
                    for k in range(self.num_judgements):
                        yield self._judgement(candidate, k, ParsedScore(None, "too_long"), None)
                    continue
                for k in range(self.num_judgements):
                    key = stable_hash(ctx.seed, f"{candidate.id}/j{k}")
                    new = min(self.sampling.max_new_tokens, room)
                    asked.append((candidate, k, Request(ids, key, new)))
        first = 0 if self._looked else FIRST_LOOK  # few at first: they may all be unreadable
        self._looked = True
        for chunk in (asked[:first], asked[first:]):
            if chunk:
                yield from self._ask(ctx, model, chunk)

    def _ask(
        self, ctx: Context, model: TokenModel, asked: list[tuple[Candidate, int, Request]]
    ) -> Iterator[Judgement]:
        requests = [request for *_, request in asked]
        decoding = decoding_of(self.sampling, ctx.tokens)
        answers = ctx.engine.generate(model, requests, decoding)
        for index, done in ctx.runtime.autocasted(answers):
            candidate, k, _ = asked[index]
            text = ctx.tokens.decode(done.ids) or ""
            yield self._judgement(candidate, k, self.parse(text), text)

    def _judgement(
        self, candidate: Candidate, k: int, parsed: ParsedScore, text: str | None
    ) -> Judgement:
        return Judgement(
            f"{candidate.id}/j{k}", (candidate.id,), self.name, parsed.score, parsed.reason, text
        )


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


def score_parser(reward: RewardConfig) -> Callable[[str], ParsedScore]:
    """How a reward config reads a judge's text: `parse_reward` first, else the template."""
    if reward.parse_reward is not None:
        return lambda text: call_parse_reward(reward.parse_reward, text)
    assert reward.reward_regex_template is not None
    pattern = compile_score_pattern(reward.reward_regex_template)
    limits = {"score_range": reward.score_range, "allowed_scores": reward.allowed_scores}
    return lambda text: parse_score(text, pattern, **limits)


def check_judge_prompt(reward: RewardConfig, tokens: Tokens, limit: int | None) -> None:
    """Raise where the templates are wrong or the empty prompt already fills the judge's context."""
    render = compile_prompt_template(reward.prompt_template, auto_dedent=reward.auto_dedent)
    score_parser(reward)
    length = len(tokens.encode(render("", "")))
    if limit is not None and length + MIN_ANSWER_TOKENS >= limit:
        raise JudgeError(
            f"the judge's prompt_template alone has {length} tokens, and the judge takes {limit}: "
            f"no room for a response and {MIN_ANSWER_TOKENS} tokens of answer. Shorten it."
        )
