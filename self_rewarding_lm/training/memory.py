"""How many tokens go through the model at once in training: what memory holds, chosen once a stage.

A forward of the longest rows is measured: how many bytes it keeps for the backward, for each token
that it has more than another. Half of what is free, without gradients and an optimiser's state,
is shared out among tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.models.batching import packs
from self_rewarding_lm.models.inference import modes_kept
from self_rewarding_lm.models.interface import SHARE_OF_FREE, TokenModel, device_of, free_bytes
from self_rewarding_lm.models.logprobs import LEAST_LOGITS
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.models.packing import packed_length
from self_rewarding_lm.models.policy import dropout_set
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runtime import (
    MemoryUsedUpError,
    give_back_memory,
    memory_told,
    random_numbers_kept,
)
from self_rewarding_lm.training.forwards import MOST, logprobs_of
from self_rewarding_lm.training.objectives import Objective

logger = logging.getLogger(__name__)


LEAST = 128
"""Tokens of a micro-batch at least, a power of two as MOST is; a longer row goes alone."""


MICRO_BATCH = "micro_batch"
"""The event of events.jsonl that says how many tokens go through the model at once from then on."""


LOOKED_AT = 1000  # rows of an objective, to find long ones


NUMBERS_OF_A_WEIGHT = 3
"""That are not there yet when a stage begins: its gradient, and the two of AdamW's state."""


PASSING = 1.25
"""What a backward needs for each byte that a forward has kept: gradients that pass through."""


CHECKPOINTED = 0.3
"""The same with gradient checkpointing, which keeps the inputs of layers and makes the tensors of
one layer again: a tenth of all in models of the shape of Llama."""


LOGIT = 12
"""Bytes of a logit while its log-prob is computed: in float32, with its gradient and a copy."""


def tokens_that_fit(needed: Callable[[int], float], allowed: float) -> int:
    """The most tokens, a power of two from LEAST to MOST, for which `needed` bytes are allowed."""
    tokens = MOST
    while tokens > LEAST and needed(tokens) > allowed:
        tokens //= 2
    return tokens


@dataclass(frozen=True)
class Kept:
    """What a forward keeps for its backward, in bytes: for each token, and once."""

    a_token: float
    once: float


def micro_batch_tokens(
    ctx: Context,
    out: StageDir,
    objective: Objective,
    optim: OptimConfig,
    *,
    dropout: float,
    adapters: bool,
) -> int:
    """The tokens of a micro-batch: those that are set, those that the stage chose, or a choice now.

    dropout, adapters: as in `dropout_set`. All processes choose the same. Version 0.1.0 had MOST.
    """
    if optim.micro_batch_tokens is not None:
        return optim.micro_batch_tokens
    if ctx.format == 1 or ctx.run is None:
        return MOST
    told = ctx.runtime.from_main([words["tokens"] for words in out.told(MICRO_BATCH)])
    if told:
        return told[-1]
    longest = max(len(ids) for ids, _ in objective.sequences(_longest(objective, 1)[0]))
    if optim.batch_size * len(objective.sequences(0)) * longest <= LEAST:  # all goes at once
        return MOST
    tokens, words = _choice(ctx, objective, optim, dropout, adapters)
    tokens = min(ctx.runtime.gather([tokens]))
    out.tell(MICRO_BATCH, tokens=tokens, **words)
    if tokens < MOST:
        logger.info(
            "%s: micro-batches of %d tokens: %.3g GiB are free, and a token keeps %.2f MB for the "
            "backward pass (optim.micro_batch_tokens sets the number).",
            *(ctx.stage, tokens, words["free_bytes"] / 2**30, words["bytes_per_token"] / 1e6),
        )
    return tokens


def _choice(
    ctx: Context, objective: Objective, optim: OptimConfig, dropout: float, adapters: bool
) -> tuple[int, dict[str, int]]:
    """The tokens that this process's memory holds, and what they were computed of."""
    module = ctx.model.module
    trained = sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)
    give_back_memory()
    free = free_bytes(device_of(module))
    allowed = SHARE_OF_FREE * (free - NUMBERS_OF_A_WEIGHT * trained)
    try:
        with memory_told("measuring a forward", ""):
            kept = _measured(ctx, objective, dropout, adapters)
    except MemoryUsedUpError:
        kept = Kept(float("inf"), 0.0)
    give_back_memory(after_error=True)
    factor = CHECKPOINTED if optim.gradient_checkpointing else PASSING
    logits = ctx.model.vocab * LOGIT

    def needed(tokens: int) -> float:
        at_once = tokens
        if ctx.model.training is not None:  # the log-probs of a piece at a time
            at_once = min(tokens, max(1, LEAST_LOGITS // ctx.model.vocab))
        return kept.once + factor * kept.a_token * tokens + logits * at_once

    words = {"free_bytes": free, "bytes_per_token": round(min(kept.a_token, 1e15))}
    return tokens_that_fit(needed, allowed), words


def _measured(ctx: Context, objective: Objective, dropout: float, adapters: bool) -> Kept:
    """What forwards of the longest row and of the two longest keep, in training mode."""
    rows = _longest(objective, 2)
    policy = ctx.policy
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    with ExitStack() as restored:
        restored.enter_context(random_numbers_kept())
        restored.enter_context(modes_kept(policy))
        to_training_mode = restored.enter_context(
            dropout_set(policy, dropout, adapters=adapters, warns=False)
        )
        to_training_mode()
        noise = RowNoise(0, lambda _: None)
        restored.enter_context(noise)
        sizes = []
        for some in (rows[:1], rows):
            with _kept_for_backward(policy) as storages:
                logprobs = logprobs_of(policy, objective, some, noise)[0]
            sizes.append((_tokens(ctx.model, objective, some), sum(storages.values())))
            del logprobs
    with torch.no_grad():
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])
    (tokens, bytes_kept), (more_tokens, more_bytes) = sizes
    if more_tokens > tokens and more_bytes > bytes_kept:
        a_token = (more_bytes - bytes_kept) / (more_tokens - tokens)
    else:
        a_token = bytes_kept / tokens
    return Kept(a_token, max(0.0, bytes_kept - a_token * tokens))


def _longest(objective: Objective, count: int) -> list[int]:
    """The longest rows of up to LOOKED_AT."""
    step = max(1, len(objective) // LOOKED_AT)
    places = range(0, len(objective), step)
    lengths = {row: max(len(ids) for ids, _ in objective.sequences(row)) for row in places}
    return sorted(places, key=lambda row: -lengths[row])[:count]


def _tokens(model: TokenModel, objective: Objective, rows: Sequence[int]) -> int:
    """Tokens of rows that go through the model together, padding included, as budgets count."""
    sequences = [[ids for ids, _ in objective.sequences(row)] for row in rows]
    if packs(model):
        return sum(map(packed_length, sequences))
    return sum(map(len, sequences)) * max(len(ids) for some in sequences for ids in some)


@contextmanager
def _kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that forwards keep, but those of the module's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
