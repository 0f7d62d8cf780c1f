"""Computes the memory of each phase of a stage: generating, judging, training."""

from dataclasses import dataclass, replace

import torch

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.interface import SHARE_OF_FREE
from self_rewarding_lm.models.interface import Plan as Rows
from self_rewarding_lm.models.packing import SHORT
from self_rewarding_lm.recipes.plan.memory import (
    EXACT,
    Micro,
    Types,
    activation_bytes,
    key_value_bytes,
    logits_bytes,
    prefill_bytes,
    recomputed_bytes,
)
from self_rewarding_lm.recipes.plan.model import ModelShape
from self_rewarding_lm.stages.base import TrainingConfig
from self_rewarding_lm.stages.work import Asking, Training
from self_rewarding_lm.training.forwards import MOST
from self_rewarding_lm.training.memory import tokens_that_fit
from self_rewarding_lm.training.reference import MovingReference

GENERATING, JUDGING, TRAINING = "generating", "judging", "training"


RECOMPUTED = "training, checkpointing"
"""The name of training with gradient_checkpointing."""


SAMPLED_LOGITS = 3
"""How many copies of a step's logits, in float32, exist while tokens are drawn."""


@dataclass(frozen=True)
class Device:
    """The device that the run computes on.

    kind: cpu or cuda. types: bytes of numbers in training. cached: bytes of each number of keys and
    values. memory: bytes, None if not given. free: bytes, of this machine's device now if memory is
    not given; None if unknown.
    """

    kind: str
    types: Types
    cached: int
    memory: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Phase:
    """The memory of one phase, in bytes; None if unknown, 0 if there are none.

    peak: the most at any one time; less than the sum if some parts never exist together. tokens: of
    a micro-batch while training, rows in flight while sampling. is_used: False for the way to train
    that the stage does not use, planned to show what gradient_checkpointing would change.
    """

    name: str
    weights: int
    gradients: int = 0
    optimizer: int | None = 0
    activations: int | None = 0
    logits: int | None = 0
    cache: int | None = 0
    peak: int | None = None
    tokens: int | None = None
    is_used: bool = True


def sampling_phase(
    name: str, asking: Asking, shape: ModelShape, device: Device, engine: LocalEngine
) -> Phase:
    """The memory of sampling by the local engine: weights, keys and values, prefill and logits."""
    weights, block, longest = _weights_and_casts(shape, device.types), shape.block, asking.longest
    if block is None:
        return Phase(name, weights, activations=None, logits=None, cache=None)
    # 1. rows in flight at most
    rows = engine.max_rows if asking.at_once is None else min(engine.max_rows, asking.at_once)
    if asking.count.most is not None:
        rows = max(1, min(rows, asking.count.most))
    # 2. keys and values of these rows, of fewer if the device has no room for all
    new, cache, prefill = asking.new.most or 1, None, engine.max_prefill_tokens
    if longest is not None:
        prefill = max(longest, min(prefill, rows * longest))
        if shape.max_len is not None:
            new = max(1, min(new, shape.max_len - longest))
        root = (0,) * min(asking.shared, longest - 1)
        plan = Rows(root, longest, new, rows)
        per_token = key_value_bytes(block, shape.layers, 1, device.cached)
        if device.memory is not None:
            plan = _fitting(plan, per_token, SHARE_OF_FREE * (device.memory - weights))
        cache, rows = plan.tokens * per_token, plan.max_rows
    # 3. the forward pass that reads prompts, and the logits of a step
    forward = prefill_bytes(block, device.types, prefill)
    logits = SAMPLED_LOGITS * rows * shape.vocab * 4
    peak = None if cache is None else weights + cache + forward + logits
    return Phase(
        name, weights, activations=forward, logits=logits, cache=cache, peak=peak, tokens=rows
    )


def _weights_and_casts(shape: ModelShape, types: Types) -> int:
    """Bytes of the weights, and in mixed precision of the narrow copies of those that multiply."""
    return shape.weight_bytes + (types.product * shape.products if types.mixed else 0)


def _fitting(plan: Rows, per_token: int, cache_bytes: float) -> Rows:
    """The plan with as many rows in flight as `cache_bytes` allow; with one row if none fits.

    per_token: bytes of a token's keys and values.
    """
    try:
        bounded = replace(plan, cache_bytes=max(0, int(cache_bytes)))
        return bounded.fitting(per_token, torch.device("cpu"))
    except ConfigError:
        return replace(plan, max_rows=1)


def micro_batch(stage: TrainingConfig, training: Training, chosen: int = MOST) -> int:
    """Tokens that go through the model at once: micro_batch_tokens or all tokens of a step,
    whichever is less, but at least the longest row.

    chosen: what memory holds, if micro_batch_tokens is not set."""
    rows, longest = stage.optim.batch_size, training.row.longest
    if stage.optim.micro_batch_size is not None:
        rows = min(rows, stage.optim.micro_batch_size)
    if training.rows.most:
        rows = min(rows, training.rows.most)
    tokens = stage.optim.micro_batch_tokens or chosen
    return tokens if longest is None else max(longest, min(tokens, rows * longest))


def training_phases(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
) -> list[Phase]:
    """The memory of training without and with gradient_checkpointing; `is_used` tells which of
    them the stage asks for.

    optimizer: bytes of the optimiser's state, None if unknown.
    """
    used = stage.optim.gradient_checkpointing
    settings = (stage, training, shape, device, optimizer)
    phases = []
    for checkpointing in (False, True):
        chosen = _chosen_tokens(*settings, checkpointing=checkpointing)
        tokens = micro_batch(stage, training, chosen)
        phase = _training_phase(*settings, tokens=tokens, checkpointing=checkpointing)
        phases.append(replace(phase, is_used=checkpointing == used))
    return phases


def _chosen_tokens(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
    *,
    checkpointing: bool,
) -> int:
    """The micro-batch that a stage will choose, as `training/memory.py` does: half of the free
    memory, without weights, gradients and the optimiser's state, is for activations and logits."""

    def phase(tokens: int) -> Phase:
        settings = (stage, training, shape, device, optimizer)
        return _training_phase(*settings, tokens=tokens, checkpointing=checkpointing)

    least = phase(1)
    if device.free is None or least.activations is None:
        return MOST
    fixed = least.weights + least.gradients + (optimizer or 0)

    def needed(tokens: int) -> float:
        found = phase(tokens)
        return (found.activations or 0) + (found.logits or 0)

    return tokens_that_fit(needed, SHARE_OF_FREE * (device.free - fixed))


def fitting_tokens(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
    *,
    checkpointing: bool,
) -> int | None:
    """The largest micro_batch_tokens, a power of two, with which training fits the device's memory;
    0 if none does, None if unknown."""
    best = 0
    for power in range(7, 21):
        settings = (stage, training, shape, device, optimizer)
        peak = _training_phase(*settings, tokens=2**power, checkpointing=checkpointing).peak
        if peak is None or device.memory is None:
            return None
        best = 2**power if peak <= device.memory else best
    return best


def _training_phase(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
    *,
    tokens: int,
    checkpointing: bool,
) -> Phase:
    """The memory of training with micro-batches of `tokens` tokens."""
    name, block, types = RECOMPUTED if checkpointing else TRAINING, shape.block, device.types
    # 1. weights, with those of a moving reference
    weights = _weights_and_casts(shape, types)
    if isinstance(getattr(stage, "reference", None), MovingReference):  # float32 at least
        weights += max(shape.gradient_bytes, EXACT * shape.trainable)
    fixed = {"gradients": shape.gradient_bytes, "optimizer": optimizer, "tokens": tokens}
    if block is None:
        return Phase(name, weights, activations=None, logits=None, **fixed)
    # 2. what the forward pass keeps, and what the backward pass recomputes
    mask = types.stream if device.kind == "cpu" else 1
    is_short = training.row.longest is not None and training.row.longest <= SHORT
    widens = device.kind == "cpu" and (is_short or stage.dropout > 0)
    attention = max(EXACT, types.product) if widens else None
    micro = Micro(tokens, stage.dropout, mask, attention)
    kept = activation_bytes(
        block, shape.layers, types, micro, adapter=shape.adapter, checkpointing=checkpointing
    )
    recomputed = 0
    if checkpointing:
        recomputed = recomputed_bytes(block, types, micro, adapter=shape.adapter)
    sizes, trained = (tokens, shape.vocab, block.hidden), shape.head_trained
    logits = logits_bytes(*sizes, types, kind=device.kind, head_trained=trained)
    # 3. the peak: logits are freed before layers are recomputed
    peak = None
    if optimizer is not None:
        peak = weights + shape.gradient_bytes + optimizer + kept + max(logits, recomputed)
    return Phase(name, weights, activations=kept + recomputed, logits=logits, peak=peak, **fixed)
