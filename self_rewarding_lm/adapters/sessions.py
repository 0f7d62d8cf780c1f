"""Sessions: the rows in flight over one model, from the engine's side.

A session belongs to one call of the engine, so the weights do not change under it, and its memory
is given back with it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.errors import ConfigError

SHARE_OF_FREE = 0.5
"""Of the memory that is free when a session begins; ours: the rest is for a forward's own needs."""

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a session is for.

    root: ids with which all its prompts begin. longest: tokens of the longest prompt, root
    included. max_new: tokens that a row takes at most. max_rows: rows in flight, min_rows: without
    which it is of no use. cache_bytes: what keys and values may take; None: a safe share of what is
    free. is_cut: whether memory made max_rows smaller than it was wanted.
    """

    root: tuple[int, ...]
    longest: int
    max_new: int
    max_rows: int
    min_rows: int = 1
    cache_bytes: int | None = None
    is_cut: bool = False

    @property
    def stems(self) -> int:
        """Prompts that are held: those of the rows, and some that are ready for the next ones."""
        return self.max_rows + self.max_rows // 8 + 2

    @property
    def tokens(self) -> int:
        """Tokens that there is memory for."""
        root = len(self.root)
        return root + self.stems * (self.longest - root) + self.max_rows * self.max_new

    def fitting(self, bytes_per_token: int, device: torch.device) -> "Plan":
        """The same with as many rows as the memory has room for.

        Raises ConfigError where it has none for min_rows.
        """
        if not bytes_per_token:
            return self
        allowed = self.cache_bytes
        if allowed is None:
            allowed = int(SHARE_OF_FREE * free_bytes(device))
        plan = self
        while plan.max_rows > self.min_rows and plan.tokens * bytes_per_token > allowed:
            plan = replace(plan, max_rows=plan.max_rows - 1, is_cut=True)
        if plan.tokens * bytes_per_token > allowed:
            raise ConfigError(
                f"the keys and values of prompts of {self.longest} tokens with {self.max_new} new "
                f"ones take {plan.tokens * bytes_per_token / 2**20:.3g} MiB even for "
                f"{plan.max_rows} rows, and {allowed / 2**20:.3g} MiB are allowed. Raise "
                "cache_bytes of LocalEngine, or use shorter prompts or fewer new tokens."
            )
        return plan


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; a machine's is divided among a launcher's processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@runtime_checkable
class Session(Protocol):
    """Prompts that are held, and the rows that go on from them.

    Prompts are numbered in the order in which they come, from 0; held: how many came. joins:
    whether rows may be added while others are in flight.
    """

    joins: bool
    held: int

    def prefill(self, prompts: Sequence[Ids]) -> Float[Tensor, "n v"]:
        """Hold some prompts; the logits of what follows each."""
        ...

    def room(self) -> int:
        """How many further prompts can be held now."""
        ...

    def add(self, prompts: Sequence[int]) -> None:
        """Rows behind those in flight, each from one of the prompts that are held."""
        ...

    def release(self, prompts: Sequence[int]) -> None:
        """No further rows of these prompts will be added."""
        ...

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to each row; the logits of what follows."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        ...


@runtime_checkable
class Cache(Protocol):
    """The state of rows that are decoded together, of a model that keeps it in its own way."""

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to each row; the logits of what follows."""
        ...

    def select(self, rows: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        ...

    def copy(self) -> "Cache":
        """The same rows once more, of which one can go on without the other."""
        ...


Start = Callable[[Sequence[Ids]], tuple[Tensor, Cache]]


class BatchSession:
    """A session over a model's own kind of cache: prompts are computed whole and rows are copied.

    Rows are not joined, as that copies the whole cache. start: the first logits and the cache of
    some rows.
    """

    joins = False

    def __init__(self, start: Start, *, max_rows: int, device: torch.device) -> None:
        self.start, self.max_rows, self.device = start, max_rows, device
        self.held = 0
        self._running: Cache | None = None
        self._held: dict[int, tuple[Cache, int]] = {}

    def prefill(self, prompts: Sequence[Ids]) -> Float[Tensor, "n v"]:
        logits, cache = self.start(prompts)
        for row in range(len(prompts)):
            self._held[self.held] = cache, row
            self.held += 1
        return logits

    def room(self) -> int:
        return self.max_rows - len(self._held)

    def add(self, prompts: Sequence[int]) -> None:
        held = [self._held[number] for number in prompts]
        assert self._running is None and len({id(cache) for cache, _ in held}) == 1
        self._running = held[0][0].copy()
        self._running.select(torch.tensor([row for _, row in held], device=self.device))

    def release(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            del self._held[number]

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        assert self._running is not None
        return self._running.extend(tokens)

    def select(self, rows: Sequence[int]) -> None:
        if not rows:
            self._running = None
        elif self._running is not None:
            self._running.select(torch.tensor(rows, device=self.device))


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
