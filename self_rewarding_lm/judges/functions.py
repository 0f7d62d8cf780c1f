"""Judges that call a function of texts or a reward module."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
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
from self_rewarding_lm.text import amount


class FunctionJudge(Judge):
    """Scores by a text function in TRL's form: f(prompts, completions, **columns) -> scores.

    columns: the other columns of the prompt rows. The scores are a list of float or None, one for
    each completion. Raises JudgeError for a function that does not take `prompts` and `completions`
    by these names.
    """

    reads_weights = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            self.takes = signature(function)
            self.takes.bind_partial(prompts=[], completions=[])
        except (TypeError, ValueError):  # it takes others, or does not say what it takes
            raise JudgeError(
                f"reward function {self.name} must have arguments named prompts and "
                "completions: f(prompts, completions), then any columns of the rows."
            ) from None

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        flat = [(p, c) for p, group in zip(prompts, candidates_PG, strict=True) for c in group]
        # 1. one call with a prompt and a completion for each candidate
        columns = self._columns([p for p, _ in flat])
        self._check(columns, prompts)
        texts = [c.text for _, c in flat]
        scores = self.function(prompts=[p.text for p, _ in flat], completions=texts, **columns)
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, Sequence) or len(scores) != len(flat):
            came = f"{len(scores)}" if isinstance(scores, Sequence) else f"{scores!r:.200}"
            raise JudgeError(
                f"reward function {self.name} must return one score (or None) for each of the "
                f"{amount(len(flat), 'completion')}; got {came}."
            )
        # 2. each number becomes a score, or None with its reason
        return [
            Judgement(f"{c.id}/j0", (c.id,), self.name, parsed.score, parsed.reason)
            for (_, c), parsed in zip(flat, map(score_of, scores), strict=True)
        ]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The other columns of the rows that the function names, or all if it takes **columns."""
        names = {key for p in prompts for key in (p.columns or {})} - {"prompts", "completions"}
        parameters = self.takes.parameters
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
            names &= set(parameters)
        return {key: [(p.columns or {}).get(key) for p in prompts] for key in sorted(names)}

    def _check(self, columns: dict[str, list[Any]], prompts: Sequence[Prompt]) -> None:
        """Raise an error if the function must be given more than there is."""
        given = {"prompts": [], "completions": [], **columns}
        try:
            self.takes.bind(**given)
        except TypeError:
            needed = (p for p in self.takes.parameters.values() if p.default is Parameter.empty)
            several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
            missing = [p.name for p in needed if p.kind not in several and p.name not in given]
            there = sorted({key for p in prompts for key in (p.columns or {})})
            raise JudgeError(
                f"reward function {self.name}{self.takes} takes {', '.join(missing)}, and no row "
                "of prompt_dataset has a column of that name; columns: "
                f"{', '.join(there) or 'none'}. "
                "Name the column as the argument, or give the argument a default."
            ) from None


class ModuleJudge(Judge):
    """Scores by a reward module or function: ids (b, t) -> (b,), (b, 1) or (b, classes).

    A row of ids is a prompt and a response. Rows of equal length are given together, at most
    max_rows at once, without padding. From classes the score is the expected class number under
    their softmax. Outputs whose number of columns follows the length are no classes: they raise
    JudgeError.
    """

    reads_weights = False

    def __init__(self, reward: Callable[[Tensor], Tensor], *, max_rows: int = 64) -> None:
        self.reward = reward
        self.max_rows = max_rows
        self._outputs = RewardOutputs()
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
        module = self.reward if isinstance(self.reward, nn.Module) else None
        ids = torch.tensor(rows, device=device if module is None else device_of(module))  # (b, t)
        with nullcontext() if module is None else evaluating(module):
            return self._outputs.scores(lambda n: self.reward(ids[:, :n]), *ids.shape)


class RewardOutputs:
    """The outputs of one reward module: a column for each class, and none for each token."""

    def __init__(self) -> None:
        self._columns: int | None = None
        self._are_classes = False

    def scores(self, ask: Callable[[int], Any], batch: int, length: int) -> list[float]:
        """The scores of `batch` rows. ask: gives the output for their first n tokens.

        An output as wide as its rows is asked for once more, for rows that are shorter by a token.
        Raises JudgeError as `reward_scores`, and if the columns follow the length.
        """
        output = ask(length)
        scores = reward_scores(output, batch)
        columns = _columns(output)
        if self._columns is None:
            self._columns = columns
        if columns == self._columns == length > 1 and not self._are_classes:
            columns = _columns(ask(length - 1))
        if columns != self._columns:
            raise JudgeError(
                f"a reward model gives one score for a response, or one for each class; this one "
                f"gave {self._columns} for one length and {columns} for another, that is, one "
                "for each token. Return the one at the response's last token, or their mean."
            )
        self._are_classes = self._are_classes or max(length, columns) > 1
        return scores


def reward_scores(output: Any, batch: int) -> list[float]:
    """The scores in the output of a reward module: (b,), (b, 1) or (b, classes).

    Raises JudgeError for any other shape, and for booleans and complex numbers.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and (output.is_complex() or output.dtype == torch.bool):
        raise JudgeError(
            f"a reward model must return real numbers; got {output.dtype}. Turn them into scores, "
            "for example with .float()."
        )
    if isinstance(output, Tensor) and output.shape[:1] == (batch,) and output.numel():
        if output.ndim == 1:
            return output.double().tolist()
        if output.ndim == 2 and output.shape[1] == 1:
            return output[:, 0].double().tolist()
        if output.ndim == 2:
            classes = torch.arange(output.shape[1], device=output.device, dtype=torch.float64)
            return (output.double().softmax(dim=-1) @ classes).tolist()
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise JudgeError(
        f"a reward model given ids of shape ({batch}, t) must return ({batch},), ({batch}, 1) or "
        f"({batch}, classes); got {came}."
    )


def _columns(output: Any) -> int:
    """How many numbers an output has for each row."""
    output = getattr(output, "logits", output)
    return output.shape[1] if output.ndim == 2 else 1
