"""What holds for any input, each shown to fail on mutants of the code.

The quick tier runs the same few examples each time, the slow tier many others each time.
"""

from collections import Counter

import pytest
from hypothesis import settings

from tests.support import (  # noqa: F401
    properties_files,
    properties_numbers,
    properties_rows,
    properties_runs,
    properties_servers,
    properties_texts,
)
from tests.support.mutants import HUNT, PROPERTIES, QUICK, SLOW, Mutant, Property

# no strategy here uses `random`; what else in the process does is not theirs
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
LEAST_EXAMPLES = 20_000
MUTANTS = [(p, mutant) for p in PROPERTIES.values() for mutant in p.mutants]
ran: Counter[str] = Counter()
killed: list[Mutant] = []
every = pytest.mark.parametrize("one", PROPERTIES.values(), ids=list(PROPERTIES))


@every
def test_it_holds(one: Property):
    few = min(QUICK.max_examples, one.examples // 20)
    one.run(one.original(), settings(QUICK, max_examples=few))


@pytest.mark.parametrize(
    ("one", "mutant"), MUTANTS, ids=[f"{p.name}-{m.old[:40]}" for p, m in MUTANTS]
)
def test_the_text_that_a_mutant_replaces_is_there(one: Property, mutant: Mutant):
    assert mutant.build()


@pytest.mark.slow
@every
def test_it_holds_for_many(one: Property):
    ran[one.name] = one.run(one.original(), settings(SLOW, max_examples=one.examples))
    print(f"{one.name}: {ran[one.name]} examples")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "mutant"), MUTANTS, ids=[f"{p.name}-{m.old[:40]}" for p, m in MUTANTS]
)
def test_it_fails_on_a_mutant(one: Property, mutant: Mutant):
    """By a wrong result or by an error that is none of the library's."""
    code = mutant.build()
    try:
        one.run(code, HUNT, hunted=True)
    except Exception as error:
        print(f"{one.name}: {mutant.old!r} -> {mutant.new!r}: {type(error).__name__}")
        killed.append(mutant)
        return
    pytest.fail(f"{one.name} holds though {mutant.old!r} is {mutant.new!r}")


@pytest.mark.slow
def test_the_examples_and_mutants_are_enough():
    """Of the properties that ran before this in the same process."""
    if set(ran) != set(PROPERTIES):
        pytest.skip("not all properties were run")
    print(
        f"{len(ran)} properties, {ran.total()} examples, {len(killed)} of {len(MUTANTS)} mutants killed"
    )
    assert ran.total() >= LEAST_EXAMPLES
    assert len(killed) == len(MUTANTS)
