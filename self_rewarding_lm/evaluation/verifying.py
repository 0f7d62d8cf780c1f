"""Responses that can be checked: a function that says what is correct, and how often it is.

Knows nothing of models.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.evaluation.responses import pass_at_k
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.stats import Rate, ratio_interval

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Verifier(FunctionJudge):
    """A judge whose scores are 1 where a function says 1 or more, else 0; None where it says None.

    function: of texts, in TRL's form, f(prompts, completions, **columns) -> numbers. Raises
    ConfigError where it is none.
    """

    def __init__(self, function: Any) -> None:
        if not callable(function) or isinstance(function, nn.Module):
            raise ConfigError(
                "a verifier is a text function f(prompts, completions, **columns) -> numbers, 1 "
                f"for a correct completion; got {type(function).__name__}."
            )
        super().__init__(function)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        judged = super().judge(ctx, prompts, candidates_PG)
        return [
            j
            if j.score is None
            else Judgement(j.id, j.candidate_ids, j.judge, float(j.score >= 1), j.reason)
            for j in judged
        ]


def accuracy(found: Sequence[tuple[int, int]], *, seed: int = 0) -> Rate:
    """The share of correct responses of (samples, correct) by prompt, prompts resampled."""
    samples, right = [n for n, _ in found], [c for _, c in found]
    total = sum(samples)
    value = sum(right) / total if total else None
    return Rate(value, ratio_interval(right, samples, seed=seed))


def pass_at(found: Sequence[tuple[int, int]], most: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... and `most`, the mean over prompts of (samples, correct).

    Prompts with fewer than k checked responses are left out; a k that leaves none has no entry.
    """
    ks = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
    known = {k: [pass_at_k(n, c, k) for n, c in found if n >= k] for k in ks}
    return {k: sum(values) / len(values) for k, values in known.items() if values}


def reasoning_task(
    name: str, *, size: int = 100, seed: int = 0
) -> tuple[list[dict[str, Any]], Callable[..., list[float]]]:
    """Prompts and the verifier of a task of reasoning-gym, by its name (`chain_sum`).

    The rows {"prompt", "entry"} are a prompt dataset, the function a verifier or a `reward_model`;
    it scores what stands in the last <answer>...</answer> of a completion, or all of it where
    there is none, from 0 to 1. size: how many problems; the same seed gives the same ones. Raises
    ConfigError where the package is missing, and for a name that it does not know.
    """
    try:
        import reasoning_gym  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"the task {name!r} needs the package reasoning-gym and what it imports; there is no "
            f"{error.name or 'reasoning_gym'} here: "
            'pip install "self-rewarding-lm[examples]"'
        ) from error
    try:
        problems = reasoning_gym.create_dataset(name, size=size, seed=seed)
    except ValueError as error:
        raise ConfigError(f"reasoning-gym has no task {name!r}: {error}") from error

    def verify(prompts: Sequence[str], completions: Sequence[str], entry: Sequence[int]) -> list:
        return [
            float(problems.score_answer(_answer(text), problems[place]))
            for text, place in zip(completions, entry, strict=True)
        ]

    rows = [{"prompt": problems[i]["question"], "entry": i} for i in range(size)]
    return rows, verify


def _answer(text: str) -> str:
    marked = ANSWER.findall(text)
    return (marked[-1] if marked else text).strip()
