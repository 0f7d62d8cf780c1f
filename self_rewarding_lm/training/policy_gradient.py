"""Policy gradients on responses with advantages: the arithmetic, the rows, the old log-probs.

Knows nothing of how an advantage was made. The arithmetic is `policy_gradient_loss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from self_rewarding_lm.models.logprobs import masked_sum
from self_rewarding_lm.records import Advantage, Candidate, Ids, ResponseLogprobs
from self_rewarding_lm.training.losses import LossResult
from self_rewarding_lm.training.objectives import Sequences, behind
from self_rewarding_lm.training.reference import StoredLogprobs

Normalise = Literal["sequence", "token", "constant"]
"""What a step's loss is a mean over; "constant": responses, each as long as the longest may be."""


Ratio = Literal["token", "sequence"]
"""Of what the policy's probability is divided by the old one."""


@dataclass(frozen=True)
class PolicyLoss:
    """The settings of `policy_gradient_loss`, as it explains them."""

    normalise: Normalise = "token"
    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.0
    constant: int = 1

    def count(self, tokens: int) -> int:
        """What a response of so many tokens adds to the divisor of the loss."""
        return {"sequence": 1, "token": tokens, "constant": self.constant}[self.normalise]


def policy_gradient_loss(
    logprobs: Float[Tensor, "b t"],
    targets: Bool[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    settings: PolicyLoss,
    *,
    old: Float[Tensor, "b t"] | None = None,
    reference: Float[Tensor, "b t"] | None = None,
    sampled: Float[Tensor, "b t"] | None = None,
) -> LossResult:
    """Of each response -sum_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta k3_t.

    rho_t = pi(t) / old(t), token by token (GRPO, arXiv:2402.03300), or for all tokens of a response
    exp(mean_t log(pi(t) / old(t))) (GSPO, arXiv:2507.18071). k3_t = ref(t)/pi(t) - log(ref(t)/
    pi(t)) - 1, whose mean over samples of pi is KL(pi || ref) (joschu.net/blog/kl-approx.html).
    old: log-probs under the weights that the responses are samples of; None: those are the present
    ones, so rho is 1 and only its gradient counts. reference: None if beta is 0. sampled: the
    sampler's own, which are measured against the old ones and not learnt from.

    normalise says what a step's sum is divided by. sequence: the sum is a mean over a response's
    tokens, and a response counts 1 (GRPO). token: a response counts its tokens (DAPO,
    arXiv:2503.14476). constant: it counts `constant` tokens, however long it is (Dr. GRPO,
    arXiv:2503.20783). Metrics are means over a response's tokens.
    """
    lengths = targets.sum(dim=-1).to(logprobs.dtype)  # (b,)

    def mean(values: Tensor) -> Tensor:  # (b, t) -> (b,)
        return masked_sum(values, targets) / lengths.clamp(min=1)

    # 1. the ratio of each token; where nothing is learnt it is 1
    before = logprobs.detach() if old is None else old
    log_ratio = (logprobs - before).masked_fill(~targets, 0.0)  # (b, t)
    if settings.ratio == "sequence":
        log_ratio = mean(log_ratio)[:, None].expand_as(logprobs)
    ratio = log_ratio.exp()
    # 2. the smaller of the gains with it and with it clipped
    gain = advantages[:, None]  # (b, 1)
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -torch.minimum(ratio * gain, clipped * gain)  # (b, t)
    metrics = {
        "policy/ratio": mean(ratio),
        "policy/clipped_low": mean(((ratio < 1 - settings.clip_low) & (gain < 0)).to(ratio)),
        "policy/clipped_high": mean(((ratio > 1 + settings.clip_high) & (gain > 0)).to(ratio)),
        "policy/logprob": mean(logprobs),
    }
    if sampled is not None:
        metrics["policy/sampler_gap"] = mean((before.detach() - sampled).abs())
    # 3. how far the policy is from the reference
    if reference is not None:
        log_far = (reference - logprobs).masked_fill(~targets, 0.0)
        far = log_far.exp() - log_far - 1
        losses = losses + settings.beta * far
        metrics["policy/kl"] = mean(far)
    sums = mean(losses) if settings.normalise == "sequence" else masked_sum(losses, targets)
    counts = [settings.count(n) for n in targets.sum(dim=-1).tolist()]
    return LossResult(sums, logprobs.new_tensor(counts), metrics)


@dataclass(frozen=True)
class PolicyGradientObjective:
    """Responses, each with its advantage; a row is one response after its prompt.

    old, reference: the stored log-probs of each row under the weights that it is a sample of, and
    under the reference; None as in `policy_gradient_loss`. sampled: candidates with the sampler's
    log-probs; None if it gives none.
    """

    responses: Sequence[Advantage]
    settings: PolicyLoss
    old: Sequence[ResponseLogprobs] | None = None
    reference: Sequence[ResponseLogprobs] | None = None
    sampled: Sequence[Candidate] | None = None

    def __len__(self) -> int:
        return len(self.responses)

    def count(self, row: int) -> int:
        return self.settings.count(len(self.responses[row].completion_ids))

    def sequences(self, row: int) -> Sequences:
        response = self.responses[row]
        return behind(response.prompt_ids, response.completion_ids)

    def name(self, row: int) -> str:
        return self.responses[row].id

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        advantages = logprobs.new_tensor([self.responses[row].advantage for row in rows])

        def at_targets(
            stored: Sequence[ResponseLogprobs] | Sequence[Candidate] | None,
        ) -> Tensor | None:  # (s, t)
            if stored is None:
                return None
            lengths = [len(self.responses[row].completion_ids) for row in rows]
            numbers = [
                number
                for row, length in zip(rows, lengths, strict=True)
                for number in (stored[row].logprobs or ())[:length]
            ]
            return torch.zeros_like(logprobs).masked_scatter(targets, logprobs.new_tensor(numbers))

        return policy_gradient_loss(
            logprobs,
            targets,
            advantages,
            self.settings,
            old=at_targets(self.old),
            reference=at_targets(self.reference),
            sampled=at_targets(self.sampled),
        )


class StoredResponses(StoredLogprobs[Advantage, ResponseLogprobs]):
    """The stored log-probs of single responses."""

    record_type = ResponseLogprobs
    noun = "response"

    def responses(self, row: Advantage) -> Sequence[tuple[Ids, Ids]]:
        return [(row.prompt_ids, row.completion_ids)]

    def record(self, record_id: str, logprobs: Sequence[tuple[float, ...]]) -> ResponseLogprobs:
        return ResponseLogprobs(record_id, *logprobs)
