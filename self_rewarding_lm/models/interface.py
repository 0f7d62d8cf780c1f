"""What a model must offer: `TokenModel`, and for it `Training`, `Plan`, `Session` and `Cache`.

The engine and the training loop know a model by these alone. Knows nothing of any model family.
Axes: b rows, t tokens, v words of the vocabulary, d the width of hidden states, r rows in flight.
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
from self_rewarding_lm.text import amount

SHARE_OF_FREE = 0.5
"""Of the memory that is free when a session begins (ours): the rest is for the forwards' needs."""


@dataclass(frozen=True)
class Training:
    """Hidden states and the head apart, so that logits are made only where they are wanted.

    hidden: ids (b, t) to hidden states (b, t, d), of right-padded rows or, given a Packing, of its
    lines. head: what makes logits of them. packs: whether `hidden` takes a Packing. width: tokens
    in a line of it at most; None if any number.
    """

    hidden: Callable[[Tensor, Packing | None], Tensor]
    head: Callable[[], Head]
    packs: bool
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a session is for.

    root: ids with which all its prompts begin. longest: tokens of the longest prompt, root
    included. max_new: new tokens of a row at most. max_rows: rows in flight at most. min_rows: the
    fewest rows with which a session is of use. cache_bytes: what keys and values may take; if None,
    SHARE_OF_FREE of the free memory. is_cut: whether memory has no room for the rows asked for.
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
        """Prompts that are held: one for each row, and some that wait for a row."""
        return self.max_rows + self.max_rows // 8 + 2

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values have a place in memory."""
        root = len(self.root)
        return root + self.stems * (self.longest - root) + self.max_rows * self.max_new

    def fitting(self, bytes_per_token: int, device: torch.device) -> "Plan":
        """This plan with as many rows as fit into memory; bytes_per_token as TokenModel has it.

        Raises ConfigError if min_rows do not fit.
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
                f"the keys and values of prompts of {amount(self.longest, 'token')} with "
                f"{amount(self.max_new, 'new one')} take "
                f"{plan.tokens * bytes_per_token / 2**20:.3g} MiB even for "
                f"{amount(plan.max_rows, 'row')}, and {allowed / 2**20:.3g} MiB are allowed. Raise "
                "cache_bytes of LocalEngine, or use shorter prompts or fewer new tokens."
            )
        return plan


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, with what torch holds of it for later.

    That of a machine is divided among its launcher's processes.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@runtime_checkable
class Session(Protocol):
    """Prompts that are held in memory, and the rows that go on from them.

    joins: whether rows may be added while others are in flight. held: how many prompts came so far;
    prompts are numbered from 0 in the order in which they come.
    """

    joins: bool
    held: int

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        """Hold prompts; the logits of the token after each."""
        ...

    def room(self) -> int:
        """How many more prompts can be held now."""
        ...

    def add(self, prompts: Sequence[int]) -> None:
        """Add rows after those in flight; prompts: the number of each row's prompt."""
        ...

    def release(self, prompts: Sequence[int]) -> None:
        """Let go of prompts to which no more rows will be added."""
        ...

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to each row; the logits of the token after it."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        ...


@runtime_checkable
class Cache(Protocol):
    """Rows that are decoded together by a model that keeps keys and values in its own way."""

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to each row; the logits of the token after it."""
        ...

    def select(self, rows: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        ...

    def copy(self) -> "Cache":
        """A second cache of the same rows, which goes on independently."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """A causal token-level transformer. On which side rows are padded is its own business.

    max_len: tokens of a row at most; None if it says no limit. vocab: how many tokens it gives
    logits for. bytes_per_token: what a session keeps for one token of one row; 0 if nothing.
    training: its hidden states and head apart; None if it only gives logits.
    """

    module: nn.Module
    max_len: int | None
    vocab: int
    bytes_per_token: int
    training: Training | None

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of right-padded rows, with gradients."""
        ...

    def side(self, length: int, *, padded: bool = True) -> int:
        """A number that rows of two lengths share if one forward may have both of them.

        padded: whether the shorter one is then padded. 0 for most models: any rows go together.
        """
        ...

    def checkpointing(self) -> AbstractContextManager[None]:
        """Within it, activations are computed again in the backward pass instead of being kept.

        Raises AdapterError if the model cannot do gradient checkpointing.
        """
        ...

    def refresh(self) -> None:
        """Called before each generating and training, as weights may have changed."""
        ...

    def session(self, plan: Plan) -> Session:
        """A new session with the present weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of the tensors that `load` replaces."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights, and what is needed to load them, into a folder."""
        ...

    def load(self, file: Path) -> None:
        """Load weights from the file that `save` wrote, in place."""
        ...


def logits_of(output: Any, batch: int, length: int) -> Tensor:
    """The logits (b, t, v) in a model's output, which is a tensor or an object with `.logits`.

    Raises AdapterError for anything else.
    """
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
    """The error of a model that cannot do gradient checkpointing."""
    return AdapterError(
        "optim.gradient_checkpointing=True needs a transformers model that can recompute its "
        f"layers; got {type(module).__name__}. Leave it out, or use a smaller "
        "optim.micro_batch_tokens."
    )


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters or buffers; the CPU if it has none."""
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


def limit_of(module: nn.Module, config: Any = None) -> int | None:
    """The longest row that a module says it takes, as `.max_seq_len` or in its config.

    config: of its part that reads the text; by default the module's own. XLNet's -1 is no limit.
    """
    config = config or getattr(module, "config", None)
    limits = (
        getattr(module, "max_seq_len", None),
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
    )
    return next((n for n in limits if isinstance(n, int) and n > 0), None)
