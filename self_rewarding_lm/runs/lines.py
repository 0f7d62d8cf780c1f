"""Sequences whose items are made when they are asked for, and files of lines.

Lines that processes append while an arrow runs are sealed: each ends with a digest of itself and of
the lines before it, `"seal": "0123456789abcdef"}`, until they are merged. Knows nothing of what a
line holds, nor of records.
"""

import hashlib
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from io import BufferedIOBase
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar, overload

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.runs.atomic import system_errors
from self_rewarding_lm.text import html_table

T = TypeVar("T")


BLOCK = 1 << 16  # bytes that are looked through at once for the end of the last whole line


SEAL, SEAL_END, SEAL_BYTES = b', "seal": "', b'"}\n', 8


SEAL_SIZE = len(SEAL) + 2 * SEAL_BYTES + len(SEAL_END)
"""Bytes of a line that are its seal, its end included."""


_ENCODER = json.JSONEncoder(ensure_ascii=False)


SHOWN_ITEMS = 5  # in a notebook


class Lazy(Sequence[T]):
    """A sequence that makes each item when it is asked for it, each time anew.

    It equals a list, or another Lazy, with equal items. A slice is a list.
    """

    def _at(self, place: int) -> T:
        """The item at a place, from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return [self._at(i) for i in places] if isinstance(places, range) else self._at(places)

    def __iter__(self) -> Iterator[T]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Lazy):
            return NotImplemented
        return len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)}>"

    def _repr_html_(self) -> str:
        """The first items as a table, without token ids and what none of them has."""
        first = [_columns(item) for item in self[:SHOWN_ITEMS]]
        names = [n for n in dict.fromkeys(chain(*first)) if any(row.get(n) for row in first)]
        rows = [[row.get(name) for name in names] for row in first]
        return html_table(names, rows, f"{len(rows)} of {len(self):,}")


def _columns(item: Any) -> dict[str, Any]:
    """A record or a row by its columns; anything else as one."""
    if is_dataclass(item):
        item = {it.name: getattr(item, it.name) for it in fields(item)}
    columns = item if isinstance(item, dict) else {"": item}
    return {str(name): v for name, v in columns.items() if not str(name).endswith("ids")}


def _same(one: Any, other: Any) -> bool:
    return bool(one == other)


class Picked(Lazy[T]):
    """The items of a sequence at some places, in the order of the places, each changed.

    places: default all. change: a function of an item; default none.
    """

    def __init__(
        self,
        items: Sequence[Any],
        places: Sequence[int] | None = None,
        change: Callable[[Any], T] | None = None,
    ) -> None:
        self._items, self._change = items, change
        self._places = range(len(items)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, place: int) -> T:
        item = self._items[self._places[place]]
        return item if self._change is None else self._change(item)


class Joined(Lazy[T]):
    """Sequences one after the other, as one."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self._parts = parts
        self._starts = list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, place: int) -> T:
        part = bisect_right(self._starts, place) - 1
        return self._parts[part][place - self._starts[part]]


class LineFile:
    """The lines of a file by the byte at which they begin.

    The file stays open as long as this object is there, so that its lines can be read again even if
    another file has taken its name.
    """

    def __init__(self, file: BufferedIOBase, path: Path) -> None:
        self.file, self.path = file, path
        self.close = weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path) -> "LineFile":
        return cls(path.open("rb"), path)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Where each line begins, and the line; no other line may be read meanwhile."""
        self.file.seek(0)
        place = 0
        for line in self.file:
            yield place, line
            place += len(line)

    def at(self, place: int) -> bytes:
        """The line that begins at a byte."""
        self.file.seek(place)
        return self.file.readline()

    def number(self, place: int) -> int:
        """The number, from 1 on, of the line that begins at a byte."""
        return 1 + sum(start < place for start, _ in self)


class SealedFile(LineFile):
    """A file of sealed lines, given without their seals.

    Iterating raises StoreError at a line that is not what was written there. needed: whether lines
    without a seal, as version 0.1.0 wrote them, are refused too; after a sealed one they always
    are.
    """

    def __init__(self, file: BufferedIOBase, path: Path, *, needed: bool = True) -> None:
        super().__init__(file, path)
        self._needed = needed

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        last = b""
        for number, (place, line) in enumerate(super().__iter__(), 1):
            plain, seal = _unsealed(line)
            if line.endswith(b"\n"):  # else it is torn
                is_right = seal == _seal(plain, last) if seal or last else not self._needed
                if not is_right:
                    raise StoreError(
                        f"{self.path} is not the file that was written: line {number}, or one "
                        "before it, was changed or deleted afterwards. Put the right file back; or "
                        "delete it to have its records made again."
                    )
                last = seal
            yield place, plain

    def at(self, place: int) -> bytes:
        return _unsealed(super().at(place))[0]


def _seal(plain: bytes, before: bytes) -> bytes:
    """The seal of a line that ends with `}`. before: the seal of the line before; b"" for none."""
    return hashlib.blake2b(before + plain, digest_size=SEAL_BYTES).hexdigest().encode()


def _unsealed(line: bytes) -> tuple[bytes, bytes]:
    """A line without its seal, and the seal; b"" if it has none."""
    start = len(line) - SEAL_SIZE
    if start < 0 or not line.endswith(SEAL_END) or not line.startswith(SEAL, start):
        return line, b""
    return line[:start] + b"}\n", line[start + len(SEAL) : -len(SEAL_END)]


def json_of(line: bytes, path: Path, number: Callable[[], int]) -> dict[str, Any]:
    """A line as a JSON object; StoreError with its number, from 1 on, if it is none."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"it is a {type(values).__name__}")
        return values
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}, line {number()}, is not a JSON object: {error}. The file was changed "
            "or damaged; delete it to have its records made again."
        ) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield json_of(line, path, lambda n=number: n)


def append_lines(path: Path, values: Iterable[dict[str, Any]], *, sealed: bool = False) -> None:
    """Append JSON lines as they come; if making one raises, none of them stays in the file."""
    lines = (_line(line).encode("utf-8", "replace") for line in values)
    with system_errors(path), path.open("ab+") as file:
        end, start = file.seek(0, os.SEEK_END), _end_of_last_line(file)
        if start < end:  # a torn line: the next one must not be glued onto it
            file.truncate(start)
        try:
            file.writelines(_sealed(lines, _seal_at(file, start)) if sealed else lines)
            file.flush()
        except BaseException:
            file.truncate(start)
            raise


def _seal_at(file: BufferedIOBase, end: int) -> bytes:
    """The seal of the line that ends at a byte; b"" if it has none."""
    start = max(0, end - SEAL_SIZE)
    file.seek(start)
    return _unsealed(file.read(end - start))[1]


def _sealed(lines: Iterable[bytes], last: bytes) -> Iterator[bytes]:
    """The lines, sealed. last: the seal of the line before the first."""
    for line in lines:
        last = _seal(line, last)
        yield line.removesuffix(b"}\n") + SEAL + last + SEAL_END


def _end_of_last_line(file: BufferedIOBase) -> int:
    """The byte after the last whole line."""
    end, size = file.seek(0, os.SEEK_END), 1
    while end > 0:
        start = max(0, end - size)
        file.seek(start)
        last = file.read(end - start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        end, size = start, BLOCK
    return 0


def _line(values: dict[str, Any]) -> str:
    return _ENCODER.encode(values) + "\n"


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of `size` as they come.

    The last list may be shorter or empty; before an error comes the list of the items until then.
    """
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except GeneratorExit:
        raise
    except BaseException:
        yield batch
        raise
    yield batch
