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
    """log p(labels[i] | hidden[i]), with the logits of a few of them at a time.

    The gradient computes these logits once more. Log-probs are in float32 at least, whatever the
    type of the head. logits_at_once: how many numbers; by default as LEAST_LOGITS says.
    """
    weights = vocab * hidden.shape[-1]
    rows = max(1, (logits_at_once or max(LEAST_LOGITS, weights)) // vocab)
    labels, head = labels.long(), head.cast(hidden.device.type)
    if head.weight is None:
        parts = [
            checkpoint(_part_logprobs, hidden[part], labels[part], head, use_reentrant=False)
            for part in _parts(len(hidden), rows)
        ]
        return torch.cat(parts)  # type: ignore[arg-type]
    hidden, settings = hidden.to(head.weight.dtype), (head.scale, head.softcap, rows)
    return _LinearLogprobs.apply(hidden, head.weight, head.bias, labels, settings)


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


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs by a linear layer, a piece of its logits at a time; kept is one number a row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: tuple[float, float | None, int],
    ) -> Tensor:
        scale, softcap, rows = settings
        logprobs, totals = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(hidden), rows):
                raw = F.linear(hidden[part], weight, bias)  # (rows, v)
                scores = _exact(_scaled(raw, scale, softcap))
                chosen = scores.gather(-1, labels[part, None]).squeeze(-1)
                most = scores.amax(dim=-1)
                total = scores.sub_(most[:, None]).exp_().sum(dim=-1).log_().add_(most)
                logprobs.append(chosen - total)
                totals.append(total)
                del raw, scores  # before the next piece is made
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(totals))
        ctx.settings = settings
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d log p / d score = (1 at the label) - p, for all scores of a row."""
        (gradient,) = gradients  # (n,)
        hidden, weight, bias, labels, totals = ctx.saved_tensors
        scale, softcap, rows = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=totals.dtype) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=totals.dtype) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(hidden), rows):
                raw = F.linear(hidden[part], weight, bias)
                scores = _exact(_scaled(raw, scale, softcap))
                slope = None if softcap is None else 1 - (scores / softcap).square()
                moved = scores.sub_(totals[part, None]).exp_().mul_(-gradient[part, None])
                moved.scatter_add_(1, labels[part, None], gradient[part, None])
                if slope is not None:
                    moved *= slope
                if scale != 1.0:
                    moved *= scale
                if of_bias is not None:
                    of_bias += moved.sum(dim=0)
                narrow = moved.to(weight.dtype)
                if of_hidden is not None:
                    torch.mm(narrow, weight, out=of_hidden[part])
                if of_weight is not None and of_weight.dtype == weight.dtype:
                    of_weight.addmm_(narrow.t(), hidden[part])
                elif of_weight is not None:  # pieces of a narrow type are summed in float32
                    of_weight += narrow.t() @ hidden[part]
                del raw, scores, slope, moved, narrow  # before the next piece is made
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


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
