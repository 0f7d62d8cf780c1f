"""The rooms: the order of imports, no circles, homes of outside libraries, names at the doors."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "self_rewarding_lm"
NAME = PACKAGE.name
ORDER = [
    "errors moved",
    "records",
    "rubrics scores stats text",
    "config",
    "describe checks sharding",
    "runtime",
    "runs",
    "data",
    "models",
    "generation",
    "context",
    "judges",
    "training",
    "evaluation",
    "stages",
    "recipes",
    "report",
    "trainer",
    "cli",
    "__init__ __main__",
]
"""Rooms and files of the top: each imports from earlier rows and from its own folder."""
HEIGHT = {room: height for height, row in enumerate(ORDER) for room in row.split()}
HOMES = {
    "accelerate": {"runtime"},
    "transformers": {"models", "data/tokenizers", "data/chat", "runs/pretrained", "recipes/plan"},
    "peft": {"models", "data/tokenizers", "data/chat", "runs/pretrained", "recipes/plan"},
    "x_transformers": {"models"},
    "jinja2": {"data/chat", "judges/templates", "report"},
    "safetensors": {"runs"},
    "pyarrow": {"data/files", "report/export"},
    "datasets": {"data/hub"},
    "rapidfuzz": {"stages/self_instruct"},
    "openai": {"generation/server"},
    "bitsandbytes": {"training/optimizers"},
}
OPEN_FILES = {"runs", "data", "recipes", "report"}
OPENING = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}
EXTRAS = {
    "transformers",
    "peft",
    "openai",
    "pyarrow",
    "datasets",
    "gguf",
    "bitsandbytes",
    "tokenizers",
}
MAY_IMPORT_LATE = {
    ("recipes/reader", f"{NAME}.trainer"),  # `Recipe.trainer()` makes it, of a later room
    ("runs/run", f"{NAME}.runs.pretrained"),  # needs torch, which reading a run does without
}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


@cache
def place(path: Path) -> str:
    """Where a file stands: runs/atomic, trainer, models/__init__."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@cache
def module(path: Path) -> str:
    parts = [NAME, *place(path).split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def room(path: Path) -> str:
    return place(path).split("/")[0]


def imports(tree: ast.AST) -> list[tuple[str, str, ast.stmt]]:
    """Each import of a file, late ones and those under TYPE_CHECKING too: module, name, where."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            found += [(node.module or "", alias.name, node) for alias in node.names]
    return found


@cache
def own_imports(path: Path) -> list[tuple[Path, str, ast.stmt]]:
    """Imports of the package's own files: the file, the name, where."""
    found = []
    for name, what, node in imports(TREES[path]):
        if name == NAME or name.startswith(f"{NAME}."):
            submodule = MODULES.get(f"{name}.{what}")
            assert submodule or name in MODULES, f"{place(path)}: there is no module {name}"
            found.append((submodule or MODULES[name], what, node))
    return found


def within(path: Path, homes: set[str]) -> bool:
    return any(place(path) == home or place(path).startswith(f"{home}/") for home in homes)


def check(wrong: list[str]) -> None:
    """Fail with all places that break a rule, a line each."""
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_import_only_from_earlier_rooms():
    wrong = [f"{place(path)} has no place in ORDER" for path in FILES if room(path) not in HEIGHT]
    check(wrong)
    for path in FILES:
        own = room(path)
        for other, _, node in own_imports(path):
            may = HEIGHT[room(other)] < HEIGHT[own] or (room(other) == own and "/" in place(path))
            late = (place(path), module(other)) in MAY_IMPORT_LATE
            if not (may or late or own == "__init__"):
                wrong.append(f"{place(path)}:{node.lineno} may not import {place(other)}")
    check(wrong)


def test_no_files_import_each_other_in_a_circle():
    edges = {
        path: {
            other
            for other, _, _ in own_imports(path)
            if (place(path), module(other)) not in MAY_IMPORT_LATE and place(path) != "__init__"
        }
        for path in FILES
    }
    left = dict(edges)
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    check([f"{place(path)} is in a circle or behind one" for path in left])


def test_files_of_the_package_are_imported_at_the_top():
    wrong = []
    for path in FILES:
        top = set(map(id, TREES[path].body))
        for other, _, node in own_imports(path):
            allowed = (place(path), module(other)) in MAY_IMPORT_LATE
            if not (id(node) in top or allowed or room(path) in {"cli", "__init__"}):
                wrong.append(f"{place(path)}:{node.lineno} imports {place(other)} late")
    check(wrong)


def test_files_import_from_the_file_that_defines_a_name():
    """A room's door is for people outside; inside, one name has one way."""
    wrong = []
    for path in (path for path in FILES if place(path) != "__init__"):
        for other, name, node in own_imports(path):
            if other.name == "__init__.py" and module(other) != NAME:
                defined = {getattr(n, "name", "") for n in TREES[other].body}
                if name not in defined:
                    wrong.append(f"{place(path)}:{node.lineno}: {name} is defined elsewhere")
    check(wrong)


def test_no_underscore_name_crosses_a_room():
    wrong = []
    for path in FILES:
        for other, name, node in own_imports(path):
            private = name.startswith("_") or other.stem.startswith("_")
            if private and not name.startswith("__") and other.stem != "__init__":
                if room(other) != room(path):
                    wrong.append(f"{place(path)}:{node.lineno} imports {name}")
    check(wrong)


def test_outside_libraries_have_their_homes():
    wrong = []
    for path in FILES:
        for name, _, node in imports(TREES[path]):
            homes = HOMES.get(name.split(".")[0])
            if homes is not None and not within(path, homes):
                wrong.append(f"{place(path)}:{node.lineno}: {name} belongs in {sorted(homes)}")
    check(wrong)


def test_optional_extras_are_imported_late():
    check(
        [
            f"{place(path)}:{node.lineno}: {name}"
            for path in FILES
            for name, _, node in imports(TREES[path])
            if any(node is statement for statement in TREES[path].body)
            and name.split(".")[0] in EXTRAS
        ]
    )


def test_only_some_rooms_open_files():
    wrong = []
    for path in (path for path in FILES if room(path) not in OPEN_FILES):
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call) and ast.unparse(node.func) != "Run.open":
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else ""
                if (name or getattr(called, "id", "")) in OPENING:
                    wrong.append(f"{place(path)}:{node.lineno} calls {name or called}")
    check(wrong)


def test_few_files_stand_at_the_top():
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 16


def test_a_room_says_what_it_is_for_what_it_knows_nothing_of_and_where_to_begin():
    wrong = []
    for path in FILES:
        words = " ".join((ast.get_docstring(TREES[path]) or "").split())
        if path.name == "__init__.py" and path.parent != PACKAGE:
            if not (len(words) > 150 and "Knows nothing of" in words and "Begin" in words):
                wrong.append(place(path))
    check(wrong)


def test_every_public_name_is_there_and_says_what_it_is():
    import self_rewarding_lm

    for name in self_rewarding_lm.__all__:
        assert (getattr(self_rewarding_lm, name).__doc__ or "").strip(), name
