"""The reference pages, from the code's own words: every stage, setting, public name and command.

`conf.py` calls `write_pages`. What settings say comes from `self_rewarding_lm.describe`, which the
example recipe is made of too; so neither falls behind the code.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import self_rewarding_lm as library
from self_rewarding_lm import cli
from self_rewarding_lm.config import Config, FinetuneConfig, RewardConfig
from self_rewarding_lm.describe import REQUIRED, Setting, config_in, settings_of
from self_rewarding_lm.recipes.settings import STAGE_KINDS, RecipeSettings
from self_rewarding_lm.recipes.settings_file import recipe_text

README = Path(__file__).parents[1] / "README.md"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def write_pages(folder: Path) -> None:
    """Write the pages; one that says what it said is left alone, so that it is not built again."""
    folder.mkdir(exist_ok=True)
    public = {name: getattr(library, name) for name in library.__all__}
    settings = {name: it for name, it in public.items() if _is(it, Config)}
    stages = {name: it for name, it in settings.items() if _is(it, FinetuneConfig)}
    others = {name: it for name, it in public.items() if name not in settings}
    pages = {
        "stages": _stages([it for it in in_order(stages) if it is not FinetuneConfig]),
        "settings": _settings([it for name, it in settings.items() if name not in stages]),
        "names": _names(others),
        "command": _command(),
        "recipe": ["# Every setting as YAML\n\n```yaml", recipe_text().strip(), "```"],
    }
    for name, lines in pages.items():
        path, text = folder / f"{name}.md", "\n".join(lines) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def in_order(stages: dict[str, type[Config]]) -> list[type[Config]]:
    """SFT and self-reward first, then the other stages in the order of README's table of stages."""
    table = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    names = dict.fromkeys(["SFTConfig", "SelfRewardDPOConfig", *table, *stages])
    return [stages[name] for name in names if name in stages]


def _stages(stages: list[type[Config]]) -> Iterator[str]:
    """A section for each stage with the fields that it adds, then one for each class they share."""
    kinds = {cls: kind for kind, cls in STAGE_KINDS.items()}
    shared: dict[type[Config], None] = {}
    yield "# Stages\n\nWhat each stage does and what it can be told. A stage of your own is a"
    yield "subclass of [FinetuneConfig](#finetuneconfig): [guide](../own_stage.md)."
    for cls in stages:
        yield f"\n## {cls.__name__}\n\n{_doc(cls)}\n"
        if cls in kinds:
            yield f"In a recipe: `stage: {kinds[cls]}`.\n"
        above = [parent for parent in cls.__mro__[1:] if parent not in stages and _own(parent)]
        shared |= dict.fromkeys(above)
        yield from _fields(cls)
        for parent in (p for p in cls.__mro__[1:] if p in stages):
            yield f"It also has what [{parent.__name__}](#{_anchor(parent)}) has.\n"
        links = ", ".join(f"[{parent.__name__}](#{_anchor(parent)})" for parent in above)
        unused = ", ".join(f"`{name}`" for name in getattr(cls, "unused", ()))
        yield f"Also the settings of {links}{f', except {unused}' if unused else ''}.\n"
    yield "\n## What stages share\n"
    for parent in sorted(shared, key=lambda parent: len(parent.__mro__)):
        yield f"\n### {parent.__name__}\n\n{_doc(parent)}\n"
        yield from _fields(parent)


def _settings(configs: list[type[Config]]) -> Iterator[str]:
    yield "# Settings objects\n\nSettings that stages and the trainer take as objects; all of them"
    yield "in one file: [every setting as YAML](recipe.md).\n"
    found = dict.fromkeys([*configs, RecipeSettings])
    for cls in list(found):
        nested = (config_in(field.annotation) for field in cls.model_fields.values())
        found |= dict.fromkeys(cls for cls in nested if cls is not None)
    for cls in found:
        yield f"\n## {cls.__name__}\n\n{_doc(cls)}\n"
        yield from _fields(cls, inherited=True)


def _fields(cls: type[Config], *, inherited: bool = False) -> Iterator[str]:
    """A definition for each field: its name, default and bounds, then its words."""
    own = set(_own(cls))
    for setting in settings_of(cls):
        if inherited or setting.name in own:
            field = cls.model_fields[setting.name]
            yield f"`{setting.name}` ({_kind(field, setting)})"
            yield f": {_text(setting.words) or 'See above.'}\n"


def _own(cls: type) -> list[str]:
    return list(inspect.get_annotations(cls)) if _is(cls, Config) else []


def _kind(field: Any, setting: Setting) -> str:
    """Type, bounds and default of a field."""
    words = [] if field.annotation is Any else [f"`{_type(field.annotation)}`"]
    for bound in field.metadata:
        words += [f"{BOUNDS[n]} {getattr(bound, n)}" for n in BOUNDS if hasattr(bound, n)]
    default = setting.default
    if default is REQUIRED:
        return ", ".join([*words, "must be given"])
    if isinstance(default, Config):
        given = ", ".join(f"{n}={getattr(default, n)!r}" for n in default.model_fields_set)
        default = f"{type(default).__name__}({given})"
    else:
        default = repr(default)
    short = default if len(default) <= 60 else "a text" if setting.default else default
    return ", ".join([*words, f"default `{short}`" if short != "a text" else "default: a text"])


def _names(public: dict[str, Any]) -> Iterator[str]:
    yield "# Classes and functions\n\nAll other public names of `self_rewarding_lm`.\n"
    for name, it in public.items():
        yield f"\n## {name}\n"
        if isinstance(it, RewardConfig):
            prompt = it.prompt_template.strip()
            yield f"The `RewardConfig` with this prompt:\n\n````text\n{prompt}\n````\n"
            continue
        yield f"{_signature(name, it)}\n\n{_doc(it)}\n"
        if inspect.isclass(it):
            for member, value in vars(it).items():
                function = value.__func__ if isinstance(value, classmethod) else value
                called = inspect.isfunction(function)
                if not member.startswith("_") and (called or isinstance(value, property)):
                    code = _signature(member, function) if called else ""
                    yield f"### {name}.{member}\n\n{code}\n\n{_doc(function)}\n"


def _signature(name: str, it: Callable[..., Any]) -> str:
    """`name(...)` as code, an argument a line where one line is too short."""
    if _is(it, BaseException):
        return ""
    try:
        given = inspect.signature(it)
    except ValueError:
        return ""
    said = [str(a) for n, a in given.parameters.items() if n not in ("self", "cls")]
    kinds = [a.kind for n, a in given.parameters.items() if n not in ("self", "cls")]
    first = next((i for i, kind in enumerate(kinds) if kind is kind.KEYWORD_ONLY), None)
    if first is not None and inspect.Parameter.VAR_POSITIONAL not in kinds:
        said.insert(first, "*")
    back = given.return_annotation
    back = (
        ""
        if back in (inspect.Signature.empty, None) or inspect.isclass(it)
        else f" -> {_type(back)}"
    )
    said = [_bare(text) for text in said]
    line = f"{name}({', '.join(said)}){back}"
    if len(line) > 80:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in said) + f"){back}"
    return f"```python\n{line}\n```"


def _command() -> Iterator[str]:
    yield "# Flags of every command\n\nWhat `self-rewarding-lm COMMAND --help` prints.\n"
    commands = next(
        action
        for action in cli.make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80)
        yield f"\n## {name}\n\n```text\n{parser.format_help().strip()}\n```\n"


def _doc(it: Any) -> str:
    """A docstring as Markdown: paragraphs, lists, `name: words` entries, indented code."""
    parts = []
    for paragraph in (inspect.getdoc(it) or "").split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0].startswith("    "):
            parts.append("```text\n" + inspect.cleandoc(paragraph) + "\n```")
            continue
        entries: list[str] = []
        for line in lines:
            starts = re.match(r"(\w+: |- |\d\. )", line) and not line.startswith(" ")
            if not entries or (starts and (line.startswith("- ") or _is_entry(lines))):
                entries.append(line.strip())
            else:
                entries[-1] += " " + line.strip()
        several = len(entries) > 1
        parts += [_entry(e) if several else _text(e) for e in entries]
    return "\n\n".join(parts)


def _is_entry(lines: list[str]) -> bool:
    """Whether a paragraph is a list of `name: words`: each line begins one or is indented."""
    return all(re.match(r"\w+: |\s", line) for line in lines)


def _entry(text: str) -> str:
    name, colon, words = text.partition(": ")
    if text.startswith("- "):
        return f"- {_text(text[2:])}"
    return f"- `{name}`: {_text(words)}" if colon and name.isidentifier() else f"- {_text(text)}"


def _text(words: str) -> str:
    """Words as Markdown: what would be markup is escaped, code between backticks is not; pages of
    these docs are linked."""
    pieces = words.split("`")
    if len(pieces) % 2 == 0:  # a backtick alone is a character like others
        pieces = [words]
    for i in range(0, len(pieces), 2):
        text = re.sub(r"([\\`*<>\[\]{}$#|~]|\b_|_\b)", r"\\\1", pieces[i])
        pieces[i] = re.sub(r"\bdocs/(\w+\.md)", r"[\1](../\1)", text)
    return "`".join(pieces)


def _type(annotation: Any) -> str:
    return _bare(inspect.formatannotation(annotation))


def _bare(text: str) -> str:
    """Names without their modules."""
    text = re.sub(r"<(?:class|function) '?([^'> ]+)[^>]*>", r"\1", text)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_]\w*)", "", text)


def _anchor(cls: type) -> str:
    return cls.__name__.lower()


def _is(it: Any, kind: type) -> bool:
    return isinstance(it, type) and issubclass(it, kind)
