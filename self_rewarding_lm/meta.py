"""Compared judgements: position weights, battles, strengths (arXiv:2407.19594, 2.2).

Pure arithmetic on verdicts and scores; nothing of prompts, texts, models or files.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import pvariance

import numpy as np

EQUAL = 1e-9
"""Strengths nearer to each other than this are equal: what is left are rounding errors."""
STEPS = 100  # of Newton's method at most; ten are usual

Verdicts = Mapping[tuple[int, int], int]
"""r_mn for (m shown first, n shown second): 1 the first is better, -1 the second, 0 neither."""


def most_varied(scores: Sequence[Sequence[float | None]]) -> int | None:
    """Which response's judgements differ most: the highest variance of their scores.

    scores: of each response those of its judgements, None where none could be read; these do not
    count. Of equals the first; None where no response has two different scores.
    """
    known = [[score for score in own if score is not None] for own in scores]
    variances = [pvariance(own) if own else 0.0 for own in known]  # exact sums: in any order alike
    best = max(range(len(scores)), key=lambda i: (variances[i], -i), default=None)
    return best if best is not None and variances[best] > 0 else None


def verdict(score: float | None) -> int:
    """1, -1 or 0 of a comparison's score: over a half, under it, or neither (None included)."""
    return 0 if score is None else (score > 0.5) - (score < 0.5)


def position_weights(wins_first: int, wins_second: int) -> tuple[float, float]:
    """What a win counts in the first and in the second place: o1 = w2 / (w1 + w2), o2 = 1 - o1.

    w1, w2: how often the judgement shown first, or second, won in the whole data set. The place
    that wins more often counts less. Without any win both are 1/2.
    """
    wins = wins_first + wins_second
    return (wins_second / wins, wins_first / wins) if wins else (0.5, 0.5)


def battles(verdicts: Verdicts, count: int, weights: tuple[float, float]) -> np.ndarray:
    """B (count, count): B_mn = o1 [r_mn = 1] + o2 [r_nm = -1], what m won over n.

    An order that is not in `verdicts` counts as 0. weights: (o1, o2) of `position_weights`.
    """
    first, second = weights
    won = np.zeros((count, count))
    for m, n in permutations(range(count), 2):
        won[m, n] = first * (verdicts.get((m, n)) == 1) + second * (verdicts.get((n, m)) == -1)
    return won


def strengths(won: np.ndarray, *, l2: float = 0.01) -> list[float]:
    """argmax over e of sum_mn B_mn log sigma(e_m - e_n) - l2/2 |e|^2; Elo is 400 e / ln 10.

    won: B (n, n), see `battles`; its diagonal does not count. l2 > 0: without it, judgements that
    win every battle have infinite strength. The default is ours: a normal prior of standard
    deviation 10, in which a single battle, won once in each order, gives a difference of 3.9. It
    does not grow with the number of battles, so that these decide where there are many.

    Newton's method. A step is shortened to log(1 + b)/b of itself, b the spread of its entries;
    as |g'''| <= g'' for g(t) = log(1 + e^-t), the sum rises with every such step.
    """
    won = np.where(np.eye(len(won), dtype=bool), 0.0, won)
    found = np.zeros(len(won))
    for _ in range(STEPS):
        losing = 1 / (1 + np.exp(found[:, None] - found[None, :]))  # sigma(e_n - e_m) at (m, n)
        flow = won * losing
        gradient = flow.sum(axis=1) - flow.sum(axis=0) - l2 * found
        bend = flow * (1 - losing)
        bend = bend + bend.T
        hessian = np.diag(bend.sum(axis=1) + l2) - bend
        step = np.linalg.solve(hessian, gradient)
        spread = float(np.ptp(step))
        if spread < 1e-15:
            break
        found = found + step * (np.log1p(spread) / spread)
    return found.tolist()


def best_and_worst(strengths: Sequence[float]) -> tuple[int, int] | None:
    """Places of the highest and the lowest strength, the first of equals; None where all are."""
    if not strengths or max(strengths) - min(strengths) <= EQUAL:
        return None
    high, low = max(strengths), min(strengths)
    best = next(i for i, e in enumerate(strengths) if e >= high - EQUAL)
    return best, next(i for i, e in enumerate(strengths) if e <= low + EQUAL)
