"""YAML text as values that know where they stand.

Knows nothing of recipes. Words and numbers are those of YAML 1.2: `true` and `false` are the only
booleans (`no` and `on` are words), `1e-6` is a number; `010`, `1:30` and dates are words, of which
YAML 1.1 makes octal numbers, numbers to the base 60 and dates.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from self_rewarding_lm.errors import ConfigError, typed

MERGE = "<<"


MOST_REPEATED = 10_000
"""Values that aliases may add to those that are written."""


_NUMBER_STARTS = list("-+0123456789.")


@dataclass(frozen=True)
class Node:
    """A value and its place.

    value: a scalar, a dict of Nodes by str, or a list of Nodes. place: words that name it in an
    error, such as "recipe.yaml, line 3". folder: where a relative path in the value starts.
    """

    value: Any
    place: str
    folder: Path

    @property
    def path(self) -> Path:
        """The file or folder that the value names, if it is taken for a path."""
        return self.folder / Path(str(self.value)).expanduser()

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: tuple[Any, ...]) -> "Node":
        """The node at a path of keys and places; if there is none, the nearest one above it."""
        if not path:
            return self
        key, rest = path[0], path[1:]
        if isinstance(self.value, dict) and key in self.value:
            return self.value[key].at(rest)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key].at(rest)
        return self

    def replaced(self, changes: Mapping[tuple[str, ...], "Node"]) -> "Node":
        """This node with other nodes at some paths of keys."""
        node = self
        for path, new in changes.items():
            node = _replaced(node, path, new)
        return node


@typed
def read_yaml(path: str | Path) -> Node:
    """The nodes of a YAML file; relative paths in it start at its folder.

    Raises ConfigError, with the line, if the text is no YAML or has a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse_yaml(text, str(path), path.resolve().parent)


def parse_yaml(text: str, source: str, folder: Path, *, lines: bool = True) -> Node:
    """The nodes of a YAML text. source: its name, to which `place` adds the line if `lines`."""

    def place(mark: Any) -> str:
        return f"{source}, line {mark.line + 1}" if lines and mark is not None else source

    try:
        top = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        words = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{place(mark)}: this is not valid YAML: {words}.") from error
    except RecursionError as error:
        raise _too_deep(source) from error
    if top is None:
        raise ConfigError(f"{source} is empty.")
    try:
        sizes: dict[int, int] = {}
        if _size(top, sizes) - len(sizes) > MOST_REPEATED:
            raise ConfigError(
                f"{source}: its aliases (*name) stand for more than {MOST_REPEATED:,} values "
                "besides those that are written; aliases within aliases multiply. Write "
                "the values out."
            )
        return _node(top, place, folder, frozenset())
    except RecursionError as error:
        raise _too_deep(source) from error


def _size(read: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, where each alias stands for all that it names.

    sizes: that of each node that is written, by its id; filled here. What an alias within itself
    would add is left out.
    """
    if id(read) not in sizes:
        sizes[id(read)] = 0
        parts = [] if isinstance(read, yaml.ScalarNode) else read.value
        nodes = (node for part in parts for node in (part if isinstance(part, tuple) else (part,)))
        sizes[id(read)] = 1 + sum(_size(node, sizes) for node in nodes)
    return sizes[id(read)]


def _too_deep(source: str) -> ConfigError:
    return ConfigError(f"{source}: there are too many lists or mappings within each other.")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the words and numbers of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}


for _tag, _pattern, _starts in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _starts
    )


def _node(read: yaml.Node, place: Any, folder: Path, above: frozenset[int]) -> Node:
    """The Node of what PyYAML read. above: ids of the nodes that it stands in."""
    where = place(read.start_mark)
    if id(read) in above:
        raise ConfigError(f"{where}: an alias stands within what it names.")
    above |= {id(read)}
    if isinstance(read, yaml.MappingNode):
        return Node(_mapping(read, place, folder, above), where, folder)
    if isinstance(read, yaml.SequenceNode):
        return Node([_node(item, place, folder, above) for item in read.value], where, folder)
    try:
        value = _Loader("").construct_object(read)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # "!!bool maybe"
        words = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: {read.value!r} cannot be read: {words}.") from error
    return Node(value, where, folder)


def _mapping(
    read: yaml.MappingNode, place: Any, folder: Path, above: frozenset[int]
) -> dict[str, Node]:
    values: dict[str, Node] = {}
    for key, child in read.value:
        where = place(key.start_mark)
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name is None:
            raise ConfigError(f"{where}: a key must be a word; got a {key.id}.")
        if name in values:
            raise ConfigError(
                f"{where}: the key {name!r} appears twice (also at {values[name].place})."
            )
        node = _node(child, place, folder, above)
        values[name] = Node(node.value, where, folder)  # errors name the line of the key
    return _merged(values.pop(MERGE), values) if MERGE in values else values


def _merged(sources: Node, values: dict[str, Node]) -> dict[str, Node]:
    """The items of a mapping with `<<`: its own come before those of the mappings it takes."""
    parts = sources.value if isinstance(sources.value, list) else [sources]
    if not all(isinstance(part.value, dict) for part in parts):
        raise ConfigError(f"{sources.place}: {MERGE} takes a mapping, such as *an_alias.")
    inherited = {k: node for part in reversed(parts) for k, node in part.value.items()}
    return {**inherited, **values}


def _replaced(node: Node, path: tuple[str, ...], new: Node) -> Node:
    """`node` with `new` at a path; mappings that are missing on the way are made."""
    key, rest = path[0], path[1:]
    values = dict(node.value) if isinstance(node.value, dict) else {}
    if rest:
        new = _replaced(values.get(key, Node({}, new.place, new.folder)), rest, new)
    values[key] = new
    return Node(values, node.place, node.folder)
