"""Bootstrap intervals of measures of agreement the slow way: every resample is measured anew."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import groupby

import numpy as np

from self_rewarding_lm.evaluation.agreement import PairCounts, RankedScores, pair_counts
from self_rewarding_lm.stats import bootstrap


def bootstrap_interval(
    items: Sequence[RankedScores],
    statistic: Callable[[Sequence[RankedScores]], float | None],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of `statistic`, resampling whole groups (cluster bootstrap).

    Each resample draws as many groups as there are, with replacement, and takes all their items:
    the replies of one tree are no independent evidence. `statistic` gives None where it is
    undefined; such resamples are left out. The same seed gives the same interval, whatever the
    order of the groups. None with fewer than two groups, or where no resample has a value. The
    method and its defaults are ours; the paper gives no intervals. Raises ConfigError for `samples`
    under 1 or a `level` not between 0 and 1.

    It says how far the figure would move with other trees of the same kind; the chance in the
    judge's sampling and in training is not in it. Models whose figures lie inside each other's
    intervals are not ranked by these data: no order of them may be read from the figures. With few
    groups it is too narrow, and where all groups give one value its width of 0 is no certainty.
    """
    parts = _by_group(items)

    def value(picks: np.ndarray) -> float | None:
        return statistic([item for pick in picks for item in parts[pick]])

    return bootstrap(value, len(parts), samples=samples, level=level, seed=seed)


def pairwise_interval(
    items: Sequence[RankedScores],
    *,
    ties_half: bool = False,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """`bootstrap_interval` of the pairwise accuracy: the same numbers, much faster.

    Pairs are counted once a group and only the counts are resampled. ties_half: the interval of
    `accuracy_ties_half` in place of `accuracy`. What `bootstrap_interval` says of the meaning of
    an interval holds here: it cannot rank models whose figures lie inside it.
    """
    parts = [sum(map(pair_counts, part), PairCounts()) for part in _by_group(items)]
    table = np.array([astuple(counts) for counts in parts], dtype=np.int64)

    def value(picks: np.ndarray) -> float | None:
        counts = PairCounts(*table[picks].sum(axis=0).tolist())
        return counts.accuracy_ties_half if ties_half else counts.accuracy

    return bootstrap(value, len(parts), samples=samples, level=level, seed=seed)


def _by_group(items: Sequence[RankedScores]) -> list[list[RankedScores]]:
    name = operator.attrgetter("group")
    return [list(part) for _, part in groupby(sorted(items, key=name), key=name)]
