"""The module that accelerate prepares: it holds the model and gives log-probs, not logits."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.models.logprobs import label_logprobs, token_logprobs
from self_rewarding_lm.models.packing import Packing

logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """forward(ids) -> the log-prob of each token.

    Every forward with gradients goes through it, so that distributed wrappers see all of them.
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

        lengths: of right-padded rows; if None all are full. targets: where log-probs are wanted, by
        default everywhere; elsewhere they are 0.0, or what they are if that costs nothing. ids may
        be on the CPU.
        """
        model = self.token_model
        device = device_of(self.model)
        training = model.training
        if training is None:
            return token_logprobs(model.logits(ids.to(device)), ids.to(device))
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1])

        # 1. hidden states of all tokens, and where that of each token of a row is
        if training.packs:
            packing = Packing(ids.cpu(), lengths.cpu(), device, width=training.width)
            hidden = training.hidden(packing.ids, packing)
            where = packing.where  # (b, t)
        else:
            hidden = training.hidden(ids.to(device), None)
            where = torch.arange(ids.numel(), device=device).view_as(ids)  # (b, t)
        hidden = rearrange(hidden, "b t d -> (b t) d")

        # 2. rows and columns whose log-probs are wanted
        wanted = torch.ones_like(ids, dtype=torch.bool) if targets is None else targets
        wanted = wanted.cpu() & (torch.arange(ids.shape[1]) < lengths.cpu()[:, None])  # (b, t)
        wanted[:, 0] = False
        rows, columns = wanted.nonzero(as_tuple=True)  # (n,) each
        weight = 1.0
        if not len(rows):  # a gradient of zeros all the same: other processes wait for it
            rows = columns = torch.zeros(1, dtype=torch.long)
            weight = 0.0

        # 3. each of them from the hidden state of the token before
        labels = ids[rows.to(ids.device), columns.to(ids.device)].to(device)  # (n,)
        rows, columns = rows.to(device), columns.to(device)
        before = where[rows, (columns - 1).clamp(min=0)]
        logprobs = label_logprobs(hidden[before], labels, training.head(), vocab=model.vocab)
        return logprobs.new_zeros(ids.shape).index_put((rows, columns), logprobs * weight)


@contextmanager
def dropout_set(module: nn.Module, rate: float, *, warns: bool = True) -> Iterator[None]:
    """Set every dropout rate of a module to `rate`, and restore them afterwards.

    warns: whether a rate above 0 that has no effect is logged.
    """
    before: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        for name in ("p",) if isinstance(part, nn.Dropout) else ("dropout", "attention_dropout"):
            rate_before = getattr(part, name, None)
            if isinstance(rate_before, int | float) and not isinstance(rate_before, bool):
                before.append((part, name, rate_before))
    if not before and rate > 0 and warns:
        logger.warning("dropout=%s has no effect: the model has no dropout layers.", rate)
    try:
        for part, name, _ in before:
            setattr(part, name, rate)
        yield
    finally:
        for part, name, rate_before in before:
            setattr(part, name, rate_before)


@torch.no_grad()
def response_logprobs(
    policy: nn.Module, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, ...]]:
    """The log-prob of each response token of (prompt, response) sequences, without dropout."""
    ids, lengths = pad_rows([(*prompt, *response) for prompt, response in sequences])
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    targets = torch.arange(ids.shape[1]) >= starts[:, None]  # (b, t)
    with evaluating(policy):
        logprobs = policy(ids, lengths, targets).cpu()
    return [
        tuple(row[len(prompt) : length].tolist())
        for row, (prompt, _), length in zip(logprobs, sequences, lengths.tolist(), strict=True)
    ]
