"""Files of rows: JSON lines, JSON, CSV and parquet. Knows nothing of what a row may look like.

Rows of a .jsonl file are read from disk when they are asked for. In memory are the unpacked bytes
of a .jsonl.gz file, a .parquet file's columns as Arrow holds them, and the rows of a .json or .csv
file.
"""

import csv
import gzip
import json
import os
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.errors import ConfigError, DataError, said
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.runs.lines import Lazy, LineFile
from self_rewarding_lm.text import amount

if TYPE_CHECKING:
    import pyarrow


SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".parquet")


SUFFIXES_IN_WORDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


LONGEST_FIELD = 2**31 - 1  # characters of a field of a .csv file


ROWS_AT_ONCE = 1024  # of a parquet file that are Python objects


@dataclass(frozen=True)
class UnreadableLine:
    """Stands in place of a line that holds no JSON. reason: what is wrong with it."""

    reason: str


class FileRows(Lazy[Any]):
    """Rows of a file, the same ones each time they are asked for."""


class JsonLines(FileRows):
    """The rows of a .jsonl file, each read from its line; an UnreadableLine if it is no JSON.

    blank_lines: whether an empty line between others is a row that cannot be read, as version 0.1.0
    had it; else it is none. Raises DataError if the file was changed since it was opened.
    """

    def __init__(self, path: Path, name: str, *, blank_lines: bool = False) -> None:
        self.name = name
        file = BytesIO(_unpacked(path, name)) if path.suffix == ".gz" else path.open("rb")
        self._lines = LineFile(file, path)
        self._starts, self._numbers, rows = array("q"), array("q"), 0
        for number, (start, line) in enumerate(self._lines, 1):
            is_blank = line.isspace()
            if blank_lines or not is_blank:
                self._starts.append(start)
                self._numbers.append(number)
            if not is_blank:
                rows = len(self._starts)
        del self._starts[rows:], self._numbers[rows:]
        self._opened_as = self._file_state()

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, place: int) -> int:
        """The number of a row's line, from 1."""
        return self._numbers[place]

    def _at(self, place: int) -> Any:
        if self._file_state() != self._opened_as:
            raise DataError(
                f"{self.name}: {self._lines.path} was changed while it was in use. Its rows are "
                "read when they are needed; begin again with the file as it is now."
            )
        line = self._lines.at(self._starts[place]).rstrip()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets within brackets without end
            return UnreadableLine(str(error))

    def _file_state(self) -> tuple[int, int] | None:
        """Size and time of the last change; None if the file is in memory."""
        if isinstance(self._lines.file, BytesIO):
            return None
        status = os.fstat(self._lines.file.fileno())
        return status.st_size, status.st_mtime_ns


class ParquetRows(FileRows):
    """The rows of a pyarrow table, of which one block at a time is Python objects."""

    def __init__(self, table: "pyarrow.Table") -> None:
        self._table = table
        self._block_start, self._block = 0, []

    def __len__(self) -> int:
        return self._table.num_rows

    def _at(self, place: int) -> Any:
        if not 0 <= place - self._block_start < len(self._block):
            self._block_start = place - place % ROWS_AT_ONCE
            self._block = self._table.slice(self._block_start, ROWS_AT_ONCE).to_pylist()
        return self._block[place - self._block_start]


def suffix_of(path: str | Path) -> str | None:
    """The suffix of SUFFIXES in which a file's name ends; None if it ends in none."""
    return next((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), None)


HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


def place_in(path: str | Path, rows: Any, index: int) -> str:
    """Words for the row at `index` (from 0) of a file: its line, or its row, counted from 1."""
    by_line = (suffix_of(path) or "").startswith(".jsonl")
    number = rows.line(index) if isinstance(rows, JsonLines) else index + 1
    return f"{path}, {'line' if by_line else 'row'} {number}"


def hub_hint(path: str | Path) -> str:
    """How a dataset of the hub is named, if a path looks like one; else ""."""
    if suffix_of(path) is not None or not HUB_NAME.fullmatch(str(path)):
        return ""
    named = said(f"from_hub({str(path)!r})", f"'{{hub: {path}}}'")
    return f" For a dataset on the Hugging Face hub, give {named}."


def check_file(path: str | Path, name: str) -> None:
    """Raise DataError if a path names no file of rows. name: the dataset, for the error."""
    if suffix_of(path) is None:
        raise DataError(
            f"{name}: a file must be {SUFFIXES_IN_WORDS}; got {str(path)!r}.{hub_hint(path)}"
        )
    if not Path(path).is_file():
        raise DataError(f"{name}: there is no file {str(path)!r}.")


def read_rows(path: str | Path, name: str, *, blank_lines: bool = False) -> Sequence[Any]:
    """All rows of a file, in their order; an UnreadableLine for each line that is no JSON.

    Each line of a .jsonl file is a row; empty lines are none (blank_lines: see JsonLines). A .json
    file holds one list. The first line of a .csv file names its columns, and all values are texts.
    Raises DataError if the file as a whole cannot be read, ConfigError if a parquet
    file is read without pyarrow.
    """
    check_file(path, name)
    path, suffix = Path(path), suffix_of(path) or ""
    if suffix == ".parquet":
        return _parquet_rows(path, name)
    if suffix.startswith(".jsonl"):
        return JsonLines(path, name, blank_lines=blank_lines)
    if suffix == ".csv":
        return _csv_rows(path, name)
    try:
        rows = json.loads(_unpacked(path, name) if path.suffix == ".gz" else path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: {path} is not valid JSON: {error}. (A file of one row a line is named "
            ".jsonl.)"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: {path} must hold a list of rows; it holds {type(rows).__name__} "
            f"{str(rows)[:60]!r}."
        )
    return rows


def _csv_rows(path: Path, name: str) -> list[dict[str, str]]:
    rows, most = [], csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            if not head or len(set(head)) < len(head):
                raise DataError(
                    f"{name}: the first line of {path} must name its columns, each once; it is "
                    f"{','.join(head)!r:.100}."
                )
            for fields in filter(None, reader):  # an empty line is no row
                if len(fields) != len(head):
                    raise DataError(
                        f"{name}: {path}, line {reader.line_num}: the row has "
                        f"{amount(len(fields), 'field')}, and the first line names {len(head)}. "
                        'Put a field that has commas or line breaks in quotes ("...").'
                    )
                rows.append(dict(zip(head, fields, strict=True)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: {path} is not valid CSV in UTF-8: {error}.") from error
    finally:
        csv.field_size_limit(most)
    return rows


def _unpacked(path: Path, name: str) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: {path} cannot be unpacked by gzip: {error}") from error


def _parquet_rows(path: Path, name: str) -> ParquetRows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{name}: {path} needs the package pyarrow: {install('data')}, or give the rows as "
            ".jsonl."
        ) from error
    try:
        return ParquetRows(parquet.ParquetFile(path).read())
    except (OSError, ValueError) as error:  # pyarrow's errors are children of these
        raise DataError(f"{name}: {path} is not a parquet file: {error}") from error
