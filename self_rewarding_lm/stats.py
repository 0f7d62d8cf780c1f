"""Rank correlations, intervals by Wilson and by bootstrap, and a logistic fit. Pure numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float

from self_rewarding_lm.errors import ConfigError, DataError


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's correlation of two lists of one length, ties given their average rank.

    None if it is undefined: fewer than two values, or all of one list the same.
    """
    # a value's average rank, doubled and centred, is how many are smaller less how many are greater
    return _cosine([sum(row) for row in _signs(a)], [sum(row) for row in _signs(b)])


def kendall_tau_b(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists of one length: corrected for ties in either.

    None if it is undefined: fewer than two values, or all of one list the same.
    """
    return _cosine(list(chain(*_signs(a))), list(chain(*_signs(b))))


def bootstrap(
    value: Callable[[np.ndarray], float | None],
    groups: int,
    *,
    samples: int,
    level: float,
    seed: int,
) -> tuple[float, float] | None:
    """Percentile interval of `value` over resamples of the groups, drawn with replacement.

    value: of the numbers of the groups drawn (groups,); a resample for which it is None is left
    out. level: of the interval, such as 0.95. None with fewer than two groups or no value.
    """
    if samples < 1 or not 0 < level < 1:
        raise ConfigError(
            "a bootstrap interval needs samples >= 1 and 0 < level < 1; "
            f"got samples={samples}, level={level}."
        )
    generator = np.random.default_rng(seed)
    draws = range(samples if groups > 1 else 0)
    values = [value(generator.integers(groups, size=groups)) for _ in draws]
    known = [number for number in values if number is not None]
    if not known:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _signs(values: Sequence[float]) -> list[list[int]]:
    """+1, 0 or -1 for each value (row) against each (column): greater, the same, smaller."""
    return [[int(one > other) - int(one < other) for other in values] for one in values]


def _cosine(a: Sequence[int], b: Sequence[int]) -> float | None:
    """a.b / (|a| |b|); None if one of them is 0."""
    if len(a) != len(b):
        raise DataError("a correlation needs two lists of the same length.")
    squares = sum(x * x for x in a) * sum(y * y for y in b)
    products = sum(x * y for x, y in zip(a, b, strict=True))
    return products / math.sqrt(squares) if squares else None


Interval = tuple[float, float] | None


RIDGE = 1e-6  # on the weights of a logistic fit, which have no maximum if all outcomes are 1


STEPS = 100  # of Newton's method at most


def wilson_interval(successes: int, total: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (1927); None for 0/0. level: 0.95 or 0.9."""
    if not total:
        return None
    z = {0.95: 1.959964, 0.9: 1.644854}[level]
    share, extra = successes / total, z * z / total
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / total + extra / (4 * total)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_interval(
    parts: Sequence[float],
    wholes: Sequence[float],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of sum(parts) / sum(wholes), resampling places (bootstrap).

    A place is a group of dependent numbers: a tree, a prompt. Resamples of 0/0 are left out. None
    with fewer than two places or if no resample has a value.
    """
    columns = np.array([parts, wholes], dtype=np.float64)

    def value(picks: np.ndarray) -> float | None:
        part, whole = columns[:, picks].sum(axis=1)
        return part / whole if whole else None

    return bootstrap(value, len(parts), samples=samples, level=level, seed=seed)


@dataclass(frozen=True)
class Rate:
    """A share, or another mean, with its interval."""

    value: float | None
    interval: Interval


def fit_logistic(
    features: Float[np.ndarray, "n d"], outcomes: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " d"]:
    """The weights w that make outcomes in [0, 1] likeliest under sigmoid(features @ w).

    Newton's method in float64; a step that overshoots is halved. 1e-6 / 2 |w|^2 is taken off the
    log-likelihood, so that there is a maximum even if the features separate the outcomes.
    """

    def objective(weights: np.ndarray) -> float:
        logits = features @ weights
        likelihood = outcomes @ logits - np.logaddexp(0, logits).sum()
        return float(likelihood - RIDGE / 2 * weights @ weights)

    weights = np.zeros(features.shape[1])
    reached = objective(weights)
    for _ in range(STEPS):
        chances = 1 / (1 + np.exp(-(features @ weights)))
        gradient = features.T @ (outcomes - chances) - RIDGE * weights
        curvature = (features.T * (chances * (1 - chances))) @ features
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(weights)), gradient)
        while (value := objective(weights + step)) < reached and np.abs(step).max() > 1e-12:
            step = step / 2
        weights, reached = weights + step, value
        if np.abs(step).max() < 1e-10:
            break
    return weights
