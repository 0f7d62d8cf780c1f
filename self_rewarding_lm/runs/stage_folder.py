"""A stage's folder, read and written. Knows no stage.

    run.json                                what was run, with which seed and versions
    files.json                              digests of run.json and of the first weights
    <nn>-<name>/config.json                 the stage's settings; its presence: the stage began
    <nn>-<name>/<records>.jsonl             prompts, candidates, judgements, pairs, reference, rows,
                                            ranked, demonstrations, instructions, meta_judgements
    <nn>-<name>/candidates_from.json        the stage whose prompts and candidates this one judges,
                                            if it samples none itself
    <nn>-<name>/metrics.jsonl, events.jsonl  numbers by step; what happened when, warnings too
    <nn>-<name>/files.json                  digests of what was finished, see atomic.py
    <nn>-<name>/state.safetensors           where training stands, until the stage is done
    <nn>-<name>/model/                      the weights, see weights.py
    <nn>-<name>/done.json                   written last, by rename; its presence: the stage is done

While an arrow runs each process appends sealed lines (see lines.py) to its own
<records>.<rank>.jsonl; at its end they become one file, ordered by id. A torn last line (of a
process that was killed) is cut off; any other line that cannot be read is an error. Records are
read one by one when they are asked for, see stored.py.

Lines of events.jsonl hold `time` (seconds since 1970), `event` and words of their own. Times differ
between two runs with equal results.
"""

import json
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import RECORD_TYPES, Record, to_json
from self_rewarding_lm.runs.atomic import (
    LEDGER,
    check_file,
    delist,
    ledger,
    system_errors,
    writing,
)
from self_rewarding_lm.runs.lines import append_lines, batched, read_lines
from self_rewarding_lm.runs.stage_files import (
    DONE,
    EVENTS,
    OF_SOURCE,
    SOURCE,
    StageFiles,
    digest_of_candidates,
    read_json,
)
from self_rewarding_lm.runs.stored import (
    SETTINGS,
    Groups,
    Stored,
    merge_files,
    merged_file,
    record_files,
)
from self_rewarding_lm.runs.weights import (
    TRAINED,
    Savable,
    Tensors,
    read_tensors,
    read_words,
    remove_weights,
    save_folder,
    write_tensors,
)
from self_rewarding_lm.runtime import Runtime


def append_event(folder: Path, event: str, words: dict[str, Any]) -> None:
    """Append a line to events.jsonl."""
    append_lines(folder / EVENTS, [{"time": round(time.time(), 3), "event": event, **words}])


@contextmanager
def ends_told(tell: Callable[..., None]) -> Iterator[None]:
    """An error that ends what is done within is told as the event `stopped`."""
    try:
        yield
    except BaseException as error:
        with suppress(StoreError):  # the error is the one to raise, though the disk be full
            tell("stopped", words=f"{type(error).__name__}: {error}")
        raise


logger = logging.getLogger(__name__)


AHEAD = "ahead"  # weights of a model that is trained ahead of a stage's own training


UNTIL_DONE = ("best", AHEAD, "iteration-[0-9]*")
"""Folders of weights that go at a stage's end: early stopping's best, those of a model that was
trained ahead, those of SPIN's iterations."""


WEIGHTS_FOLDERS = ("model", "checkpoint-[0-9]*", *UNTIL_DONE)


STATE = "state.safetensors"


CHECK = "early_stopping/score"  # in lines of metrics


RECORDS_AT_ONCE = 64  # that `StageDir.keep` writes together


STAGE_FILES = (SETTINGS, DONE, SOURCE, "metrics.jsonl", EVENTS, LEDGER, STATE)


class StageDir(StageFiles):
    """One stage's folder, as the stage writes it.

    runtime tells which process this is. beside: writes what belongs into a folder of weights
    beside them, such as a tokenizer. steps_before: those that earlier stages trained; trackers get
    steps of the whole run, for some of them drop what comes at an earlier step than the last.
    """

    def __init__(
        self,
        path: Path,
        runtime: Runtime,
        beside: Callable[[Path], None] | None = None,
        *,
        steps_before: int = 0,
    ) -> None:
        super().__init__(path)
        self.runtime = runtime
        self.beside = beside
        self.steps_before = steps_before
        self.summary: dict[str, Any] = {}
        """What done.json will hold; stages add to it."""
        self._round: dict[str, int] = {}  # in each line of metrics, if there are several
        self._sequences: list[weakref.ref[Stored[Any]]] = []  # those that `stored` gave
        self._replayed: Counter[str] = Counter()  # lines of metrics that an earlier attempt wrote
        self._trainings: Counter[int] = Counter()

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder and write config.json, unless it began before."""
        if self.runtime.is_main:
            with system_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / SETTINGS).exists():
                self._check_new()
                write_json(self.path / SETTINGS, settings)
            self._say_missing()
            self._replayed = Counter(map(_line_name, read_lines(self.path / "metrics.jsonl")))
        self.tell("begin")
        self.runtime.barrier()

    def _check_new(self) -> None:
        """Raise StoreError if there are records of a stage that has not begun."""
        if any(record_files(self.path, t.kind) for t in RECORD_TYPES):
            raise StoreError(
                f"{self.path} holds records and no config.json, so that nobody knows with which "
                "settings they were made. Put config.json back, or delete the folder."
            )

    def _say_missing(self) -> None:
        """Warn of finished files that are gone, and take them out of the ledger."""
        gone = [name for name in ledger(self.path) if not (self.path / name).exists()]
        delist(self.path, gone)
        deleted = [name for name in gone if not (self.path / f"{name}.tmp").exists()]
        if deleted:  # the others were being written when the run was stopped
            words = "%s: %s is not there any more; it is made again."
            logger.warning(words, self.path, ", ".join(deleted))

    def take(self, source: StageFiles) -> None:
        """From now on prompts and candidates are those of a stage that is done; all processes call.

        Raises StoreError on each if the stage began with others.
        """
        if self.runtime.is_main and self.samples:
            folder = source.source.path.resolve()
            beside = folder.parent == self.path.resolve().parent  # they are moved together
            words = {
                "folder": f"../{folder.name}" if beside else str(folder),
                "candidates": digest_of_candidates(folder),
            }
            write_json(self.path / SOURCE, words)
        self.runtime.barrier()
        self.source  # raises if it is not as it was  # noqa: B018

    def append(self, records: Iterable[Any]) -> None:
        """Append records of one type to this process's file as they come.

        If making one of them raises, none of them stays in the file.
        """
        coming = iter(records)
        first = next(coming, None)
        if first is not None:
            lines = map(to_json, chain([first], coming))
            path = self.path / f"{first.kind}.{self.runtime.rank}.jsonl"
            append_lines(path, lines, sealed=True)

    def keep(self, records: Iterable[Record]) -> Iterator[list[Record]]:
        """Append records of one type as they come, and give each list of them once it is on disk.

        Lists hold RECORDS_AT_ONCE records; the last one, or one before an error, holds fewer.
        Whoever stops asking loses what came after the last list. Raises Interrupted after a record
        if a signal asked for it.
        """
        for some in batched(self.runtime.stopping.between(records), RECORDS_AT_ONCE):
            if some:
                self.append(some)
                yield some

    def missing(self, record_type: type[Any], ids: Iterable[str]) -> list[str]:
        """Those of the ids that no record on disk has, in their order; before an arrow begins.

        As with `known`, all processes have to call it.
        """
        known = Groups(self.known(record_type))
        return [record_id for record_id in ids if record_id not in known]

    def stored(
        self, record_type: type[Record], wanted: Callable[[str], bool] | None = None
    ) -> Stored[Record]:
        """As of any folder; once records of the type were merged it holds the merged ones."""
        records = super().stored(record_type, wanted)
        self._sequences = [ref for ref in self._sequences if ref() is not None]
        self._sequences.append(weakref.ref(records))
        return records

    def merge(self, record_type: type[Any]) -> None:
        """Make one file, ordered by id, of what all processes appended."""
        if record_type in OF_SOURCE and not self.samples:
            return
        for ref in self._sequences:
            records = ref()
            if records is not None and records.record_type is record_type:
                records.close()
        self.runtime.barrier()
        failure = None
        if self.runtime.is_main:
            try:
                merge_files(self.path, record_type.kind)
            except StoreError as error:
                failure = error
        failure = self.runtime.from_main(failure)
        if failure is not None:
            raise failure

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

    def begin_round(self, number: int) -> None:
        """From now on each line of metrics names this round."""
        self._round = {"round": number}

    def log(self, metrics: dict[str, Any], *, again: bool = True) -> None:
        """Append a line to metrics.jsonl, and its numbers to the trackers (main process).

        again: a stage that goes on says again what it said before training; such a line stays as
        it is. A training says nothing twice: `cut_metrics` deletes what it is to say.
        """
        if not self.runtime.is_main:
            return
        name, step = self.path.name.partition("-")[2], metrics.get("step", 0) + self.steps_before
        numbers = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, int | float)}
        self.runtime.log({f"{name}/{k}": v for k, v in numbers.items()}, step)
        metrics = {**metrics, **self._round}
        if again and self._replayed[_line_name(metrics)] > 0:
            self._replayed[_line_name(metrics)] -= 1
            return
        append_lines(self.path / "metrics.jsonl", [metrics])

    def tell(self, event: str, **words: Any) -> None:
        """Append what happened, and when, to events.jsonl (main process)."""
        if self.runtime.is_main:
            append_event(self.path, event, words)

    def told(self, event: str) -> list[dict[str, Any]]:
        """The lines of events.jsonl that told an event, the earliest first."""
        return [line for line in read_lines(self.path / EVENTS) if line.get("event") == event]

    def cut_metrics(self, step: int) -> None:
        """Delete the lines of metrics of later steps: training goes on after this one.

        A check for early stopping at this step stays if it is of a training that took the step, and
        not the first one of a training that began after it.
        """
        path = self.path / "metrics.jsonl"
        if not self.runtime.is_main or not path.exists():
            return
        lines, kept, took_step = list(read_lines(path)), [], False
        for line in lines:
            is_here = line.get("step", 0) == step
            is_check = is_here and CHECK in line
            if line.get("step", 0) < step or (is_here and (took_step or not is_check)):
                kept.append(line)
            took_step = not is_check and (took_step or (is_here and "loss" in line))
        if len(kept) < len(lines):
            with writing(path) as draft:
                append_lines(draft, kept)
            self._replayed &= Counter(map(_line_name, kept))

    def count_training(self, round: int) -> int:
        """How many trainings of a round began in this folder before this one, in this process."""
        self._trainings[round] += 1
        return self._trainings[round] - 1

    def save_state(self, tensors: Tensors, words: dict[str, Any]) -> None:
        """Write where training stands, in place of an earlier state (main process)."""
        if self.runtime.is_main:
            write_tensors(tensors, json.dumps(words), self.path / STATE)
        self.runtime.barrier()

    def state_words(self) -> dict[str, Any] | None:
        """The words of the state that was saved last; None if there is none."""
        state = self.path / STATE
        return json.loads(read_words(state) or read_tensors(state)[1]) if state.exists() else None

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """What `save_state` saved last; StoreError if the file was changed."""
        tensors, words = read_tensors(self.path / STATE)
        return tensors, json.loads(words)

    def save_weights(
        self, model: Savable, name: str = "model", *, steps: int | None = None
    ) -> None:
        """Write a model's weights (main process); all processes wait.

        steps: of the training that ended with them, for `steps_of`.
        """

        def beside(folder: Path) -> None:
            if self.beside is not None:
                self.beside(folder)
            if steps is not None:
                (folder / TRAINED).write_text(json.dumps({"steps": steps}), encoding="utf-8")

        if self.runtime.is_main:
            save_folder(model, self.path / name, beside, listed=True)
        self.runtime.barrier()

    def steps_of(self, name: str) -> int | None:
        """The steps with which the weights of that name were saved; None if nothing says so.

        StoreError if what says so was changed.
        """
        file = self.path / name / TRAINED
        if not file.exists():
            return None
        check_file(file, self.path)
        return read_json(file)["steps"]

    def drop_weights(self, name: str) -> None:
        """Delete the weights of that name (main process)."""
        self.runtime.barrier()
        if self.runtime.is_main:
            remove_weights(self.path / name)

    def finish(self) -> None:
        """Write done.json: the stage is complete; then delete what it needed until here."""
        self.runtime.barrier()
        if self.runtime.is_main:
            self.tell("done")
            write_json(self.path / DONE, self.summary)
            clear(self.path)
        self.runtime.barrier()


def clear(stage: Path) -> None:
    """Delete what a stage needs only until it is done: its training state and UNTIL_DONE.

    A draft of the ledger goes too: a run may be killed while the ledger takes done.json.
    """
    for name in (STATE, f"{LEDGER}.tmp"):
        (stage / name).unlink(missing_ok=True)
    for folder in (f for pattern in UNTIL_DONE for f in stage.glob(pattern)):
        remove_weights(folder)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file by rename, so that it is there in full or not at all.

    The ledger of its folder takes its digest.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with writing(path, listed_in=path.parent) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")


def remove_stage(path: Path) -> None:
    """Delete what the library wrote into a stage's folder; other files stay."""
    names = [*STAGE_FILES, *(f"{t.kind}.jsonl" for t in RECORD_TYPES)]
    names += [f"{name}.tmp" for name in names]
    files = [path / name for name in names]
    files += [f for t in RECORD_TYPES for f in path.glob(f"{t.kind}.[0-9]*.jsonl")]
    for folder in (f for pattern in WEIGHTS_FOLDERS for f in path.glob(pattern)):
        remove_weights(folder)  # before the ledger that knows its files
    for file in files:
        file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _line_name(metrics: dict[str, Any]) -> str:
    """What a line of metrics is about: its step and its names."""
    return json.dumps([metrics.get("step"), sorted(metrics)])
