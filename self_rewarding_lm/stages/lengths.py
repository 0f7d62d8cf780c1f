"""Counts the rows of a stage's datasets and measures how many tokens they have.

The rows of files and lists are counted, and a sample of them is turned into tokens. The rows of an
earlier stage are estimated from its settings. Iterables are not read, so their rows are unknown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from self_rewarding_lm.config import FromStage
from self_rewarding_lm.data.datasets import Rows, is_concatenation
from self_rewarding_lm.data.ranked import ranked_row
from self_rewarding_lm.data.rows import preference_row, prompt_of, training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError, TokenizerError
from self_rewarding_lm.stages.ranges import UNKNOWN, Range, total

SAMPLED_ROWS = 256
"""How many rows of a dataset are turned into tokens, at even distances."""


Parts = tuple[int, tuple[int, ...]]
"""Tokens of a row's prompt, and of each of its answers."""


Measure = Callable[[Any, str, Tokens], Parts]
"""Measures a row; the text names the row in errors."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of the rows that were measured, in tokens.

    prompt, answer: averages. longest_prompt, longest_answer: maxima. longest: of a whole row, its
    prompt with all answers. answers: how many answers a row has, on average.
    """

    prompt: float
    answer: float
    longest_prompt: int
    longest_answer: int
    longest: int
    answers: float


@dataclass(frozen=True)
class Counted:
    """How many rows a dataset has, and their lengths, None if no row could be turned into
    tokens."""

    rows: Range = UNKNOWN
    lengths: Lengths | None = None


def training_row_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Tokens of a training row: of its prompt, and of the answer that is learnt."""
    ids, targets = training_row(row, where, tokens)
    answer = sum(targets)
    return len(ids) - answer, (answer,)


def pair_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Tokens of a preference pair: of its prompt, the chosen and the rejected response."""
    pair = preference_row(row, where, tokens)
    return len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids))


def prompt_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Tokens of a prompt without answers."""
    return len(prompt_of(row, where, tokens).ids), ()


def ranked_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Tokens of ranked replies: of their prompt, and of each reply."""
    item = ranked_row(row, where)
    replies = tuple(len(tokens.encode_part(reply)) for reply in item.replies)
    return len(tokens.prompt(item.prompt, where).ids), replies


def counted(
    dataset: Any,
    name: str,
    made: Mapping[str, Range],
    *,
    measure: Measure | None = None,
    tokens: Tokens | None = None,
) -> Counted:
    """Count the rows of a dataset and measure a sample of them.

    name: of the dataset, for errors. made: how many records each earlier stage makes, by the
    stage's name. measure: None to measure none. tokens: None if there is no tokenizer.
    """
    parts = dataset if is_concatenation(dataset) else [dataset]
    rows, measured = [], []
    for part in parts:
        if isinstance(part, FromStage):
            rows.append(made.get(part.stage, UNKNOWN))
        elif _has_length(part):
            opened = Rows(part, name)
            rows.append(Range.of(len(opened)))
            if measure is not None and tokens is not None:
                measured += _measure_sample(opened, measure, tokens)
        else:
            rows.append(UNKNOWN)
    return Counted(total(rows), _lengths(measured) if measured else None)


def sources(dataset: Any) -> list[str | None]:
    """For each part of a dataset the earlier stage whose records it is, None for other rows."""
    parts = dataset if is_concatenation(dataset) else [dataset]
    return [part.stage if isinstance(part, FromStage) else None for part in parts]


def _has_length(part: Any) -> bool:
    """Whether the rows of a dataset can be counted: those of a file, a list or an indexed set."""
    by_place = hasattr(part, "__len__") and hasattr(part, "__getitem__")
    return isinstance(part, str | Path) or (by_place and not isinstance(part, IterableDataset))


def _measure_sample(rows: Rows, measure: Measure, tokens: Tokens) -> list[Parts]:
    """The lengths of rows at even distances, without those that cannot be read."""
    measured = []
    for place in range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)):
        try:
            measured.append(measure(rows.read(place), rows.where(place), tokens))
        except (DataError, TokenizerError):  # the run raises it or leaves the row out
            continue
    return measured


def _lengths(measured: Sequence[Parts]) -> Lengths:
    """Averages and maxima over rows."""
    answers = [answer for _, row_answers in measured for answer in row_answers]
    return Lengths(
        prompt=sum(prompt for prompt, _ in measured) / len(measured),
        answer=sum(answers) / len(answers) if answers else 0.0,
        longest_prompt=max(prompt for prompt, _ in measured),
        longest_answer=max(answers, default=0),
        longest=max(prompt + sum(row_answers) for prompt, row_answers in measured),
        answers=len(answers) / len(measured),
    )
