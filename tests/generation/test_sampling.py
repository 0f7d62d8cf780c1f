"""Sampling against a slow oracle in plain Python, and the noise against its definition."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import tensor

import self_rewarding_lm
from self_rewarding_lm.generation import sampling
from self_rewarding_lm.generation.sampling import (
    highest,
    inverse_cdf,
    penalise_repetition,
    sample_next,
    uniforms,
)
from self_rewarding_lm.records import stable_hash

DRAWS = 20_000
LEAST_P = 1e-4
SMALL = [1.5, -0.5, 0.25, 2.0, -3.0, 1.0, 0.0, -1.0]
INF = math.inf
ALMOST_ONE = math.nextafter(1.0, 0.0)


def distribution(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Each token's probability: temperature, then top-k, then top-p, then min-p.

    Every filter works on what the one before left, renormalised; tokens that tie with the last
    kept one are kept.
    """
    scores = [x / temperature for x in logits]
    weights = {i: math.exp(s - max(scores)) for i, s in enumerate(scores)}

    def at_least(floor):
        return {i: w for i, w in weights.items() if w >= floor}

    if top_k is not None:
        weights = at_least(sorted(weights.values(), reverse=True)[:top_k][-1])
    if top_p is not None:
        total, mass = math.fsum(weights.values()), 0.0
        for last in sorted(weights.values(), reverse=True):
            mass += last / total
            if mass >= top_p:
                break
        weights = at_least(last)
    if min_p is not None:
        weights = at_least(min_p * max(weights.values()))
    total = math.fsum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(logits))]


def draw(logits, seed, count=DRAWS, **settings):
    """How often each token comes in `count` draws with the noise of key `seed`."""
    noise = torch.from_numpy(uniforms(np.array([seed]), count)[0])
    row = tensor([logits], dtype=torch.float64)
    tokens = [
        sample_next(row.expand(len(part), -1), part, **settings) for part in noise.split(2_000)
    ]
    return torch.cat(tokens).bincount(minlength=len(logits)).tolist()


def p_value(counts, probabilities):
    """Of a chi-square test; bins with fewer than five expected draws are put together."""
    expected = [p * sum(counts) for p in probabilities]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0.0)
    big = [i for i, e in enumerate(expected) if e >= 5]
    small = [i for i, e in enumerate(expected) if 0 < e < 5]
    observed = [counts[i] for i in big] + [sum(counts[i] for i in small)] * bool(small)
    theory = [expected[i] for i in big] + [sum(expected[i] for i in small)] * bool(small)
    assert len(theory) >= 2
    return stats.chisquare(observed, theory).pvalue


FILTERS = [
    dict(zip(("top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((None, 5), (None, 0.85), (None, 0.1))
]


def named(settings):
    return "-".join(f"{k}={v}" for k, v in settings.items() if v is not None) or "none"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("filters", FILTERS, ids=named)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_frequencies_follow_the_enumerated_distribution(temperature, filters, seed):
    settings = {"temperature": temperature, **filters}
    counts = draw(SMALL, seed, **settings)
    assert p_value(counts, distribution(SMALL, **settings)) > LEAST_P


def test_each_filter_of_the_small_vocabulary_removes_something_of_its_own():
    """So that the test above cannot pass with a filter that does nothing."""
    kept = {named(f): sum(p > 0 for p in distribution(SMALL, **f)) for f in FILTERS}
    assert kept["none"] == 8
    assert kept["top_k=5"] == 5
    assert kept["top_p=0.85"] == 4
    assert kept["min_p=0.1"] == 5
    assert kept["top_k=5-top_p=0.85"] == 3


LARGE_PEAKED = (np.random.default_rng(7).standard_normal(300) * 3).tolist()
LARGE_FLAT = (np.random.default_rng(8).standard_normal(300) * 0.3).tolist()
LARGE = [
    (LARGE_PEAKED, {"top_k": 20}),
    (LARGE_PEAKED, {"top_p": 0.8}),  # the head's mass suffices
    (LARGE_PEAKED, {"min_p": 0.02}),
    (LARGE_PEAKED, {"top_k": 40, "top_p": 0.7}),
    (LARGE_PEAKED, {"top_k": 100, "top_p": 0.9, "min_p": 0.01}),
    (LARGE_FLAT, {}),
    (LARGE_FLAT, {"top_k": 100}),  # more than the head holds
    (LARGE_FLAT, {"top_p": 0.8}),  # the head's mass is short
    (LARGE_FLAT, {"min_p": 0.3}),
    (LARGE_FLAT, {"top_k": 100, "top_p": 0.9}),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("logits", "settings"),
    LARGE,
    ids=[("peaked-" if row is LARGE_PEAKED else "flat-") + named(s) for row, s in LARGE],
)
def test_frequencies_of_a_large_vocabulary_follow_the_enumerated_distribution(
    logits, settings, seed
):
    assert len(logits) > 4 * sampling.HEAD_SIZES[0]
    counts = draw(logits, seed, temperature=0.8, **settings)
    assert p_value(counts, distribution(logits, temperature=0.8, **settings)) > LEAST_P


def test_the_flat_row_is_one_whose_head_is_short_of_mass_and_the_peaked_row_is_not():
    kept = [
        sum(p > 0 for p in distribution(row, temperature=0.8, top_p=0.8))
        for row in (LARGE_PEAKED, LARGE_FLAT)
    ]
    assert kept[0] < sampling.HEAD_SIZES[0] < kept[1]


@pytest.mark.parametrize("sizes", [(64, 1024), (8, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.9}, {"top_k": 30}, {"min_p": 0.05}, {"top_k": 80, "top_p": 0.95, "min_p": 0.01}],
    ids=named,
)
def test_the_head_slice_gives_the_tokens_that_sorting_the_whole_vocabulary_gives(
    monkeypatch, sizes, dtype, filters
):
    """But for uniforms within 1e-5 of a step of the CDF, where rounding may decide."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 6.0, 300)[:, None]  # from flat to peaked, so both ways are taken
    logits = (spread * torch.randn(300, 600, generator=generator)).to(dtype)
    noise = torch.from_numpy(uniforms(np.arange(300), 1)[:, 0])
    monkeypatch.setattr(sampling, "HEAD_SIZES", sizes)
    quick = sample_next(logits, noise, temperature=0.9, **filters)
    monkeypatch.setattr(sampling, "HEAD_SIZES", ())
    whole = sample_next(logits, noise, temperature=0.9, **filters)
    for row in (quick != whole).nonzero().flatten().tolist():
        steps = np.cumsum(distribution(logits[row].tolist(), temperature=0.9, **filters))
        assert np.abs(steps - noise[row].item()).min() < 1e-5
    if dtype == torch.float64:
        assert torch.equal(quick, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "size"), [(40, 8), (16 * 33, 8), (16 * 33 + 15, 8), (16 * 300, 64), (5000, 1)]
)
def test_the_highest_logits_are_those_of_topk(vocabulary, size, dtype):
    """Whole numbers, many of which tie; rows with -inf, inf and NaN, as a model may give them."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-40, 40, (6, vocabulary), generator=generator).to(dtype)
    logits[1] = torch.arange(vocabulary).to(dtype)  # the highest are all in the last places
    logits[2] = -math.inf
    logits[2, 3] = 0.0
    logits[3, 7] = math.inf
    logits[4, -2] = math.nan
    logits[5] = 1.0
    values, columns = highest(logits, size)
    expected = logits.topk(size, dim=-1).values
    assert torch.equal(values.nan_to_num(99.0), expected.nan_to_num(99.0))
    picked = logits.gather(1, columns)
    assert torch.equal(picked.nan_to_num(99.0), values.nan_to_num(99.0))
    assert all(len(set(row)) == size for row in columns.tolist())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("vocabulary", [8, 1_000])
def test_temperature_0_is_the_argmax_in_every_dtype(dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, vocabulary, generator=generator).to(dtype)
    noise = torch.linspace(0, ALMOST_ONE, 50, dtype=torch.float64)
    expected = [row.index(max(row)) for row in logits.tolist()]
    for filters in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        assert sample_next(logits, noise, temperature=0, **filters).tolist() == expected


def test_a_uniform_picks_the_token_whose_part_of_the_cdf_it_falls_into():
    scores = tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64).log()
    for uniform, token in ((0.0, 0), (0.099, 0), (0.101, 1), (0.499, 1), (0.501, 2), (0.801, 3)):
        assert inverse_cdf(scores, tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_inverse_cdf_never_returns_a_token_without_probability(dtype, uniform):
    """The largest double below 1 is 1.0 once it is rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 50, generator=generator, dtype=torch.float64).to(dtype)
    banned = torch.rand(300, 50, generator=generator) < 0.9
    banned[torch.arange(300), torch.arange(300) % 50] = False
    banned[:, 0] |= torch.arange(300) % 50 != 0  # nearly all rows begin and end with a banned one
    banned[:, -1] |= torch.arange(300) % 50 != 49
    scores = scores.masked_fill(banned, -INF)
    picked = inverse_cdf(scores, torch.full((300,), uniform, dtype=torch.float64))
    assert scores.gather(-1, picked[:, None]).isfinite().all()


def test_the_extreme_uniforms_give_the_first_and_the_last_kept_token_in_vocabulary_order():
    for size in (8, 1_000):  # the whole way and the head slice
        logits = torch.full((2, size), -20.0)
        logits[:, [3, 5, 6]] = tensor([1.0, 3.0, 2.0])
        noise = tensor([0.0, ALMOST_ONE], dtype=torch.float64)
        assert sample_next(logits, noise, top_k=3).tolist() == [3, 6]


@pytest.mark.parametrize("size", [8, 1_000])
@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {1, 4, 6}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.75}, {1, 4, 6}),
        ({"min_p": 0.4}, {1, 4, 6}),
        ({"top_k": 2, "top_p": 0.3}, {1}),
    ],
    ids=str,
)
def test_tokens_that_tie_with_the_last_kept_one_are_kept_too(size, filters, kept):
    """Probabilities 0.5, and 0.25 twice; all others have next to none."""
    logits = torch.full((2_000, size), -40.0, dtype=torch.float64)
    logits[:, [1, 4, 6]] = tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    noise = torch.from_numpy(uniforms(np.array([5]), 2_000)[0])
    assert set(sample_next(logits, noise, **filters).tolist()) == kept


def test_ties_with_the_last_of_top_k_count_in_the_mass_of_top_p_however_many_they_are():
    """Five tokens of weight 10 and 150 of weight 1: top-k 10 keeps all of them, a mass of 200."""
    logits = [math.log(10)] * 5 + [0.0] * 150 + [-40.0] * 145
    settings = {"top_k": 10, "top_p": 0.4}
    assert sum(p > 0 for p in distribution(logits, **settings)) == 155
    assert p_value(draw(logits, 0, **settings), distribution(logits, **settings)) > LEAST_P


@pytest.mark.parametrize("size", [8, 1_000])
def test_filters_that_keep_everything_change_nothing(size):
    logits = torch.randn(400, size, generator=torch.Generator().manual_seed(3))
    noise = torch.from_numpy(uniforms(np.arange(400), 1)[:, 0])
    plain = sample_next(logits, noise)
    for filters in ({"top_p": 1.0}, {"min_p": 0.0}, {"top_k": size}, {"top_k": 10 * size}):
        assert torch.equal(sample_next(logits, noise, **filters), plain)


def test_the_likeliest_token_survives_the_strictest_filters():
    logits = torch.randn(50, 1_000, generator=torch.Generator().manual_seed(4))
    noise = torch.linspace(0, 0.999, 50)
    for filters in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert torch.equal(sample_next(logits, noise, **filters), logits.argmax(dim=-1))


@pytest.mark.parametrize("size", [8, 1_000])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.01}], ids=named)
def test_tokens_that_a_user_filter_set_to_minus_infinity_never_come(size, filters):
    logits = torch.full((500, size), -INF)
    logits[:, [2, 7]] = tensor([0.5, 1.0])
    noise = torch.from_numpy(uniforms(np.arange(500), 1)[:, 0])
    assert set(sample_next(logits, noise, **filters).tolist()) == {2, 7}


@pytest.mark.parametrize("size", [8, 1_000])
def test_a_row_is_sampled_alike_alone_and_in_a_batch(size):
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(40, size, generator=generator, dtype=torch.float64)
    noise = torch.from_numpy(uniforms(np.arange(40), 1)[:, 0])
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    alone = [sample_next(logits[i, None], noise[i, None], **settings).item() for i in range(40)]
    assert sample_next(logits, noise, **settings).tolist() == alone


def splitmix64(state, count):
    """Steele, Lea & Flood 2014 in Python's integers: the state, then `count` outputs."""
    mask = 2**64 - 1
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        outputs.append(mixed(state))
    return outputs


def mixed(z):
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64_from_the_mixed_key():
    """The oracle gives the published outputs for the seed 1234567."""
    assert splitmix64(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    keys = [0, 1, 42, 2**63 - 1]
    found = uniforms(np.array(keys), 6)
    for key, row in zip(keys, found, strict=True):
        assert row.tolist() == [(z >> 11) / 2**53 for z in splitmix64(mixed(key), 6)]


def test_uniforms_are_at_least_0_and_below_1():
    found = uniforms(np.arange(1_000), 200)
    assert found.min() >= 0.0
    assert found.max() < 1.0


def test_the_same_key_gives_the_same_numbers_wherever_it_stands():
    keys = np.array([9, 4, 9])
    found = uniforms(keys, 7)
    assert (found[0] == found[2]).all()
    assert (uniforms(keys[:2], 7) == found[:2]).all()
    assert (found[0] != found[1]).all()


def test_five_numbers_of_a_key_are_the_first_five_of_nine():
    keys = np.array([3, 2**62])
    assert (uniforms(keys, 5) == uniforms(keys, 9)[:, :5]).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_numbers_of_one_key_are_uniform(seed):
    assert stats.kstest(uniforms(np.array([seed]), DRAWS)[0], "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_numbers_of_neighbouring_keys_at_one_position_are_uniform(position):
    numbers = uniforms(np.arange(DRAWS), 3)[:, position]
    assert stats.kstest(numbers, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("keys", [(0, 1), (1, 2), (7, 7 + 2**32), (2, 4)])
def test_different_keys_give_uncorrelated_numbers(keys):
    one, other = uniforms(np.array(keys), DRAWS)
    assert stats.pearsonr(one, other).pvalue > LEAST_P
    assert stats.pearsonr(one[1:], other[:-1]).pvalue > LEAST_P  # nor shifted against each other


def test_neighbouring_numbers_of_a_key_are_uncorrelated():
    numbers = uniforms(np.array([0]), DRAWS)[0]
    assert stats.pearsonr(numbers[1:], numbers[:-1]).pvalue > LEAST_P


def test_stable_hash_is_a_constant_whatever_pythons_hash_seed():
    program = (
        "from self_rewarding_lm.records import stable_hash as h; "
        "print(h('a', 1), h(0, 'sft', 'self_reward/12/0/3'))"
    )
    root = str(Path(self_rewarding_lm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    known = [1202366693309484190, 4209840039937204266]
    assert [int(number) for number in done.stdout.split()] == known
    assert [stable_hash("a", 1), stable_hash(0, "sft", "self_reward/12/0/3")] == known


def test_stable_hash_tells_its_parts_apart():
    parts = [("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("1",), (1,), ("a,b",), ('a", "b',)]
    assert len({stable_hash(*each) for each in parts}) == len(parts)
    assert all(0 <= stable_hash(*each) < 2**63 for each in parts)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = tensor([[3.0, -3.0, 0.0, 3.0, -3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    seen = tensor([[True, True, True, False, False], [False, False, False, False, True]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [
        [1.5, -6.0, 0.0, 3.0, -3.0],
        [1.0, 2.0, 3.0, 4.0, 2.5],
    ]


def test_a_repetition_penalty_of_1_changes_nothing():
    logits = tensor([[3.0, -3.0, 0.0]])
    assert torch.equal(penalise_repetition(logits, tensor([[True] * 3]), 1.0), logits)
