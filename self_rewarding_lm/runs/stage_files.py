"""A run's folders as they are read: which stage is done, its records, the file of its weights.

Imports no torch, so that a run can be looked at at once. What is written there is in
`stage_folder.py`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import Candidate, Prompt, Record
from self_rewarding_lm.runs.atomic import check_file, digest_of, ledger
from self_rewarding_lm.runs.stored import Stored, merged_file

EVENTS = "events.jsonl"

LIBRARY = "self_rewarding_lm"


FORMAT = 2
"""By which rules a run makes its records; run.json holds it. 1: those of version 0.1.0. A run keeps
the rules that it began with."""


STAGE_FOLDER = re.compile(r"\d+-[^/\\\0]+")

DONE = "done.json"


SOURCE = "candidates_from.json"


OF_SOURCE = (Prompt, Candidate)
"""Records that a stage which samples nothing has in another stage's folder."""

MODEL_FILE = "model.safetensors"

ADAPTER_FILE = "adapter_model.safetensors"


class StageFiles:
    """One stage's folder, to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_done(self) -> bool:
        return (self.path / DONE).exists()

    @property
    def samples(self) -> bool:
        """Whether the stage's candidates are its own; else they are those of another stage."""
        return not (self.path / SOURCE).exists()

    @property
    def source(self) -> "StageFiles":
        """The stage that sampled the prompts' candidates: this one, or the one that it names.

        Raises StoreError if they are not there any more, or are others than this stage began with.
        """
        if self.samples:
            return self
        words = read_json(self.path / SOURCE)
        folder = self.path / words["folder"]  # an absolute one stays what it is
        wrong = not merged_file(folder, Candidate.kind).exists()
        if wrong or digest_of_candidates(folder) != words["candidates"]:
            how = "are not there any more" if wrong else "are others than it began with"
            raise StoreError(
                f"{self.path} judges the candidates of {folder.resolve()}, and these {how}. Put "
                "that folder back; or delete this stage's folder (and those of later stages) to do "
                "it again."
            )
        return StageFiles(folder)

    def stored(
        self, record_type: type[Record], wanted: Callable[[str], bool] | None = None
    ) -> Stored[Record]:
        """The records of a type that are on disk, each id once, read when they are asked for.

        Prompts and candidates of a stage that samples nothing are those of its source.

        wanted: whether an id belongs to them, default all. Raises StoreError if a file of them was
        changed after it was written, or was deleted from a stage that is done.
        """
        if record_type in OF_SOURCE and not self.samples:
            return self.source.stored(record_type, wanted)
        merged = merged_file(self.path, record_type.kind)  # type: ignore[attr-defined]
        if self.is_done and not merged.exists() and merged.name in ledger(self.path):
            raise StoreError(
                f"{merged} was part of a stage that is done and is not there any more. Put it "
                "back; or delete the stage's folder (and those of later stages) to do it again."
            )
        return Stored(record_type, self.path, wanted)

    def read(self, record_type: type[Record]) -> list[Record]:
        """All of them, in memory."""
        return list(self.stored(record_type))

    def weights(self, name: str = "model") -> Path | None:
        """The file of the weights of that name, or None; StoreError if it was changed."""
        file = weights_file(self.path / name)
        if file is not None:
            check_file(file, self.path)
        return file


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder, a whole model's or an adapter's; None if there is none."""
    paths = (folder / name for name in (MODEL_FILE, ADAPTER_FILE))
    return next((path for path in paths if path.exists()), None)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; StoreError if the file was changed since, or cannot be read."""
    try:
        check_file(path, path.parent)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def check_ours(folder: Path, info: Any) -> None:
    """Raise StoreError if run.json is not of this library, is of a later version's format, or names
    folders outside its own.
    """
    if not isinstance(info, dict) or info.get("library") != LIBRARY:
        raise StoreError(f"{folder}/run.json was not written by {LIBRARY}; choose another folder.")
    if info.get("format") not in range(1, FORMAT + 1):
        raise StoreError(
            f"{folder}/run.json must have a format of 1 to {FORMAT}, which this version knows; "
            f"got {info.get('format')!r}. Go on with the version that began it (`versions`)."
        )
    check_folders(info.get("stages"), folder / "run.json")


def check_folders(names: Any, where: Path) -> None:
    """Raise StoreError for names that are no folders within a run's own, such as 01-sft."""
    bad = [names]
    if isinstance(names, list):
        bad = [n for n in names if not isinstance(n, str) or STAGE_FOLDER.fullmatch(n) is None]
    if bad:
        raise StoreError(
            f"{where}: the stages are a list of folders named <number>-<name>, such as 01-sft, "
            f"without slashes; got {bad[0]!r}. Nothing outside the run's folder is read or written."
        )


def digest_of_candidates(folder: Path) -> str:
    """The digest that the ledger lists for a stage's candidates; without it their own."""
    path = merged_file(folder, Candidate.kind)
    listed = ledger(folder).get(path.name)
    return listed[-1] if listed else digest_of(path)
