"""The run directory: the only opener of its files.

    run.json                                what was run, with which seed and versions
    <nn>-<name>/config.json                 the stage's settings; its presence: the stage began
    <nn>-<name>/<records>.jsonl             prompts, candidates, judgements, pairs, reference, rows,
                                            ranked, demonstrations, instructions
    <nn>-<name>/metrics.jsonl
    <nn>-<name>/model/                      the weights, see weights.py
    <nn>-<name>/done.json                   written last, by rename; its presence: the stage is done

While an arrow runs each process appends to its own <records>.<rank>.jsonl; at its end they become
one file, ordered by id. A torn last line (of a process that was killed) is cut off; any other line
that cannot be read is an error. Records are read one by one when they are asked for, see stored.py.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import (
    Candidate,
    Demonstration,
    Instruction,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReplies,
    Record,
    ReferenceLogprobs,
    TrainingRow,
    to_json,
)
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.stored import Stored, merge_files, merged_file
from self_rewarding_lm.weights import Savable, remove_weights, save_folder, weights_file

RECORD_TYPES = (
    Prompt,
    Candidate,
    Judgement,
    PreferencePair,
    ReferenceLogprobs,
    TrainingRow,
    Demonstration,
    RankedReplies,
    Instruction,
)
WEIGHTS_FOLDERS = ("model", "best", "iteration-[0-9]*", "checkpoint-[0-9]*")
STAGE_FILES = ("config.json", "done.json", "metrics.jsonl")
BLOCK = 1 << 16  # bytes that are looked through at once for the end of the last whole line
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class StageFiles:
    """One stage's folder, to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_done(self) -> bool:
        return (self.path / "done.json").exists()

    def stored(
        self, record_type: type[Record], wanted: Callable[[str], bool] | None = None
    ) -> Stored[Record]:
        """The records of a type that are on disk, each id once, read when they are asked for.

        wanted: whether an id belongs to them, default all.
        """
        return Stored(record_type, self.path, wanted)

    def read(self, record_type: type[Record]) -> list[Record]:
        """All of them, in memory."""
        return list(self.stored(record_type))

    def weights(self, name: str = "model") -> Path | None:
        """The weights of that name, if they were written."""
        return weights_file(self.path / name)


class StageDir(StageFiles):
    """One stage's folder, as the stage writes it.

    runtime tells which process this is. beside: writes what belongs into a folder of weights
    beside them, such as a tokenizer.
    """

    def __init__(
        self, path: Path, runtime: Runtime, beside: Callable[[Path], None] | None = None
    ) -> None:
        super().__init__(path)
        self.runtime = runtime
        self.beside = beside
        self.summary: dict[str, Any] = {}
        """What done.json will hold; stages add to it."""
        self._given: list[weakref.ref[Stored[Any]]] = []

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder and write config.json, unless it began before."""
        if self.runtime.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "config.json").exists():
                write_json(self.path / "config.json", settings)
            metrics = self.path / "metrics.jsonl"
            if metrics.exists():  # of an attempt that was stopped: its curve is kept apart
                earlier = len(list(self.path.glob("metrics.attempt-*.jsonl")))
                metrics.replace(self.path / f"metrics.attempt-{earlier + 1}.jsonl")
        self.runtime.barrier()

    def append(self, records: Iterable[Any]) -> None:
        """Append records of one type to this process's file as they come.

        Where making one of them raises, none of them stays there.
        """
        coming = iter(records)
        first = next(coming, None)
        if first is not None:
            lines = map(to_json, chain([first], coming))
            _append_lines(self.path / f"{first.kind}.{self.runtime.rank}.jsonl", lines)

    def stored(
        self, record_type: type[Record], wanted: Callable[[str], bool] | None = None
    ) -> Stored[Record]:
        """As of any folder; once records of the type were merged it holds the merged ones."""
        found = super().stored(record_type, wanted)
        self._given = [ref for ref in self._given if ref() is not None]
        self._given.append(weakref.ref(found))
        return found

    def merge(self, record_type: type[Any]) -> None:
        """Make one file, ordered by id, of what all processes appended."""
        for ref in self._given:
            given = ref()
            if given is not None and given.record_type is record_type:
                given.close()
        self.runtime.barrier()
        if self.runtime.is_main:
            merge_files(self.path, record_type.kind)
        self.runtime.barrier()

    def known(
        self, record_type: type[Record], wanted: Callable[[str], bool] | None = None
    ) -> Stored[Record]:
        """As `stored`, before an arrow begins: no process appends until all have looked."""
        records = self.stored(record_type, wanted)
        self.runtime.barrier()
        return records

    def merged_ids(self, record_type: type[Any]) -> Iterator[str]:
        """Ids of a type that were merged; none of what processes appended since."""
        return (values["id"] for values in read_lines(merged_file(self.path, record_type.kind)))

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl (main process)."""
        if self.runtime.is_main:
            _append_lines(self.path / "metrics.jsonl", [metrics])

    def save_weights(self, model: Savable, name: str = "model") -> None:
        """Write a model's weights (main process); all processes wait."""
        if self.runtime.is_main:
            save_folder(model, self.path / name, self.beside)
        self.runtime.barrier()

    def drop_weights(self, name: str) -> None:
        """Delete weights that were only needed within the stage."""
        self.runtime.barrier()
        if self.runtime.is_main:
            remove_weights(self.path / name)

    def finish(self) -> None:
        """Write done.json: the stage is complete."""
        self.runtime.barrier()
        if self.runtime.is_main:
            write_json(self.path / "done.json", self.summary)
        self.runtime.barrier()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file by rename, so that it is there in full or not at all."""
    draft = path.with_suffix(".json.tmp")
    with draft.open("w", encoding="utf-8", errors="replace") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def read_lines(path: Path) -> Iterator[Any]:
    """The lines of a JSONL file; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise StoreError(
                    f"{path}, line {number}, is no JSON: {error}. The file was changed or damaged; "
                    "delete it to have its records made again."
                ) from error


def remove_stage(path: Path) -> None:
    """Delete what the library wrote into a stage's folder; other files stay."""
    names = [*STAGE_FILES, *(f"{t.kind}.jsonl" for t in RECORD_TYPES)]
    names += [f"{name}.tmp" for name in names]
    files = [path / name for name in names]
    files += path.glob("metrics.attempt-[0-9]*.jsonl")
    files += [f for t in RECORD_TYPES for f in path.glob(f"{t.kind}.[0-9]*.jsonl")]
    for file in files:
        file.unlink(missing_ok=True)
    for pattern in WEIGHTS_FOLDERS:
        for folder in path.glob(pattern):
            remove_weights(folder)
    _remove_if_empty(path)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _append_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("ab+") as file:
        end, start = file.seek(0, os.SEEK_END), _end_of_last_line(file)
        if start < end:  # a torn line: the next one must not be glued onto it
            file.truncate(start)
        try:
            file.writelines(_line(one).encode("utf-8", "replace") for one in values)
        except BaseException:
            file.truncate(start)
            raise


def _end_of_last_line(file: BufferedIOBase) -> int:
    """Where the last line that is there in full ends."""
    end, size = file.seek(0, os.SEEK_END), 1
    while end > 0:
        start = max(0, end - size)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end, size = start, BLOCK
    return 0


def _line(values: dict[str, Any]) -> str:
    return _ENCODER.encode(values) + "\n"
