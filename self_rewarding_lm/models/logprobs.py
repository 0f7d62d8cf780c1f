"""Token log-probabilities: the only place where logits and the tokens they predict are aligned.

Column i speaks of token i, so masks, ids and log-probs share a shape. They are made of the logits
of whole rows, or of hidden states and the head that turns them into logits, a piece at a time, so
that tokens x vocabulary numbers never exist at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LEAST_LOGITS = 16_777_216
"""A piece may have this many logits (64 MiB in float32), or as many as the head has weights if that
is more: then reading the weights for each piece is no more work than writing its logits."""


LOGITS_OF_CPU = 4_194_304
"""A CPU makes so many at once (16 MiB in float32) where it can: its cache holds them for what is
done with each of them. With LEAST_LOGITS at once the head took an eighth longer."""


LEAST_COLUMNS = 1024
"""Tokens of the vocabulary that are multiplied at once at least, however many rows there are."""


def token_logprobs(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """log p(ids[:, i] | ids[:, :i]) at column i; column 0 is 0.0, nothing predicts it.

    Computed in float32, or in float64 if the logits are float64.
    """
    scores = _exact(logits[:, :-1])
    chosen = scores.gather(-1, ids[:, 1:, None].long()).squeeze(-1)
    return F.pad(chosen - scores.logsumexp(dim=-1), (1, 0))


Measure = Callable[[Tensor], Tensor]
"""A number for each distribution over the vocabulary, of its logits: (*n, v) to (*n)."""


def token_measures(logits: Float[Tensor, "b t v"], measure: Measure) -> Float[Tensor, "b t"]:
    """The measure of the distribution of token i at column i; column 0, which has none, is 0.0."""
    return F.pad(measure(_exact(logits[:, :-1])), (1, 0))


def next_logprobs(logits: Float[Tensor, "r v"], tokens: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """log p of each row's next token, computed as `token_logprobs` computes it."""
    scores = _exact(logits)
    return scores.gather(-1, tokens[:, None].long()).squeeze(-1) - scores.logsumexp(dim=-1)


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: softcap * tanh(scale * project(h) / softcap).

    weight (v, d), bias (v,): of `project` if it is a linear layer and nothing more, else None.
    softcap: None if there is none (Gemma 2, arXiv:2408.00118, has 30).
    """

    project: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """The logits of hidden states, all at once."""
        return _scaled(self.project(hidden), self.scale, self.softcap)

    def cast(self, kind: str) -> "Head":
        """This head in the type in which `torch.autocast` multiplies now, on a kind of device.

        A head that is no linear layer stays as it is.
        """
        if self.weight is None or not torch.is_autocast_enabled(kind):
            return self
        narrow = torch.get_autocast_dtype(kind)
        weight = self.weight.to(narrow)
        bias = None if self.bias is None else self.bias.to(narrow)
        project = partial(F.linear, weight=weight, bias=bias)
        return replace(self, project=project, weight=weight, bias=bias)


def label_logprobs(
    hidden: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    head: Head,
    *,
    vocab: int,
    logits_at_once: int | None = None,
) -> Float[Tensor, " n"]:
    """log p(labels[i] | hidden[i]), with a few of the logits at a time.

    Where the head is a linear layer, these are a part of the vocabulary for many rows, and the
    gradient computes them once more if the layer is trained. Else they are whole rows, and are
    computed once more. Log-probs are in float32 at least, whatever the type of the head.
    logits_at_once: how many numbers; by default LOGITS_OF_CPU or LEAST_LOGITS, more for whole rows.
    """
    labels, head = labels.long(), head.cast(hidden.device.type)
    if head.weight is None:
        rows = max(1, (logits_at_once or max(LEAST_LOGITS, vocab * hidden.shape[-1])) // vocab)
        parts = [
            checkpoint(_part_logprobs, hidden[part], labels[part], head, use_reentrant=False)
            for part in _parts(len(hidden), rows)
        ]
        return torch.cat(parts)  # type: ignore[arg-type]
    at_once = logits_at_once or tile_logits(hidden.device.type)
    tiles = _Tiles(*tile_sizes(len(hidden), vocab, at_once), head.scale, head.softcap)
    hidden = hidden.to(head.weight.dtype)
    return _LinearLogprobs.apply(hidden, head.weight, head.bias, labels, tiles)


def tile_logits(kind: str) -> int:
    """How many logits a kind of device makes at once where the head is a linear layer."""
    return LOGITS_OF_CPU if kind == "cpu" else LEAST_LOGITS


def tile_sizes(count: int, vocab: int, at_once: int) -> tuple[int, int]:
    """Rows and tokens of the vocabulary whose logits are made at once, of `count` rows."""
    columns = min(vocab, max(LEAST_COLUMNS, at_once // max(count, 1)))
    return max(1, at_once // columns), columns


def label_measures(
    hidden: Float[Tensor, "n d"], head: Head, measure: Measure, *, vocab: int
) -> Float[Tensor, " n"]:
    """A measure of the distribution after each hidden state, with a few logits at a time.

    Without gradients. Measures are of float32 logits at least, whatever the type of the head.
    """
    rows = max(1, max(LEAST_LOGITS, vocab * hidden.shape[-1]) // vocab)
    head = head.cast(hidden.device.type)
    hidden = hidden if head.weight is None else hidden.to(head.weight.dtype)
    parts = [measure(_exact(head.logits(hidden[part]))) for part in _parts(len(hidden), rows)]
    return torch.cat(parts)


def negative_entropy(scores: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """The sum of p log p over the vocabulary, of logits: 0 if one token is certain."""
    return -torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)


def kl_from_uniform(scores: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """KL(uniform || p) = -log v - mean of log p over the vocabulary, of logits.

    0 if all tokens are equally likely; infinite if one has no probability.
    """
    return scores.logsumexp(dim=-1) - scores.mean(dim=-1) - math.log(scores.shape[-1])


def masked_sum(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """The sum of each row's values where the mask is True."""
    return values.masked_fill(~mask, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class _Tiles:
    """How logits are made, so many rows and tokens of the vocabulary at a time."""

    rows: int
    columns: int
    scale: float
    softcap: float | None

    def scores(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of a tile (n, c), which are nobody else's."""
        return _exact(_scaled(F.linear(hidden, weight, bias), self.scale, self.softcap))

    def slope(self, scores: Tensor) -> Tensor | None:
        """d score / d (scale * product), for each score; None where it is 1."""
        return None if self.softcap is None else 1 - (scores / self.softcap).square()


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs by a linear layer, a tile of its logits at a time.

    A row keeps two things: log sum exp of its logits, and the gradient of its log-prob by its
    hidden state. That is made beside the log-prob, of the same logits, so that they are computed
    again for the gradients of the layer alone, if it is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        tiles: _Tiles,
    ) -> Tensor:
        wants_hidden, *wants_layer = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            found = [
                _row_logprobs(hidden[rows], weight, bias, labels[rows], tiles, wants_hidden)
                for rows in _parts(len(hidden), tiles.rows)
            ]
        logprobs, totals, slopes = (torch.cat(values) for values in zip(*found, strict=True))
        layer = (hidden, weight, bias, labels, totals) if any(wants_layer) else (None,) * 5
        ctx.save_for_backward(*layer, slopes)
        ctx.tiles, ctx.dtype = tiles, hidden.dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # (n,)
        wants_hidden, *wants_layer = ctx.needs_input_grad[:3]
        hidden, weight, bias, labels, totals, slopes = ctx.saved_tensors
        of_hidden = (slopes * gradient[:, None]).to(ctx.dtype) if wants_hidden else None
        of_weight = of_bias = None
        if any(wants_layer):
            with torch.autocast(gradient.device.type, enabled=False):
                of_weight, of_bias = _layer_gradients(
                    gradient, hidden, weight, bias, labels, totals, ctx.tiles
                )
        return of_hidden, of_weight, of_bias, None, None


def _row_logprobs(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    labels: Int[Tensor, " n"],
    tiles: _Tiles,
    wants_slopes: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n s"]]:
    """Log-probs, log sum exp of the logits, and d log-prob / d hidden (n, d; n, 0 if not wanted).

    Sums over the vocabulary are taken tile by tile, each relative to the highest logit so far
    (arXiv:1805.02867, algorithm 3).
    """
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    lowest = torch.finfo(exact).min
    chosen = hidden.new_zeros(len(hidden), 1, dtype=exact)
    total = torch.full_like(chosen, lowest)
    # of the weight's rows, by their tokens' probabilities and slopes; the label's comes at the end,
    # since a narrow type would lose the difference between its probability and 1
    mean = hidden.new_zeros(len(hidden), weight.shape[1] if wants_slopes else 0, dtype=exact)
    for columns in _parts(len(weight), tiles.columns):
        part = weight[columns]
        scores = tiles.scores(hidden, part, None if bias is None else bias[columns])
        is_here, place = _placed(labels, columns)
        chosen += scores.gather(-1, place).masked_fill_(~is_here, 0.0)
        slope = tiles.slope(scores) if wants_slopes else None
        most = scores.amax(dim=-1, keepdim=True).clamp(min=lowest)  # of -inf alone none is left
        shares = scores.sub_(most).exp_()
        before, total = total, total.logaddexp(shares.sum(dim=-1, keepdim=True).log_().add_(most))
        if wants_slopes:
            of_label = shares.gather(-1, place).masked_fill_(~is_here, 0.0)
            shares.scatter_add_(-1, place, of_label.neg_())
            shares = shares if slope is None else shares.mul_(slope)
            product = shares.to(weight.dtype) @ part
            mean.mul_((before - total).exp_()).addcmul_(product, (most - total).exp_())
        del scores, shares, slope  # before the next tile is made
    if wants_slopes:
        slope = tiles.slope(chosen)
        missing = torch.expm1(chosen - total).neg_()  # 1 - p of the label
        own = weight[labels] * (missing if slope is None else missing.mul_(slope))
        mean = own.sub_(mean).mul_(tiles.scale)
    return (chosen - total).squeeze(-1), total.squeeze(-1), mean


def _layer_gradients(
    gradient: Float[Tensor, " n"],
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    labels: Int[Tensor, " n"],
    totals: Float[Tensor, " n"],
    tiles: _Tiles,
) -> tuple[Float[Tensor, "v d"], Float[Tensor, " v"] | None]:
    """Gradients of weight and bias: d log p / d score = (1 at the label) - p, for all of a row."""
    gradient, of_weight = gradient * tiles.scale, torch.empty_like(weight)
    of_bias = None if bias is None else torch.empty_like(bias)
    for columns in _parts(len(weight), tiles.columns):
        part, part_bias = weight[columns], None if bias is None else bias[columns]
        of_part = torch.zeros_like(part, dtype=totals.dtype)
        of_part_bias = None if part_bias is None else totals.new_zeros(len(part))
        for rows in _parts(len(hidden), tiles.rows):
            scores, slopes = tiles.scores(hidden[rows], part, part_bias), gradient[rows, None]
            slope = tiles.slope(scores)
            moved = scores.sub_(totals[rows, None]).exp_().mul_(-slopes)
            is_here, place = _placed(labels[rows], columns)
            moved.scatter_add_(1, place, slopes.masked_fill(~is_here, 0.0))
            moved = moved if slope is None else moved.mul_(slope)
            if of_part_bias is not None:
                of_part_bias += moved.sum(dim=0)
            _add_product(of_part, moved.to(weight.dtype).t(), hidden[rows])
            del scores, moved, slope  # before the next tile is made
        of_weight[columns] = of_part
        if of_bias is not None and of_part_bias is not None:
            of_bias[columns] = of_part_bias
    return of_weight, of_bias


def _placed(labels: Int[Tensor, " n"], columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels are in these columns (n, 1), and of each a place there (n, 1)."""
    places, last = labels[:, None] - columns.start, columns.stop - columns.start - 1
    return (places >= 0) & (places <= last), places.clamp(0, last)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other; products of a narrow type are summed in the type of the total."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _part_logprobs(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log-probs of one piece, whose logits are not kept."""
    scores = _exact(head.logits(hidden))
    return scores.gather(-1, labels[:, None]).squeeze(-1) - scores.logsumexp(dim=-1)


def _scaled(scores: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores times `scale`, softly capped, in their own type, as the models do it."""
    scores = scores if scale == 1.0 else scores * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _exact(scores: Tensor) -> Tensor:
    """Scores in float32, or in float64 if they are."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _parts(count: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` of `count` rows; a single empty one if there are none."""
    for start in range(0, max(count, 1), rows):
        yield slice(start, min(start + rows, count))
