"""A stage's records on disk: read one by one when they are asked for, and merged into one file.

What is kept of a record in memory is the place of its line, eight bytes, and if records are looked
up by a key its hash and its rank, sixteen more; never the record. Knows nothing of stages.
"""

import hashlib
import heapq
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Generic

import numpy as np

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import Record, from_json
from self_rewarding_lm.runs.atomic import changed, ledger, writing
from self_rewarding_lm.runs.lines import Lazy, LineFile, Picked, SealedFile, json_of

RUN = 1 << 16  # lines that are sorted at once


KEPT = 256  # records read last that are not parsed again: a batch is looked at several times


TRIES = 10  # to open all files of a kind


FILE_BITS = 16  # of a place: which of the files


ID_START = b'{"id": "'  # of the lines that the library writes


SETTINGS = "config.json"  # of a stage's folder


IdOrder = tuple[tuple[int, int, str], ...]


def id_order(record_id: str) -> IdOrder:
    """Sorts ids part by part, numbers as numbers."""
    parts = record_id.split("/")
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


class Stored(Lazy[Record]):
    """The records of one type in a folder, each id once, in the order of their files.

    It holds what was on disk when it was made. After `close` the next access opens the files anew:
    files that were merged hold the same records, ordered by id. wanted: whether an id belongs to
    it, default all. Raises StoreError for a line without an id, and for a record that is asked for
    and whose line is no record.
    """

    def __init__(
        self,
        record_type: type[Record],
        folder: Path,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        self.record_type, self.folder, self.wanted = record_type, folder, wanted
        self._files: list[LineFile] = []
        self._places: Sequence[int] | None = None
        self.times_opened = 0
        itself = weakref.proxy(self)  # so that the files are closed as soon as nobody holds this
        self._recent = lru_cache(KEPT)(lambda place: itself._parsed(place))
        self._opened()

    def __len__(self) -> int:
        return len(self._opened())

    def __iter__(self) -> Iterator[Record]:
        return map(self._parsed, range(len(self)))

    def _at(self, place: int) -> Record:
        return self._recent(place)

    def ids(self) -> Iterator[str]:
        """The ids alone, which takes less than parsing the records."""
        return map(self.id_at, range(len(self)))

    def id_at(self, place: int) -> str:
        file, start = self._line_of(place)
        return _id_of(file.at(start), file, start)

    def close(self) -> None:
        """Close the files, which are to be merged."""
        for file in self._files:
            file.close()
        self._files, self._places = [], None
        self._recent.cache_clear()

    def _opened(self) -> Sequence[int]:
        """The records' places, each the start of a line and the number of its file in one."""
        if self._places is None:
            self.times_opened += 1
            kind = self.record_type.kind  # type: ignore[attr-defined]
            merged, vouched = merged_file(self.folder, kind), ledger(self.folder)
            self._files = _open_all(self.folder, kind)
            places, hashes = array("q"), array("q")
            for number, file in enumerate(self._files):
                for start, line in _as_written(file, vouched.get(file.path.name)):
                    record_id = _id_of(line, file, start)
                    if self.wanted is None or self.wanted(record_id):
                        places.append(start << FILE_BITS | number)
                        hashes.append(hash(record_id))
            self._places = places
            if [file.path for file in self._files] != [merged]:  # alone it holds each id once
                self._places = self._each_once(places, np.frombuffer(hashes, np.int64))
        return self._places

    def _each_once(self, places: array, hashes: np.ndarray) -> array:
        """The places of the first record of each id. hashes: of the ids."""
        order = np.argsort(hashes, kind="stable")
        alike = hashes[order[1:]] == hashes[order[:-1]]
        again, seen = set(), set()
        for k in np.flatnonzero(alike).tolist():
            if k == 0 or not alike[k - 1]:
                seen = {self.id_at(int(order[k]))}
            place = int(order[k + 1])
            record_id = self.id_at(place)
            if record_id in seen:
                again.add(place)
            seen.add(record_id)
        return array("q", (p for i, p in enumerate(places) if i not in again)) if again else places

    def _line_of(self, place: int) -> tuple[LineFile, int]:
        packed = self._opened()[place]
        return self._files[packed & ((1 << FILE_BITS) - 1)], packed >> FILE_BITS

    def _parsed(self, place: int) -> Record:
        file, start = self._line_of(place)
        values = json_of(file.at(start), file.path, lambda: file.number(start))
        try:
            return from_json(self.record_type, values)
        except (AttributeError, TypeError, ValueError) as error:
            name = self.record_type.__name__
            raise StoreError(f"{file.path} holds no {name} record: {error}") from error


class Groups(Generic[Record]):
    """Stored records by a key. A group is read when it is asked for.

    key: of a record; default its id. Records that were merged meanwhile are looked up anew.
    """

    def __init__(self, records: Stored[Record], key: Callable[[Record], str] | None = None) -> None:
        self.records, self._key = records, key
        self._times_opened = 0
        self._refresh()

    def _refresh(self) -> None:
        """Sort the keys' hashes, unless those of the files as they are now are sorted already."""
        count = len(self.records)
        if self._times_opened != self.records.times_opened:
            keys = self.records.ids() if self._key is None else map(self._key, self.records)
            hashes = np.fromiter(map(hash, keys), np.int64, count)
            self._order = np.argsort(hashes, kind="stable")
            self._hashes = hashes[self._order]
            self._times_opened = self.records.times_opened

    def __contains__(self, key: str) -> bool:
        return bool(self.places(key))

    def __getitem__(self, key: str) -> list[Record]:
        """The records of a key, in the order in which they are stored; [] for an unknown one."""
        return [self.records[place] for place in self.places(key)]

    def places(self, key: str) -> list[int]:
        """The places of a key's records in `records`."""
        self._refresh()
        if not len(self._hashes):
            return []
        sought = hash(key)
        first = int(self._hashes.searchsorted(sought))
        last = first
        while last < len(self._hashes) and self._hashes[last] == sought:
            last += 1
        return [p for p in self._order[first:last].tolist() if self._key_at(p) == key]

    def in_order(self, ids: Iterable[str]) -> Sequence[Record]:
        """The records of some ids, if the key is the id; KeyError for one that is not there.

        They stay those of the ids when others are merged with them.
        """
        names = list(ids)
        for name in names:
            if name not in self:
                raise KeyError(name)
        return Picked(range(len(names)), change=lambda place: self[names[place]][0])

    def _key_at(self, place: int) -> str:
        return self.records.id_at(place) if self._key is None else self._key(self.records[place])


def merged_file(folder: Path, kind: str) -> Path:
    """The file that holds the records of a kind once an arrow is through."""
    return folder / f"{kind}.jsonl"


def rank_files(folder: Path, kind: str) -> list[Path]:
    """The files that processes append to meanwhile."""
    return sorted(folder.glob(f"{kind}.[0-9]*.jsonl"))


def record_files(folder: Path, kind: str) -> list[Path]:
    """All files with records of a kind; if an id comes twice, its first record counts."""
    parts, merged = rank_files(folder, kind), merged_file(folder, kind)
    return [*([merged] if merged.exists() else []), *parts]


def _open_all(folder: Path, kind: str) -> list[LineFile]:
    """All files with records of a kind, opened together while another process may merge them."""
    for _ in range(TRIES):
        try:
            merged = merged_file(folder, kind)
            return [_open(path, sealed=path != merged) for path in record_files(folder, kind)]
        except FileNotFoundError:  # merged by the run's own process in this very moment
            continue
    raise StoreError(f"the files {kind}*.jsonl in {folder} come and go; they cannot be read.")


def _open(path: Path, *, sealed: bool) -> LineFile:
    """A file with records. sealed: whether its lines are, as in those of single processes.

    Lines without a seal are taken where the stage began with version 0.1.0, whose ledger lists no
    settings.
    """
    if not sealed:
        return LineFile.open(path)
    return SealedFile(path.open("rb"), path, needed=SETTINGS in ledger(path.parent))


def merge_files(folder: Path, kind: str) -> None:
    """Make one file of all, ordered by id, each id once; by rename, then the others are deleted.

    Lines are taken as they are, without their seals. Pieces of RUN lines are sorted and then
    merged, so that memory is eight bytes a line and what the pieces need. Raises StoreError if one
    of the files was changed after it was written.
    """
    target, parts = merged_file(folder, kind), rank_files(folder, kind)
    if target.exists() and not parts:
        return
    files, vouched = _open_all(folder, kind), ledger(folder)
    runs = [
        _lines_of(run, file)
        for file in files
        for run in _sorted_runs(file, vouched.get(file.path.name))
    ]
    with writing(target, listed_in=folder) as draft:
        with draft.open("wb") as out:
            out.writelines(_first_of_each(heapq.merge(*runs, key=itemgetter(0))))
        for file in files:
            file.close()
    for part in parts:
        part.unlink()


def _sorted_runs(file: LineFile, digests: list[str] | None) -> list[array]:
    """Where the lines of a file begin, in as few lists as possible, each ordered by id.

    digests: as for `_as_written`.
    """
    runs: list[array] = []
    last: IdOrder | None = None
    lines = (
        (id_order(_id_of(line, file, start)), start) for start, line in _as_written(file, digests)
    )
    while some := sorted(islice(lines, RUN)):
        if last is None or some[0][0] < last:
            runs.append(array("q"))
        runs[-1].extend([start for _, start in some])
        last = some[-1][0]
    return runs


def _lines_of(run: array, file: LineFile) -> Iterator[tuple[IdOrder, str, bytes]]:
    for start in run:
        line = file.at(start)
        record_id = _id_of(line, file, start)
        yield id_order(record_id), record_id, line


def _first_of_each(lines: Iterable[tuple[IdOrder, str, bytes]]) -> Iterator[bytes]:
    seen: set[str] = set()  # of the ids in one place of the order: a/1 and a/01 are different
    last: IdOrder | None = None
    for order, record_id, line in lines:
        if order != last:
            seen.clear()
            last = order
        if record_id not in seen:
            seen.add(record_id)
            yield line


def _as_written(file: LineFile, digests: list[str] | None) -> Iterator[tuple[int, bytes]]:
    """The lines of a file without a torn last one; StoreError if it was changed.

    digests: those of which its own is one, seen at its end; None if nobody vouches for it.
    """
    digest = hashlib.sha256()
    for start, line in file:
        if digests is not None:
            digest.update(line)
        if line.endswith(b"\n"):
            yield start, line
    if digests is None:
        return
    now = ledger(file.path.parent).get(file.path.name, [])  # it may have been replaced meanwhile
    if digest.hexdigest() not in [*digests, *now]:
        raise changed(file.path)


def _id_of(line: bytes, file: LineFile, start: int) -> str:
    """The id in a line, without parsing a line that the library wrote; StoreError without one."""
    end = line.find(b'"', len(ID_START))
    if line.startswith(ID_START) and end > 0 and b"\\" not in line[:end]:
        return line[len(ID_START) : end].decode("utf-8", "replace")
    values = json_of(line, file.path, lambda: file.number(start))
    record_id = values.get("id")
    if not isinstance(record_id, str):
        raise StoreError(f"{file.path} holds no record with an id in line {file.number(start)}.")
    return record_id
