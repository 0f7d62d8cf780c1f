"""Token log-probabilities: the only place where logits and the tokens they predict are aligned.

Column i speaks of token i, so masks, ids and log-probs share a shape.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_logprobs(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """log p(ids[:, i] | ids[:, :i]) at column i; column 0 is 0.0, nothing predicts it.

    Computed in float32, in float64 where the logits are float64.
    """
    scores = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    chosen = scores.gather(-1, ids[:, 1:, None].long()).squeeze(-1)
    return F.pad(chosen - scores.logsumexp(dim=-1), (1, 0))


def masked_sum(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """The sum of each row's values where the mask is True."""
    return values.masked_fill(~mask, 0.0).sum(dim=-1)
