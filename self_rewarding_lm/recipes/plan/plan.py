"""The plan of a recipe: what each stage holds, does, takes and writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.inference import is_slow
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
from self_rewarding_lm.stages.base import TrainingConfig, stage_names
from self_rewarding_lm.stages.preference import NO_REFERENCE, PreferenceConfig
from self_rewarding_lm.stages.ranges import NOTHING, Range
from self_rewarding_lm.stages.work import Counting, Work
from self_rewarding_lm.training.loss_config import losses_in, read_by
from self_rewarding_lm.training.reference import MovingReference

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fitting:
    """Largest micro_batch_tokens (powers of two) that fit the device, without and with
    gradient_checkpointing; 0 for none, None where that is not known."""

    plain: int | None
    checkpointing: int | None


@dataclass(frozen=True)
class StagePlan:
    """One stage. seconds: of its phases by name, None where no machine was measured; fitting: where
    the device's memory was given."""

    name: str
    kind: str
    work: Work
    phases: tuple[Phase, ...]
    seconds: Mapping[str, Range] | None
    disk: StageDisk
    fitting: Fitting | None = None

    @property
    def peak(self) -> Phase | None:
        """The phase that takes the most; None where none, or one of them, is not known."""
        used = [phase for phase in self.phases if phase.is_used]
        if not used or any(phase.peak is None for phase in used):
            return None
        return max(used, key=lambda phase: phase.peak or 0)


@dataclass(frozen=True)
class RunPlan:
    """A whole run. machine: None where times were not wanted. texts: why lengths of rows are not
    known, None where they are."""

    model: ModelShape
    device: Device
    machine: Machine | None
    stages: tuple[StagePlan, ...]
    disk: RunDisk
    texts: str | None = None

    @property
    def peak(self) -> tuple[StagePlan, Phase] | None:
        """The stage and its phase that take the most; None where a stage's is not known."""
        found = [(stage, stage.peak) for stage in self.stages if stage.phases]
        known = [(stage, phase) for stage, phase in found if phase is not None]
        if not found or len(known) < len(found):
            return None
        return max(known, key=lambda pair: pair[1].peak or 0)


def plan_recipe(recipe: Recipe, *, device_memory: int | None = None, timed: bool = True) -> RunPlan:
    """What a recipe will take. Reads the model's configuration and the data, loads no weights.

    device_memory: bytes of the GPU of each process; then the plan is for a GPU, else for what is
    here. timed: measure this machine for two seconds, to estimate times. Raises ConfigError where
    the model's configuration cannot be read, DataError where the data cannot.
    """
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
    tokens, texts = _tokens(recipe, shape)
    counting = Counting(arguments["self_reward_prompt_config"], tokens, shape.max_len)
    stages = [
        _stage_plan(stage, name, counting.work(stage, name), shape, device, machine)
        for stage, name in zip(recipe.stages, stage_names(recipe.stages), strict=True)
    ]
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
) -> StagePlan:
    engine, phases, fitting, optimizer = LocalEngine(), [], None, 0
    for label, asking in ((GENERATING, work.candidates), (JUDGING, work.judgements)):
        if asking.here and asking.count != NOTHING:
            phases.append(sampling_phase(label, asking, shape, device, engine))
    if work.training is not None and isinstance(stage, TrainingConfig):
        optimizer = state_bytes(shape.module, stage.optim, shape.vocab)
        settings = (stage, work.training, shape, device, optimizer)
        phases += training_phases(*settings)
        if device.memory is not None:
            plain, again = (fitting_tokens(*settings, again=again) for again in (False, True))
            fitting = Fitting(plain, again)
    seconds = None if machine is None else _seconds(stage, work, shape, machine, engine)
    disk = stage_disk(stage, work, shape.saved_bytes, shape.vocab, states=optimizer)
    return StagePlan(name, type(stage).__name__, work, tuple(phases), seconds, disk, fitting)


def _seconds(
    stage: FinetuneConfig, work: Work, shape: ModelShape, machine: Machine, engine: LocalEngine
) -> dict[str, Range]:
    """Times of a stage's phases. Operations: two for each weight and token of a forward, twice as
    many of a backward pass, half of them where weights are not trained themselves."""
    forward = 2 * shape.products
    found = {}
    for label, asking in ((GENERATING, work.candidates), (JUDGING, work.judgements)):
        if asking.here and asking.count != NOTHING:
            each = machine.seconds_per_token(shape.products, shape.weight_bytes, engine.max_rows)
            reading = machine.computing(asking.read.times(forward))
            found[label] = reading + asking.written.times(each)
    training = work.training
    if training is not None and isinstance(stage, TrainingConfig):
        times = 1 + (2 if shape.adapter is None else 1) + stage.optim.gradient_checkpointing
        operations = training.tokens.times(forward * times)
        if training.pairs and _reads_reference(stage):
            moves = isinstance(stage, PreferenceConfig) and isinstance(
                stage.reference, MovingReference
            )
            asked = training.tokens if moves else training.rows.times(training.row.tokens)
            operations = operations + asked.times(forward)
        found["training"] = machine.computing(operations)
    return found


def _reads_reference(stage: TrainingConfig) -> bool:
    if not isinstance(stage, PreferenceConfig) or stage.reference == NO_REFERENCE:
        return False
    return read_by(losses_in(stage.loss)).reference


def _device(shape: ModelShape, accelerate: Mapping[str, Any], memory: int | None) -> Device:
    """The device that is planned for."""
    has_gpu = torch.cuda.is_available() and not accelerate.get("cpu")
    kind = "cuda" if memory is not None or has_gpu else "cpu"
    narrow = NARROW.get(str(accelerate.get("mixed_precision")))
    stream = shape.dtype.itemsize
    product = stream if narrow is None else min(stream, narrow.itemsize)
    cached = shape.dtype if narrow is None else narrow
    slow = kind == "cpu" and is_slow(cached, torch.device("cpu"))
    types = Types(stream, product, autocast=narrow is not None)
    return Device(kind, types, 4 if slow else cached.itemsize, memory)


def _product_type(shape: ModelShape, accelerate: Mapping[str, Any], kind: str) -> torch.dtype:
    """The type of products that is measured."""
    dtype = NARROW.get(str(accelerate.get("mixed_precision")), shape.dtype)
    return torch.float32 if is_slow(dtype, torch.device(kind)) else dtype


def _tokens(recipe: Recipe, shape: ModelShape) -> tuple[Tokens | None, str | None]:
    """The recipe's tokenizer; or why there is none to count with."""
    source = recipe.tokenizer
    try:
        if source is None and not isinstance(recipe.model, str):
            return None, "the recipe names no tokenizer"
        if source is None or isinstance(source, str):
            source = load_tokenizer(source or recipe.model)
            if not set(source.encode("a", add_special_tokens=False)) - {*source.all_special_ids}:
                return None, "no tokenizer is there"  # transformers makes an empty one
        template, eos = recipe.arguments["chat_template"], recipe.arguments["eos_id"]
        return Tokens(source, eos_id=eos, vocab=shape.vocab or None, chat_template=template), None
    except SelfRewardingError as error:
        return None, str(error)
