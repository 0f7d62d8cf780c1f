"""Attention with dropout by blocks against the whole matrix of its weights, written out."""

import math

import pytest
import torch

from self_rewarding_lm.models import dropped
from self_rewarding_lm.models.attention import causal_mask
from self_rewarding_lm.models.dropped import LEVELS, dropped_attention

HEADS, GROUPS, WIDTH = 4, 2, 8


def inputs(count: int, length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, count, WIDTH), (GROUPS, length, WIDTH), (GROUPS, length, 5)]
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [*shapes, shapes[0]])
    q, k, v, slopes = (t.to(dtype) for t in drawn)
    return [q, k, v, slopes[..., :5]]


def added(count: int, length: int, window: int | None) -> torch.Tensor | None:
    """The mask of the last `count` of `length` tokens; None if they are all and see all before."""
    if count == length and window is None:
        return None
    hidden = ~causal_mask(count, length, window, torch.device("cpu"))
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -math.inf)


def whole(q, k, v, is_hidden, is_kept, rate):
    """The oracle: all weights (h, n, t) at once, those that are not kept put to 0."""
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=0) for t in (k, v))
    scores = torch.einsum("hnd,htd->hnt", q, k) / math.sqrt(WIDTH)
    weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
    return torch.einsum("hnt,hte->hne", weights * is_kept / (1 - rate), v)


def kept_of(count: int, length: int, mask: torch.Tensor | None, rate: float) -> torch.Tensor:
    """Which weights are kept under the seed 7: the output for values that name each key."""
    q, k, _, _ = inputs(count, length)
    names = torch.eye(length, dtype=torch.float64).expand(GROUPS, -1, -1)
    torch.manual_seed(7)
    return dropped_attention(q, k, names, mask, scale=None, dropout=rate) != 0


@pytest.mark.parametrize("at_once", [1, 300, 10**6])
@pytest.mark.parametrize(
    ("count", "length", "window"), [(17, 17, None), (17, 17, 5), (6, 17, None), (1, 1, None)]
)
def test_values_and_gradients_are_those_of_the_whole_matrix(
    count, length, window, at_once, monkeypatch
):
    monkeypatch.setattr(dropped, "AT_ONCE", at_once)
    rate = 0.25  # a multiple of 1 / LEVELS
    mask = added(count, length, window)
    is_kept = kept_of(count, length, mask, rate)
    is_hidden = ~causal_mask(count, length, window, torch.device("cpu"))
    assert not (is_kept & is_hidden).any() and not is_kept.all()
    *leaves, slopes = inputs(count, length)
    q, k, v = (t.requires_grad_() for t in leaves)
    torch.manual_seed(7)
    found = dropped_attention(q, k, v, mask, scale=None, dropout=rate)
    truth = whole(q, k, v, is_hidden, is_kept, rate)
    assert torch.allclose(found, truth, rtol=0, atol=1e-12)
    both = (torch.autograd.grad(out, [q, k, v], slopes) for out in (found, truth))
    for one, other in zip(*both, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_weights_are_left_out_at_the_rate_and_each_by_itself():
    """Of 40,000 weights, within five standard deviations; of neighbours both at the rate squared."""
    length, rate = 100, 0.1
    sees_all = torch.zeros(length, length, dtype=torch.float64)
    is_left_out = ~kept_of(length, length, sees_all, rate)  # (h, n, t)
    count = is_left_out.numel()
    assert abs(is_left_out.sum() - count * rate) < 5 * math.sqrt(count * rate * (1 - rate))
    for axis in range(3):
        pairs = is_left_out & is_left_out.roll(1, axis)
        assert abs(pairs.sum() - count * rate**2) < 5 * math.sqrt(count * rate**2)


def test_blocks_draw_other_numbers_and_the_random_state_decides_them(monkeypatch):
    monkeypatch.setattr(dropped, "AT_ONCE", 4 * 40 * 20)  # two blocks of 20 queries
    q, k, v, _ = inputs(40, 40)
    sees_all = torch.zeros(40, 40, dtype=torch.float64)
    is_kept = kept_of(40, 40, sees_all, 0.5)
    assert not torch.equal(is_kept[:, :20], is_kept[:, 20:])
    torch.manual_seed(3)
    first, second = (dropped_attention(q, k, v, None, scale=None, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, dropped_attention(q, k, v, None, scale=None, dropout=0.5))
    assert not torch.equal(first, second)


def test_the_mean_is_attention_without_dropout_at_rates_between_levels():
    """One key has the weight 1: the output is 0 or its value over the share that is kept."""
    q, k, v = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, 1)
    for rate in (0.3, 1e-9):
        draws = {
            float(dropped_attention(q, k, v, None, scale=1.0, dropout=rate)) for _ in range(99)
        }
        kept = min(round((1 - rate) * LEVELS), LEVELS - 1)
        assert max(draws) == pytest.approx(LEVELS / kept)
        assert draws <= {0.0, max(draws)} and (rate < 0.1 or len(draws) == 2)


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_gradient():
    count = 200
    q, k, v, _ = (t.requires_grad_() for t in inputs(count, count, torch.float32))
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropped_attention(q, k, v, None, scale=None, dropout=0.1)
    assert sum(kept.values()) < 4 * count * count
