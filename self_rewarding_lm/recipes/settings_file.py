"""The recipe with every setting, its default and its words, as YAML text.

It is made from the classes and functions whose settings it names, so it cannot fall behind them.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from self_rewarding_lm.config import Config, SelfInstruct
from self_rewarding_lm.data.hub import from_hub
from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.describe import REQUIRED, Setting, settings_of
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.recipes.paper import paper_recipe
from self_rewarding_lm.recipes.settings import (
    NESTED,
    RUBRICS,
    STAGE_KINDS,
    RecipeSettings,
    RubricSettings,
)

WIDTH = 100


HEAD = """\
A recipe: the whole of Self-Rewarding Language Models (arXiv:2401.10020), from M0 to M3.

  self-rewarding-lm run recipe.yaml

`self-rewarding-lm run --settings` prints this file. Lines that begin with two marks say what
a setting is; lines that begin with one hold a setting at its default: remove the mark and the
space after it to change the setting. Everything is checked before any work. Relative paths
start at this file's folder. Flags (`self-rewarding-lm run --help`) override the file. An
editor with a YAML language server completes and checks the file by the schema that the first
line names (`self-rewarding-lm schema` prints it).

A dataset is one of:
  a file             rows.jsonl, .json (both also .gz), .csv or .parquet
  of the hub         {hub: owner/name, split: train}, further settings below
  an object          package.module:attribute, a torch Dataset, a list, a datasets.Dataset
  a stage's records  {from_stage: name}
  Open Assistant     {open_assistant: trees.jsonl.gz, part: ift}, further settings below
  new prompts        {self_instruct: {seed_dataset: prompts.jsonl, num_prompts: 5000}}, where
                     prompts are wanted; further settings below
  several            [one, another], one after the other
  one a round        {rounds: [one, another]}, for the prompts of `paper`
Functions, modules and classes are named package.module:attribute. Write null for None.
"""


EXAMPLES = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "out": "runs/paper",
    "ift": "{open_assistant: trees.jsonl, part: ift}",
    "ranked": "{open_assistant: trees.jsonl, part: eft_train}",
    "prompts": "prompts.jsonl",
    "train_dataset": "rows.jsonl",
    "prompt_dataset": "prompts.jsonl",
    "ranked_dataset": "{open_assistant: trees.jsonl, part: eft_train}",
    "reward_model": "my_rewards:score",
}
"""Values of settings that are required, and of some others; a required one without is `...`."""


LINES_IN_WORDS = (
    "[first, end]: lines first to end - 1 of the file, counted from 0, such as [0, 70]."
)


STAGES_MARK = "In place of `paper`: stages of your own"


def recipe_text(schema: str | None = None) -> str:
    """A recipe with every setting: a few with values, the others after a mark.

    schema: where the JSON schema of recipes is, as the file tells editors.
    """
    lines = [] if schema is None else [f"# yaml-language-server: $schema={schema}"]
    lines += [*_words(0, HEAD), ""]
    top = {setting.name: setting for setting in settings_of(RecipeSettings)}

    # 1. the settings with values: the model, the folder, the paper's data
    for name in ("model", "out"):
        lines += [*_with_example(0, top[name]), ""]
    lines += [*_words(0, top["paper"].words), "paper:"]
    settings = settings_of(paper_recipe)
    for setting in sorted(settings, key=lambda s: s.name not in ("ift", "ranked", "prompts")):
        is_data = setting.name in ("ift", "ranked", "prompts")
        lines += _with_example(1, setting) if is_data else _commented(1, setting)

    # 2. all others, after marks
    for setting in top.values():
        if setting.name not in ("model", "out", *NESTED):
            lines += ["", *_commented(0, setting)]
    lines += ["", *_rewards(top["reward_prompts"]), "", *_engine(top["engine"])]
    lines += ["", *_dataset_words()]
    lines += ["", *_stages()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _rewards(setting: Setting) -> Iterator[str]:
    """The settings of a judge's prompt, with the values of the paper's rubric."""
    yield from _words(0, setting.words)
    yield from ("# reward_prompts:", "#   default:")
    base = RUBRICS["paper"]
    for inner in settings_of(RubricSettings):
        if inner.name == "prompt_template":
            whole = "Given, it takes the place of a rubric, and all that it needs is said with it."
            yield from _words(0, f"prompt_template: {inner.words} {whole}", inset=4)
        else:
            value = getattr(base, inner.name, inner.default)
            yield from _commented(0, inner, depth=2, value=value)


def _engine(setting: Setting) -> Iterator[str]:
    """The settings of a server, by their words, and the setting itself."""
    yield from _commented(0, setting)
    for inner in settings_of(ServerEngine):
        yield from _words(0, f"{inner.name}: {_yaml(inner.default)}  {_all_words(inner)}", inset=2)


def _dataset_words() -> Iterator[str]:
    """The settings of datasets that are made: of the hub, Open Assistant's rows, new prompts."""
    owners = {"hub": from_hub, "open_assistant": open_assistant, "self_instruct": SelfInstruct}
    for name, owner in owners.items():
        yield from _words(0, f"Further settings of {name}:")
        for setting in settings_of(owner):
            default = "" if setting.default is REQUIRED else f"{_yaml(setting.default)}  "
            words = LINES_IN_WORDS if setting.name == "trees" else _all_words(setting)
            if setting.name not in ("hub", "path"):  # the values of hub and open_assistant
                yield from _words(0, f"{setting.name}: {default}{words}", inset=2)


def _stages() -> Iterator[str]:
    """All stages as a list after marks; a setting that an earlier one has too is only named."""
    yield from _words(
        0,
        f"{STAGES_MARK}, one after the other; a stage may also be package.module:Class. Each kind "
        "with its settings:",
    )
    yield "# stages:"
    seen: set[tuple[str, str, str]] = set()
    for kind, cls in STAGE_KINDS.items():
        yield from _words(0, (cls.__doc__ or "").split("\n\n")[0], inset=2)
        yield f"#   - stage: {kind}"
        repeated = []
        for setting in settings_of(cls):
            key = (setting.name, _yaml(setting.default), setting.words)
            if setting.default is REQUIRED or key not in seen:
                yield from _commented(0, setting, depth=2)
            else:
                repeated.append(setting.name)
            seen.add(key)
        if repeated:
            yield from _words(0, f"also, as above: {', '.join(repeated)}", inset=4)


def _with_example(base: int, setting: Setting) -> Iterator[str]:
    """A setting with its value of EXAMPLES."""
    yield from _words(base, _all_words(setting))
    yield f"{'  ' * base}{setting.name}: {EXAMPLES[setting.name]}"


def _commented(
    base: int, setting: Setting, *, depth: int = 0, value: Any = REQUIRED
) -> Iterator[str]:
    """A setting after a mark, at `value` or its default.

    base: levels of YAML before the mark; depth: levels after it.
    """
    inset = 2 * depth
    mark = f"{'  ' * base}# {' ' * inset}"
    value = setting.default if value is REQUIRED else value
    if isinstance(value, str) and "\n" in value:  # a prompt of the library's own
        yield from _words(base, f"{setting.name}: {_all_words(setting)}", inset=inset)
        return
    yield from _words(base, _all_words(setting), inset=inset)
    if isinstance(value, Config):
        yield f"{mark}{setting.name}:"
        for inner in settings_of(type(value)):
            inner_value = getattr(value, inner.name)
            yield from _commented(base, inner, depth=depth + 1, value=inner_value)
        return
    text = EXAMPLES.get(setting.name, "...") if value is REQUIRED else _yaml(value)
    yield f"{mark}{setting.name}: {text}"
    if value is None and setting.nested is not None:
        for inner in settings_of(setting.nested):
            words = f"{inner.name}: {_yaml(inner.default)}  {_all_words(inner)}"
            yield from _words(base, words, inset=inset + 2)


def _words(base: int, text: str, *, inset: int = 0) -> list[str]:
    """Words after two marks, in lines of at most 100 characters."""
    mark = f"{'  ' * base}## {' ' * inset}"
    lines: list[str] = []
    for line in text.splitlines() if "\n" in text else [text]:
        lines += textwrap.wrap(line, WIDTH - len(mark), break_on_hyphens=False) or [""]
    return [f"{mark}{line}" for line in lines if text]


def _all_words(setting: Setting) -> str:
    """A setting's words, and the values that it takes if they are few."""
    allowed = ", ".join(map(str, setting.allowed))
    return f"{setting.words} One of: {allowed}.".strip() if allowed else setting.words


def _yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if value is REQUIRED:
        return ""
    if isinstance(value, Config):
        return "{...}"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    if "\n" in text:  # a text of several lines, which JSON writes on one
        return json.dumps(plain, ensure_ascii=False)
    return re.sub(r"e-0(\d)", r"e-\1", text)
