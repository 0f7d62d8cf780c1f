"""The prompt that asks a model for new instructions. Knows nothing of models and tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from self_rewarding_lm.data.control_tokens import Filled, fill
from self_rewarding_lm.errors import ConfigError, DataError

_HEADER = (
    "Below is a numbered list of tasks that people gave to an assistant. Go on with the list: "
    "write further tasks, one under each number. Each is complete in itself and differs from all "
    "the others in what it asks for and in its wording. Write only the tasks: no answers, no "
    "comments."
)


@dataclass(frozen=True, slots=True)
class Example:
    """An instruction that may be shown, with the id of the record it comes from."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class FewShot:
    """A prompt that asks for new instructions; parents: ids of the examples, as they are shown.

    text: knows which of its characters are the examples'.
    """

    text: Filled
    parents: tuple[str, ...]

    @property
    def first_number(self) -> int:
        """The number that `text` ends with: that of the instruction to be written next."""
        return len(self.parents) + 1


def few_shot_prompt(
    seeds: Sequence[Example],
    generated: Sequence[Example],
    *,
    num_seed: int = 6,
    num_generated: int = 2,
    key: int,
) -> FewShot:
    """A numbered list of examples in shuffled order that ends with the next number, "9.".

    The defaults are arXiv:2401.10020's: 6 seeds and 2 instructions that a model wrote. Seeds fill
    the places of generated examples that are not there yet; with fewer seeds than places, all of
    them are shown. Generated examples take no seed's place. White space in an example is folded.
    The text serves a base model as it is and a chat model as a user message.

    Choice and order depend on `key` and the two sequences alone. Raises ConfigError where no
    example is asked for or a number is negative, DataError where there is none to show or its text
    is empty.
    """
    if min(num_seed, num_generated) < 0 or num_seed + num_generated < 1:
        raise ConfigError(
            "a few-shot prompt shows at least one example and no negative number of them; got "
            f"num_seed={num_seed} and num_generated={num_generated}."
        )
    draw = random.Random(key)
    own = _sample(generated, num_generated, draw)
    shown = own + _sample(seeds, num_seed + num_generated - len(own), draw)
    if not shown:
        raise DataError(
            f"a few-shot prompt needs an example; got {len(seeds)} seeds and {len(generated)} "
            f"generated ones for num_seed={num_seed}, num_generated={num_generated}. Give seeds."
        )
    if empty := [example.id for example in shown if not example.text.strip()]:
        raise DataError(f"an example needs a text; that of {empty[0]!r} is empty. Leave it out.")
    shown = _sample(shown, len(shown), draw)
    parts = [(f"{_HEADER}\n\n", False)]
    for number, example in enumerate(shown, start=1):
        parts += [(f"{number}. ", False), (" ".join(example.text.split()), True), ("\n", False)]
    text = fill([*parts, (f"{len(shown) + 1}.", False)])
    return FewShot(text, tuple(example.id for example in shown))


def _sample(items: Sequence[Example], count: int, draw: random.Random) -> list[Example]:
    """`count` of the items, or all, in random order: a Fisher-Yates shuffle that stops early.

    Random promises the same numbers in all versions of Python for random() alone.
    """
    moved: dict[int, int] = {}  # place -> the item that was put there
    chosen = []
    for i in range(min(count, len(items))):
        j = i + int(draw.random() * (len(items) - i))
        chosen.append(items[moved.get(j, j)])
        moved[j] = moved.get(i, i)
    return chosen
