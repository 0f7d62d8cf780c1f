"""The module that accelerate prepares: it holds the model and gives log-probs, not logits."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.base import TokenModel
from self_rewarding_lm.logprobs import token_logprobs

logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """forward(ids) -> per-token log-probs; every training forward goes through it.

    Distributed wrappers see all forwards because nothing calls the model from outside it while
    gradients are computed.
    """

    def __init__(self, model: TokenModel) -> None:
        super().__init__()
        self.model = model.module
        self._logits = model.logits

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        return token_logprobs(self._logits(ids), ids)


@contextmanager
def dropout_set(module: nn.Module, rate: float) -> Iterator[None]:
    """Every dropout rate of a module set to `rate`, and restored afterwards."""
    found: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        for name in ("p",) if isinstance(part, nn.Dropout) else ("dropout", "attention_dropout"):
            rate_now = getattr(part, name, None)
            if isinstance(rate_now, int | float) and not isinstance(rate_now, bool):
                found.append((part, name, getattr(part, name)))
    if not found and rate > 0:
        logger.warning("dropout=%s has no effect: the model has no dropout layers.", rate)
    try:
        for part, name, _ in found:
            setattr(part, name, rate)
        yield
    finally:
        for part, name, before in found:
            setattr(part, name, before)
