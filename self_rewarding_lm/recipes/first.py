"""The first recipe of a folder, with example data: fit for the model, the prompts and the machine.

Which weights are trained is decided by the plan of each way to do it: the first that fits is taken.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models.inference import products_unused
from self_rewarding_lm.recipes.plan.model import ModelShape, read_shape
from self_rewarding_lm.recipes.plan.plan import plan_recipe
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.yaml_nodes import parse_yaml
from self_rewarding_lm.runs.atomic import OTHER_PLACE, system_errors
from self_rewarding_lm.runs.installed import SCHEMA
from self_rewarding_lm.text import amount, number

RECIPE = "recipe.yaml"


DATA = ("ift", "ranked", "prompts")
"""The datasets of the paper's stages; one that is not given is written as <name>.jsonl."""


JUDGING_SIZE = 2e9
"""Parameters from which on a model is taken to write reviews whose score can be read."""


ONE_ROUND = 500
"""With fewer prompts there is one round, since a second one would go over the same prompts."""


STEPS = 16
"""Optimiser steps of a round that the batch size leaves, if half of the prompts give a pair."""


MANY_STEPS = 100
"""With fewer in a round an adapter takes higher learning rates (docs/models.md)."""


SHARE = 0.9
"""Of a GPU's memory that a plan may need."""


@dataclass(frozen=True)
class Way:
    """Which weights are trained, and how. settings: lines of the recipe."""

    words: str
    settings: tuple[str, ...]
    is_adapter: bool


ADAPTER = "peft: {r: 16, lora_alpha: 32}"


MIXED = "accelerate: {mixed_precision: bf16}"


ON_CPU = (Way("a LoRA adapter is trained", (ADAPTER,), True),)


ON_GPU = (
    Way("all weights are trained", (MIXED,), False),
    Way("a LoRA adapter is trained, on weights in bfloat16", ("torch_dtype: bf16", ADAPTER), True),
    Way("a LoRA adapter is trained, on weights in 4 bit", ("load_in_4bit: true", ADAPTER), True),
)
"""The first that fits is taken."""


def write_first_recipe(
    folder: Path, model: str, data: Mapping[str, str | None], *, device_memory: int | None = None
) -> list[str]:
    """Write a recipe, and example data for what `data` does not name. Returns what was decided.

    data: files by the names of DATA. device_memory: of the GPU, in bytes; None: that of this
    machine, or its CPU. Raises ConfigError if the model's configuration or a file cannot be read or
    nothing fits, StoreError if a file that would be written is there; nothing is written then.
    """
    # 1. what is there: the files, the model's size, the machine
    examples = [name for name in DATA if data.get(name) is None]
    written = [folder / RECIPE, *(folder / f"{name}.jsonl" for name in examples)]
    there = [str(path) for path in written if path.exists()]
    if folder.exists() and not folder.is_dir():
        there = [str(folder)]
    if there:
        raise StoreError(f"there is {', '.join(there)} already; give the name of a new folder.")
    files = {name: Path(str(given)) for name, given in data.items() if given is not None}
    for name, file in files.items():
        if not file.is_file():
            raise ConfigError(f"--{name}: there is no file {str(file)!r}.")
    files |= {name: _shipped(name) for name in examples}
    prompts = len(Rows(str(files["prompts"]), "prompts"))
    source = str(Path(model).resolve()) if Path(model).exists() else model
    shape = read_shape(source)
    if device_memory is None and torch.cuda.is_available():
        device_memory = torch.cuda.mem_get_info()[1]

    # 2. the way to train it, by the plan of the recipe; its folder need not be there yet
    on_gpu = device_memory is not None

    def text(way: Way, named: Callable[[Path], str]) -> str:
        paths = {name: _quoted(named(file.resolve())) for name, file in files.items()}
        m0 = _quoted(named(Path(source)) if Path(source).exists() else source)
        return _recipe(shape, m0, way, prompts, paths, on_gpu=on_gpu)

    ways = ON_GPU if on_gpu else ON_CPU
    chosen = next((way for way in ways if _fits(way, text(way, str), device_memory)), None)
    if chosen is None:
        raise ConfigError(
            f"{model} has {number(shape.parameters)} parameters, too many for {device_memory:,} "
            "bytes of memory even in 4 bit; name a smaller --model."
        )

    # 3. the files
    with system_errors(folder, OTHER_PLACE):
        folder.mkdir(parents=True, exist_ok=True)
        for name in examples:
            shutil.copy(files[name], folder / f"{name}.jsonl")
            files[name] = folder / f"{name}.jsonl"
        root = folder.resolve()
        recipe = text(chosen, lambda path: _path_from(root, path))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    machine = "the CPU" if device_memory is None else f"a GPU of {device_memory / 1e9:.0f} GB"
    return [
        f"{path}: {what}"
        for path, what in zip(
            written, ("the recipe", *(f"example data ({name})" for name in examples)), strict=True
        )
    ] + [
        f"{shape.name} with {number(shape.parameters)} parameters on {machine}: {chosen.words}; "
        f"{amount(prompts, 'prompt')} make{'s' if prompts == 1 else ''} {_rounds(prompts)}."
    ]


def _path_from(folder: Path, path: Path) -> str:
    """A path as it is named from a folder; in full if it is not near."""
    relative = os.path.relpath(path, folder)
    return str(path) if relative.startswith(os.path.join(os.pardir, os.pardir)) else relative


def _shipped(name: str) -> Path:
    return Path(__file__).with_name(f"first_{name}.jsonl")


def _fits(way: Way, text: str, memory: int | None) -> bool:
    """Whether a way fits a device, by the plan of its recipe; if that cannot tell, an adapter."""
    recipe = read_recipe(parse_yaml(text, RECIPE, Path()))
    peak = plan_recipe(recipe, device_memory=memory, timed=False).peak
    if memory is None:
        return True
    return way.is_adapter if peak is None else (peak[1].peak or 0) <= SHARE * memory


def _rounds(prompts: int) -> str:
    return "one round" if prompts < ONE_ROUND else "two rounds"


def _recipe(
    shape: ModelShape,
    model: str,
    way: Way,
    prompts: int,
    paths: Mapping[str, str],
    *,
    on_gpu: bool,
) -> str:
    """The text of the recipe. model, paths: M0 and the datasets as YAML says them."""
    judges = shape.parameters >= JUDGING_SIZE
    longest = min(shape.max_len or 4096, 4096 if judges else 2048 if on_gpu else 1024)
    batch = max(2, min(16, prompts // 2 // STEPS))
    tokens = 8192 if on_gpu else 2048
    checkpointing = "gradient_checkpointing: true, " if on_gpu and shape.block is not None else ""
    reward = (
        "{rubric: paper, forced_ending: true}"
        if judges
        else "{rubric: short, score_mode: expected, forced_ending: at_once}"
    )
    judging = (
        "The model writes reviews; where one states no score, it is taken from probabilities."
        if judges
        else "So small a model writes no reviews that can be read: its scores are probabilities,\n"
        "# asked for at once, and its examples of judging come from the people's order."
    )
    rates = ("[1e-5, 1e-6]", "[1e-6, 1e-7]")
    if way.is_adapter:
        few = prompts // 2 // batch < MANY_STEPS
        rates = ("[5e-4, 1e-4]", "[1e-4, 1e-5]") if few else ("[2e-4, 4e-5]", "[2e-5, 2e-6]")
    is_unused = not on_gpu and products_unused("cpu", shape.dtype, shape.products, mixed=False)
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        "#",
        "# The paper's loop (arXiv:2401.10020), written by `self-rewarding-lm init`. What is next:",
        "#",
        f"#   self-rewarding-lm preview {RECIPE}   some rows as the model will read them",
        f"#   self-rewarding-lm check {RECIPE}     tries every stage on a few rows",
        f"#   self-rewarding-lm plan {RECIPE}      memory, tokens, time, disk",
        f"#   self-rewarding-lm run {RECIPE}",
        "#",
        "# All settings, with words: self-rewarding-lm run --settings",
        "",
        f"model: {model}",
        "out: runs/first",
        f"# {way.words[0].upper()}{way.words[1:]}.",
        *way.settings,
        *((MIXED,) if is_unused else ()),
        "",
        f"# {judging}",
        "reward_prompts:",
        f"  default: {reward}",
        "",
        "paper:",
        f"  ift: {paths['ift']} # instructions with a human answer",
        f"  ranked: {paths['ranked']} # answers that people have put in order, the best first",
        f"  prompts: {paths['prompts']} # new prompts, {number(prompts)}; each is asked once",
        f"  iterations: {1 if prompts < ONE_ROUND else 2}",
        f"  max_new_tokens: {512 if on_gpu else 128} # of a response and of a judgement",
        f"  batch_size: {batch} # rows or pairs a step",
        "  dropout: 0",
        f"  sft_learning_rates: {rates[0]} # at the first and the last step",
        f"  dpo_learning_rates: {rates[1]}",
        *(() if judges else ("  eft: {method: ranks}",)),
        "  sft: &fitting",
        f"    max_seq_len: {longest}",
        f"    optim: {{{checkpointing}micro_batch_tokens: {tokens}}}",
        "  self_reward: *fitting",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text in YAML, in quotes unless it is plainly a path."""
    return text if re.fullmatch(r"[A-Za-z.][\w-]*[./][\w./-]*", text) else json.dumps(text)
