"""Losses: arithmetic on tensors.

A loss returns one number per row and what each row counts; the training loop divides the sum of
the numbers by the sum of the counts over the whole optimiser step, so that the gradient does not
depend on how a step is cut into micro-batches. No model, no device, no configuration here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from self_rewarding_lm.logprobs import masked_sum


@dataclass(frozen=True)
class PairLogprobs:
    """Summed log-probs of the chosen and the rejected responses."""

    chosen: Float[Tensor, " b"]
    rejected: Float[Tensor, " b"]


@dataclass(frozen=True)
class LossResult:
    """losses: a number per row. counts: what each row adds to the divisor. metrics: per row."""

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


def dpo_loss(policy: PairLogprobs, reference: PairLogprobs, *, beta: float) -> LossResult:
    """-log sigmoid(beta * h), h = (log pi/ref)(chosen) - (log pi/ref)(rejected).

    Eq. 7 of arXiv:2305.18290. SPIN (Eq. 4.7 of arXiv:2401.01335, with the logistic loss) is this
    on human and own answers, its lambda being beta.
    """
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    margin = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    return LossResult(-F.logsigmoid(margin), torch.ones_like(margin), metrics)


def nll_term(
    chosen_logprobs: Float[Tensor, " b"], chosen_lengths: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """-log pi(chosen) / |chosen|, per pair: the second term of Eq. 2 of arXiv:2404.19733."""
    return -chosen_logprobs / chosen_lengths.clamp(min=1)
