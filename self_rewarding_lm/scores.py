"""Judgements become one score per candidate. Pure arithmetic; a missing score is None.

Means are exact fractions and are rounded once, when they are a score: rounding on the way would
make differences of 1e-16 of ties.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from self_rewarding_lm.records import Candidate, Judgement

Number = Fraction | float


MOST = 10**6  # denominator of a fraction that a float is read as


_ROUNDS = ContextVar("rounds", default=False)


@contextmanager
def rounding_each_step() -> Iterator[None]:
    """Within it numbers are floats all the way, as in runs of format 1."""
    before = _ROUNDS.set(True)
    try:
        yield
    finally:
        _ROUNDS.reset(before)


def exact(number: float) -> Number:
    """The fraction that a number stands for, so that sums and means of such numbers are exact.

    0.7 stands for 7/10, and 0.333... for 1/3: a fraction with a denominator of at most a million
    that is rounded to the number. Without one it is what the float holds. float(exact(x)) == x.
    NaN and infinity stay as they are.
    """
    return number if _ROUNDS.get() or not math.isfinite(number) else _fraction(float(number))


def exact_sum(numbers: Iterable[Number]) -> Number:
    """The sum of what `exact` gave."""
    return math.fsum(numbers) if _ROUNDS.get() else sum(numbers, Fraction())


@lru_cache(maxsize=1 << 16)
def _fraction(number: float) -> Fraction:
    held = Fraction(number)
    near = held.limit_denominator(MOST)
    return near if float(near) == number else held


def number_text(score: float) -> str:
    """A score as judges write it: whole numbers without a point."""
    return str(int(score)) if score == int(score) else repr(float(score))


@dataclass(frozen=True, slots=True)
class ParsedScore:
    """A score, or None and the reason why there is none."""

    score: float | None
    reason: str | None = None


def score_of(value: object) -> ParsedScore:
    """A user function's result as a score: a finite number, else None with its reason."""
    if value is None:
        return ParsedScore(None, "no_score")
    if isinstance(value, bool | str | bytes) or "bool" in str(getattr(value, "dtype", "")):
        return ParsedScore(None, f"not_a_number: {type(value).__name__}")
    try:
        score = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return ParsedScore(None, "not_finite")
    except (TypeError, ValueError):
        return ParsedScore(None, f"not_a_number: {type(value).__name__}")
    return ParsedScore(score) if math.isfinite(score) else ParsedScore(None, "not_finite")


def mean_score(scores: Iterable[float | None]) -> float | None:
    """The mean of the scores that are not None; None if all are."""
    mean = _mean(None if score is None else exact(score) for score in scores)
    return None if mean is None else float(mean)


def _mean(numbers: Iterable[Number | None]) -> Number | None:
    known = [number for number in numbers if number is not None]
    return exact_sum(known) / len(known) if known else None


def candidate_scores(
    candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> dict[str, float | None]:
    """The score of each candidate by its id; None if its judgements give none.

    Judgements of one candidate: their mean. Judgements of two, whose score is 1 if the first shown
    wins and 0 if the second does: each two candidates are shown in both orders. Who wins in both
    wins, all else is a tie, and if one order has no score the comparison is unknown. A candidate's
    score is its mean over known comparisons, 1 won, 0.5 tied, 0 lost. Several judges (by name)
    count alike: the mean of what each gives, None if one of them gives none, for a mean over fewer
    judges measures something else.
    """
    by_judge: dict[tuple[str, bool], list[Judgement]] = {}
    for judgement in judgements:
        key = judgement.judge, len(judgement.candidate_ids) == 2
        by_judge.setdefault(key, []).append(judgement)
    scores_of: dict[str, list[Number | None]] = {candidate.id: [] for candidate in candidates}
    for (_, compares), judgements_of_one in by_judge.items():
        by_candidate = (_win_rates if compares else _means)(judgements_of_one)
        for candidate_id, score in by_candidate.items():
            if candidate_id in scores_of:
                scores_of[candidate_id].append(score)
    means = {i: None if None in scores else _mean(scores) for i, scores in scores_of.items()}
    return {i: None if mean is None else float(mean) for i, mean in means.items()}


def label_of(judgement: Judgement) -> str | None:
    """Which member of an ensemble, or which earlier model, judged; None for the stage's one judge.

    Ids: <candidate id>/j0 or <candidate id>/vs/3, and with a label <candidate id>/m0/j0.
    """
    behind_candidate = judgement.id.removeprefix(f"{judgement.candidate_ids[0]}/")
    first, _, rest = behind_candidate.partition("/")
    return first if rest and first != "vs" else None


def _means(judgements: Sequence[Judgement]) -> dict[str, Number | None]:
    """The mean score of each candidate, of judgements of one candidate."""
    by_candidate: dict[str, list[Number | None]] = {}
    for judgement in judgements:
        score = None if judgement.score is None else exact(judgement.score)
        by_candidate.setdefault(judgement.candidate_ids[0], []).append(score)
    return {candidate_id: _mean(scores) for candidate_id, scores in by_candidate.items()}


def _win_rates(judgements: Sequence[Judgement]) -> dict[str, Number | None]:
    """Each candidate's mean over its known comparisons, of judgements of two candidates."""
    outcomes: dict[str, list[Number | None]] = {
        candidate_id: [] for j in judgements for candidate_id in j.candidate_ids
    }
    for (one, other), (there, back) in both_orders(judgements).items():
        if there is not None and back is not None:
            won = there if there == back else 0.5
            outcomes[one].append(exact(won))
            outcomes[other].append(exact(1 - won))
    return {candidate_id: _mean(scores) for candidate_id, scores in outcomes.items()}


def both_orders(
    judgements: Iterable[Judgement],
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """For each two candidates what the first of them did, shown first and shown second.

    1 won, 0.5 tied, 0 lost, None if that order has no score.
    """
    scores_of: dict[tuple[str, ...], list[float | None]] = {}
    for judgement in judgements:
        scores_of.setdefault(judgement.candidate_ids, []).append(judgement.score)
    outcomes = {}
    for one, other in scores_of:
        if (other, one) in scores_of and (other, one) <= (one, other):
            continue  # counted under its other order
        there = _outcome(mean_score(scores_of[one, other]))
        back = _outcome(mean_score(scores_of.get((other, one), ())))
        outcomes[one, other] = there, None if back is None else 1 - back
    return outcomes


def _outcome(score: float | None) -> float | None:
    """A score between 0 and 1 as 1 (over a half), 0.5 (a half) or 0."""
    return None if score is None else 0.5 + 0.5 * (score > 0.5) - 0.5 * (score < 0.5)
