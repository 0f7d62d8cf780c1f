"""Builds the prompt that asks a model for new instructions: a numbered list of examples."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from self_rewarding_lm.data.control_tokens import Filled, fill
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.text import amount

_HEADER = (
    "Below is a numbered list of tasks that people gave to an assistant. Go on with the list: "
    "write further tasks, one under each number. Each is complete in itself and differs from all "
    "the others in what it asks for and in its wording. Write only the tasks: no answers, no "
    "comments."
)


@dataclass(frozen=True, slots=True)
class Example:
    """An instruction that may be shown to the model. id: of the record that it comes from."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class FewShot:
    """A prompt that asks for new instructions.

    text: the prompt; it records which of its characters come from the examples. parents: ids of the
    examples, in the order in which they are shown.
    """

    text: Filled
    parents: tuple[str, ...]

    @property
    def first_number(self) -> int:
        """The number at the end of `text`, under which the model writes its first instruction."""
        return len(self.parents) + 1


def few_shot_prompt(
    seeds: Sequence[Example],
    generated: Sequence[Example],
    *,
    num_seed: int = 6,
    num_generated: int = 2,
    key: int,
) -> FewShot:
    """Build a numbered list of examples in random order that ends with the next number, "9.".

    num_seed, num_generated: how many seeds and generated instructions are shown; the defaults are
    those of arXiv:2401.10020. If there are too few generated examples, seeds take their places. If
    there are too few seeds, all are shown; generated examples never take their places. Runs of
    white space in an example become one space. The text is a prompt for a base model and a user
    message for a chat model.

    Choice and order depend only on `key` and the two sequences. Raises ConfigError if the numbers
    ask for no example or are negative, DataError if there is no example or one has no text.
    """
    if min(num_seed, num_generated) < 0 or num_seed + num_generated < 1:
        raise ConfigError(
            "a few-shot prompt shows at least one example and no negative number of them; got "
            f"num_seed={num_seed} and num_generated={num_generated}."
        )
    # 1. choose the examples
    rng = random.Random(key)
    from_model = _sample(generated, num_generated, rng)
    examples = from_model + _sample(seeds, num_seed + num_generated - len(from_model), rng)
    if not examples:
        raise DataError(
            f"a few-shot prompt needs an example; got {amount(len(seeds), 'seed')} and "
            f"{amount(len(generated), 'generated one')} for num_seed={num_seed}, "
            f"num_generated={num_generated}. Give seeds."
        )
    if empty := [example.id for example in examples if not example.text.strip()]:
        raise DataError(f"an example needs a text; that of {empty[0]!r} is empty. Leave it out.")
    examples = _sample(examples, len(examples), rng)
    # 2. write the list: each part with whether it comes from an example
    parts = [(f"{_HEADER}\n\n", False)]
    for number, example in enumerate(examples, start=1):
        parts += [(f"{number}. ", False), (" ".join(example.text.split()), True), ("\n", False)]
    text = fill([*parts, (f"{len(examples) + 1}.", False)])
    return FewShot(text, tuple(example.id for example in examples))


def _sample(items: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` items, or all if there are fewer, in random order.

    A Fisher-Yates shuffle that stops early. Uses only `rng.random()`, the one method whose numbers
    are the same in all versions of Python.
    """
    moved: dict[int, int] = {}  # place -> place of the item that was moved there
    chosen = []
    for i in range(min(count, len(items))):
        j = i + int(rng.random() * (len(items) - i))
        chosen.append(items[moved.get(j, j)])
        moved[j] = moved.get(i, i)
    return chosen
