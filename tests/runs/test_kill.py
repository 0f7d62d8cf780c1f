"""A run of six stages, killed wherever it writes and at any time: it goes on to the same result.

Each run is a process of its own, forked from this one so that nothing is imported again.
"""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError

from self_rewarding_lm import (
    MixedReference,
    OptimConfig,
    Run,
    SelfPlayConfig,
)
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import RECORD_TYPES
from self_rewarding_lm.runs import atomic as durable
from self_rewarding_lm.runs import lines, weights
from self_rewarding_lm.runs import stage_folder as store
from self_rewarding_lm.runs.run import REPORT
from tests.stages.test_grpo import grpo
from tests.stages.test_stepwise import stepwise
from tests.support.processes import launched
from tests.test_trainer import ROWS, SHORT, external, model64, self_reward, sft, trainer_of

OPTIM = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=2, save_state_every=1)
OUR_WORDS = re.compile(r"could not be written")
OUR_STATUS = 3  # of a process that ended with such an error
RANDOM_TIMES = 20


def stages():
    spin = SelfPlayConfig(
        train_dataset=ROWS[:5], generation=SHORT, iterations=2, mix_previous=True, optim=OPTIM
    )
    return [
        sft(optim=OPTIM, valid_dataset=ROWS[:2], num_train_steps=3),
        spin.model_copy(update={"num_train_steps": 2}),
        self_reward(optim=OPTIM),
        external(optim=OPTIM, init_from="initial"),
        external(optim=OPTIM, rounds=2, prompts_per_round=4, reference=MixedReference(every=2)),
        grpo(optim=OPTIM, rounds=2, prompts_per_round=2, beta=0.1, scale="batch"),
    ]


def work(folder):
    torch.set_num_threads(1)
    trainer_of(folder, stages(), model64(), keep_stages=2)(rehearse=False)


def in_child(job: Callable[[], None]) -> int:
    """Run a job in a process of its own; its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = OUR_STATUS if isinstance(error, StoreError) and OUR_WORDS.search(str(error)) else 1
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, object]:
    """All that a run leaves: files, weights, records, metrics."""
    run = Run.open(folder)
    found: dict[str, object] = {
        "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    }
    for file in sorted(folder.rglob("*.safetensors")):
        found[file.relative_to(folder).as_posix()] = durable.digest_of(file)
    for name in run.stages:
        for kind in RECORD_TYPES:
            records = run.stage(name).read(kind)
            ids = [record.id for record in records]
            assert len(set(ids)) == len(ids)
            found[f"{name} {kind.__name__}"] = records
        found[f"{name} metrics"] = run.metrics(name)
        found[f"{name} summary"] = run.summary(name)
    return found


def gone_wrong(folder: Path, before: dict[str, object]) -> list[str]:
    """Let a run go on, and name what is then different from an undisturbed one."""
    if ended(in_child(lambda: work(folder))) != 0:
        return ["it does not go on"]
    after = outcome(folder)
    return [what for what in before.keys() | after.keys() if before.get(what) != after.get(what)]


# -- the moments at which a run writes ------------------------------------------------------------


Event = tuple[str, str]


def kind_of(op: str, path: Path) -> Event:
    """What is done to which kind of file: stages and numbers in names do not count."""
    folder = (
        "" if path.suffix == ".jsonl" or re.match(r"(run|\d\d-.*)$", path.parent.name) else "of/"
    )
    name = "a folder" if path.is_dir() else f"{folder}{path.name}"
    return op, re.sub(r"\d+", "0", name)


class Faults:
    """Sees every write, flush, rename and deletion of the library's rooms that open files.

    at: what happens at the n-th of them, `before` or `after` it is done; half: in the middle of it.
    """

    def __init__(self, at: int | None = None, when: str = "before", fault=None) -> None:
        self.at, self.when, self.fault = at, when, fault
        self.seen: list[Event] = []

    def reached(self, when: str) -> bool:
        return len(self.seen) - 1 == self.at and self.when == when

    def around(self, op: str, function, path_of):
        def wrapped(*args, **kwargs):
            self.seen.append(kind_of(op, Path(path_of(*args))))
            if self.reached("before"):
                self.fault(op)
            result = function(*args, **kwargs)
            if self.reached("after"):
                self.fault(op)
            return result

        return wrapped

    def appending(self, function):
        """`append_lines`, which may also be cut in the middle of its last line."""

        def wrapped(path, values, **how):
            self.seen.append(kind_of("append", path))
            if self.reached("before") and self.fault is full:
                values = first_alone(values)
            elif self.reached("before"):
                self.fault("append")
            if self.reached("half"):
                values = list(values)
                function(path, values, **how)
                whole = path.read_bytes()
                last = whole.rindex(b"\n", 0, len(whole) - 1) + 1 if whole.count(b"\n") > 1 else 0
                path.write_bytes(whole[: (last + len(whole)) // 2])
                self.fault("append")
            function(path, values, **how)
            if self.reached("after"):
                self.fault("append")

        return wrapped

    @contextmanager
    def watching(self) -> Iterator["Faults"]:
        first = lambda path, *rest: path  # noqa: E731
        second = lambda one, path, *rest: path  # noqa: E731
        with ExitStack() as held:

            def put(owner, name, made):
                held.enter_context(patch.object(owner, name, made))

            flushing = self.around("fsync", durable.flush, first)
            put(durable, "flush", flushing)
            put(weights, "flush", flushing)
            put(Path, "replace", self.around("rename", Path.replace, second))
            put(Path, "unlink", self.around("unlink", Path.unlink, first))
            put(Path, "write_text", self.around("write", Path.write_text, first))
            put(weights, "save_model", self.around("write", weights.save_model, second))
            put(weights, "save_file", self.around("write", weights.save_file, second))
            appending = self.appending(lines.append_lines)
            put(store, "append_lines", appending)
            yield self


def kill(op: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(op: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def first_alone(values):
    """Of some lines the first, and then a disk that is full."""
    yield next(iter(values))
    full("append")


def events_of(folder: Path) -> list[Event]:
    """All moments of an undisturbed run, in their order."""
    told = folder.with_suffix(".events")

    def job():
        with Faults().watching() as faults:
            work(folder)
        with told.open("w") as file:
            file.writelines(f"{op} {name}\n" for op, name in faults.seen)

    assert ended(in_child(job)) == 0
    return [tuple(line.split(" ", 1)) for line in told.read_text().splitlines()]  # type: ignore[misc]


def moments(events: list[Event], ways: tuple[str, ...]) -> list[tuple[int, str, Event]]:
    """Of each kind of moment the first and the last one, in each way."""
    first = {event: place for place, event in reversed(list(enumerate(events)))}
    last = {event: place for place, event in enumerate(events)}
    places = sorted({*first.values(), *last.values()})
    return [(p, way, events[p]) for p in places for way in ways]


def disturbed(folder: Path, place: int, when: str, fault) -> int:
    """A run with a fault at one moment; how it ended."""

    def job():
        with Faults(place, when, fault).watching():
            work(folder)

    return ended(in_child(job))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run: its outcome, its moments, and how long it takes."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    events = events_of(folder)
    times = []
    for name in ("again", "once more"):  # the first one imports what is imported late
        began = time.monotonic()
        assert ended(in_child(lambda name=name: work(folder.with_name(name)))) == 0
        times.append(time.monotonic() - began)
    return outcome(folder), events, min(times)


@pytest.mark.slow
def test_a_run_that_is_killed_wherever_it_writes_goes_on_to_the_same_result(straight, tmp_path):
    before, events, _ = straight
    points = moments(events, ("before", "after"))
    points += [(p, "half", e) for p, _, e in moments(events, ("",)) if e[0] == "append"]
    mismatches = []
    for number, (place, when, event) in enumerate(points):
        folder = tmp_path / str(number)
        assert disturbed(folder, place, when, kill) == -signal.SIGKILL
        mismatches += [(when, *event, what) for what in gone_wrong(folder, before)]
        shutil.rmtree(folder)
    print(f"{len(points)} kill points of {len(events)} writes, {len(mismatches)} mismatches")
    assert mismatches == []


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_times_goes_on_to_the_same_result(straight, tmp_path):
    before, _, seconds = straight
    draws, killed, mismatches = random.Random(0), 0, []
    for number in range(RANDOM_TIMES):
        folder = tmp_path / str(number)
        after = draws.uniform(0, seconds)
        child = in_child(lambda folder=folder: work(folder))
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        mismatches += [(after, what) for what in gone_wrong(folder, before)]
        shutil.rmtree(folder)
    print(f"{killed} of {RANDOM_TIMES} killed at random times, {len(mismatches)} mismatches")
    assert mismatches == [] and killed > RANDOM_TIMES / 2


@pytest.mark.slow
def test_a_disk_that_is_full_is_said_and_the_run_goes_on_when_there_is_room(straight, tmp_path):
    before, events, _ = straight
    writing = [(p, w, e) for p, w, e in moments(events, ("before",)) if e[0] != "unlink"]
    # without its report the run itself is whole
    report = next(place for place, (_, name) in enumerate(events) if REPORT in name)
    mismatches = []
    for number, (place, when, event) in enumerate(writing):
        folder = tmp_path / str(number)
        fault = refused if event[0] == "write" and event[1].endswith(".safetensors.tmp") else full
        told = disturbed(folder, place, when, fault)
        mismatches += [(*event, what) for what in gone_wrong(folder, before)]
        if told != (0 if place >= report else OUR_STATUS):
            mismatches.append((*event, "in no words of ours"))
        shutil.rmtree(folder)
    print(f"{len(writing)} full disks, {len(mismatches)} mismatches")
    assert mismatches == []


def refused(op: str) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.slow
def test_a_small_file_system_that_is_full_is_said_and_the_run_goes_on(straight, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        folder = mount / "run"
        assert ended(in_child(lambda: work(folder))) == OUR_STATUS
        larger = ["mount", "-o", "remount,size=64m", str(mount)]
        assert subprocess.run(larger, capture_output=True).returncode == 0
        assert ended(in_child(lambda: work(folder))) == 0
        assert outcome(folder) == straight[0]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_moments_of_a_run_are_all_seen(straight):
    """Those of each room that writes, and each kind of file."""
    _, events, _ = straight
    assert {op for op, _ in events} == {"append", "write", "fsync", "rename", "unlink"}
    names = {name.removeprefix("of/") for _, name in events}
    assert {"pairs.jsonl", "files.json.tmp", "state.safetensors", "done.json.tmp"} <= names
    assert {"metrics.jsonl", "candidates.0.jsonl", "run.json.tmp", "model.safetensors"} <= names


@pytest.mark.slow
def test_answers_that_grow_are_the_same_wherever_they_are_killed(tmp_path, monkeypatch):
    """After each line that the stage appends: a position, steps, judgements, pairs."""
    grows = lambda: [stepwise(optim=OPTIM, prompt_dataset=["tell 0", "tell 1"])]  # noqa: E731
    monkeypatch.setattr(sys.modules[__name__], "stages", grows)
    events = events_of(tmp_path / "straight")
    before, mismatches = outcome(tmp_path / "straight"), []
    places = [place for place, (op, _) in enumerate(events) if op == "append"]
    for place in places:
        folder = tmp_path / str(place)
        assert disturbed(folder, place, "after", kill) == -signal.SIGKILL
        mismatches += [(*events[place], what) for what in gone_wrong(folder, before)]
        shutil.rmtree(folder)
    print(f"{len(places)} kill points, {len(mismatches)} mismatches")
    assert mismatches == [] and len(places) > 12


@pytest.mark.slow
def test_two_processes_of_which_one_or_both_are_killed_go_on_to_the_same_result(tmp_path):
    """Moments of the main process, of the other, and of both at about the same time."""

    def run(folder: Path, who: str, place: int) -> int:
        process = launched(
            "-m", "tests.support.two_process_kill", folder, who, place, OMP_NUM_THREADS="1"
        )
        process.communicate(timeout=240)
        return process.returncode

    assert run(tmp_path / "straight", "nobody", 0) == 0
    before = outcome(tmp_path / "straight")
    mismatches = []
    cases = [("0", 30), ("0", 90), ("1", 2), ("1", 7), ("both", 5)]
    for number, (who, place) in enumerate(cases):
        folder = tmp_path / str(number)
        assert run(folder, who, place) != 0
        assert run(folder, "nobody", 0) == 0
        after = outcome(folder)
        mismatches += [(who, place, what) for what in before if before[what] != after.get(what)]
    print(f"{len(cases)} kills of two processes, {len(mismatches)} mismatches")
    assert mismatches == []
