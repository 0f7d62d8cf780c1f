"""Judges that call a function of texts or a reward module."""

from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.interface import device_of
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.scores import score_of


class FunctionJudge(Judge):
    """A text function in TRL's form: f(prompts, completions, **columns) -> list[float | None]."""

    reads_weights = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        flat = [(p, c) for p, group in zip(prompts, candidates_PG, strict=True) for c in group]
        # 1. one call with a prompt and a completion for each candidate
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
        # 2. each number becomes a score, or None with its reason
        return [
            Judgement(f"{c.id}/j0", (c.id,), self.name, parsed.score, parsed.reason)
            for (_, c), parsed in zip(flat, map(score_of, scores), strict=True)
        ]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The other columns of the rows that the function names, or all if it takes **columns."""
        names = {key for p in prompts for key in (p.columns or {})} - {"prompts", "completions"}
        parameters = signature(self.function).parameters
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
            names &= set(parameters)
        return {key: [(p.columns or {}).get(key) for p in prompts] for key in sorted(names)}


class ModuleJudge(Judge):
    """A reward module or function: ids (b, t) -> (b,), (b, 1) or (b, classes).

    It is called with prompts and responses of equal length, at most max_rows at once, without
    padding. From classes the score is the expected class number under their softmax.
    """

    reads_weights = False

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
                for (c, _), parsed in zip(part, map(score_of, scores), strict=True):
                    yield Judgement(f"{c.id}/j0", (c.id,), self.name, parsed.score, parsed.reason)

    @torch.no_grad()
    def _scores(self, rows: list[tuple[int, ...]], device: torch.device) -> list[float]:
        if not isinstance(self.reward, nn.Module):
            return reward_scores(self.reward(torch.tensor(rows, device=device)), len(rows))
        ids = torch.tensor(rows, device=device_of(self.reward))
        with evaluating(self.reward):
            return reward_scores(self.reward(ids), len(rows))


def reward_scores(output: Any, batch: int) -> list[float]:
    """The scores in the output of a reward module: (b,), (b, 1) or (b, classes).

    Raises JudgeError for any other shape.
    """
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
