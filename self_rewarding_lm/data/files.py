"""Files of rows: JSON lines, JSON and parquet. Knows nothing of what a row may look like.

Rows of a .jsonl file are read from disk when they are asked for. In memory are the unpacked bytes
of a .jsonl.gz file, a .parquet file's columns as Arrow holds them, and a .json file's rows.
"""

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.runs.lines import Lazy, LineFile

if TYPE_CHECKING:
    import pyarrow


SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


SUFFIXES_IN_WORDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


ROWS_AT_ONCE = 1024  # of a parquet file that are Python objects


@dataclass(frozen=True)
class UnreadableLine:
    """Stands in place of a line that holds no JSON. reason: what is wrong with it."""

    reason: str


class FileRows(Lazy[Any]):
    """Rows of a file, the same ones each time they are asked for."""


class JsonLines(FileRows):
    """The rows of a .jsonl file, each read from its line; an UnreadableLine if it is no JSON.

    Raises DataError if the file was changed since it was opened.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        file = BytesIO(_unpacked(path, name)) if path.suffix == ".gz" else path.open("rb")
        self._lines = LineFile(file, path)
        self._starts, rows = array("q"), 0
        for start, line in self._lines:
            self._starts.append(start)
            if not line.isspace():
                rows = len(self._starts)
        del self._starts[rows:]
        self._opened_as = self._file_state()

    def __len__(self) -> int:
        return len(self._starts)

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


def place_in(path: str | Path, index: int) -> str:
    """Words for the row at `index` (from 0) of a file: its line, or its row, counted from 1."""
    by_line = (suffix_of(path) or "").startswith(".jsonl")
    return f"{path}, {'line' if by_line else 'row'} {index + 1}"


def check_file(path: str | Path, name: str) -> None:
    """Raise DataError if a path names no file of rows. name: the dataset, for the error."""
    if suffix_of(path) is None:
        raise DataError(f"{name}: a file must be {SUFFIXES_IN_WORDS}; got {str(path)!r}.")
    if not Path(path).is_file():
        raise DataError(f"{name}: there is no file {str(path)!r}.")


def read_rows(path: str | Path, name: str) -> Sequence[Any]:
    """All rows of a file, in their order; an UnreadableLine for each line that is no JSON.

    Each line of a .jsonl file is a row, so that no line in the middle may be empty. A .json file
    holds one list. Raises DataError if the file as a whole cannot be read, ConfigError if a parquet
    file is read without pyarrow.
    """
    check_file(path, name)
    path, suffix = Path(path), suffix_of(path) or ""
    if suffix == ".parquet":
        return _parquet_rows(path, name)
    if suffix.startswith(".jsonl"):
        return JsonLines(path, name)
    try:
        rows = json.loads(_unpacked(path, name) if path.suffix == ".gz" else path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: {path} is no JSON: {error}. (A file of one row a line is named .jsonl.)"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: {path} must hold a list of rows; it holds {type(rows).__name__} "
            f"{str(rows)[:60]!r}."
        )
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
        raise DataError(f"{name}: {path} is no parquet file: {error}") from error
