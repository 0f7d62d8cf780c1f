"""Token paths of scores: what they share, where they go on, what their probabilities come to."""

import itertools
import math

import numpy as np
import pytest

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.score_trie import (
    MIN_SCORE_MASS,
    NodeChances,
    build_trie,
    expected_score,
    score_probabilities,
)

PREFIX = (90, 91)


def digit_by_digit(numbers):
    """Each digit is the token of its value, after two tokens of words."""
    return {float(n): PREFIX + tuple(map(int, str(n))) for n in numbers}


def all_digits():
    return [(*PREFIX, d) for d in range(10)]


def test_scores_of_one_token_each_have_the_root_alone():
    trie = build_trie(digit_by_digit(range(6)), all_digits())
    assert trie.context == PREFIX
    assert trie.paths == tuple((float(n), (n,)) for n in range(6))
    assert trie.levels() == [[()]]
    assert trie.children(()) == [0, 1, 2, 3, 4, 5]
    assert trie.endings() == []


def test_from_0_to_10_digit_by_digit_only_1_goes_on():
    trie = build_trie(digit_by_digit(range(11)), all_digits())
    assert trie.levels() == [[()], [(1,)]]
    assert trie.children((1,)) == [0]
    assert trie.endings() == [(1,)]


def test_from_1_to_100_digit_by_digit_the_inner_nodes_are_1_to_9_and_10():
    trie = build_trie(digit_by_digit(range(1, 101)), all_digits())
    assert trie.levels() == [[()], [(n,) for n in range(1, 10)], [(1, 0)]]
    assert trie.children((4,)) == list(range(10))
    assert trie.children((1, 0)) == [0]
    assert trie.endings() == [*((n,) for n in range(1, 10)), (1, 0)]


def test_a_digit_that_all_scores_begin_with_is_no_context():
    tens = digit_by_digit(range(10, 20))
    assert build_trie(tens, all_digits()).context == PREFIX
    assert build_trie(tens).context == (*PREFIX, 1)  # labels: nothing bounds what is shared


def test_a_joined_space_belongs_to_the_paths():
    trie = build_trie({4.0: (90, 44), 5.0: (90, 45)}, [(90, 40 + d) for d in range(10)])
    assert trie.context == (90,) and trie.paths == ((4.0, (44,)), (5.0, (45,)))


@pytest.mark.parametrize(
    ("encodings", "words"),
    [
        ({4.0: (90, 1), 5.0: (90, 1), 6.0: (90, 2)}, "encodes 5 like 4"),
        ({4.0: (90,), 5.0: (90, 1)}, "encodes 4 as nothing"),
    ],
)
def test_scores_that_cannot_be_told_apart_are_an_error(encodings, words):
    with pytest.raises(ConfigError, match=words):
        build_trie(encodings)


def writer(seed):
    """Someone who writes digits: after each text of up to 3 digits the chances of each digit and,
    last, of anything else."""
    random = np.random.default_rng(seed)
    texts = ["".join(p) for n in range(4) for p in itertools.product("0123456789", repeat=n)]
    return {text: random.dirichlet(np.ones(11)) for text in texts}


def written(chances):
    """Every text of up to 4 digits with its probability: what is written until no digit follows,
    cut at 4."""
    for length in range(5):
        for text in map("".join, itertools.product("0123456789", repeat=length)):
            p = math.prod(chances[text[:i]][int(text[i])] for i in range(length))
            yield text, p if length == 4 else p * chances[text][10]


@pytest.mark.parametrize("numbers", [range(6), range(11), range(1, 101)], ids=["5", "10", "100"])
def test_probabilities_are_those_of_writing_the_number_out(numbers):
    """Oracle: every text with its probability, given to the number that it says.

    A text says a number if it is that number; and if it goes on from one that no allowed number
    goes on from, it says that one (42 of 427).
    """
    chances = writer(seed=3)
    texts = list(map(str, numbers))
    going_on = {
        text for text in texts for other in texts if other != text and other[: len(text)] == text
    }
    truth = dict.fromkeys(map(float, numbers), 0.0)
    for text, p in written(chances):
        said = [t for t in texts if text == t or (text.startswith(t) and t not in going_on)]
        assert len(said) <= 1
        for number in said:
            truth[float(number)] += p

    trie = build_trie(digit_by_digit(numbers), all_digits())
    nodes = [node for level in trie.levels() for node in level]
    given = {
        node: NodeChances(
            {d: float(chances["".join(map(str, node))][d]) for d in trie.children(node)},
            float(chances["".join(map(str, node))][10]),
        )
        for node in nodes
    }
    assert score_probabilities(trie, given) == pytest.approx(truth, abs=1e-12)


def test_the_expected_score_by_hand():
    found = expected_score({1.0: 0.1, 2.0: 0.2, 4.0: 0.2})
    assert found.score == pytest.approx((0.1 + 0.4 + 0.8) / 0.5, abs=1e-9)
    assert found.mass == pytest.approx(0.5) and found.reason is None


def test_under_a_tenth_of_the_mass_there_is_no_score():
    assert MIN_SCORE_MASS == 0.1
    low = expected_score({1.0: 0.05, 2.0: 0.049})
    assert (low.score, low.mass, low.reason) == (None, pytest.approx(0.099), "low_mass")
    assert expected_score({1.0: 0.05, 2.0: 0.051}).reason is None


def test_what_is_no_number_is_no_score():
    found = expected_score({1.0: math.nan, 2.0: 0.5})
    assert (found.score, found.mass, found.reason) == (None, None, "not_finite")
