"""Losses: arithmetic on tensors.

A loss returns one number per row and what each row counts; the training loop divides the sum of
the numbers by the sum of the counts over the whole optimiser step, so that the gradient does not
depend on how a step is cut into micro-batches. Knows no model, no device and no configuration.

A loss of pairs is a function (PairBatch, its parameters by name) -> a number per pair; those in
`PAIR_LOSSES` can be chosen by name. In their formulas w is the chosen and l the rejected response,
|y| a length in tokens, D(y) = log pi(y) - log ref(y) summed over tokens, h = D(w) - D(l), s the
logistic function. The sources of the defaults are in docs/losses.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.logprobs import masked_sum

PairLoss = Callable[..., Tensor]
"""(PairBatch, *, parameters) -> a number per pair, shape (b,)."""


Positive = Annotated[float, Field(gt=0)]


NotNegative = Annotated[float, Field(ge=0)]


Share = Annotated[float, Field(ge=0, le=1)]


Noise = Annotated[float, Field(ge=0, lt=0.5)]
"""A share of wrong labels; if half of them are wrong there is nothing to learn."""


@dataclass(frozen=True)
class LossResult:
    """losses: a number per row. counts: what each row adds to the divisor. metrics: of each row."""

    losses: Float[Tensor, " b"]
    counts: Float[Tensor, " b"]
    metrics: Mapping[str, Float[Tensor, " b"]]

    def mean(self) -> Float[Tensor, ""]:
        """The loss of these rows alone."""
        return self.losses.sum() / self.counts.sum()


def sft_loss(logprobs: Float[Tensor, "b t"], targets: Bool[Tensor, "b t"]) -> LossResult:
    """Negative log-likelihood of the target tokens; a row counts its target tokens."""
    losses = -masked_sum(logprobs, targets)
    return LossResult(losses, targets.sum(dim=-1).to(losses.dtype), {})


@dataclass(frozen=True)
class Responses:
    """One side of several pairs: all chosen responses, or all rejected ones.

    logprobs: under the policy, summed over the response. lengths: in tokens. wins: how likely the
    response wins; unless its pair says so, 1 for a chosen and 0 for a rejected one. reference: as
    logprobs, under the reference; None if no loss reads it. tokens, reference_tokens: the same
    token by token, from the response's first token on, 0 after its end; None if no loss reads them
    (see `reads`).
    """

    logprobs: Float[Tensor, " b"]
    lengths: Float[Tensor, " b"]
    wins: Float[Tensor, " b"]
    reference: Float[Tensor, " b"] | None = None
    tokens: Float[Tensor, "b t"] | None = None
    reference_tokens: Float[Tensor, "b t"] | None = None

    def gains(self) -> Float[Tensor, " b"]:
        """D(y). Raises ConfigError if no reference was computed."""
        return self.logprobs - _computed(self.reference, "reference")

    def token_gains(self) -> Float[Tensor, "b t"]:
        """D of each token. Raises ConfigError if no log-probs of tokens were computed."""
        reference = _computed(self.reference_tokens, "tokens")
        return _computed(self.tokens, "tokens") - reference

    def means(self, values: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Sums over each response as means over its tokens."""
        return values / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class PairBatch:
    """What a loss function gets: b pairs with the log-probs of their responses.

    chosen, rejected: each has `logprobs`, `lengths` and `wins`, and what the loss `reads` besides,
    all of them tensors (b,), or (b, t) token by token.
    """

    chosen: Responses
    rejected: Responses

    def margins(self) -> Float[Tensor, " b"]:
        """h = D(w) - D(l), (b,): how much more likely than under the reference, chosen - rejected.

        Raises ConfigError if no reference was computed.
        """
        return self.chosen.gains() - self.rejected.gains()

    def swapped(self) -> "PairBatch":
        """The pairs with their sides exchanged."""
        return PairBatch(self.rejected, self.chosen)


@dataclass(frozen=True)
class Reads:
    """What a loss needs beside the policy's summed log-probs.

    reference: those of a reference, which is not run if no loss reads it. tokens: log-probs token
    by token, of the policy and, with `reference`, of the reference. compares: whether the loss
    compares the two sides, so that a pair's label_smoothing has a meaning for it.
    """

    reference: bool = True
    tokens: bool = False
    compares: bool = True


Function = TypeVar("Function", bound=PairLoss)


def reads(
    *, reference: bool = True, tokens: bool = False, compares: bool = True
) -> Callable[[Function], Function]:
    """Decorates a loss function of your own with what it reads.

    reference: log-probs under the reference; a function without this decorator reads them. tokens:
    log-probs token by token. compares: whether a pair's label_smoothing applies to the loss.
    """

    def decorate(function: Function) -> Function:
        function.reads = Reads(reference, tokens, compares)  # type: ignore[attr-defined]
        return function

    return decorate


def reads_of(function: PairLoss) -> Reads:
    """What a loss reads, as its decorator says."""
    return getattr(function, "reads", Reads())


def dpo_loss(
    batch: PairBatch, *, beta: Positive = 0.1, label_smoothing: Noise = 0.0
) -> Float[Tensor, " b"]:
    """-(1-e) log s(beta h) - e log s(-beta h), e = label_smoothing.

    Eq. 7 of arXiv:2305.18290 at e = 0; with e > 0 it is cDPO (Eq. 3 of ericmitchell.ai/cdpo.pdf).
    SPIN (Eq. 4.7 of arXiv:2401.01335, logistic) is this on people's answers against the model's
    own; its lambda is beta.
    """
    margin = beta * batch.margins()
    straight, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return straight if label_smoothing == 0.0 else straight.lerp(flipped, label_smoothing)


def robust_loss(
    batch: PairBatch, *, beta: Positive = 0.1, label_smoothing: Noise = 0.1
) -> Float[Tensor, " b"]:
    """[-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e): rDPO, arXiv:2403.00409.

    Its mean over labels of which a share e is flipped is the DPO loss of the true labels.
    """
    margin, noise = beta * batch.margins(), label_smoothing
    return (noise * F.logsigmoid(-margin) - (1 - noise) * F.logsigmoid(margin)) / (1 - 2 * noise)


def ipo_loss(
    batch: PairBatch, *, beta: Positive = 0.1, over: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, " b"]:
    """(h - 1/(2 beta))^2, Eq. 17 of arXiv:2310.12036 (beta is its tau).

    over: "mean" takes D(y) as the mean over tokens, as the authors confirmed to TRL; or "sum".
    """
    if over == "sum":
        margin = batch.margins()
    else:
        margin = _mean_gains(batch.chosen) - _mean_gains(batch.rejected)
    return (margin - 1 / (2 * beta)).square()


def hinge_loss(batch: PairBatch, *, beta: Positive = 0.1) -> Float[Tensor, " b"]:
    """max(0, 1 - beta h): SLiC-HF (arXiv:2305.10425) on implicit rewards (arXiv:2309.06657)."""
    return F.relu(1 - beta * batch.margins())


def dpo_norm_loss(batch: PairBatch, *, beta: Positive = 5.0) -> Float[Tensor, " b"]:
    """-log s(beta [D(w)/|w| - D(l)/|l|]): length-normalised DPO (arXiv:2411.15124)."""
    return -F.logsigmoid(beta * (_mean_gains(batch.chosen) - _mean_gains(batch.rejected)))


@reads(reference=False)
def simpo_loss(
    batch: PairBatch, *, beta: Positive = 2.0, gamma: float = 1.0
) -> Float[Tensor, " b"]:
    """-log s(beta log pi(w)/|w| - beta log pi(l)/|l| - gamma), without a reference.

    Eq. 6 of arXiv:2405.14734; gamma is the margin itself, not its ratio to beta.
    """
    margin = _mean_logprobs(batch.chosen) - _mean_logprobs(batch.rejected)
    return -F.logsigmoid(beta * margin - gamma)


@reads(tokens=True)
def ld_dpo_loss(
    batch: PairBatch, *, beta: Positive = 0.1, alpha: Share = 0.5
) -> Float[Tensor, " b"]:
    """DPO in which tokens beyond the shorter response's length count alpha (arXiv:2409.06411).

    alpha 1 is DPO; at 0 only the first min(|w|, |l|) tokens of both count.
    """
    shared = torch.minimum(batch.chosen.lengths, batch.rejected.lengths)
    chosen, rejected = (_desensitised(s, shared, alpha) for s in (batch.chosen, batch.rejected))
    return -F.logsigmoid(beta * (chosen - rejected))


def r_dpo_loss(
    batch: PairBatch, *, beta: Positive = 0.1, alpha: NotNegative = 0.01
) -> Float[Tensor, " b"]:
    """-log s(beta h + alpha |w| - alpha |l|): the longer a chosen response, the less is learnt.

    Eq. 9 of arXiv:2403.19159.
    """
    longer = batch.chosen.lengths - batch.rejected.lengths
    return -F.logsigmoid(beta * batch.margins() + alpha * longer)


def dpop_loss(
    batch: PairBatch, *, beta: Positive = 0.3, penalty: NotNegative = 50.0
) -> Float[Tensor, " b"]:
    """-log s(beta [h - penalty max(0, -D(w))]): DPO-positive, arXiv:2402.13228 (its lambda).

    The penalty begins where the chosen response is less likely than under the reference.
    """
    lost = F.relu(-batch.chosen.gains())
    return -F.logsigmoid(beta * (batch.margins() - penalty * lost))


def apo_zero_loss(batch: PairBatch, *, beta: Positive = 0.1) -> Float[Tensor, " b"]:
    """1 - s(beta D(w)) + s(beta D(l)): the chosen up, the rejected down (arXiv:2408.06266)."""
    return torch.sigmoid(-beta * batch.chosen.gains()) + torch.sigmoid(
        beta * batch.rejected.gains()
    )


def apo_down_loss(batch: PairBatch, *, beta: Positive = 0.1) -> Float[Tensor, " b"]:
    """s(beta D(w)) + 1 - s(beta h): both down, the rejected more (arXiv:2408.06266)."""
    return torch.sigmoid(beta * batch.chosen.gains()) + torch.sigmoid(-beta * batch.margins())


def sppo_loss(
    batch: PairBatch, *, beta: Positive = 0.001, hard: bool = False
) -> Float[Tensor, " b"]:
    """([D(w) - (p_w - 1/2)/beta]^2 + [D(l) - (p_l - 1/2)/beta]^2) / 2: arXiv:2405.00675.

    p: how likely each wins, as its pair says, else 1 and 0. hard: 1 and 0 whatever the pair says.
    """
    chosen_wins, rejected_wins = (1.0, 0.0) if hard else (batch.chosen.wins, batch.rejected.wins)
    chosen_error = batch.chosen.gains() - (chosen_wins - 0.5) / beta
    rejected_error = batch.rejected.gains() - (rejected_wins - 0.5) / beta
    return (chosen_error.square() + rejected_error.square()) / 2


def wpo_loss(
    batch: PairBatch, *, beta: Positive = 0.1, label_smoothing: Noise = 0.0
) -> Float[Tensor, " b"]:
    """DPO times exp(log pi(w)/|w| + log pi(l)/|l|), through which no gradient flows.

    arXiv:2406.11827: pairs that the policy would hardly write itself count less. The paper's
    alignment of weights is left out: it needs the sum of squared probabilities over the vocabulary.
    """
    weights = (_mean_logprobs(batch.chosen) + _mean_logprobs(batch.rejected)).detach().exp()
    return weights * dpo_loss(batch, beta=beta, label_smoothing=label_smoothing)


@reads(reference=False, compares=False)
def nll_loss(batch: PairBatch) -> Float[Tensor, " b"]:
    """-log pi(w) / |w|, per pair: the second term of Eq. 2 of arXiv:2404.19733 (IRPO)."""
    return -_mean_logprobs(batch.chosen)


PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": dpo_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "dpo_norm": dpo_norm_loss,
    "simpo": simpo_loss,
    "ld_dpo": ld_dpo_loss,
    "r_dpo": r_dpo_loss,
    "dpop": dpop_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sppo": sppo_loss,
    "wpo": wpo_loss,
    "nll": nll_loss,
}
"""Losses by the names that a stage's `loss` may give; docs/losses.md has a line for each."""


def _mean_gains(side: Responses) -> Tensor:
    return side.means(side.gains())


def _mean_logprobs(side: Responses) -> Tensor:
    return side.means(side.logprobs)


def _desensitised(
    side: Responses, shared: Float[Tensor, " b"], alpha: float
) -> Float[Tensor, " b"]:
    """D(y) in which tokens beyond the shared length count alpha."""
    gains = side.token_gains()  # (b, t)
    is_shared = torch.arange(gains.shape[1], device=gains.device) < shared[:, None]  # (b, t)
    return torch.where(is_shared, gains, alpha * gains).sum(dim=-1)


def _computed(values: Tensor | None, what: str) -> Tensor:
    """The values; ConfigError if they were not computed, naming the argument of `reads`."""
    if values is None:
        raise ConfigError(
            f"this loss reads {what} that nobody computed: decorate its function with "
            f"self_rewarding_lm.training.reads({what}=True), or leave `reads` away for a reference."
        )
    return values
