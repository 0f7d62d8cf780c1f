"""Plans a recipe: for each stage its work, memory, time and disk space.

Input: a recipe. Output: a `RunPlan`, which `table.py` turns into text or JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.inference import is_slow
from self_rewarding_lm.models.interface import free_bytes
from self_rewarding_lm.models.loading import load_tokenizer, lora_config
from self_rewarding_lm.recipes.plan.disk import RunDisk, StageDisk, run_disk, stage_disk
from self_rewarding_lm.recipes.plan.machine import Machine, measure
from self_rewarding_lm.recipes.plan.memory import Types, state_bytes
from self_rewarding_lm.recipes.plan.model import ModelShape, read_shape
from self_rewarding_lm.recipes.plan.phases import (
    GENERATING,
    JUDGING,
    Device,
    Phase,
    fitting_tokens,
    sampling_phase,
    training_phases,
)
from self_rewarding_lm.recipes.reader import Recipe
from self_rewarding_lm.runs.run import INITIAL
from self_rewarding_lm.runtime import NARROW
from self_rewarding_lm.stages.base import TrainingConfig, stage_names
from self_rewarding_lm.stages.ranges import NOTHING, Range
from self_rewarding_lm.stages.work import Asking, Counting, Training, Work


@dataclass(frozen=True)
class Fitting:
    """The largest micro_batch_tokens (powers of two) that fit the device.

    plain, checkpointing: without and with gradient_checkpointing; 0 if none fits, None if unknown.
    """

    plain: int | None
    checkpointing: int | None


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    seconds: for each phase, by its name; None if no machine was measured. fitting: None if the
    device's memory was not given. chooses: whether its micro-batch is chosen when it begins, by
    what is free then.
    """

    name: str
    kind: str
    work: Work
    phases: tuple[Phase, ...]
    seconds: Mapping[str, Range] | None
    disk: StageDisk
    fitting: Fitting | None = None
    chooses: bool = False

    @property
    def peak(self) -> Phase | None:
        """The phase that needs the most memory; None if there is none or if one is unknown."""
        used = [phase for phase in self.phases if phase.is_used]
        if not used or any(phase.peak is None for phase in used):
            return None
        return max(used, key=lambda phase: phase.peak or 0)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a whole run.

    machine: None if times were not wanted. texts: why the lengths of rows are unknown, None if they
    are known.
    """

    model: ModelShape
    device: Device
    machine: Machine | None
    stages: tuple[StagePlan, ...]
    disk: RunDisk
    texts: str | None = None

    @property
    def peak(self) -> tuple[StagePlan, Phase] | None:
        """The stage and its phase that need the most memory; None if a stage's peak is unknown."""
        peaks = [(stage, stage.peak) for stage in self.stages if stage.phases]
        known = [(stage, phase) for stage, phase in peaks if phase is not None]
        if not peaks or len(known) < len(peaks):
            return None
        return max(known, key=lambda pair: pair[1].peak or 0)


def plan_recipe(recipe: Recipe, *, device_memory: int | None = None, timed: bool = True) -> RunPlan:
    """Compute what a recipe will need. Reads the model's configuration and the data, no weights.

    device_memory: bytes of memory of each process's GPU; if None, the plan is for the device of
    this machine, otherwise for a GPU. timed: whether to measure this machine, for two seconds, to
    estimate times. Raises ConfigError if the model's configuration cannot be read, DataError if the
    data cannot.
    """
    # 1. the model, the device and this machine
    arguments = recipe.arguments
    peft = None if recipe.peft is None else lora_config(**dict(recipe.peft))
    shape = read_shape(
        recipe.model,
        torch_dtype=arguments.get("torch_dtype"),
        four_bit=bool(arguments.get("load_in_4bit")),
        peft_config=peft,
    )
    accelerate = arguments.get("accelerate_kwargs") or {}
    device = _device(shape, accelerate, device_memory)
    machine = None
    if timed:
        here = "cuda" if torch.cuda.is_available() and not accelerate.get("cpu") else "cpu"
        machine = measure(here, _product_type(shape, accelerate, here))
    # 2. the stages, in their order
    tokens, texts = recipe_tokens(recipe, shape.vocab)
    counting = Counting(arguments["self_reward_prompt_config"], tokens, shape.max_len)
    serves = arguments.get("engine") is not None
    stages = [
        _stage_plan(stage, name, counting.work(stage, name), shape, device, machine, serves)
        for stage, name in zip(recipe.stages, stage_names(recipe.stages), strict=True)
    ]
    # 3. the disk space of the run
    disk = run_disk(
        [stage.disk for stage in stages],
        uses_initial=any(INITIAL in stage.weights_used() for stage in recipe.stages),
        merged=shape.weight_bytes if arguments.get("merge_adapter") else 0,
        keep=arguments.get("keep_stages"),
    )
    return RunPlan(shape, device, machine, tuple(stages), disk, texts)


def _stage_plan(
    stage: FinetuneConfig,
    name: str,
    work: Work,
    shape: ModelShape,
    device: Device,
    machine: Machine | None,
    serves: bool,
) -> StagePlan:
    """The plan of one stage: the memory of its phases, their times and its disk space.

    serves: whether a server generates and judges, whose memory and time are its own.
    """
    engine, phases, fitting, optimizer_bytes = LocalEngine(), [], None, 0
    asked = [(GENERATING, work.candidates), (JUDGING, work.judgements)]
    sampled = [
        (label, asking) for label, asking in asked if asking.here and asking.count != NOTHING
    ]
    if serves and sampled:
        what = " and ".join(label for label, _ in sampled)
        work = replace(work, notes=(*work.notes, f"memory and time of {what}: a server does it"))
    sampled = [] if serves else sampled
    for label, asking in sampled:
        phases.append(sampling_phase(label, asking, shape, device, engine))
    if work.training is not None and isinstance(stage, TrainingConfig):
        optimizer_bytes = state_bytes(shape.module, stage.optim, shape.vocab)
        settings = (stage, work.training, shape, device, optimizer_bytes)
        phases += training_phases(*settings)
        if device.memory is not None:
            fitting = Fitting(
                fitting_tokens(*settings, checkpointing=False),
                fitting_tokens(*settings, checkpointing=True),
            )
    seconds = None
    if machine is not None:
        seconds = _seconds(stage, sampled, work.training, shape, machine, engine)
    disk = stage_disk(stage, work, shape.saved_bytes, shape.vocab, states=optimizer_bytes)
    chooses = isinstance(stage, TrainingConfig) and stage.optim.micro_batch_tokens is None
    kind = type(stage).__name__
    return StagePlan(name, kind, work, tuple(phases), seconds, disk, fitting, chooses)


def _seconds(
    stage: FinetuneConfig,
    sampled: Sequence[tuple[str, Asking]],
    training: Training | None,
    shape: ModelShape,
    machine: Machine,
    engine: LocalEngine,
) -> dict[str, Range]:
    """Seconds of each phase of a stage, by the phase's name.

    Operations per weight and token: two in a forward pass and four in a backward pass, or two in it
    if only an adapter is trained.
    """
    forward = 2 * shape.products  # operations per token
    seconds = {}
    # 1. sampling: prompts are read, texts are written token by token
    for label, asking in sampled:
        per_token = machine.seconds_per_token(shape.products, shape.weight_bytes, engine.max_rows)
        reading = machine.computing(asking.read.times(forward))
        seconds[label] = reading + asking.written.times(per_token)
    # 2. training, and the reference model's forward passes
    if training is not None and isinstance(stage, TrainingConfig):
        passes = 1 + (2 if shape.adapter is None else 1) + stage.optim.gradient_checkpointing
        operations = training.tokens.times(forward * passes)
        operations = operations + stage.reference_tokens(training).times(forward)
        seconds["training"] = machine.computing(operations)
    return seconds


def _device(shape: ModelShape, accelerate: Mapping[str, Any], memory: int | None) -> Device:
    """The device that the plan is for.

    accelerate: the settings of accelerate. memory: bytes of a GPU, None for the device of this
    machine.
    """
    has_gpu = torch.cuda.is_available() and not accelerate.get("cpu")
    kind = "cuda" if memory is not None or has_gpu else "cpu"
    narrow = NARROW.get(str(accelerate.get("mixed_precision")))
    stream = shape.dtype.itemsize
    product = stream if narrow is None else min(stream, narrow.itemsize)
    cache_dtype = shape.dtype if narrow is None else narrow
    slow = kind == "cpu" and is_slow(cache_dtype, torch.device("cpu"))
    types = Types(stream, product, autocast=narrow is not None)
    free = free_bytes(torch.device(kind)) if memory is None else memory
    return Device(kind, types, 4 if slow else cache_dtype.itemsize, memory, free)


def _product_type(shape: ModelShape, accelerate: Mapping[str, Any], kind: str) -> torch.dtype:
    """The type of numbers with which matrix products are measured."""
    dtype = NARROW.get(str(accelerate.get("mixed_precision")), shape.dtype)
    return torch.float32 if is_slow(dtype, torch.device(kind)) else dtype


def recipe_tokens(recipe: Recipe, vocab: int = 0) -> tuple[Tokens | None, str | None]:
    """What makes tokens of a recipe's texts, None if there is none; and then the reason, else None.

    vocab: tokens of the model, 0 if that is not known.
    """
    source = recipe.tokenizer
    try:
        if source is None and not isinstance(recipe.model, str):
            return None, "the recipe names no tokenizer"
        if source is None or isinstance(source, str):
            source = load_tokenizer(source or recipe.model)
            if not set(source.encode("a", add_special_tokens=False)) - {*source.all_special_ids}:
                return None, "no tokenizer is there"  # transformers builds an empty one
        template, eos = recipe.arguments["chat_template"], recipe.arguments["eos_id"]
        return Tokens(source, eos_id=eos, vocab=vocab or None, chat_template=template), None
    except SelfRewardingError as error:
        return None, str(error)
