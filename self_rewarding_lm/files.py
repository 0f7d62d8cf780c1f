"""Files of rows: JSON lines, JSON and parquet. Knows nothing of what a row may look like."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
WRITTEN = (".jsonl", ".parquet")
SUFFIXES_IN_WORDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


@dataclass(frozen=True)
class UnreadableLine:
    """Stands in the place of a line that holds no JSON. reason: what is wrong with it."""

    reason: str


def suffix_of(path: str | Path) -> str | None:
    """The suffix of SUFFIXES that a file's name ends in; None where it ends in none."""
    return next((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), None)


def place_in(path: str | Path, index: int) -> str:
    """Words for the row at `index` (from 0) of a file: its line, or its row, counted from 1."""
    by_line = (suffix_of(path) or "").startswith(".jsonl")
    return f"{path}, {'line' if by_line else 'row'} {index + 1}"


def check_file(path: str | Path, name: str) -> None:
    """Raise DataError where a file cannot hold rows. name: the dataset, for the error."""
    if suffix_of(path) is None:
        raise DataError(f"{name}: a file must be {SUFFIXES_IN_WORDS}; got {str(path)!r}.")
    if not Path(path).is_file():
        raise DataError(f"{name}: there is no file {str(path)!r}.")


def read_rows(path: str | Path, name: str) -> list[Any]:
    """All rows of a file, in their order; an UnreadableLine for each line that is no JSON.

    A line of a .jsonl file is a row, so no line in the middle may be empty. A .json file holds one
    list. Raises DataError where the file as a whole cannot be read, ConfigError where a parquet
    file is read without pyarrow.
    """
    check_file(path, name)
    path, suffix = Path(path), suffix_of(path) or ""
    if suffix == ".parquet":
        return _parquet_rows(path, name)
    data = _content(path, name)
    if suffix.startswith(".jsonl"):
        text = data.rstrip()
        return [_line(line) for line in text.split(b"\n")] if text else []
    try:
        rows = json.loads(data)
    except ValueError as error:
        raise DataError(
            f"{name}: {path} is no JSON: {error}. (A file of one row a line is named .jsonl.)"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: {path} must hold a list of rows; it holds {type(rows).__name__} "
            f"{str(rows)[:60]!r}."
        )
    return rows


def _content(path: Path, name: str) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: {path} cannot be unpacked by gzip: {error}") from error


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return UnreadableLine(str(error))


def _parquet_rows(path: Path, name: str) -> list[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{name}: {path} needs the package pyarrow: "
            'pip install "self-rewarding-lm[data]", or give the rows as .jsonl.'
        ) from error
    try:
        return parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are children of these
        raise DataError(f"{name}: {path} is no parquet file: {error}") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a .jsonl or .parquet file, by rename.

    Raises ConfigError for other files, and for parquet without pyarrow.
    """
    if path.suffix not in WRITTEN:
        raise ConfigError(f"the file must end in {' or '.join(WRITTEN)}; got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    if path.suffix == ".parquet":
        try:
            from pyarrow import Table, parquet
        except ImportError as error:
            raise ConfigError(
                f"{path} needs the package pyarrow: "
                'pip install "self-rewarding-lm[data]", or write .jsonl.'
            ) from error
        parquet.write_table(Table.from_pylist(list(rows)), draft)
    else:
        with draft.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft.replace(path)
