"""Rotary factors that follow the longest row: no forward has rows on both sides of a border."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from self_rewarding_lm import SamplingConfig, generate
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan
from self_rewarding_lm.models.logprobs import token_logprobs
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.models.rotary import RotaryBorders
from tests.support.hf_models import BORDER, LONGROPE, phi3

pytest.importorskip("transformers")

VOCAB = 64
LONG = [(7 * i + i * i) % VOCAB for i in range(23)]
ROWS = [LONG, [3, 1, 4, 1, 5], LONG[:BORDER], LONG[: BORDER + 1], [9, 9, 2], LONG[:12]]


def whole(module: nn.Module, row: Sequence[int]) -> Tensor:
    """The oracle: the model's own forward of one row."""
    return module(torch.tensor([[*row]]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(module: nn.Module, row: Sequence[int], new: int) -> tuple[int, ...]:
    found = list(row)
    for _ in range(new):
        found.append(int(whole(module, found)[-1].argmax()))
    return tuple(found[len(row) :])


@pytest.mark.parametrize(
    ("rope", "same", "apart"),
    [
        ({"rope_type": "default"}, [1, 16, 17, 64, 10**9], []),
        ({"rope_type": "llama3", "original_max_position_embeddings": 16}, [1, 17], []),
        (LONGROPE, [1, 16], [17]),
        (LONGROPE, [17, 64], [1]),
        ({"type": "su", "original_max_position_embeddings": 16}, [2, 3], [17]),
        ({"rope_type": "dynamic", "factor": 2.0}, [1, 64], [65, 66, 99]),
        ({"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}, [1], [20]),
    ],
)
def test_sides_of_borders(rope, same, apart):
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    side = RotaryBorders(config).side
    assert len({*map(side, same)}) == 1
    assert len({side(same[0]), *map(side, apart)}) == 1 + len(apart)


def test_rows_on_both_sides_do_not_change_each_other_in_training_and_judging():
    module = phi3()
    model = adapt(module)
    assert model.training is not None and model.training.packs  # also beyond the border
    policy = Policy(model).eval()
    ids, lengths = pad_rows(ROWS)
    found = policy(ids, lengths)
    loss, expected = found.sum(), torch.tensor(0.0)
    for row, values in zip(ROWS, found, strict=True):
        truth = token_logprobs(whole(module, row)[None], torch.tensor([row]))[0]
        assert torch.allclose(values[: len(row)], truth, atol=1e-6, rtol=0)
        assert not values[len(row) :].any()
        expected = expected + truth.sum()
    weights = list(module.parameters())
    got = torch.autograd.grad(loss, weights)
    truths = torch.autograd.grad(expected, weights)
    for one, other in zip(got, truths, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, 20:] = targets[1, 2:5] = True
    some = policy(ids, lengths, targets)
    assert torch.allclose(some[targets], found[targets], atol=1e-9, rtol=0)


def test_rows_without_lengths_are_full_rows():
    module = phi3()
    ids = torch.tensor([LONG])
    truth = token_logprobs(whole(module, LONG)[None], ids)
    assert torch.allclose(Policy(adapt(module)).eval()(ids), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("max_rows", [128, 2])
@pytest.mark.parametrize("caches", [True, False])
def test_rows_that_come_over_a_border_while_they_are_decoded_are_those_of_whole_forwards(
    max_rows, caches
):
    module, new = phi3(), 9
    model = adapt(module)
    if not caches:
        model.attends = model.caches = False
    from self_rewarding_lm.generation.engine import Decoding, Request

    requests = [Request(tuple(row), i, new) for i, row in enumerate(ROWS)]
    engine = LocalEngine(max_rows=max_rows)
    found = dict(engine.generate(model, requests, Decoding(temperature=0.0)))
    assert [found[i].ids for i in range(len(ROWS))] == [greedy(module, row, new) for row in ROWS]


def test_neighbours_beyond_the_border_change_no_answer():
    module, sampling = phi3(), SamplingConfig(temperature=0.0, max_new_tokens=5)
    short = torch.tensor([3, 1, 4, 1, 5])
    [[alone]] = generate(module, [short], sampling=sampling)
    [_, [beside]] = generate(module, [torch.tensor(LONG), short], sampling=sampling)
    assert alone.ids == beside.ids == greedy(module, short.tolist(), 5)


def test_rows_that_stay_below_the_border_keep_the_fast_way():
    model = adapt(phi3(torch.float32))
    assert model.attends and not model.refused
    assert model.session(Plan((), 10, BORDER - 10, 2)).joins
    assert not model.session(Plan((), 10, BORDER - 9, 2)).joins
