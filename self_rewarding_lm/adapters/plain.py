"""Any module ids (b, t) -> logits (b, t, v): no cache, so each token costs a whole forward."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.base import (
    Cache,
    TokenModel,
    check_causal,
    copied,
    device_of,
    limit_of,
    logits_of,
    probe_vocab,
)
from self_rewarding_lm.batching import pad_rows
from self_rewarding_lm.weights import MODEL_FILE, read_weights, write_weights


class PlainModel:
    """A module as it is; rows are padded on the right, which a causal model does not see."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.max_len = limit_of(module)
        self.vocab = probe_vocab(module)
        check_causal(self)

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self.module(ids), *ids.shape)

    def refresh(self) -> None:
        """Nothing here depends on the weights."""

    def state(self) -> dict[str, Tensor]:
        return copied(self.module.state_dict())

    def save(self, folder: Path) -> None:
        write_weights(self.module, folder / MODEL_FILE)

    def load(self, file: Path) -> None:
        read_weights(self.module, file)

    def start(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        cache = RecomputedRows(self, rows)
        return cache.last_logits(), cache


class RecomputedRows:
    """The stand-in for a cache: it holds the rows and computes them anew for each token."""

    def __init__(self, model: TokenModel, rows: Sequence[Sequence[int]]) -> None:
        self.model = model
        ids, lengths = pad_rows(rows)
        device = device_of(model.module)
        self.ids, self.lengths = ids.to(device), lengths.to(device)

    def last_logits(self) -> Float[Tensor, "r v"]:
        rows = torch.arange(len(self.lengths), device=self.ids.device)
        return self.model.logits(self.ids)[rows, self.lengths - 1]

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        longest = int(self.lengths.max())
        if longest == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, 1))
        self.ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1
        return self.last_logits()

    def select(self, rows: Int[Tensor, " n"]) -> None:
        self.lengths = self.lengths[rows]
        self.ids = self.ids[rows, : int(self.lengths.max())]
