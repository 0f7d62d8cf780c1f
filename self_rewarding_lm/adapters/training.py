"""Models that give hidden states and their head apart, and the trial of such a model.

With these, log-probs are computed where they are wanted alone, a piece at a time, and, where the
model's attention can turn to ours, over rows without padding.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from self_rewarding_lm.adapters.base import TokenModel, agrees_on_probes, close, device_of
from self_rewarding_lm.adapters.inference import inferring
from self_rewarding_lm.adapters.packing import Packing, packed_length
from self_rewarding_lm.batching import micro_batches, pad_rows
from self_rewarding_lm.logprobs import Head

logger = logging.getLogger(__name__)

LOUD = 100.0
"""The largest logit of a trial by which a softcap or a scale shows, whatever the weights are."""


@dataclass(frozen=True)
class Training:
    """hidden: ids (b, t) -> (b, t, d), of right-padded rows or, with a Packing, of its lines.

    packs: whether it takes a Packing. width: tokens in a line of it at most; None: any number.
    """

    hidden: Callable[[Tensor, Packing | None], Tensor]
    head: Callable[[], Head]
    packs: bool
    width: int | None = None


def tried(model: TokenModel, training: Training) -> Training | None:
    """The same where it gives the model's logits, without packing if need be; else None."""
    ways = [training, replace(training, packs=False)] if training.packs else [training]
    return next((way for way in ways if _agrees(model, way)), None)


def packs(model: TokenModel) -> bool:
    """Whether rows go through a model without padding."""
    return model.training is not None and model.training.packs


def grouped(
    model: TokenModel,
    rows: Sequence[Sequence[Sequence[int]]],
    *,
    token_budget: int,
    max_rows: int | None = None,
) -> list[list[int]]:
    """Indices of rows, each of one or more sequences, in groups that go through the model at once.

    token_budget: tokens of a group, with its padding where the model does not pack.
    """
    packed = packs(model)
    if packed:
        lengths = [packed_length(sequences) for sequences in rows]
    else:
        lengths = [max(map(len, sequences)) for sequences in rows]
        token_budget //= max(map(len, rows), default=1)
    return micro_batches(lengths, token_budget=token_budget, max_rows=max_rows, padded=not packed)


def head_agrees(model: TokenModel, project: nn.Module, head: Head) -> bool:
    """Whether a head's logits of large hidden states are those the model makes of them.

    With small ones neither a softcap would show nor, before training, a wrong scale.
    """
    loud: list[Tensor] = []

    def louder(_: nn.Module, args: tuple) -> tuple:
        largest = project.forward(args[0]).abs().amax().clamp(min=1e-6)
        loud.append(args[0] * (LOUD / largest))
        return (loud[0], *args[1:])

    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model.module))
    with inferring(model.module):
        handle = project.register_forward_pre_hook(louder)
        try:
            truth = model.logits(ids)
        finally:
            handle.remove()
        found = head.logits(loud[0])
    return bool(torch.allclose(found.float(), truth.float(), rtol=1e-2, atol=1e-2 * LOUD))


def _agrees(model: TokenModel, training: Training) -> bool:
    def trial(model: TokenModel, tokens: list[int]) -> bool:
        return _equals_whole(model, training, tokens)

    return agrees_on_probes(model, trial)


def _equals_whole(model: TokenModel, training: Training, tokens: list[int]) -> bool:
    """Rows of which two begin alike, and of which the last is the first's beginning."""
    rows = [tokens[:-1], [tokens[0], *tokens[2:]], tokens[1:3], tokens[1:2]]
    ids, lengths = pad_rows(rows)
    device = device_of(model.module)
    if training.packs:
        width = None if training.width is None else min(training.width, len(tokens) - 1)
        packing = Packing(ids, lengths, device, width=width, least_shared=1)
        hidden = training.hidden(packing.ids, packing).flatten(0, 1)[packing.where]
    else:
        hidden = training.hidden(ids.to(device), None)
    head = training.head()
    return all(
        close(model, row, head.logits(states[len(row) - 1]))
        for row, states in zip(rows, hidden, strict=True)
    )
