"""Responses that a function can check: whether they are correct, and how often.

Knows nothing of models.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError, typed
from self_rewarding_lm.evaluation.responses import pass_at_k
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.stats import Rate, ratio_interval

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Verifier(FunctionJudge):
    """A judge whose score is 1 if a function gives 1 or more, 0 if it gives less, None if None.

    function: a text function in TRL's form, f(prompts, completions, **columns) -> numbers. Raises
    ConfigError for anything else.
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


def accuracy(counts: Sequence[tuple[int, int]], *, seed: int = 0) -> Rate:
    """The share of correct responses; its interval resamples prompts.

    counts: for each prompt the checked and the correct responses.
    """
    checked, correct = [n for n, _ in counts], [c for _, c in counts]
    total = sum(checked)
    value = sum(correct) / total if total else None
    return Rate(value, ratio_interval(correct, checked, seed=seed))


def pass_at(counts: Sequence[tuple[int, int]], most: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... and `most`, each the mean over prompts.

    counts: for each prompt the checked and the correct responses. A prompt with fewer than k
    checked responses is left out; a k for which no prompt remains has no entry.
    """
    ks = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
    known = {k: [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in ks}
    return {k: sum(values) / len(values) for k, values in known.items() if values}


@typed
def reasoning_task(
    name: str, *, size: int = 100, seed: int = 0
) -> tuple[list[dict[str, Any]], Callable[..., list[float]]]:
    """Prompts and a verifier for a task of reasoning-gym, such as `chain_sum`.

    The rows {"prompt", "entry"} are a prompt dataset. The function is a verifier or a
    `reward_model`: it scores the text in a completion's last <answer>...</answer> from 0 to 1, or
    the whole completion if it has no such mark. size: the number of problems; the same seed gives
    the same problems. Raises ConfigError if the package is missing or does not know the name.
    """
    try:
        import reasoning_gym  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"the task {name!r} needs the package reasoning-gym and what it imports; there is no "
            f"{error.name or 'reasoning_gym'} here: {install('examples')}"
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
    """The text of the last answer mark, or all of the text."""
    answers = ANSWER.findall(text)
    return (answers[-1] if answers else text).strip()
