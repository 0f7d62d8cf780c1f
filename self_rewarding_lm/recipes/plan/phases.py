"""The phases of a stage, and what each holds in memory: generating, judging, training."""

from dataclasses import dataclass, replace

import torch

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.interface import SHARE_OF_FREE
from self_rewarding_lm.models.interface import Plan as Rows
from self_rewarding_lm.recipes.plan.memory import (
    EXACT,
    Micro,
    Types,
    activation_bytes,
    key_value_bytes,
    layer_scores,
    logits_bytes,
    prefill_bytes,
    recomputed_bytes,
)
from self_rewarding_lm.recipes.plan.model import ModelShape
from self_rewarding_lm.stages.base import TrainingConfig
from self_rewarding_lm.stages.work import Asking, Training
from self_rewarding_lm.training.reference import MovingReference

GENERATING, JUDGING, TRAINING = "generating", "judging", "training"


RECOMPUTED = "training, checkpointing"


SAMPLED_LOGITS = 3
"""Times that the logits of a step are held while tokens are drawn, in float32."""


@dataclass(frozen=True)
class Device:
    """Where the run computes. kind: cpu or cuda. memory: bytes, None where nobody said. types: of
    numbers in training; cached: bytes of a number of keys and values."""

    kind: str
    types: Types
    cached: int
    memory: int | None = None


@dataclass(frozen=True)
class Phase:
    """Bytes; None where they are not known, 0 where there are none.

    peak: the most at once, less than the sum where parts do not meet. scores: the part of
    activations that attention takes because it keeps its scores. tokens: of a micro-batch, or
    rows in flight. is_used: False for the other way to train, which shows what
    gradient_checkpointing would change.
    """

    name: str
    weights: int
    gradients: int = 0
    optimizer: int | None = 0
    activations: int | None = 0
    logits: int | None = 0
    cache: int | None = 0
    peak: int | None = None
    scores: int = 0
    tokens: int | None = None
    is_used: bool = True


def sampling_phase(
    name: str, asking: Asking, shape: ModelShape, device: Device, engine: LocalEngine
) -> Phase:
    """Texts that the policy writes by the local engine: weights, keys and values, a prefill."""
    weights, block, longest = shape.weight_bytes, shape.block, asking.longest
    if block is None:
        return Phase(name, weights, activations=None, logits=None, cache=None)
    rows = engine.max_rows if asking.at_once is None else min(engine.max_rows, asking.at_once)
    if asking.count.most is not None:
        rows = max(1, min(rows, asking.count.most))
    new, cache, prefill = asking.new.most or 1, None, engine.max_prefill_tokens
    if longest is not None:
        prefill = max(longest, min(prefill, rows * longest))
        if shape.max_len is not None:
            new = max(1, min(new, shape.max_len - longest))
        root = (0,) * min(asking.shared, longest - 1)
        plan = Rows(root, longest, new, rows)
        each = key_value_bytes(block, shape.layers, 1, device.cached)
        if device.memory is not None:
            plan = _fitting(plan, each, SHARE_OF_FREE * (device.memory - weights))
        cache, rows = plan.tokens * each, plan.max_rows
    forward = prefill_bytes(block, device.types, prefill)
    logits = SAMPLED_LOGITS * rows * shape.vocab * 4
    peak = None if cache is None else weights + cache + forward + logits
    return Phase(
        name, weights, activations=forward, logits=logits, cache=cache, peak=peak, tokens=rows
    )


def _fitting(plan: Rows, each: int, allowed: float) -> Rows:
    """As many rows as the engine lets be in flight with so much memory; one, if none fits."""
    try:
        bounded = replace(plan, cache_bytes=max(0, int(allowed)))
        return bounded.fitting(each, torch.device("cpu"))
    except ConfigError:
        return replace(plan, max_rows=1)


def micro_batch(stage: TrainingConfig, training: Training) -> int:
    """Tokens that go through the model at once: the setting's, or what a step has if that is less,
    and never less than a row."""
    rows, longest = stage.optim.batch_size, training.row.longest
    if stage.optim.micro_batch_size is not None:
        rows = min(rows, stage.optim.micro_batch_size)
    if training.rows.most:
        rows = min(rows, training.rows.most)
    tokens = stage.optim.micro_batch_tokens
    return tokens if longest is None else max(longest, min(tokens, rows * longest))


def training_phases(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
) -> list[Phase]:
    """Training as the stage is set, and with gradient_checkpointing the other way."""
    tokens = micro_batch(stage, training)
    asked = stage.optim.gradient_checkpointing
    settings = (stage, training, shape, device, optimizer)
    return [
        replace(_trained(*settings, tokens=tokens, again=again), is_used=again == asked)
        for again in (False, True)
    ]


def fitting_tokens(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
    *,
    again: bool,
) -> int | None:
    """The largest power of two of micro_batch_tokens for which training fits the device's memory;
    0 where none does, None where that is not known."""
    best = 0
    for power in range(7, 21):
        settings = (stage, training, shape, device, optimizer)
        peak = _trained(*settings, tokens=2**power, again=again).peak
        if peak is None or device.memory is None:
            return None
        best = 2**power if peak <= device.memory else best
    return best


def _trained(
    stage: TrainingConfig,
    training: Training,
    shape: ModelShape,
    device: Device,
    optimizer: int | None,
    *,
    tokens: int,
    again: bool,
) -> Phase:
    name, block, types = RECOMPUTED if again else TRAINING, shape.block, device.types
    weights = shape.weight_bytes + (types.product * shape.products if types.mixed else 0)
    if isinstance(getattr(stage, "reference", None), MovingReference):  # float32 at least
        weights += max(shape.gradient_bytes, EXACT * shape.trainable)
    fixed = {"gradients": shape.gradient_bytes, "optimizer": optimizer, "tokens": tokens}
    if block is None:
        return Phase(name, weights, activations=None, logits=None, **fixed)
    drops = stage.dropout if block.attention_dropout else 0.0
    keys = min(training.row.sequence or tokens, tokens) if drops and device.kind == "cpu" else 0
    mask = types.stream if device.kind == "cpu" else 1
    micro = Micro(tokens, stage.dropout, keys, mask)
    kept = activation_bytes(
        block, shape.layers, types, micro, adapter=shape.adapter, checkpointing=again
    )
    once_more = recomputed_bytes(block, types, micro, adapter=shape.adapter) if again else 0
    logits = logits_bytes(tokens, shape.vocab, block.hidden, types, head_trained=shape.head_trained)
    peak = None
    if optimizer is not None:
        peak = weights + shape.gradient_bytes + optimizer + kept + max(logits, once_more)
    scores = layer_scores(block, types, micro) * tokens * (1 if again else shape.layers)
    fixed |= {"peak": peak, "scores": scores}
    return Phase(name, weights, activations=kept + once_more, logits=logits, **fixed)
