"""Turns a plan into text for a terminal or into JSON. Sizes are decimal: 1 GB is 10^9 bytes."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.inference import products_unused
from self_rewarding_lm.recipes.plan.machine import UTILISATION
from self_rewarding_lm.recipes.plan.phases import GENERATING, JUDGING, Phase
from self_rewarding_lm.recipes.plan.plan import Fitting, RunPlan, StagePlan
from self_rewarding_lm.stages.ranges import NOTHING, Range
from self_rewarding_lm.text import aligned, number

WIDTH = 100
"""Characters of a line."""


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "peak")
"""The fields of a `Phase` that the table shows."""


HEADS = ("weights", "gradients", "optimiser", "activations", "logits", "cache", "peak")
"""The heads of these columns."""


def bytes_of(text: str) -> int:
    """The number of bytes that a text such as 24GB, 80GiB or 512 MB names.

    Raises ConfigError if the text is no size or names zero bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or float(match[1]) == 0:
        raise ConfigError(f"a size of memory is a number with a unit, such as 24GB; got {text!r}.")
    units = BINARY_UNITS if match[3] else UNITS
    return round(float(match[1]) * units[match[2].lower()])


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON values.

    Bytes and seconds are numbers; unknown numbers are null; a range is {"least", "most"}, with null
    as "most" if it has no upper bound.
    """
    values = _json_value(plan)
    for stage, stage_values in zip(plan.stages, values["stages"], strict=True):
        stage_values["peak"] = None if stage.peak is None else stage.peak.peak
        for name in ("candidates", "judgements"):
            written = getattr(stage.work, name).written
            stage_values["work"][name]["written"] = _json_value(written)
    peak = plan.peak
    values["peak"] = None
    if peak is not None:
        values["peak"] = {"bytes": peak[1].peak, "stage": peak[0].name, "phase": peak[1].name}
    values["disk"]["total"] = _json_value(plan.disk.total)
    values["utilisation"] = UTILISATION
    return values


def plan_text(plan: RunPlan) -> str:
    """The plan as lines of at most 100 characters; the last two state peak memory and disk."""
    lines = [*_heading_lines(plan)]
    for place, stage in enumerate(plan.stages, 1):
        lines += ["", f"stage {place} of {len(plan.stages)}: {stage.name} ({stage.kind})"]
        lines += [f"  {line}".rstrip() for line in _stage_lines(plan, stage)]
    return "\n".join([*lines, "", *_total_lines(plan)])


def _heading_lines(plan: RunPlan) -> Iterator[str]:
    """The model, what is unknown, and the measured rates."""
    model, device, machine = plan.model, plan.device, plan.machine
    trained = "all" if model.trainable == model.parameters else f"{model.trainable:,}"
    kind = str(model.dtype).removeprefix("torch.")
    mixed = ", mixed precision" if device.types.mixed else ""
    yield from _wrapped(
        f"{model.name}: {model.parameters:,} parameters, {trained} trained, {kind}{mixed}; "
        f"planned for {'a GPU' if device.kind == 'cuda' else 'the CPU'}, for each process."
    )
    unused = products_unused(device.kind, model.dtype, model.products, mixed=device.types.mixed)
    if unused is not None:
        yield from _wrapped(unused)
    if model.reason is not None:
        yield from _wrapped(f"Activations and cache are unknown: {model.reason}.")
    if plan.texts is not None:
        yield from _wrapped(f"Lengths of rows are unknown ({plan.texts}): limits stand for them.")
    if machine is not None:
        yield from _wrapped(
            f"Times are of this machine: {machine.rate / 1e9:,.0f} GFLOP/s and "
            f"{machine.bandwidth / 1e9:,.0f} GB/s measured, of which {UTILISATION:.0%} are assumed "
            "to be reached."
        )


def _stage_lines(plan: RunPlan, stage: StagePlan) -> Iterator[str]:
    """The memory, work, times and disk space of a stage, and whether it fits the device."""
    if stage.phases:
        yield from _memory_table(stage.phases)
    yield from _work_lines(stage)
    for note in stage.work.notes:
        yield from _wrapped(f"not counted: {note}")
    for remark in stage.work.remarks:
        yield from _wrapped(f"note: {remark}")
    if stage.seconds:
        times = [f"{name} {_range(time, _time)}" for name, time in stage.seconds.items()]
        yield from _wrapped(f"time: {', '.join(times)}")
    disk = stage.disk
    sizes = [f"weights {_size(disk.weights)}", f"records {_range(disk.records, _size)}"]
    if disk.meanwhile != NOTHING:
        sizes.append(f"further weights while it trains {_range(disk.meanwhile, _size)}")
    yield from _wrapped(f"disk: {', '.join(sizes)}")
    if stage.fitting is not None:
        yield from _wrapped(_fitting_text(stage, plan.device.memory or 0, stage.fitting))


def _memory_table(phases: Sequence[Phase]) -> list[str]:
    """A line for each phase; phases that the stage does not use are in parentheses."""
    rows: list[tuple[str, ...]] = [("memory", *HEADS)]
    for phase in phases:
        name = phase.name if phase.is_used else f"({phase.name})"
        rows.append((name, *(_cell(getattr(phase, column)) for column in COLUMNS)))
    return aligned(rows, "<>")


def _work_lines(stage: StagePlan) -> Iterator[str]:
    """What a stage samples, and on what it trains."""
    work, training = stage.work, stage.work.training
    sampled = [
        (name, asking)
        for name, asking in (("candidates", work.candidates), ("judgements", work.judgements))
        if asking.count != NOTHING
    ]
    if sampled:
        parts = [f"prompts {_range(work.prompts, number)}"] if work.prompts != NOTHING else []
        for name, asking in sampled:
            words = f"{name} {_range(asking.count, number)}"
            if asking.here:
                words += f" of {_tokens(asking.new)}"
            parts.append(words)
        written = [asking.written for _, asking in sampled if asking.here]
        parts.append(f"tokens to generate {_range(sum(written, NOTHING), number)}")
        yield from _wrapped("; ".join(parts))
    if training is not None:
        noun = "pairs" if training.pairs else "rows"
        micro = next((p.tokens for p in stage.phases if p.is_used and p.gradients), None)
        how = ", as many as a step has and half of the free memory holds" if stage.chooses else ""
        yield from _wrapped(
            f"{noun} {_range(training.rows, number)} of {_tokens(training.row.tokens)}; "
            f"steps {_range(training.steps, number)}; tokens to train "
            f"{_range(training.tokens, number)}; in micro-batches of {number(micro or 0)} "
            f"tokens{how}"
        )


def _fitting_text(stage: StagePlan, memory: int, fitting: Fitting) -> str:
    """Whether a stage fits a device with `memory` bytes, and what to change if it does not."""
    peak = stage.peak
    if peak is None or peak.peak is None:
        return f"device: whether it fits into {_size(memory)} is unknown"
    words = f"device: fits into {_size(memory)}"
    if peak.peak > memory:
        words = f"device: {peak.name} does not fit into {_size(memory)}"
        if peak.name in (GENERATING, JUDGING):
            return (
                f"{words}; narrower weights (torch_dtype) or a server on other devices are needed"
            )
    if fitting.plain is None or fitting.checkpointing is None:
        return words
    if fitting.checkpointing == fitting.plain == 0:
        return (
            f"{words}; no micro_batch_tokens would: fewer trained weights (peft), narrower ones "
            "(torch_dtype) or several processes that share them (FSDP) are needed"
        )
    return (
        f"{words}; largest optim.micro_batch_tokens: {number(fitting.plain)}, with "
        f"gradient_checkpointing {number(fitting.checkpointing)}"
    )


def _total_lines(plan: RunPlan) -> Iterator[str]:
    """The peak memory and the disk space of the run."""
    peak, disk = plan.peak, plan.disk
    if peak is None:
        yield "Peak memory: unknown."
    else:
        stage, phase = peak
        yield f"Peak memory: {_size(phase.peak or 0)}, stage {stage.name}, {phase.name}."
    weights = disk.weights + Range.of(disk.initial)
    parts = [f"weights {_range(weights, _size)}", f"records {_range(disk.records, _size)}"]
    if disk.meanwhile != NOTHING:
        parts.append(f"training {_range(disk.meanwhile, _size)}")
    yield f"Disk: {_range(disk.total, _size)} ({', '.join(parts)})."


def _cell(value: int | None) -> str:
    """A number of bytes as the memory table shows it."""
    return "unknown" if value is None else "-" if value == 0 else _size(value)


def _tokens(value: Range) -> str:
    said = _range(value, number)
    return f"{said} token{'' if said == '1' else 's'}"


def _range(value: Range, form: Callable[[int], str]) -> str:
    """A range in words; `form` writes each of its bounds."""
    if value.is_unknown:
        return "unknown"
    if value.most is None:
        return f"at least {form(value.least)}"
    least, most = form(value.least), form(value.most)
    if least == most:
        return least
    return f"at most {most}" if value.least == 0 or form(0) == least else f"{least} to {most}"


def _size(value: float) -> str:
    """Bytes with three digits."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= 0.9995 * unit:
            return f"{_digits(value / unit)} {name}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    """Seconds in the unit that a reader would use."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{_digits(seconds / unit)} {name}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"


def _digits(value: float) -> str:
    """A number with three digits; larger ones as whole numbers."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _wrapped(text: str) -> list[str]:
    """A text in lines that fit the terminal, each with an indent of two characters."""
    return textwrap.wrap(text, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False)


def _json_value(value: Any) -> Any:
    """A value as JSON: dataclasses become dicts without their modules, torch types become names."""
    if is_dataclass(value):
        values = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: _json_value(v) for name, v in values if not isinstance(v, nn.Module)}
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
