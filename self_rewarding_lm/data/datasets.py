"""Datasets: what counts as one, and how a stage opens it.

A dataset is a torch Dataset or `datasets.Dataset` (or anything with `len` and `[i]`), a list, an
iterable, a DataFrame of pandas or polars, a .jsonl, .json (both also .gz), .csv or .parquet file,
`from_hub(...)`, `from_stage(...)`, or a list of those, which stands for them one after the other.
Rows of a .jsonl file and of an earlier stage are read when they are needed. Iterables are read
once, into memory, and may not be endless. Rows are checked as they are read: a DataError names the
dataset or file, the row or line, and what is wrong. What a row may look like is in `rows`.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch.utils.data import Dataset, IterableDataset

from self_rewarding_lm.config import FromStage
from self_rewarding_lm.data.files import (
    SUFFIXES,
    SUFFIXES_IN_WORDS,
    FileRows,
    UnreadableLine,
    check_file,
    place_in,
    read_rows,
)
from self_rewarding_lm.data.forms import is_conversation
from self_rewarding_lm.data.rows import PromptRow, check_prompt, prompt_of
from self_rewarding_lm.data.tables import is_table, table_rows
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError, TokenizerError
from self_rewarding_lm.records import Demonstration, PreferencePair, Prompt, RankedReplies
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


OnBadRow = Literal["raise", "skip"]


PREVIEWED_ROWS = 10_000  # rows of lists and files that are checked before the first stage begins


SHOWN_REASONS = 3  # reasons in a warning of rows that were left out


ROWS = (str, Mapping, tuple, PreferencePair, Demonstration, RankedReplies)
"""A list within a list is a dataset if it begins with one of these."""


def create_mock_dataset(length: int, output: Any) -> Dataset:
    """A dataset of `length` rows: each is `output()` if that is a function, else `output`."""

    class MockDataset(Dataset):
        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> Any:
            if not 0 <= index < length:
                raise IndexError(index)
            return output() if callable(output) else output

    return MockDataset()


@runtime_checkable
class Indexed(Protocol):
    """Rows that are read by their place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Rows:
    """A dataset opened for one stage: each row is read once.

    name: the dataset's, for errors. resolve: returns the records of an earlier stage; None if
    the dataset names no stage. Raises DataError if `dataset` is no dataset.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        resolve: Callable[[FromStage], Sequence] | None = None,
    ) -> None:
        self.name = name
        self._resolve = resolve
        self._parts: list[Indexed] | None = None
        self._blank_lines = False
        self._first: list[Any] = []  # the first row, between `peek` and `read`
        # prompts that a check made, without their ids, which take eight bytes each beside them
        self._prompts: dict[int, tuple[PromptRow, array[int]]] = {}
        self._datasets = dataset if is_concatenation(dataset) else [dataset]
        for part in self._datasets:
            _check_dataset(part, name)

    def __len__(self) -> int:
        return sum(map(len, self._opened()))

    def known_length(self) -> int | None:
        """How many rows there are; None if an earlier stage has still to make them."""
        unmade = any(isinstance(part, FromStage) for part in self._datasets)
        return None if unmade else len(self)

    def read(self, index: int) -> Any:
        """The row at `index`, as it is in the dataset. Raises DataError if a line is no JSON."""
        if index == 0 and self._first:
            return self._first.pop()
        part, place = self._locate(index)
        row = self._opened()[part][place]
        if isinstance(row, UnreadableLine):
            raise DataError(f"{self.where(index)}, is not valid JSON: {row.reason}")
        return row

    def preview(self) -> Iterator[int]:
        """Places of rows that `peek` can look at before the run.

        Of lists, files and `datasets.Dataset`: up to PREVIEWED_ROWS, and every line that is no
        JSON. Of other datasets, whose rows may be read only once: the first. Of an earlier stage's
        records: none. Raises DataError for an empty dataset.
        """
        length = self.known_length()
        if length is None:
            return
        if length == 0:
            raise DataError(f"{self.name} is empty; it needs at least one row.")
        if not self._is_repeatable():
            yield 0
            return
        yield from range(min(length, PREVIEWED_ROWS))
        start = 0
        for part in self._opened():
            for place, row in enumerate(part if isinstance(part, FileRows) else (), start):
                if place >= PREVIEWED_ROWS and isinstance(row, UnreadableLine):
                    yield place
            start += len(part)

    def peek(self, index: int) -> Any:
        """A row that `preview` named; `read` returns the same one afterwards."""
        if self._is_repeatable():
            return self.read(index)
        if not self._first:
            self._first.append(self.read(0))
        return self._first[0]

    def keep_prompt(self, index: int, prompt: PromptRow) -> None:
        """Keep what a row is as a prompt until it is read for the run."""
        self._prompts[index] = replace(prompt, ids=()), array("q", prompt.ids)

    def kept_prompt(self, index: int) -> PromptRow | None:
        """The prompt that was kept of a row, or None."""
        if index not in self._prompts:
            return None
        prompt, ids = self._prompts[index]
        return replace(prompt, ids=tuple(ids))

    def forget_prompt(self, index: int) -> None:
        self._prompts.pop(index, None)

    def forget_prompts(self) -> None:
        """They are rendered in another way now."""
        self._prompts.clear()

    def follow(self, rules: int) -> None:
        """Count rows by the rules of a run's format: by those of 0.1.0 an empty line is one."""
        if (rules == 1) != self._blank_lines:
            self._blank_lines, self._parts = rules == 1, None
            self._prompts.clear()

    def forget_stages(self) -> None:
        """Read the rows of earlier stages anew, since those stages may have run again."""
        if any(isinstance(part, FromStage) for part in self._datasets):
            self._parts = None

    def where(self, index: int) -> str:
        """Names a row in an error: its file and line, or its dataset and number."""
        part, place = self._locate(index)
        dataset = self._datasets[part]
        if isinstance(dataset, str | Path):
            return place_in(dataset, self._opened()[part], place)
        if len(self._datasets) == 1:
            return f"{self.name}, row {place}"
        source = f" (from_stage({dataset.stage!r}))" if isinstance(dataset, FromStage) else ""
        return f"{self.name}, part {part}{source}, row {place}"

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of the part that holds a row, and the row's place in it."""
        place = index
        for number, part in enumerate(self._opened()):
            if 0 <= place < len(part):
                return number, place
            place -= len(part)
        raise IndexError(index)

    def _is_repeatable(self) -> bool:
        """Whether each row is known to be the same whenever it is read."""
        return all(
            isinstance(part, list | FileRows) or _is_plain_hugging_face(part)
            for part in self._opened()
        )

    def _opened(self) -> list[Indexed]:
        if self._parts is None:
            self._parts = [self._open(part) for part in self._datasets]
        return self._parts

    def _open(self, dataset: Any) -> Indexed:
        if isinstance(dataset, FromStage):
            assert self._resolve is not None, f"{self.name} names a stage: {dataset}"
            return self._resolve(dataset)
        if isinstance(dataset, str | Path):
            return read_rows(dataset, self.name, blank_lines=self._blank_lines)
        if is_table(dataset):
            return table_rows(dataset)
        by_place = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        return list(dataset) if isinstance(dataset, IterableDataset) or not by_place else dataset


class BadRows:
    """Rows that cannot be used: the first is an error, or they are left out and counted.

    reasons: of the first few, each once.
    """

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self.on_bad_row: OnBadRow = on_bad_row
        self.count = 0
        self.reasons: list[str] = []

    @contextmanager
    def tolerated(self, where: str) -> Iterator[None]:
        """With "skip", a DataError or TokenizerError within is counted in place of being raised.

        where: names the row.
        """
        try:
            yield
        except (DataError, TokenizerError) as error:
            if self.on_bad_row == "raise":
                raise
            self.count += 1
            reason = str(error) if where in str(error) else f"{where}: {error}"
            if len(self.reasons) < SHOWN_REASONS and reason not in self.reasons:
                self.reasons.append(reason)

    def together(self, parts: "Iterable[BadRows]") -> "BadRows":
        """The sum of what all processes counted."""
        total = BadRows(self.on_bad_row)
        for part in parts:
            total.count += part.count
            total.reasons += [reason for reason in part.reasons if reason not in total.reasons]
        total.reasons = total.reasons[:SHOWN_REASONS]
        return total

    def report(self, name: str, total: int, *, warn: bool = True) -> None:
        """Warn once of the rows left out. total: the number of all rows.

        Raises DataError if none of the rows can be used.
        """
        reasons = "\n".join(f"  {reason}" for reason in self.reasons)
        if 0 < total <= self.count:
            raise DataError(
                f"{name}: none of {amount(total, 'row')} can be used. The first reasons:\n{reasons}"
            )
        if self.count and warn:
            logger.warning(
                "%s: %d of %d rows cannot be used and were left out. The first reasons:\n%s",
                name,
                self.count,
                total,
                reasons,
            )


def read_prompt(
    rows: Rows, index: int, prompt_id: str, tokens: Tokens, limit: int | None
) -> Prompt:
    """The prompt at a row, with the id `prompt_id`.

    What a check made of the row is taken, once. Raises DataError if the row is no prompt, or leaves
    no room for a response in `limit` tokens.
    """
    where, given = rows.where(index), rows.read(index)
    row = rows.kept_prompt(index) or prompt_of(given, where, tokens)
    rows.forget_prompt(index)
    check_prompt(row.ids, where, limit)
    return Prompt(prompt_id, index, row.ids, row.text, row.columns, messages=row.messages)


def _check_dataset(dataset: Any, name: str) -> None:
    """Raise DataError if something cannot be read as a dataset."""
    kinds = (
        "a torch Dataset, a datasets.Dataset, a list, an iterable, a DataFrame, a "
        f"{SUFFIXES_IN_WORDS} file, from_hub(...) or from_stage(...)"
    )
    if isinstance(dataset, str | Path):
        check_file(dataset, name)
    elif isinstance(dataset, Mapping):
        held = ", ".join(map(repr, list(dataset)[:10]))
        problem = (
            f"has the splits {held}; give one of them, for example ...[{next(iter(dataset), '')!r}]"
            if _is_hugging_face(dataset)
            else f"is one row or a table with {held}; give a list of rows"
        )
        raise DataError(f"{name}: a {type(dataset).__name__} {problem}.")
    elif isinstance(dataset, FromStage | Iterable):
        return
    elif not hasattr(dataset, "__getitem__"):
        raise DataError(f"{name} must be {kinds}; got {type(dataset).__name__}.")
    elif not hasattr(dataset, "__len__"):
        raise DataError(
            f"{name}: {type(dataset).__name__} has __getitem__ but neither __len__ nor __iter__, "
            "so where it ends is not known. Give it a __len__."
        )


def is_concatenation(dataset: Any) -> bool:
    """Whether this is a list whose items are datasets, and not rows."""
    return isinstance(dataset, list) and bool(dataset) and all(map(_is_dataset, dataset))


def _is_dataset(item: Any) -> bool:
    """Whether an item of a list is a dataset, and not a row: a text, a dict, a tuple or ids."""
    if isinstance(item, str):
        return item.endswith(SUFFIXES) and not set(item) & set(" \n")
    if isinstance(item, list):
        is_row = is_conversation(item)
        return bool(item) and not is_row and isinstance(item[0], ROWS)
    return isinstance(item, FromStage | Dataset | Path) or _is_hugging_face(item) or is_table(item)


def _is_hugging_face(dataset: Any) -> bool:
    """Whether this comes from the package `datasets`: a dataset, or a dict of its splits."""
    return type(dataset).__module__.partition(".")[0] == "datasets"


def _is_plain_hugging_face(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset` that no function transforms as it is read."""
    form = getattr(dataset, "format", None) if _is_hugging_face(dataset) else None
    return isinstance(form, Mapping) and form.get("type") != "custom"
