"""From logits to a token: filters, noise, inverse CDF.

Noise belongs to the sample, not to the batch: each token has one uniform number, a function of
(seed, stage, record id, position) alone. The inverse of the cumulative distribution, in vocabulary
order, turns it into a token. So the same numbers give the same tokens for any batch size and any
order of the rows, up to the rounding of the logits.

Filters apply after the temperature, in the order top-k, top-p, min-p, as in common samplers. Tokens
that tie with the last kept one are kept too, so that the result does not depend on how a sort
breaks ties. Axes: r rows, v words of the vocabulary, n of them.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HEAD_SIZES = (64, 1024)  # the slices that are tried before a whole vocabulary is sorted

GROUP = 16  # columns; groups of 24 and 32 took as long, those of 64 a fifth longer


Filters = dict[str, Any]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: Int[np.ndarray, " r"], count: int) -> Float[np.ndarray, "r n"]:
    """`count` numbers in [0, 1) for each key, of which number i depends on the key and i alone.

    SplitMix64 (Steele et al., OOPSLA 2014), used as a counter.
    """
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    z = _mix(_mix(keys.astype(np.uint64))[:, None] + counter[None, :])
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keep_threshold(
    scores: Float[Tensor, "r n"],
    log_total: Float[Tensor, "r 1"],
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Tensor, "r 1"]:
    """The least score that survives the filters. `scores` may be the highest ones of larger rows.

    log_total: log-sum-exp of the whole rows. top_p: keep the fewest likeliest tokens whose mass
    reaches p (arXiv:1904.09751). min_p: keep tokens with p >= min_p * max p (arXiv:2407.01082).
    """
    threshold = torch.full_like(log_total, -math.inf)
    ordered = scores.sort(dim=-1, descending=True).values
    if top_k is not None:
        threshold = ordered[:, min(top_k, ordered.shape[-1]) - 1, None]
        ordered = ordered.masked_fill(ordered < threshold, -math.inf)
        log_total = ordered.logsumexp(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1.0:
        mass = (ordered - log_total).exp()
        before = mass.cumsum(dim=-1) - mass
        kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        threshold = torch.maximum(threshold, ordered.gather(-1, kept - 1))
    if min_p is not None and min_p > 0.0:
        threshold = torch.maximum(threshold, ordered[:, :1] + math.log(min_p))
    return threshold


def inverse_cdf(scores: Float[Tensor, "r n"], uniform: Float[Tensor, " r"]) -> Int[Tensor, " r"]:
    """The first column where the cumulative probability exceeds `uniform`.

    A column of -inf has probability 0. Rows whose highest score is not finite give n, which is no
    column.
    """
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = uniform[:, None].to(total.dtype) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def sample_next(
    logits: Float[Tensor, "r v"],
    uniform: Float[Tensor, " r"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Int[Tensor, " r"]:
    """One token for each row; its argmax at temperature 0.

    A row whose highest logit is not finite gives v, which is no token.
    """
    if temperature == 0:
        best = logits.max(dim=-1)
        return best.indices.masked_fill(~best.values.isfinite(), logits.shape[-1])
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens = torch.full(uniform.shape, logits.shape[-1], device=logits.device)
    rest = torch.arange(len(logits), device=logits.device)  # rows without a token
    for size in HEAD_SIZES if _filters_anything(top_k, top_p, min_p) else ():
        if len(rest) and logits.shape[-1] > 4 * size:
            rows = logits if len(rest) == len(logits) else logits[rest]
            tokens[rest], short = _sample_head(rows, uniform[rest], size, temperature, filters)
            rest = rest[short]
    if len(rest):
        tokens[rest] = _sample_whole(_scores(logits[rest], temperature), uniform[rest], filters)
    return tokens


def _sample_head(
    logits: Tensor, uniform: Tensor, size: int, temperature: float, filters: Filters
) -> tuple[Tensor, Tensor]:
    """A token of each row among its `size` likeliest, and which rows need more of them.

    These are the rows of which further tokens may survive the filters.
    """
    raw, columns = highest(logits, size)
    head, top_k = _scores(raw, temperature), filters["top_k"]
    if top_k is None:  # top-p is a share of the mass of all
        log_total = _scores(logits, temperature).logsumexp(dim=-1, keepdim=True)
    else:
        log_total = head.logsumexp(dim=-1, keepdim=True)  # of those it keeps, see keep_threshold
    threshold = keep_threshold(head, log_total, **filters)
    short = threshold[:, 0] <= head[:, -1]  # tokens outside the head may survive
    if top_k is not None:  # or belong to the mass that top-p is a share of
        short |= head[:, min(int(top_k), size) - 1] <= head[:, -1]
    columns, order = columns.sort(dim=-1)  # vocabulary order
    head = head.gather(-1, order)
    picked = inverse_cdf(head.masked_fill(head < threshold, -math.inf), uniform)
    tokens = columns.gather(-1, picked[:, None].clamp(max=size - 1)).squeeze(-1)
    tokens[picked == size] = logits.shape[-1]
    return tokens, short


def highest(
    logits: Float[Tensor, "r v"], size: int
) -> tuple[Float[Tensor, "r n"], Int[Tensor, "r n"]]:
    """The `size` highest logits of each row, the highest first, and their columns.

    What torch.topk gives, but for which of the columns that tie with the last one. On a CPU it is
    searched for in the groups of GROUP columns whose highest is among the `size` highest of all
    groups: half the time of topk over a vocabulary of 49,152.
    """
    groups = logits.shape[-1] // GROUP
    if logits.device.type != "cpu" or groups <= 4 * size:
        return logits.topk(size, dim=-1)
    grouped = logits[:, : groups * GROUP].unflatten(1, (GROUP, groups))  # column: place, group
    best = grouped.amax(dim=1).topk(size, dim=-1, sorted=False).indices  # (r, n)
    rest = torch.arange(groups * GROUP, logits.shape[-1]).expand(len(logits), -1)  # in no group
    columns = torch.arange(0, groups * GROUP, groups)[:, None] + best[:, None]  # (r, GROUP, n)
    columns = torch.cat([columns.flatten(1), rest], dim=1)
    found = logits.gather(1, columns).topk(size, dim=-1)
    return found.values, columns.gather(1, found.indices)


def _scores(logits: Tensor, temperature: float) -> Tensor:
    """Logits by temperature, in float32, or in float64 if they are."""
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _filters_anything(top_k: int | None, top_p: float | None, min_p: float | None) -> bool:
    return top_k is not None or (top_p is not None and top_p < 1.0) or bool(min_p)


def _sample_whole(scores: Tensor, uniform: Tensor, filters: Filters) -> Tensor:
    """A token of each row among the whole vocabulary."""
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    threshold = keep_threshold(scores, log_total, **filters)
    return inverse_cdf(scores.masked_fill(scores < threshold, -math.inf), uniform)


def penalise_repetition(
    logits: Float[Tensor, "r v"], seen: Bool[Tensor, "r v"], penalty: float
) -> Float[Tensor, "r v"]:
    """Logits with those of tokens that occurred already made less likely.

    Section 4.1 of arXiv:1909.05858; seen: which tokens occurred in each row.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)
