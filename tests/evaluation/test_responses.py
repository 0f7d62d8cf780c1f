"""Measures of responses and of comparisons: counted by hand, enumerated, fitted a second time."""

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from self_rewarding_lm import measure_responses
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.evaluation.agreement import RankedScores, agreement
from self_rewarding_lm.evaluation.judge_quality import (
    agreement_intervals,
    calibration,
    calibration_of_scores,
    calibration_of_verdicts,
    position_bias,
)
from self_rewarding_lm.evaluation.responses import (
    distinct_n,
    length_controlled,
    outcome,
    pass_at_k,
    repetition,
    win_rates,
)
from self_rewarding_lm.evaluation.verifying import accuracy, pass_at
from self_rewarding_lm.records import Judgement
from self_rewarding_lm.stats import fit_logistic, ratio_interval, wilson_interval
from tests.support.intervals import bootstrap_interval
from tests.support.intervals import pairwise_interval as of_pairs


def test_distinct_and_repeated_ngrams_are_those_a_reader_counts():
    words = list("ababab")
    # 6 words, 2 different; 5 twos: ab ba ab ba ab, 2 different; 4 threes: aba bab aba bab
    assert [distinct_n([words], n) for n in (1, 2, 3)] == [2 / 6, 2 / 5, 2 / 4]
    assert repetition(words) == 1 / 2
    assert distinct_n([["a"], ["a"]], 1) == 1 / 2 and distinct_n([["a"], ["a"]], 2) is None
    assert repetition(["a", "b"]) is None


def test_responses_are_measured_one_by_one_and_together():
    found = measure_responses(["a b a b a b", "c d", "  "])
    assert found.count == 3 and found.characters == (11 + 3 + 2) / 3 and found.words == 8 / 3
    assert found.distinct == {1: 4 / 8, 2: 3 / 6, 3: 2 / 4}
    assert found.repetition == 1 / 2  # of the one response that has three words in a row
    assert found.empty == 1 / 3
    nothing = measure_responses([])
    assert (nothing.count, nothing.words, nothing.repetition) == (0, None, None)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            choices = list(combinations(range(n), k))
            lucky = sum(any(i < c for i in chosen) for chosen in choices)
            assert pass_at_k(n, c, k) == pytest.approx(lucky / len(choices))
    assert pass_at_k(4, 1, 2) == 1 / 2  # by hand: 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6


def test_pass_at_k_of_prompts_is_a_mean_and_leaves_out_those_with_too_few_responses():
    assert pass_at([(4, 1), (4, 4), (2, 0)], 4) == {
        1: pytest.approx((1 / 4 + 1 + 0) / 3),
        2: pytest.approx((1 / 2 + 1 + 0) / 3),
        4: pytest.approx((1 + 1) / 2),
    }
    assert accuracy([(4, 1), (4, 4), (2, 0)]).value == 5 / 10
    for wrong in ((2, 1, 3), (2, 3, 1), (2, 1, 0)):
        with pytest.raises(ConfigError, match="Sample more responses"):
            pass_at_k(*wrong)


def test_wilsons_interval_is_scipys_and_holds_the_shares_that_z_does_not_refuse():
    stats = pytest.importorskip("scipy.stats")
    for wins, total in ((0, 10), (3, 10), (10, 10), (55, 100), (125, 250)):
        theirs = stats.binomtest(wins, total).proportion_ci(method="wilson")
        assert wilson_interval(wins, total) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert wilson_interval(0, 0) is None


def test_a_ratio_interval_of_two_places_has_their_values_as_its_ends():
    assert ratio_interval([2, 1], [2, 2]) == (0.5, 1.0)
    assert ratio_interval([1], [2]) is None and ratio_interval([0, 0], [0, 0]) is None


def ascended(features, outcomes, steps=4000):
    """The same maximum by plain gradient ascent."""
    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        chances = 1 / (1 + np.exp(-features @ weights))
        weights += 4 / len(outcomes) * features.T @ (outcomes - chances)
    return weights


def test_the_logistic_fit_is_that_of_gradient_ascent_and_of_scipy():
    draw = np.random.default_rng(3)
    features = np.column_stack([np.ones(80), draw.normal(size=(80, 2))])
    outcomes = draw.choice([0.0, 0.5, 1.0], size=80)
    own = fit_logistic(features, outcomes)
    assert own == pytest.approx(ascended(features, outcomes), abs=1e-6)
    optimize = pytest.importorskip("scipy.optimize")

    def loss(weights):
        logits = features @ weights
        return np.logaddexp(0, logits).sum() - outcomes @ logits

    assert own == pytest.approx(optimize.minimize(loss, np.zeros(3), tol=1e-12).x, abs=1e-5)


def test_known_weights_come_back_where_outcomes_are_their_exact_expectations():
    draw = np.random.default_rng(0)
    features = np.column_stack([np.ones(50), draw.normal(size=50)])
    weights = np.array([0.7, -1.3])
    outcomes = 1 / (1 + np.exp(-features @ weights))
    assert fit_logistic(features, outcomes) == pytest.approx(weights, abs=1e-5)


def test_outcomes_that_can_be_told_apart_entirely_still_have_a_fit():
    features = np.column_stack([np.ones(4), [-2.0, -1.0, 1.0, 2.0]])
    found = fit_logistic(features, np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite(found).all() and found[1] > 5
    assert length_controlled(np.ones(5), np.full((5, 2), 7.0)) > 0.999


def test_the_length_controlled_rate_takes_off_just_what_length_adds():
    # the first wins by a bias for length alone: sigmoid(2 tanh(d / std)) is its exact win rate
    lengths = np.array([[100.0 + 10 * i, 100.0] for i in range(-3, 9)])
    difference = lengths[:, 0] - lengths[:, 1]
    term = np.tanh(difference / difference.std())
    for skill in (0.0, 0.8):
        outcomes = 1 / (1 + np.exp(-(skill + 2 * term)))
        assert outcomes.mean() > 1 / (1 + np.exp(-skill)) + 0.05
        found = length_controlled(outcomes, lengths)
        assert found == pytest.approx(1 / (1 + np.exp(-skill)), abs=1e-5)


def test_equal_lengths_change_nothing():
    outcomes = np.array([1.0, 0.0, 1.0, 0.5])
    assert length_controlled(outcomes, np.full((4, 2), 9.0)) == pytest.approx(outcomes.mean())


def test_comparisons_are_counted_and_unknown_ones_left_out():
    found = win_rates([1, 0.5, None, 0, 1], [(3.0, 3.0)] * 5)
    assert (found.wins, found.ties, found.losses, found.unknown, found.prompts) == (2, 1, 1, 1, 4)
    assert found.win_rate.value == 2.5 / 4 and found.won.value == 2 / 4
    assert found.won.interval == wilson_interval(2, 4)
    assert found.length_controlled.value == pytest.approx(2.5 / 4, abs=1e-6)
    low, high = found.win_rate.interval
    assert 0 <= low < 2.5 / 4 < high <= 1
    assert win_rates([1, 0]).length_controlled.value is None
    assert win_rates([None]).win_rate.value is None


def test_the_interval_resamples_prompts_and_not_responses():
    # resamples of two prompts: the first alone 1, the second alone 0, both 1/2
    outcomes, groups = [1, 1, 0, 0], ["p", "p", "q", "q"]
    assert win_rates(outcomes, groups=groups).win_rate.interval == (0.0, 1.0)
    assert win_rates(outcomes, groups=["p"] * 4).win_rate.interval is None
    with pytest.raises(DataError, match="an outcome is 1"):
        win_rates([0.7])


def test_scores_decide_who_wins():
    assert [outcome(2, 1), outcome(1, 2), outcome(1, 1), outcome(None, 1)] == [1, 0, 0.5, None]


ITEMS = [
    RankedScores("a", (0, 1, 2), (5, 3, 3)),
    RankedScores("b", (0, 1), (2, 4)),
    RankedScores("b", (1, 0, 0), (1, None, 5)),
    RankedScores("c", (0, 1), (3, 1)),
]


def test_the_interval_of_each_measure_is_that_of_resampling_the_measure_itself():
    found = agreement_intervals(ITEMS, top_score=5)
    measured = cache(lambda some: agreement(some, top_score=5))  # three groups: 27 resamples
    for name in ("best_precision", "exact_match", "spearman", "kendall", "scored"):
        naive = bootstrap_interval(ITEMS, lambda some, n=name: getattr(measured(tuple(some)), n))
        assert found[name] == pytest.approx(naive), name
    assert found["accuracy"] == of_pairs(ITEMS)
    assert found["accuracy_ties_half"] == of_pairs(ITEMS, ties_half=True)


def compared(one, other, score):
    return Judgement(f"{one}/vs/{other}", (one, other), "judge", score)


def test_a_judge_that_likes_the_first_place_shows_it():
    always = [compared("a", "b", 1.0), compared("b", "a", 1.0), compared("c", "d", 1.0)]
    found = position_bias([*always, compared("d", "c", 0.0), compared("e", "f", None)])
    assert found is not None
    assert (found.first, found.second, found.ties) == (3, 1, 0) and found.first_share == 3 / 4
    assert (found.compared, found.consistent, found.consistency) == (2, 1, 1 / 2)
    assert position_bias([Judgement("j", ("a",), "judge", 3.0)]) is None


def test_calibration_is_what_a_reader_computes():
    # four pairs at 0.75 of which two came so, one at 0.95 that did
    found = calibration([(0.75, 1), (0.75, 1), (0.75, 0), (0.75, 0), (0.95, 1)])
    assert found is not None
    assert [(b.low, b.high, b.count) for b in found.bins] == [(0.7, 0.8, 4), (0.9, 1.0, 1)]
    assert [b.agreed for b in found.bins] == [0.5, 1.0]
    assert found.error == pytest.approx((4 * 0.25 + 0.05) / 5)
    assert calibration([]) is None


def test_a_pairwise_judges_probabilities_are_the_mean_of_both_orders():
    judged = [compared("x/0", "x/1", 0.9), compared("x/1", "x/0", 0.3)]  # 0.8 for x/0
    right = calibration_of_verdicts(judged, {"x/0": 0.0, "x/1": 1.0})
    wrong = calibration_of_verdicts(judged, {"x/0": 1.0, "x/1": 0.0})
    assert right is not None and wrong is not None
    assert right.bins[0].predicted == wrong.bins[0].predicted == pytest.approx(0.8)
    assert (right.bins[0].agreed, wrong.bins[0].agreed) == (1.0, 0.0)
    assert calibration_of_verdicts(judged, {"x/0": 1.0, "x/1": 1.0}) is None


def test_the_slope_of_scores_is_the_log_odds_of_agreement_a_point():
    # one point apart: three of four pairs as people ordered them, so log(3)
    items = [RankedScores(str(i), (0, 1), (2, 1) if i < 3 else (1, 2)) for i in range(4)]
    found = calibration_of_scores(items)
    assert found is not None and found.slope == pytest.approx(math.log(3), abs=1e-4)
    assert found.error == pytest.approx(0, abs=1e-5) and found.bins[0].agreed == 3 / 4
    assert calibration_of_scores([RankedScores("x", (0, 0), (1, 2))]) is None
