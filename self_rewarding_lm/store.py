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
that cannot be read is an error.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    from_json,
    to_json,
)
from self_rewarding_lm.runtime import Runtime
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


class StageFiles:
    """One stage's folder, to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_done(self) -> bool:
        return (self.path / "done.json").exists()

    def read(self, record_type: type[Record]) -> list[Record]:
        """All records of a type that are on disk, each id once."""
        found: dict[str, Record] = {}
        kind = record_type.kind  # type: ignore[attr-defined]
        for path in (self.path / f"{kind}.jsonl", *self._rank_files(kind)):
            for values in read_lines(path):
                record = _record(record_type, values, path)
                found.setdefault(record.id, record)  # type: ignore[attr-defined]
        return list(found.values())

    def weights(self, name: str = "model") -> Path | None:
        """The weights of that name, if they were written."""
        return weights_file(self.path / name)

    def _rank_files(self, kind: str) -> list[Path]:
        return sorted(self.path.glob(f"{kind}.[0-9]*.jsonl"))


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

    def append(self, records: Sequence[Any]) -> None:
        """Append records of one type to this process's file."""
        if records:
            _append_lines(self._rank_file(type(records[0]).kind), map(to_json, records))

    def merge(self, record_type: type[Any]) -> None:
        """Make one file, ordered by id, of what all processes appended."""
        self.runtime.barrier()
        if self.runtime.is_main:
            records = self.read(record_type)
            target = self.path / f"{record_type.kind}.jsonl"
            draft = target.with_suffix(".jsonl.tmp")
            with draft.open("w", encoding="utf-8", errors="replace") as file:
                for record in sorted(records, key=lambda r: id_order(r.id)):
                    file.write(_line(to_json(record)))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
            for part in self._rank_files(record_type.kind):
                part.unlink()
        self.runtime.barrier()

    def known(self, record_type: type[Record]) -> list[Record]:
        """As `read`, before an arrow begins: no process appends until all have read."""
        records = self.read(record_type)
        self.runtime.barrier()
        return records

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

    def _rank_file(self, kind: str) -> Path:
        return self.path / f"{kind}.{self.runtime.rank}.jsonl"


def id_order(record_id: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts ids part by part, numbers as numbers."""
    parts = record_id.split("/")
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


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
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a torn line: the next one must not be glued onto it
                file.truncate(_last_line_start(path))
        file.write("".join(map(_line, values)).encode("utf-8", "replace"))
        file.flush()


def _last_line_start(path: Path) -> int:
    data = path.read_bytes()
    return data.rfind(b"\n") + 1


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _record(record_type: type[Record], values: Any, path: Path) -> Record:
    try:
        return from_json(record_type, values)
    except (AttributeError, TypeError, ValueError) as error:
        raise StoreError(f"{path} holds no {record_type.__name__} record: {error}") from error
