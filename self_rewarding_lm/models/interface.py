"""What a model must offer, and may offer: `TokenModel`, `Training`, `Plan`, `Session`, `Cache`.

The engine and the training loop know a model by these alone. Knows nothing of any model family.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.errors import AdapterError, ConfigError
from self_rewarding_lm.models.logprobs import Head
from self_rewarding_lm.models.packing import Packing


@dataclass(frozen=True)
class Training:
    """hidden: ids (b, t) -> (b, t, d), of right-padded rows or, with a Packing, of its lines.

    packs: whether it takes a Packing. width: tokens in a line of it at most; None: any number.
    """

    hidden: Callable[[Tensor, Packing | None], Tensor]
    head: Callable[[], Head]
    packs: bool
    width: int | None = None


SHARE_OF_FREE = 0.5
"""Of the memory that is free when a session begins; ours: the rest is for a forward's own needs."""


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

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
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


@runtime_checkable
class TokenModel(Protocol):
    """A causal token-level transformer. The pad side is the adapter's own business.

    bytes_per_token: what a session's memory takes for one token of one row; 0 where it keeps none.
    training: its hidden states and head apart; None where it gives logits alone.
    """

    module: nn.Module
    max_len: int | None
    vocab: int
    bytes_per_token: int
    training: "Training | None"

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of right-padded rows, with gradients."""
        ...

    def checkpointing(self) -> AbstractContextManager[None]:
        """Layers are computed again in the backward pass instead of being kept (gradient
        checkpointing); AdapterError where the model cannot do that."""
        ...

    def refresh(self) -> None:
        """Called before generating and training: weights may have changed since the last one."""
        ...

    def session(self, plan: Plan) -> Session:
        """Rows to be decoded together, with the present weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of the tensors that `load` replaces."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights, and what else loading them needs, into a folder."""
        ...

    def load(self, file: Path) -> None:
        """Load weights from the file that `save` wrote, in place."""
        ...


def logits_of(output: Any, batch: int, length: int) -> Tensor:
    """The logits in a model's output: a tensor, or an object with `.logits`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (batch, length):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AdapterError(
            f"model(ids) with ids of shape ({batch}, {length}) must give logits of shape "
            f"({batch}, {length}, vocabulary), or an object with such .logits; got {came}. Wrap "
            "the model in a module whose forward returns them."
        )
    return logits


def not_checkpointed(module: nn.Module) -> AdapterError:
    """The error of a model that cannot compute its layers again."""
    return AdapterError(
        "optim.gradient_checkpointing=True needs a model of transformers, which can compute its "
        f"layers again; got {type(module).__name__}. Leave it out, or use a smaller "
        "optim.micro_batch_tokens."
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters (or buffers) live; the CPU for one that has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def copied(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def limit_of(module: nn.Module) -> int | None:
    """The longest sequence a module says it takes: `.max_seq_len`, or its config's."""
    config = getattr(module, "config", None)
    found = (
        getattr(module, "max_seq_len", None),
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
    )
    return next((n for n in found if isinstance(n, int) and n > 0), None)
