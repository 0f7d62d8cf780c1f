"""The measures of a judge against human ranks: by hand, by SciPy, by enumeration."""

import math
import random
from dataclasses import asdict, replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
from scipy import stats

from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.evaluation.agreement import (
    PairCounts,
    RankedScores,
    agreeing,
    agreement,
    orders_agree,
    pair_counts,
)
from self_rewarding_lm.stats import kendall_tau_b, spearman
from tests.support.intervals import bootstrap_interval, pairwise_interval


def item(ranks, scores, *, group="tree", best=None):
    return RankedScores(group, tuple(ranks), tuple(scores), best)


def random_items(seed, *, count=60, groups=12, missing=0.15):
    """Instructions of 1 to 6 replies with ties in ranks and in scores."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        size = draw.randint(1, 6)
        ranks = [float(draw.randint(0, size - 1)) for _ in range(size)]
        scores = [
            None if draw.random() < missing else float(draw.randint(0, 5)) for _ in range(size)
        ]
        items.append(item(ranks, scores, group=f"tree {number % groups}"))
    return items


def pooled(items):
    return sum(map(pair_counts, items), PairCounts())


def test_pairs_of_one_instruction_by_hand():
    """Ranks 0 1 2 3 and scores 5 3 3 -: 0>1 and 0>2 agree, 1-2 ties, three pairs have no score."""
    assert pair_counts(item([0, 1, 2, 3], [5, 3, 3, None])) == PairCounts(2, 0, 1, 3)
    assert pair_counts(item([1, 0], [4.0, 3.5])) == PairCounts(disagree=1)


def test_replies_that_people_did_not_order_make_no_pair():
    assert pair_counts(item([0, 1, 1], [5, 2, 4])) == PairCounts(agree=2)
    assert pair_counts(item([2, 2], [5, None])) == PairCounts()


def test_counts_add_up_and_give_the_three_shares_by_hand():
    counts = PairCounts(5, 3, 1, 7) + PairCounts(1, 0, 2, 1)
    assert counts == PairCounts(6, 3, 3, 8)
    assert counts.total == 20
    assert counts.accuracy == pytest.approx(6 / 9)
    assert counts.accuracy_ties_half == pytest.approx(7.5 / 12)
    assert counts.tie_rate == pytest.approx(3 / 12)


def test_a_share_of_nothing_is_unknown():
    nothing = PairCounts(unscored=4)
    assert (nothing.accuracy, nothing.accuracy_ties_half, nothing.tie_rate) == (None, None, None)
    only_ties = PairCounts(tied=2)
    assert (only_ties.accuracy, only_ties.accuracy_ties_half, only_ties.tie_rate) == (None, 0.5, 1)


@pytest.mark.parametrize("seed", range(5))
def test_turning_every_score_round_turns_the_accuracy_round(seed):
    items = random_items(seed)
    turned = [
        replace(one, scores=tuple(None if s is None else -s for s in one.scores)) for one in items
    ]
    there, back = pooled(items), pooled(turned)
    assert (back.agree, back.disagree) == (there.disagree, there.agree)
    assert (back.tied, back.unscored) == (there.tied, there.unscored)
    assert there.accuracy_ties_half + back.accuracy_ties_half == pytest.approx(1)


@pytest.mark.parametrize(
    ("ranks", "scores", "best", "words"),
    [
        ((0, 1, 2), (5, 3), None, "3 ranks and 2 scores"),
        ((0, 1), (5, math.nan), None, "must be finite"),
        ((0, math.inf), (5, 4), None, "must be finite"),
        ((0, 1), (5, 4), 1.0, "no rank can be under best=1.0"),
    ],
)
def test_what_is_no_ranked_set_is_refused(ranks, scores, best, words):
    with pytest.raises(DataError, match=words):
        item(ranks, scores, best=best)


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(DataError, match="2 ranks and 1 score"):
        orders_agree([0, 1], [5])
    with pytest.raises(DataError, match="2 ranks and 3 scores"):
        agreeing([0, 1], [5, 4, 3])
    for correlation in (spearman, kendall_tau_b):
        with pytest.raises(DataError, match="same length"):
            correlation([1, 2], [1, 2, 3])


def test_correlations_by_hand():
    """Of 4 2 3 1 and 4 3 2 1 five pairs agree, one does not; squared rank differences add up to 2."""
    assert kendall_tau_b([4, 2, 3, 1], [4, 3, 2, 1]) == pytest.approx(4 / 6)
    assert spearman([4, 2, 3, 1], [4, 3, 2, 1]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    for correlation in (spearman, kendall_tau_b):
        assert correlation([0.1, 0.2, 7], [-1, 0, 0.5]) == 1.0
        assert correlation([0.1, 0.2, 7], [0.5, 0, -1]) == -1.0


@pytest.mark.parametrize("size", [2, 3, 5, 8, 30])
def test_correlations_are_those_of_scipy_with_many_ties(size):
    draw = np.random.default_rng(size)
    undefined = 0
    for _ in range(60):
        a, b = draw.integers(0, 4, size=(2, size)) / 2.0
        theirs = [math.nan, math.nan]
        if len(set(a)) > 1 and len(set(b)) > 1:
            theirs = [stats.spearmanr(a, b).statistic, stats.kendalltau(a, b).statistic]
        ours = [spearman(list(a), list(b)), kendall_tau_b(list(a), list(b))]
        undefined += ours == [None, None]
        assert [math.nan if v is None else v for v in ours] == pytest.approx(theirs, nan_ok=True)
    assert undefined < 60


def test_a_correlation_with_a_constant_is_unknown():
    for values in ([], [1.0], [3.0, 3.0, 3.0]):
        for correlation in (spearman, kendall_tau_b):
            assert correlation(values, list(range(len(values)))) is None
            assert correlation(list(range(len(values))), values) is None


def test_the_five_measures_by_hand():
    found = agreement(
        [
            item([0, 1, 2], [5, 4, 2]),  # exact; its 5 is the best
            item([1, 0], [5, 3]),  # turned round; its 5 is not the best
            item([0, 1, 2], [3, 3, 3]),  # all tied: no correlation
            item([0, 1], [5, None], group="other"),  # a miss; its 5 is the best
            item([0], [5], group="third"),  # nothing ordered: only its score is counted
        ],
        top_score=5,
    )
    assert found.pairs == PairCounts(agree=3, disagree=1, tied=3, unscored=1)
    assert found.pairs.accuracy == 3 / 4
    assert (found.best_precision, found.best_count) == (2 / 3, 3)
    assert found.exact_match == 1 / 4
    assert (found.spearman, found.kendall) == (0.0, 0.0)  # +1 and -1
    assert (found.correlated, found.uncorrelated) == (2, 2)
    assert found.scored == 10 / 11
    assert (found.groups, found.instructions, found.ordered, found.replies) == (3, 5, 4, 11)


def test_a_perfect_and_a_contrary_judge():
    items = [item(order, [5 - rank for rank in order]) for order in permutations(range(4))]
    found = agreement(items, top_score=5)
    assert found.pairs == PairCounts(agree=24 * 6)
    assert (found.best_precision, found.best_count) == (1, 24)
    assert (found.exact_match, found.spearman, found.kendall) == (1, 1, 1)
    contrary = agreement([item(one.ranks, one.ranks) for one in items], top_score=3)
    assert contrary.pairs == PairCounts(disagree=24 * 6)
    assert (contrary.best_precision, contrary.best_count) == (0, 24)
    assert (contrary.exact_match, contrary.spearman, contrary.kendall) == (0, -1, -1)


def test_a_constant_judge_has_ties_and_nothing_else():
    """The judge that says 4 to everything, known from models without EFT data."""
    found = agreement([item([0, 1, 2], [4, 4, 4])] * 3, top_score=5)
    assert (found.pairs.accuracy, found.pairs.tie_rate, found.exact_match) == (None, 1, 0)
    assert (found.spearman, found.kendall, found.uncorrelated) == (None, None, 3)
    assert (found.best_precision, found.best_count) == (None, 0)


def test_nothing_to_measure_is_unknown_and_no_error():
    found = asdict(agreement([], top_score=5))
    assert found.pop("pairs") == asdict(PairCounts())
    unknown = {"best_precision", "exact_match", "spearman", "kendall", "scored"}
    assert {name for name, value in found.items() if value is None} == unknown
    assert all(value == 0 for name, value in found.items() if name not in unknown)


def test_5_best_counts_the_top_score_exactly_and_all_top_ranked_replies():
    items = [item([1, 1, 2], [5, 5, 4.99]), item([1, 2], [4, 5])]
    found = agreement(items, top_score=5)
    assert (found.best_precision, found.best_count) == (2 / 3, 3)
    without = agreement(items, top_score=None)
    assert (without.best_precision, without.best_count) == (None, 0)
    assert without == replace(found, best_precision=None, best_count=0)


def test_where_the_best_reply_is_missing_nobody_takes_its_place():
    found = agreement([item([1, 2], [5, 3], best=0)], top_score=5)
    assert (found.best_precision, found.best_count) == (0, 1)
    assert agreement([item([0, 2], [5, 3], best=0)], top_score=5).best_precision == 1


def naive(items):
    """Exact match, Spearman and Kendall once more, by sorting and by SciPy."""
    exact, rhos, taus = [], [], []
    for one in (one for one in items if len(set(one.ranks)) > 1):
        known = [(r, s) for r, s in zip(one.ranks, one.scores, strict=True) if s is not None]
        # ordered by score, ties put against the judge: are the ranks in order?
        order = [rank for rank, _ in sorted(known, key=lambda two: (-two[1], -two[0]))]
        exact.append(len(known) == len(one.ranks) and order == sorted(order))
        if len({r for r, _ in known}) > 1 and len({s for _, s in known}) > 1:
            ranks, scores = np.array(known).T
            rhos.append(stats.spearmanr(-ranks, scores).statistic)
            taus.append(stats.kendalltau(-ranks, scores).statistic)
    return np.mean(exact), np.mean(rhos), np.mean(taus), len(rhos), len(exact)


@pytest.mark.parametrize("seed", range(5))
def test_the_measures_are_those_of_a_second_implementation(seed):
    items = random_items(seed)
    found = agreement(items, top_score=5)
    exact, rho, tau, correlated, ordered = naive(items)
    assert (found.exact_match, found.spearman, found.kendall) == pytest.approx((exact, rho, tau))
    assert (found.correlated, found.correlated + found.uncorrelated) == (correlated, ordered)
    assert found.ordered == ordered
    assert found.pairs.total == sum(
        one != other for each in items for one, other in combinations(each.ranks, 2)
    )


def test_a_missing_score_never_counts_as_a_number():
    """Two scored replies beside one without a score correlate as those two alone."""
    found = agreement([item([0, 1, 2], [4, 5, None])], top_score=None)
    assert (found.spearman, found.kendall, found.exact_match) == (-1, -1, 0)
    assert found.pairs == PairCounts(disagree=1, unscored=2)


@pytest.mark.parametrize(
    ("ranks", "scores", "each"),
    [
        ([0, 1, 2], [5, 4, 1], (True, True, True)),
        ([0, 1, 2], [5, 1, 4], (True, False, False)),  # only the best stands right
        ([0, 1, 2], [5, 3, 3], (True, False, False)),  # a tie is no agreement
        ([0, 1, 1], [5, 3, 4], (True, True, True)),  # equal ranks: either way
        ([0, 1, 1], [5, 3, 3], (True, True, True)),
        ([0, 1, 1], [4, 3, 4], (False, True, False)),
        ([0, 1, 2], [5, None, 3], (False, False, False)),  # a missing score has no order
        ([0, 1, 1], [5, 3, None], (False, True, False)),
        ([0, 0], [3, None], (True, False)),
        ([0], [3], (True,)),
    ],
)
def test_which_replies_stand_where_people_put_them(ranks, scores, each):
    assert agreeing(ranks, scores) == each
    assert orders_agree(ranks, scores) is all(each)


def test_orders_agree_over_every_order_and_tie_of_three_scores():
    """Of the 27 triples of the scores 1 2 3 just one falls strictly with the ranks."""
    accepted = [
        scores for scores in product([1, 2, 3], repeat=3) if orders_agree([0, 1, 2], scores)
    ]
    assert accepted == [(3, 2, 1)]
    accepted = [
        scores for scores in product([1, 2, 3], repeat=3) if orders_agree([0, 0, 1], scores)
    ]
    assert accepted == [s for s in product([1, 2, 3], repeat=3) if s[0] > s[2] and s[1] > s[2]]


def accuracy(items):
    return pooled(items).accuracy


def test_scores_may_be_numpy_numbers():
    one = item([0, 1, 2], np.array([3.0, 4.0, 1.0]))
    assert agreement([one], top_score=4.0) == agreement([item([0, 1, 2], [3, 4, 1])], top_score=4)
    assert agreeing([0, 1, 2], list(one.scores)) == (False, False, True)


@pytest.mark.parametrize("ties_half", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_fast_interval_is_the_general_one_to_the_last_bit(seed, ties_half):
    items = random_items(seed, count=40, groups=9, missing=0.5)

    def statistic(drawn):
        counts = pooled(drawn)
        return counts.accuracy_ties_half if ties_half else counts.accuracy

    settings = dict(samples=150, level=0.8, seed=seed)
    slow = bootstrap_interval(items, statistic, **settings)
    assert slow is not None
    assert pairwise_interval(items, ties_half=ties_half, **settings) == slow


def trees(*outcomes):
    """One tree for each outcome: its numbers of agreeing and of disagreeing pairs."""
    return [
        item([0, 1], [4, 3] if agrees else [3, 4], group=f"tree {number}")
        for number, (right, wrong) in enumerate(outcomes)
        for agrees in [True] * right + [False] * wrong
    ]


def test_the_interval_is_that_of_all_resamples_of_three_trees():
    """All 27 ordered draws of 3 trees; at levels 0.9 and 0.6 no atom ends near the percentiles."""
    outcomes = [(1, 0), (1, 3), (0, 2)]
    values = sorted(
        sum(right for right, _ in draw) / sum(map(sum, draw))
        for draw in product(outcomes, repeat=3)
    )
    for level in (0.9, 0.6):
        low, high = (1 - level) / 2 * 27, (1 + level) / 2 * 27
        assert all(abs(low - k) > 0.3 and abs(high - k) > 0.3 for k in range(28))
        expected = values[math.floor(low)], values[math.floor(high)]
        assert pairwise_interval(trees(*outcomes), samples=20_000, level=level) == expected


def test_with_one_pair_a_tree_the_interval_is_the_binomial_one():
    """Resampled agreements of 60 one-pair trees, 42 right, are Binomial(60, 0.7) by definition."""
    found = pairwise_interval(trees(*[(1, 0)] * 42, *[(0, 1)] * 18), samples=10_000)
    expected = stats.binom.ppf([0.025, 0.975], 60, 0.7) / 60
    assert found == pytest.approx(tuple(expected), abs=1.01 / 60)


def test_whole_trees_are_drawn_so_repeating_what_is_in_them_adds_no_certainty():
    items = random_items(3, groups=8)
    once, ten = (pairwise_interval(items * times, seed=5) for times in (1, 10))
    assert ten == once
    alone = [replace(one, group=str(number)) for number, one in enumerate(items * 10)]
    low, high = pairwise_interval(alone, seed=5)
    assert high - low < (once[1] - once[0]) / 2


def test_the_interval_depends_on_the_seed_and_not_on_the_order_of_items():
    items = random_items(4)
    found = pairwise_interval(items, samples=200, seed=1)
    assert pairwise_interval(items, samples=200, seed=1) == found
    assert pairwise_interval(items[::-1], samples=200, seed=1) == found
    assert pairwise_interval(items, samples=200, seed=2) != found


def test_a_wider_level_gives_a_wider_interval_around_the_figure():
    items = random_items(6)
    levels = [pairwise_interval(items, level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    for (low, high), (lower, higher) in pairwise(levels):
        assert lower < low < accuracy(items) < high < higher


def test_resamples_without_a_value_are_left_out():
    """One tree has a pair: a resample has the value 1, or none where that tree was not drawn."""
    items = [*trees((1, 0)), item([0, 1], [None, 3], group="unscored")]
    assert pairwise_interval(items) == (1, 1)
    assert bootstrap_interval(items, accuracy) == (1, 1)


def test_no_interval_from_fewer_than_two_trees_or_without_a_value():
    for items in ([], trees((3, 2)), [item([0, 1], [None, 3], group=name) for name in "ab"]):
        assert pairwise_interval(items) is None
        assert bootstrap_interval(items, accuracy) is None


def test_any_statistic_can_be_given():
    items = trees((1, 0), (1, 0), (0, 1))
    sizes = bootstrap_interval(items, len, samples=50)
    assert sizes == (3, 3)  # as many trees as there are, here of one instruction each
    exact = bootstrap_interval(
        items, lambda drawn: agreement(drawn, top_score=5).exact_match, samples=50
    )
    assert exact == pairwise_interval(items, samples=50)  # one measure: two replies and no ties


@pytest.mark.parametrize(
    "wrong", [dict(samples=0), dict(level=0.0), dict(level=1.0), dict(level=95)]
)
def test_wrong_settings_of_an_interval_are_refused_however_few_the_trees(wrong):
    with pytest.raises(ConfigError, match="samples >= 1 and 0 < level < 1"):
        pairwise_interval([], **wrong)
    with pytest.raises(ConfigError, match="samples >= 1 and 0 < level < 1"):
        bootstrap_interval([], accuracy, **wrong)
