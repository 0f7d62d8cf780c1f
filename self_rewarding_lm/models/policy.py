"""The module that accelerate prepares: it holds the model and gives log-probs, not logits."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.models.logprobs import label_logprobs, token_logprobs
from self_rewarding_lm.models.packing import Packing

logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """forward(ids) -> per-token log-probs; every training forward goes through it.

    Distributed wrappers see all forwards because nothing calls the model from outside it while
    gradients are computed.
    """

    def __init__(self, model: TokenModel) -> None:
        super().__init__()
        self.model = model.module
        self.token_model = model

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"] | None = None,
        targets: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """log p(ids[:, i] | ids[:, :i]) at column i, 0.0 at column 0.

        lengths: of right-padded rows; None: all of them are full. targets: where log-probs are
        wanted, the rest is 0.0 (or whatever cost nothing); None: everywhere. ids may be on the CPU.
        """
        model = self.token_model
        device = device_of(self.model)
        training = model.training
        if training is None:
            return token_logprobs(model.logits(ids.to(device)), ids.to(device))
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1])
        if training.packs:
            packing = Packing(ids.cpu(), lengths.cpu(), device, width=training.width)
            hidden = training.hidden(packing.ids, packing).flatten(0, 1)
            where = packing.where
        else:
            hidden = training.hidden(ids.to(device), None).flatten(0, 1)
            where = torch.arange(ids.numel(), device=device).view_as(ids)
        wanted = torch.ones_like(ids, dtype=torch.bool) if targets is None else targets
        wanted = wanted.cpu() & (torch.arange(ids.shape[1]) < lengths.cpu()[:, None])
        wanted[:, 0] = False
        rows, columns = wanted.nonzero(as_tuple=True)
        counts = 1.0
        if not len(rows):  # a gradient of zeros all the same: siblings wait for it
            rows = columns = torch.zeros(1, dtype=torch.long)
            counts = 0.0
        labels = ids[rows.to(ids.device), columns.to(ids.device)].to(device)
        rows, columns = rows.to(device), columns.to(device)
        source = where[rows, (columns - 1).clamp(min=0)]
        found = label_logprobs(hidden[source], labels, training.head(), vocab=model.vocab)
        return found.new_zeros(ids.shape).index_put((rows, columns), found * counts)


@contextmanager
def dropout_set(module: nn.Module, rate: float, *, warns: bool = True) -> Iterator[None]:
    """Every dropout rate of a module set to `rate`, and restored afterwards."""
    found: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        for name in ("p",) if isinstance(part, nn.Dropout) else ("dropout", "attention_dropout"):
            rate_now = getattr(part, name, None)
            if isinstance(rate_now, int | float) and not isinstance(rate_now, bool):
                found.append((part, name, getattr(part, name)))
    if not found and rate > 0 and warns:
        logger.warning("dropout=%s has no effect: the model has no dropout layers.", rate)
    try:
        for part, name, _ in found:
            setattr(part, name, rate)
        yield
    finally:
        for part, name, before in found:
            setattr(part, name, before)


@torch.no_grad()
def response_logprobs(
    policy: nn.Module, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, ...]]:
    """Per-token log-probs of the responses of (prompt, response) sequences, dropout off."""
    ids, lengths = pad_rows([(*prompt, *response) for prompt, response in sequences])
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    targets = torch.arange(ids.shape[1]) >= starts[:, None]
    with evaluating(policy):
        logprobs = policy(ids, lengths, targets).cpu()
    return [
        tuple(row[len(prompt) : length].tolist())
        for row, (prompt, _), length in zip(logprobs, sequences, lengths.tolist(), strict=True)
    ]
