"""Any module that turns ids (b, t) into logits (b, t, v), with a cache if it offers one.

Without a cache each token costs a whole forward. A module offers one by a forward of the form
forward(ids, positions=None, cache=None), see docs/adapters.md.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.attention import KeyValues
from self_rewarding_lm.models.batching import by_side, pad_rows
from self_rewarding_lm.models.interface import (
    Cache,
    Plan,
    Session,
    TokenModel,
    Training,
    copied,
    device_of,
    limit_of,
    logits_of,
    not_checkpointed,
)
from self_rewarding_lm.models.sessions import AttendingSession, BatchSession
from self_rewarding_lm.models.trial import check_causal, probe_vocab, session_error
from self_rewarding_lm.runs.stage_files import MODEL_FILE
from self_rewarding_lm.runs.weights import read_weights, write_weights

logger = logging.getLogger(__name__)


UNEQUAL = re.compile(r"size of tensor a \(\d+\) must match the size of tensor b")
"""What torch says of tensors of unlike sizes, such as rows that are longer than their positions."""


class PlainModel:
    """A module as it is. Rows are padded on the right, which a causal model does not see."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Every module: the last family takes what no other does."""
        return True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.max_len = limit_of(module)
        self.vocab = probe_vocab(module)
        self.bytes_per_token = 0
        self.training: Training | None = None
        check_causal(self)
        self.caches = {"positions", "cache"} <= set(signature(module.forward).parameters)
        self.refresh()

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self._forward(ids), *ids.shape)

    @property
    def attends(self) -> bool:
        """Whether it is decoded over our keys and values, which is its only cache."""
        return self.caches

    def side(self, length: int, *, padded: bool = True) -> int:
        return 0

    def checkpointing(self) -> AbstractContextManager[None]:
        raise not_checkpointed(self.module)

    def refresh(self) -> None:
        """Try whether the module's cache gives the right logits with the present weights.

        A branch that starts at zero hides what a cache gets wrong until it is trained.
        """
        if self.caches and session_error(self) > 1:
            self.caches = False
            logger.warning(
                "%s.forward takes positions and a cache, but its logits with a cache are not those "
                "without one: it is decoded without, and each token costs a whole forward. See "
                "docs/adapters.md.",
                type(self.module).__name__,
            )

    def state(self) -> dict[str, Tensor]:
        return copied(self.module.state_dict())

    def save(self, folder: Path) -> None:
        write_weights(self.module, folder / MODEL_FILE)

    def load(self, file: Path) -> None:
        read_weights(self.module, file)

    def session(self, plan: Plan) -> Session:
        device = device_of(self.module)
        if self.caches:
            return AttendingSession(self._attending, plan, device)
        return recomputing(self, plan)

    def _forward(self, ids: Tensor, **more: Any) -> Any:
        """The module's output. Raises AdapterError if it fails as beyond its last position."""
        try:
            return self.module(ids, **more)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not UNEQUAL.search(str(error)):
                raise
            raise AdapterError(
                f"model(ids) failed on ids of shape {tuple(ids.shape)}: {type(error).__name__}: "
                f"{error}. If the model takes fewer tokens, give it an attribute max_seq_len, "
                "the most tokens in a row; rows are then kept within it."
            ) from error

    def _attending(self, ids: Tensor, positions: Tensor, cache: KeyValues) -> Tensor:
        output = self._forward(ids, positions=positions, cache=cache)
        self.bytes_per_token = cache.bytes_per_token
        count = ids.shape[1] if cache.wanted is None else len(cache.wanted)
        return logits_of(output, 1, count)


def recomputing(model: TokenModel, plan: Plan) -> BatchSession:
    """A session that computes whole rows for each token.

    Rows are not joined: rows that begin together have the least padding.
    """

    def start(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        cache = RecomputedRows(model, rows)
        return cache.last_logits(), cache

    return BatchSession(start, max_rows=plan.max_rows, device=device_of(model.module))


class RecomputedRows:
    """What stands in for a cache: it holds the rows' ids and computes whole rows for each token."""

    def __init__(self, model: TokenModel, rows: Sequence[Sequence[int]]) -> None:
        self.model = model
        ids, lengths = pad_rows(rows)
        device = device_of(model.module)
        self.ids, self.lengths = ids.to(device), lengths.to(device)

    def last_logits(self) -> Float[Tensor, "r v"]:
        groups = by_side(self.lengths.tolist(), self.model.side)
        parts = []
        for group in groups:
            ends = self.lengths[group] - 1
            logits = self.model.logits(self.ids[group, : int(ends.max()) + 1])  # (b, t, v)
            parts.append(logits[torch.arange(len(group), device=logits.device), ends])
        order = torch.tensor([row for group in groups for row in group])
        return torch.cat(parts)[order.argsort().to(self.ids.device)]

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        longest = int(self.lengths.max())
        if longest == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, 1))
        self.ids = self.ids.scatter(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1
        return self.last_logits()

    def copy(self) -> Cache:
        return copy(self)

    def select(self, rows: Int[Tensor, " n"]) -> None:
        self.lengths = self.lengths[rows]
        self.ids = self.ids[rows, : int(self.lengths.max())]
