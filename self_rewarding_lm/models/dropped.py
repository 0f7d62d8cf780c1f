"""Attention with dropout on a CPU, a block of queries at a time.

PyTorch's kernel of a CPU has no dropout: with it, scores, weights and mask of all pairs of tokens
are made and kept for the gradient. Here they exist for a block alone, the gradient makes them once
more, and the mask is drawn again from its seed (as FlashAttention does, arXiv:2205.14135).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

AT_ONCE = 524_288
"""Scores in a block: 2 MiB in float32, which a core's cache holds."""


LEVELS = 65_536
"""Values of the 16 random bits that decide whether a weight is kept. Four weights share a number of
64 bits, which costs a fifth of `torch.bernoulli`."""


def dropped_attention(
    q: Float[Tensor, "h n d"],
    k: Float[Tensor, "g t d"],
    v: Float[Tensor, "g t e"],
    mask: Float[Tensor, "n t"] | None,
    *,
    scale: float | None,
    dropout: float,
) -> Float[Tensor, "h n e"]:
    """Attention whose weights are left out with probability `dropout`, on a CPU.

    The arguments are those of `causal_attention`; a mask is added to the scores. What is left out
    depends on torch's random state and on the shapes. The rate, between 0 and 1, is exact to 1 /
    LEVELS, and what is left is scaled by its own rate, so that the mean is attention without
    dropout.
    """
    seed = int(torch.randint(2**62, ()))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    kept = min(round((1 - dropout) * LEVELS), LEVELS - 1)
    return _Dropped.apply(q * factor, k, v, mask, seed, kept)


class _Dropped(torch.autograd.Function):
    """Kept for the gradient are queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: int, kept: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.draw = seed, kept
        out = q.new_empty(*q.shape[:2], v.shape[-1])  # (h, n, e)
        with torch.autocast("cpu", enabled=False):
            for rows, columns, weights, is_kept in _blocks(q, k, mask, seed, kept):
                part = torch.bmm(weights.mul_(is_kept), v[:, columns])  # (g, r b, e)
                out[:, rows] = part.view(len(q), -1, v.shape[-1])
        return out.mul_(LEVELS / kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With weights w, which of them are kept s, and a gradient a of their products with values:
        d v = (w s)' a, and d score = w (d w - sum(w d w)) for d w = s (a v')."""
        q, k, v, mask = ctx.saved_tensors
        gradient = gradients[0] * (LEVELS / ctx.draw[1])  # (h, n, e)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast("cpu", enabled=False):
            for rows, columns, weights, is_kept in _blocks(q, k, mask, *ctx.draw):
                above = _by_group(gradient[:, rows], len(k))  # (g, r b, e)
                of_v[:, columns].baddbmm_((weights * is_kept).mT, above)
                moved = torch.bmm(above, v[:, columns].mT).mul_(is_kept).mul_(weights)
                moved.addcmul_(weights, moved.sum(-1, keepdim=True), value=-1)  # (g, r b, c)
                of_q[:, rows] = torch.bmm(moved, k[:, columns]).view(len(q), -1, q.shape[-1])
                of_k[:, columns].baddbmm_(moved.mT, _by_group(q[:, rows], len(k)))
        return of_q, of_k, of_v, None, None, None


def _blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, seed: int, kept: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of queries: their places, those of the keys that they see, and the weights of these.

    Weights, and 1 for each that is kept, else 0: (g, r b, c) of r = h / g heads of queries that
    look at one head of keys, b queries and c keys.
    """
    heads, count, _ = q.shape
    groups, length, _ = k.shape
    draws = torch.Generator().manual_seed(seed)
    size = max(1, AT_ONCE // (heads * length))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        columns = slice(0, rows.stop if mask is None else length)
        scores = torch.bmm(_by_group(q[:, rows], groups), k[:, columns].mT)  # (g, r b, c)
        by_head = scores.view(heads, -1, columns.stop)  # (h, b, c)
        if mask is None:
            block = rows.stop - start
            later = torch.full((block, block), -torch.inf, dtype=q.dtype).triu_(1)
            by_head[:, :, start:] += later
        else:
            by_head += mask[rows]
        weights = torch.softmax(scores, dim=-1)
        numbers = torch.empty(-(-scores.numel() // 4), dtype=torch.int64)
        numbers.random_(-(2**63), None, generator=draws)  # all 64 bits
        bits = numbers.view(torch.int16)[: scores.numel()].view_as(scores)
        is_kept = torch.lt(bits, kept - LEVELS // 2, out=torch.empty_like(scores))
        yield rows, columns, weights, is_kept


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """The heads (h, b, d) that look at one head of keys behind each other: (g, r b, d)."""
    return tensor.reshape(groups, -1, tensor.shape[-1])
