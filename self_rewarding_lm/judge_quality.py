"""What else is to be known of a judge beside its agreement with people: intervals, the order in
which it is shown responses, and whether its certainty is worth anything.

Pure: knows nothing of models, texts or files.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np

from self_rewarding_lm.agreement import Agreement, RankedScores, agreement
from self_rewarding_lm.judging import both_orders
from self_rewarding_lm.quality import Interval, fit_logistic, ratio_interval
from self_rewarding_lm.records import Judgement

BINS = 10
"""Of equal width over probabilities from 0 to 1."""


@dataclass(frozen=True)
class PositionBias:
    """What the order in which two responses are shown does to a pairwise judge.

    first, second, ties: verdicts for the response shown first, for the other, and for neither.
    compared: pairs with a verdict in both orders; consistent: those with the same one in both.
    """

    first: int
    second: int
    ties: int
    compared: int
    consistent: int

    @property
    def first_share(self) -> float | None:
        """first / (first + second); 0.5 without bias, as every pair is shown in both orders."""
        decided = self.first + self.second
        return self.first / decided if decided else None

    @property
    def consistency(self) -> float | None:
        """consistent / compared."""
        return self.consistent / self.compared if self.compared else None


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose predicted probability lies in [low, high), the last bin with its end.

    predicted: its mean; agreed: the share of them that people ordered so.
    """

    low: float
    high: float
    count: int
    predicted: float
    agreed: float


@dataclass(frozen=True)
class Calibration:
    """How often people agree where a judge is as sure as it is; bins without a pair are left out.

    error: the expected calibration error, the mean of |predicted - agreed| over the bins, weighted
    by their counts; bins are of width 0.1. slope: of a judge that scores single responses, the
    log-odds by which one point more between two scores makes people's agreement likelier, fitted
    to these very pairs, so that the error says only how far that curve is from them; None for a
    pairwise judge, whose own probabilities are measured.
    """

    bins: tuple[CalibrationBin, ...]
    error: float
    pairs: int
    slope: float | None = None


def position_bias(judgements: Iterable[Judgement]) -> PositionBias | None:
    """Of the judgements of two responses; None where there is none with a verdict."""
    own = [j for j in judgements if len(j.candidate_ids) == 2 and j.score is not None]
    scores = [j.score for j in own if j.score is not None]
    orders = [found for found in both_orders(own).values() if None not in found]
    if not scores:
        return None
    return PositionBias(
        first=sum(score > 0.5 for score in scores),
        second=sum(score < 0.5 for score in scores),
        ties=sum(score == 0.5 for score in scores),
        compared=len(orders),
        consistent=sum(there == back for there, back in orders),
    )


def calibration_of_scores(items: Iterable[RankedScores]) -> Calibration | None:
    """Of a judge that scores single responses; None where no ordered pair has two scores."""
    gaps = np.array(
        [
            (score - other) if rank < other_rank else (other - score)
            for item in items
            for (rank, score), (other_rank, other) in combinations(_known(item), 2)
            if rank != other_rank
        ],
        dtype=float,
    )
    if not len(gaps):
        return None
    slope = float(fit_logistic(gaps[:, None], np.ones(len(gaps)))[0])
    chances = 1 / (1 + np.exp(-slope * np.abs(gaps)))
    agreed = (np.sign(gaps) + 1) / 2
    return calibration(list(zip(chances.tolist(), agreed.tolist(), strict=True)), slope=slope)


def calibration_of_verdicts(
    judgements: Iterable[Judgement], ranks: dict[str, float]
) -> Calibration | None:
    """Of a pairwise judge's probabilities: the mean of both orders, for the likelier response.

    ranks: people's, by candidate id. None where no pair that people ordered has both.
    """
    shown = {j.candidate_ids: j.score for j in judgements if len(j.candidate_ids) == 2}
    found = []
    for (one, other), score in shown.items():
        back = shown.get((other, one))
        if one < other and score is not None and back is not None and ranks[one] != ranks[other]:
            chance = (score + 1 - back) / 2
            right = float(ranks[one] < ranks[other])
            found.append((chance, right) if chance >= 0.5 else (1 - chance, 1 - right))
    return calibration([(c, 0.5 if c == 0.5 else right) for c, right in found])


def calibration(
    predictions: Sequence[tuple[float, float]], *, slope: float | None = None
) -> Calibration | None:
    """Of (probability, 1 where it came so, 0 where not, 0.5 for neither); None for none."""
    places: dict[int, list[tuple[float, float]]] = {}
    for chance, right in predictions:
        places.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, right))
    bins = []
    for place, own in sorted(places.items()):
        chances, rights = zip(*own, strict=True)
        means = sum(chances) / len(own), sum(rights) / len(own)
        bins.append(CalibrationBin(place / BINS, (place + 1) / BINS, len(own), *means))
    if not bins:
        return None
    total = len(predictions)
    error = sum(b.count * abs(b.predicted - b.agreed) for b in bins) / total
    return Calibration(tuple(bins), error, total, slope)


def agreement_intervals(
    items: Sequence[RankedScores], *, top_score: float | None, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals of the measures of `agreement`, resampling groups (message trees).

    Every measure is a sum over instructions or pairs divided by another, so a group is worked once
    and only its sums are resampled. See `agreement.bootstrap_interval` for what they mean.
    """
    name = operator.attrgetter("group")
    groups = [list(part) for _, part in groupby(sorted(items, key=name), key=name)]
    sums = [_sums(agreement(part, top_score=top_score)) for part in groups]
    found: dict[str, Interval] = {}
    for measure in sums[0] if sums else ():
        parts, wholes = zip(*(own[measure] for own in sums), strict=True)
        found[measure] = ratio_interval(parts, wholes, seed=seed)
    return found


def _sums(found: Agreement) -> dict[str, tuple[float, float]]:
    """Each measure as a part and its whole."""
    pairs = found.pairs
    decided, scored = pairs.agree + pairs.disagree, pairs.total - pairs.unscored
    means = {
        "best_precision": (found.best_precision, found.best_count),
        "exact_match": (found.exact_match, found.ordered),
        "spearman": (found.spearman, found.correlated),
        "kendall": (found.kendall, found.correlated),
        "scored": (found.scored, found.replies),
    }
    return {
        "accuracy": (pairs.agree, decided),
        "accuracy_ties_half": (pairs.agree + pairs.tied / 2, scored),
        "tie_rate": (pairs.tied, scored),
        **{name: ((mean or 0.0) * count, count) for name, (mean, count) in means.items()},
    }


def _known(item: RankedScores) -> list[tuple[float, float]]:
    return [(r, s) for r, s in zip(item.ranks, item.scores, strict=True) if s is not None]
