"""Properties of the code, and mutants of the code by which each property is shown to be able to fail.

A property is a function over (module, case). It is run with the module as it is, and with mutants of
it: the module's source with one piece of text replaced by another, executed as a module of its own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

PACKAGE = "self_rewarding_lm"
Check = Callable[[ModuleType, Any], None]
ROUTINE = {
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
QUICK = settings(derandomize=True, max_examples=12, **ROUTINE)
"""The same examples each time: a change of code, not of luck, makes it fail."""
SLOW = settings(print_blob=True, **ROUTINE)
"""Other examples each time; one that fails is made smaller and printed with what brings it back."""
HUNT = settings(max_examples=1500, phases=[Phase.generate], **ROUTINE)
"""Looks for an example that a mutant fails, the same ones each time (by a seed)."""


@dataclass(frozen=True)
class Mutant:
    """A module in whose source `old`, which is there once, was replaced by `new`."""

    module: str
    old: str
    new: str

    def build(self) -> ModuleType:
        original = import_module(f"{PACKAGE}.{self.module}")
        path = Path(original.__file__ or "")
        source = path.read_text(encoding="utf-8")
        assert source.count(self.old) == 1, (
            f"{self.module} has {self.old!r} {source.count(self.old)} times"
        )
        built = ModuleType(original.__name__)
        built.__file__, built.__package__ = str(path), original.__package__
        exec(
            compile(source.replace(self.old, self.new), f"<mutant of {path.name}>", "exec"),
            built.__dict__,
        )
        return built


@dataclass(frozen=True)
class Property:
    """What holds for a module and every case of `cases`.

    examples: in the slow tier. built: cases that always come first, for what a search finds rarely.
    """

    name: str
    module: str
    cases: SearchStrategy[Any]
    check: Check
    mutants: tuple[Mutant, ...]
    examples: int
    built: tuple[Any, ...]

    def run(self, code: ModuleType, profile: settings, *, hunted: bool = False) -> int:
        """Run it over a module; the number of examples. Raises what the property raises."""
        for case in self.built:
            self.check(code, copy.deepcopy(case))
        count = len(self.built)

        @profile
        @given(self.cases)
        def run(case: Any) -> None:
            nonlocal count
            count += 1
            self.check(code, case)

        (seed(0)(run) if hunted else run)()
        return count

    def original(self) -> ModuleType:
        return import_module(f"{PACKAGE}.{self.module}")


PROPERTIES: dict[str, Property] = {}


def over(
    module: str,
    cases: SearchStrategy[Any],
    *,
    mutants: dict[str, str],
    examples: int = 400,
    built: Sequence[Any] = (),
) -> Callable[[Check], Check]:
    """Enter a function over (module, case) as a property. mutants: new texts by old ones."""

    def enter(check: Check) -> Check:
        name = check.__name__  # type: ignore[attr-defined]
        assert name not in PROPERTIES and mutants
        made = tuple(Mutant(module, old, new) for old, new in mutants.items())
        PROPERTIES[name] = Property(name, module, cases, check, made, examples, tuple(built))
        return check

    return enter
