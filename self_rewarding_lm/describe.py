"""What can be set: the settings of a class or a function, with their defaults and their words.

The words are those of the source: the text below a field of a class, the entry of an argument in a
function's docstring. Knows nothing of YAML or of what a setting does.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, get_args, get_origin

from pydantic import create_model
from pydantic_core import PydanticUndefined

from self_rewarding_lm.config import Config

REQUIRED = object()
"""The default of what must be given."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    default: REQUIRED if there is none. words: what the source says of it, or "". allowed: the
    values of a Literal. nested: the Config class of its value, if it is one.
    """

    name: str
    default: Any
    words: str
    allowed: tuple[Any, ...] = ()
    nested: type[Config] | None = None


@cache
def settings_of(owner: Callable[..., Any]) -> tuple[Setting, ...]:
    """The fields of a Config class, or the keyword arguments of a function, in their order."""
    model = owner if _is_config(owner) else model_of(owner)
    words = _field_words(owner) if _is_config(owner) else _argument_words(owner)
    return tuple(
        Setting(
            name,
            REQUIRED if field.default is PydanticUndefined else field.default,
            words.get(name, ""),
            _allowed(field.annotation),
            config_in(field.annotation),
        )
        for name, field in model.model_fields.items()  # type: ignore[attr-defined]
        if name not in getattr(owner, "unused", ())
    )


@cache
def model_of(function: Callable[..., Any]) -> type[Config]:
    """A Config class with a function's arguments as fields, to check values against."""
    fields: dict[str, Any] = {
        name: (
            Any if argument.annotation is inspect.Parameter.empty else argument.annotation,
            ... if argument.default is inspect.Parameter.empty else argument.default,
        )
        for name, argument in inspect.signature(function).parameters.items()
    }
    return create_model(function.__name__, __base__=Config, **fields)


def config_in(annotation: Any) -> type[Config] | None:
    """The Config class of a field: itself, or in a union with None."""
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if _is_config(part)), None)


def _is_config(owner: Any) -> bool:
    return isinstance(owner, type) and issubclass(owner, Config)


def _allowed(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of one in a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _allowed(part))


def _field_words(owner: Any) -> dict[str, str]:
    """The texts below a class's fields, those of its parents included."""
    words: dict[str, str] = {}
    for cls in reversed(owner.__mro__):
        if not _is_config(cls):
            continue
        try:
            body = ast.parse(dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError):  # made at run time: there is no source
            continue
        statements = getattr(body, "body", [])
        for field, text in pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    words[field.target.id] = _one_line(str(text.value.value))
    return words


def _argument_words(function: Callable[..., Any]) -> dict[str, str]:
    """Entries `name: words` of a docstring, at the start of a paragraph or after a sentence."""
    names = "|".join(map(re.escape, inspect.signature(function).parameters))
    entry = re.compile(rf"(?:^|(?<=[.;)] ))({names}): ")
    words_of: dict[str, str] = {}
    for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
        pieces = entry.split(_one_line(paragraph))[1:]
        for name, words in zip(pieces[::2], pieces[1::2], strict=True):
            words_of[name] = words.strip()
    return words_of


def _one_line(text: str) -> str:
    return " ".join(text.split())
