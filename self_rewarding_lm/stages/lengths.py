"""Rows of a stage's datasets: how many there are, and how long they are as the model reads them.

Files and lists are counted; their lengths are those of a sample. Nothing is known of what an
earlier stage will make but what its settings say, and nothing of iterables, which are not touched.
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
"""Rows of a dataset that are turned into tokens, evenly over it."""


Parts = tuple[int, tuple[int, ...]]
"""Tokens of a row's prompt, and of each of its answers."""


Measure = Callable[[Any, str, Tokens], Parts]


@dataclass(frozen=True)
class Lengths:
    """Tokens, of the rows that were looked at. answers: how many a row has, on average."""

    prompt: float
    answer: float
    longest_prompt: int
    longest_answer: int
    longest: int
    answers: float


@dataclass(frozen=True)
class Counted:
    """A dataset's rows; lengths None where no row could be read as tokens."""

    rows: Range = UNKNOWN
    lengths: Lengths | None = None


def training_row_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Of a row that is learnt."""
    ids, targets = training_row(row, where, tokens)
    learnt = sum(targets)
    return len(ids) - learnt, (learnt,)


def pair_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Of a pair of responses."""
    found = preference_row(row, where, tokens)
    return len(found.prompt_ids), (len(found.chosen_ids), len(found.rejected_ids))


def prompt_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Of a prompt to be answered."""
    return len(prompt_of(row, where, tokens).ids), ()


def ranked_lengths(row: Any, where: str, tokens: Tokens) -> Parts:
    """Of replies that were ranked."""
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
    """A dataset's rows. made: what earlier stages make, by their names; tokens: None where there
    is no tokenizer."""
    parts = dataset if is_concatenation(dataset) else [dataset]
    rows, found = [], []
    for part in parts:
        if isinstance(part, FromStage):
            rows.append(made.get(part.stage, UNKNOWN))
        elif _has_length(part):
            opened = Rows(part, name)
            rows.append(Range.of(len(opened)))
            if measure is not None and tokens is not None:
                found += _sampled(opened, measure, tokens)
        else:
            rows.append(UNKNOWN)
    return Counted(total(rows), _lengths(found) if found else None)


def _has_length(part: Any) -> bool:
    by_place = hasattr(part, "__len__") and hasattr(part, "__getitem__")
    return isinstance(part, str | Path) or (by_place and not isinstance(part, IterableDataset))


def _sampled(rows: Rows, measure: Measure, tokens: Tokens) -> list[Parts]:
    found = []
    for place in range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)):
        try:
            found.append(measure(rows.read(place), rows.where(place), tokens))
        except (DataError, TokenizerError):  # the run says it, or leaves the row out
            continue
    return found


def _lengths(found: Sequence[Parts]) -> Lengths:
    answers = [length for _, lengths in found for length in lengths]
    return Lengths(
        prompt=sum(length for length, _ in found) / len(found),
        answer=sum(answers) / len(answers) if answers else 0.0,
        longest_prompt=max(length for length, _ in found),
        longest_answer=max(answers, default=0),
        longest=max(length + sum(lengths) for length, lengths in found),
        answers=len(answers) / len(found),
    )
