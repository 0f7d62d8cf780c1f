"""Rows of a transformers model with transformers' own cache, which grows by copying."""

from collections.abc import Sequence, Set
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.base import device_of
from self_rewarding_lm.adapters.sessions import Cache


class PaddedRows:
    """Left-padded rows, their mask and transformers' cache."""

    def __init__(
        self, module: nn.Module, config: Any, takes: Set[str], rows: Sequence[Sequence[int]]
    ) -> None:
        from transformers import DynamicCache

        self.module, self.takes = module, takes
        device = device_of(module)
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
        starts = torch.tensor([longest - len(row) for row in rows], device=device)
        self.mask = (torch.arange(longest, device=device) >= starts[:, None]).long()
        self.cache = DynamicCache(config=config)
        self.logits = self._forward(ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0))

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        positions = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def select(self, rows: Int[Tensor, " n"]) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def copy(self) -> Cache:
        other = copy(self)
        other.cache = deepcopy(self.cache)
        return other

    @property
    def bytes_per_token(self) -> int:
        """Of the layers that keep all tokens; the states of others do not grow."""
        kept = [
            t
            for layer in self.cache.layers
            for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(t, Tensor) and t.ndim == 4
        ]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in kept)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        known = {"position_ids": positions, "logits_to_keep": 1}
        optional: dict[str, Any] = {k: v for k, v in known.items() if k in self.takes}
        output = self.module(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **optional,
        )
        # a model that leaves the cache empty is found out by its trial, however small its logits
        assert self.cache.get_seq_length() == self.mask.shape[1], "the cache was not filled"
        return output.logits[:, -1]
