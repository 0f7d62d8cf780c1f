"""Judgements become one score for each candidate. Pure arithmetic; a missing score is None."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from self_rewarding_lm.records import Candidate, Judgement


def number_text(score: float) -> str:
    """A score as it is written: whole numbers without a point."""
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
    """The mean of the scores that there are; None where there is none."""
    valid = [score for score in scores if score is not None]
    return math.fsum(valid) / len(valid) if valid else None


def candidate_scores(
    candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> dict[str, float | None]:
    """What judgements come to for each candidate, by its id; None where nothing is known.

    Judgements of one candidate: their mean. Judgements of two, which are `score` 1 where the first
    shown wins, 0 where the second does: each two candidates are shown in both orders; who wins in
    both wins, all else is a tie, and an order without a score makes the comparison unknown. The
    mean over a candidate's known comparisons counts, 1 won, 0.5 tied, 0 lost. Several judges (by
    name) count alike: the mean of what each comes to, None where one of them comes to nothing, for
    a mean over fewer judges is no measure of the same thing.
    """
    by_judge: dict[tuple[str, bool], list[Judgement]] = {}
    for judgement in judgements:
        key = judgement.judge, len(judgement.candidate_ids) == 2
        by_judge.setdefault(key, []).append(judgement)
    found: dict[str, list[float | None]] = {candidate.id: [] for candidate in candidates}
    for (_, compared), own in by_judge.items():
        for candidate_id, score in (_compared if compared else _means)(own).items():
            if candidate_id in found:
                found[candidate_id].append(score)
    return {
        candidate_id: None if None in scores else mean_score(scores)
        for candidate_id, scores in found.items()
    }


def label_of(judgement: Judgement) -> str | None:
    """The member of an ensemble, or the earlier model, that a judgement is by; else None.

    Ids: <candidate id>/j0 or <candidate id>/vs/3, and with a label <candidate id>/m0/j0.
    """
    own = judgement.id.removeprefix(f"{judgement.candidate_ids[0]}/")
    first, _, rest = own.partition("/")
    return first if rest and first != "vs" else None


def _means(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    by_candidate: dict[str, list[float | None]] = {}
    for judgement in judgements:
        by_candidate.setdefault(judgement.candidate_ids[0], []).append(judgement.score)
    return {candidate_id: mean_score(scores) for candidate_id, scores in by_candidate.items()}


def _compared(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    outcomes: dict[str, list[float | None]] = {
        candidate_id: [] for j in judgements for candidate_id in j.candidate_ids
    }
    for (one, other), (there, back) in both_orders(judgements).items():
        if there is not None and back is not None:
            won = there if there == back else 0.5
            outcomes[one].append(won)
            outcomes[other].append(1 - won)
    return {candidate_id: mean_score(scores) for candidate_id, scores in outcomes.items()}


def both_orders(
    judgements: Iterable[Judgement],
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """For each two candidates how the first of them did in each order: 1, 0.5, 0 or None."""
    shown: dict[tuple[str, ...], list[float | None]] = {}
    for judgement in judgements:
        shown.setdefault(judgement.candidate_ids, []).append(judgement.score)
    found = {}
    for one, other in (order for order in shown if order[::-1] not in shown or order < order[::-1]):
        there = _outcome(mean_score(shown[one, other]))
        back = _outcome(mean_score(shown.get((other, one), ())))
        found[one, other] = there, None if back is None else 1 - back
    return found


def _outcome(score: float | None) -> float | None:
    return None if score is None else 0.5 + 0.5 * (score > 0.5) - 0.5 * (score < 0.5)
