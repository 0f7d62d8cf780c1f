"""Compared judgements: the worked case, other solvers, closed forms, judges whose truth is known."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest

from self_rewarding_lm.stages.meta_rewarding import (
    battles,
    best_and_worst,
    most_varied,
    position_weights,
    strengths,
    verdict,
)

WORKED = {(0, 1): 1, (1, 0): 1, (0, 2): 1, (2, 0): -1, (1, 2): 1, (2, 1): 1}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def rising(won: list[list[float]], e: list[float], l2: float) -> list[float]:
    """The gradient, entry by entry as the sum is written."""
    found = [-l2 * own for own in e]
    for m, n in permutations(range(len(e)), 2):
        slope = won[m][n] * (1 - sigma(e[m] - e[n]))
        found[m] += slope
        found[n] -= slope
    return found


def tables(count: int) -> list[np.ndarray]:
    """Battles as they come: of chance, with orders that were never won, and separable ones."""
    random = np.random.default_rng(0)
    found = [random.random((count, count)) for _ in range(3)]
    found += [table * (random.random((count, count)) < 0.3) for table in found]
    return [*found, np.triu(np.ones((count, count)), 1), np.zeros((count, count))]


# The worked case


def test_the_worked_case_to_the_number():
    weights = position_weights(5, 1)  # all but r_20 were won by the judgement shown first
    assert weights == (1 / 6, 5 / 6)
    won = battles(WORKED, 3, weights)
    small = 1 / 6
    assert won.tolist() == [[0, small, 1], [small, 0, small], [0, small, 0]]
    e = strengths(won)
    assert best_and_worst(e) == (0, 2) and e[0] > e[1] > e[2]
    # 0 and 2 mirror each other, so e = (x, 0, -x) with one equation left
    x = e[0]
    assert e[1] == pytest.approx(0, abs=1e-12) and e[2] == pytest.approx(-x, abs=1e-12)
    assert small * (sigma(-x) - sigma(x)) + sigma(-2 * x) - 0.01 * x == pytest.approx(0, abs=1e-12)
    assert x == pytest.approx(1.12, abs=0.005)


def test_the_favoured_place_counts_less():
    assert position_weights(3, 1) == (0.25, 0.75)
    assert position_weights(0, 0) == (0.5, 0.5)
    assert battles({(0, 1): 1}, 2, (0.25, 0.75)).tolist() == [[0, 0.25], [0, 0]]
    assert battles({(0, 1): -1}, 2, (0.25, 0.75)).tolist() == [[0, 0], [0.75, 0]]
    assert not battles({(0, 1): 0}, 2, (0.25, 0.75)).any()


def test_a_judge_that_always_takes_the_first_says_nothing():
    verdicts = dict.fromkeys(permutations(range(4), 2), 1)
    won = battles(verdicts, 4, position_weights(12, 0))
    assert not won.any() and best_and_worst(strengths(won)) is None


def test_a_score_over_a_half_is_a_win_of_the_first():
    assert [verdict(s) for s in (1.0, 0.51, 0.5, 0.2, 0.0, None)] == [1, 1, 0, -1, -1, 0]


# The fit


@pytest.mark.parametrize("l2", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("count", [2, 3, 11])
def test_the_gradient_is_zero_at_the_optimum(count, l2):
    for won in tables(count):
        e = strengths(won, l2=l2)
        assert max(map(abs, rising(won.tolist(), e, l2))) < 1e-10
        assert sum(e) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("l2", [0.01, 1.0])
def test_scipy_finds_the_same(l2):
    optimize = pytest.importorskip("scipy.optimize")
    for won in tables(5):

        def falling(e, won=won):
            gaps = e[:, None] - e[None, :]
            np.fill_diagonal(won, 0)
            return (won * np.logaddexp(0, -gaps)).sum() + l2 / 2 * (e @ e)

        found = optimize.minimize(falling, np.zeros(5), method="BFGS", options={"gtol": 1e-8})
        assert strengths(won, l2=l2) == pytest.approx(found.x.tolist(), abs=1e-4)


def test_plain_gradient_ascent_climbs_to_the_same_place():
    won = battles(WORKED, 3, (1 / 6, 5 / 6)).tolist()
    e = [0.0, 0.0, 0.0]
    for _ in range(3000):
        e = [x + g for x, g in zip(e, rising(won, e, 0.01), strict=True)]
    assert strengths(np.array(won)) == pytest.approx(e, abs=1e-9)


def test_of_two_the_difference_is_the_log_of_their_wins():
    """sigma(d) = 3/4 where one wins three battles of four: d = ln 3."""
    e = strengths(np.array([[0.0, 3.0], [1.0, 0.0]]), l2=1e-12)
    assert e[0] - e[1] == pytest.approx(math.log(3), abs=1e-9)


def test_what_wins_everything_stays_finite():
    """Of one battle won in both orders d solves sigma(-d) = l2 d/2; without l2 it is infinite."""
    d = np.ptp(strengths(np.array([[0.0, 1.0], [0.0, 0.0]])))
    assert sigma(-d) == pytest.approx(0.01 * d / 2, abs=1e-12) and d == pytest.approx(
        3.91, abs=0.01
    )
    order = strengths(np.triu(np.ones((11, 11)), 1), l2=1e-6)
    assert all(math.isfinite(x) for x in order) and order == sorted(order, reverse=True)


def test_another_order_of_the_judgements_gives_the_same_strengths():
    for won in tables(6):
        shuffle = np.random.default_rng(1).permutation(6)
        moved = strengths(won[np.ix_(shuffle, shuffle)])
        assert moved == pytest.approx([strengths(won)[i] for i in shuffle], abs=1e-9)


# Judges whose truth is known


def test_the_true_strengths_come_out_of_expected_battles():
    """At B_mn = sigma(e_m - e_n) the gradient is sigma(d) sigma(-d) - sigma(-d) sigma(d) = 0."""
    true = [1.5, 0.3, 0.0, -0.7, -1.1]
    won = np.array([[sigma(a - b) for b in true] for a in true])
    assert strengths(won, l2=1e-9) == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.0, 3.0])
def test_a_population_of_biased_judges_gives_the_true_order(bias):
    """Of 1000 judges the first place wins in round(1000 sigma(e_m - e_n + bias)): their battles
    are added. Whoever is stronger wins at least as much against all others, and loses no more."""
    judges, true = 1000, [-0.8, 1.2, 0.1, -0.2, 0.6]
    places = list(permutations(range(5), 2))
    firsts = {(m, n): round(judges * sigma(true[m] - true[n] + bias)) for m, n in places}
    first = sum(firsts.values())
    weights = position_weights(first, judges * len(places) - first)
    won = np.zeros((5, 5))
    for judge in range(judges):
        verdicts = {place: 1 if judge < firsts[place] else -1 for place in places}
        won += battles(verdicts, 5, weights)
    found = strengths(won)
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=true.__getitem__)
    assert best_and_worst(found) == (1, 0)


def test_weights_set_right_what_a_biased_judge_says_once_in_each_order():
    """0 beats 1 from the second place, against the judge's habit; 1 beats 2 from the first alone.
    The habit is worth little: 0 is best, and 1 and 2, each won by its place, are nearly alike."""
    verdicts = {(0, 1): 1, (1, 0): -1, (1, 2): 1, (2, 1): 1, (0, 2): 1, (2, 0): 1}
    won = battles(verdicts, 3, position_weights(5, 1))
    assert won[0, 1] == pytest.approx(1) and won[1, 2] == won[2, 1] == won[0, 2] == 1 / 6
    assert best_and_worst(strengths(won)) == (0, 1)


# Picks


def test_where_all_are_equal_there_is_no_pair():
    circle = {(0, 1): 1, (1, 0): -1, (1, 2): 1, (2, 1): -1, (2, 0): 1, (0, 2): -1}
    assert best_and_worst(strengths(battles(circle, 3, (0.3, 0.7)))) is None
    assert best_and_worst([]) is None and best_and_worst([0.5]) is None
    assert best_and_worst([0.1, 0.1 + 1e-12]) is None


def test_of_equals_the_first_is_taken_whatever_rounding_says():
    assert best_and_worst([0.0, 1.0, -1.0, 1.0 + 1e-12, -1.0 - 1e-12]) == (1, 2)


def test_the_response_whose_judgements_differ_most():
    assert most_varied([[4, 4, 5], [1, 5, 1, 2], [0, 2]]) == 1  # variances 2/9, 2.69, 1
    assert most_varied([[0, 2], [2, 0], [1, 1]]) == 0
    assert most_varied([[3, None], [None, None], [], [2, 2]]) is None
    assert most_varied([[3, None], [None, 2, 3]]) == 1
    assert most_varied([]) is None


def test_the_order_of_judgements_does_not_decide_between_equal_variances():
    scores = [0.1, 0.2, 0.3, 0.7]
    for one, other in combinations(permutations(scores), 2):
        assert most_varied([one, other]) == 0
