"""Files that were edited while a run stood still: it names the file, or comes to the same end.

For stages of every kind, stopped at several moments: each file of the folder is edited in each way,
and the run goes on. Nothing that an edit put there may be trained on or be read back as the run's
own.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from self_rewarding_lm import Run
from self_rewarding_lm.errors import SelfRewardingError, StoreError
from self_rewarding_lm.records import RECORD_TYPES
from self_rewarding_lm.runs.atomic import digest_of
from self_rewarding_lm.runs.stage_folder import StageDir
from tests.fixtures.make_runs import serving
from tests.fixtures.runs import COMPARISONS, EARLIER, RUNS, comparison, trainer_of
from tests.stages import test_self_instruct as written

LOGS = ("metrics.jsonl", "events.jsonl")
"""What was said while it ran. Nothing is made of them, and nobody vouches for them."""

Edit = Callable[[bytes], bytes | None]
"""What becomes of a file's bytes; None: it is deleted."""


# -- edits


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def other(value: Any) -> Any:
    """A value of the same kind that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value[:-1], other(value[-1])] if value else [1]
    if isinstance(value, dict):
        return {key: other(held) for key, held in value.items()} or {"more": 1}
    return 1


def with_value_changed(line: bytes, last: bool) -> bytes:
    """A JSON line with another value of its first field after the id, or of its last one."""
    values = json.loads(line)
    names = [name for name in values if name not in ("id", "seal")]
    name = names[-1 if last else 0]
    values[name] = other(values[name])
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def on_line(place: int, change: Callable[[bytes], bytes]) -> Edit:
    def edit(data: bytes) -> bytes:
        lines = lines_of(data)
        lines[place] = change(lines[place])
        return b"".join(lines)

    return edit


def swapped(data: bytes) -> bytes:
    lines = lines_of(data)
    lines[0], lines[-1] = lines[-1], lines[0]
    return b"".join(lines)


def middle(data: bytes) -> int:
    return len(lines_of(data)) // 2


LINES: dict[str, Edit] = {
    "first value": on_line(0, lambda line: with_value_changed(line, last=False)),
    "last value": on_line(-1, lambda line: with_value_changed(line, last=True)),
    "first line deleted": lambda data: b"".join(lines_of(data)[1:]),
    "middle line deleted": lambda data: b"".join(
        line for place, line in enumerate(lines_of(data)) if place != middle(data)
    ),
    "last line deleted": lambda data: b"".join(lines_of(data)[:-1]),
    "lines swapped": swapped,
    "cut in a line": lambda data: data[:-7],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "line doubled": lambda data: data + lines_of(data)[0],
    "no line of ours": on_line(0, lambda line: b"{}\n"),
    "emptied": lambda data: b"",
    "deleted": lambda data: None,
}

BYTES: dict[str, Edit] = {
    "changed": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "cut": lambda data: data[:-9],
    "deleted": lambda data: None,
}


def json_edits(data: bytes) -> dict[str, Edit]:
    """Each value changed by itself, and what is done to any file."""
    try:
        values = json.loads(data)
    except ValueError:
        return BYTES

    def changed(name: str, value: Any) -> Edit:
        return lambda _: json.dumps({**values, name: value}, indent=2).encode()

    edits: dict[str, Edit] = {f"{n} changed": changed(n, other(v)) for n, v in values.items()}
    if "next_prompt" in values:
        edits |= {f"next_prompt {v}": changed("next_prompt", v) for v in (0, 7, -3, True, None)}
    return {**edits, "cut": lambda d: d[:-9], "deleted": lambda _: None}


def edits_of(path: Path) -> dict[str, Edit]:
    data = path.read_bytes()
    if path.name == "files.json":  # without it, or without a line of it, nobody vouches
        return {}
    if path.suffix == ".jsonl":
        return LINES if data else {}
    if path.suffix == ".json" and path.parent.name != "model":
        return json_edits(data)
    return BYTES if data else {}


# -- runs, stopped


class StoppedError(BaseException):
    """In place of a power cut: nothing that cleans up catches it."""


WRITING = ("append", "merge", "save_state", "save_weights", "finish")


@contextmanager
def stopped_after(is_time: Callable[[], bool], seen: list[tuple[str, str]]) -> Iterator[None]:
    """Note each time that a stage writes, and stop after it if it is time."""

    def around(method: str) -> Callable[..., Any]:
        write = getattr(StageDir, method)

        def writing(self: StageDir, *args: Any, **options: Any) -> Any:
            result = write(self, *args, **options)
            seen.append((method, self.path.name))
            if is_time():
                raise StoppedError
            return result

        return writing

    with ExitStack() as patched:
        for method in WRITING:
            patched.enter_context(patch.object(StageDir, method, around(method)))
        yield


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run made, as it is read back."""
    run, found = Run.open(folder), {}
    for stage in run.stages:
        for kind in RECORD_TYPES:
            found[f"{stage} {kind.__name__}"] = run.stage(stage).read(kind)
        found[f"{stage} summary"] = run.summary(stage)
    found["weights"] = digest_of(run.weights(run.stages[-1]))
    return found


class OfRecipe:
    """One of the runs that the tests know."""

    def __init__(self, name: str) -> None:
        self.name = name

    def go(self, folder: Path) -> dict[str, Any]:
        with serving() if self.name == "library_objects" else nullcontext("") as address:
            trainer_of(self.name, folder, address=address)(rehearse=False)
        return outcome(folder)


class OfComparison:
    def __init__(self, name: str) -> None:
        self.name = name

    def go(self, folder: Path) -> dict[str, Any]:
        return comparison(self.name, folder)


class OfWritten:
    """A stage whose prompts a model writes."""

    def go(self, folder: Path) -> dict[str, Any]:
        lists = written.two_a_list("external_reward")
        engine = written.Scripted(lists)
        stage = written.stage(num_prompts=8, samples_per_round=3)
        written.trainer_of(folder, [written.sft(), stage], engine)(rehearse=False)
        return outcome(folder)


CASES = {
    **{name: OfRecipe(name) for name in RUNS if name != "library_objects"},
    **{f"compare {name}": OfComparison(name) for name in COMPARISONS},
    "self_instruct": OfWritten(),
}


def moments(seen: list[tuple[str, str]]) -> list[int | None]:
    """Where a run is stopped: in the arrows of its last stage, where it trains, and at its end."""
    last = [i for i, (_, stage) in enumerate(seen) if stage == seen[-1][1]]
    appends, states, saves, merges = (
        [i for i in last if seen[i][0] == method]
        for method in ("append", "save_state", "save_weights", "merge")
    )
    places = {
        *(appends[len(appends) * part // 4] for part in (1, 2, 3) if appends),
        *states[len(states) // 2 :][:1],
        *saves[:-1],
        *merges[-1:],
    }
    return [*sorted(places), None]


def halted(case: Any, moment: int | None, folder: Path) -> None:
    """The folder of a run that was stopped at a moment, or is through."""
    seen: list[tuple[str, str]] = []
    ends = nullcontext() if moment is None else pytest.raises(StoppedError)
    with stopped_after(lambda: len(seen) - 1 == moment, seen), ends:
        case.go(folder)


def gone_wrong(case: Any, folder: Path, path: Path, edit: Edit, expected: Any) -> str | None:
    """Edit a file of a copy of `folder`, let the run go on, and say what is wrong then."""
    copy = folder.with_name("edited")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    target = copy / path.relative_to(folder)
    before = target.read_bytes()
    data = edit(before)
    if data == before:
        return None
    target.unlink() if data is None else target.write_bytes(data)
    try:
        found = case.go(copy)
    except SelfRewardingError as error:
        named = path.name if data is not None else str(copy)  # of a deleted file the folder
        return None if named in str(error) else f"an error without it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    differ = [what for what in expected.keys() | found.keys() if expected[what] != found[what]]
    return f"other {', '.join(sorted(differ))}" if differ else None


def places(stopped: dict[int | None, Path]) -> dict[tuple[str, str], list[int | None]]:
    """Each file and each of its edits, with the moments at which the run has that file."""
    found: dict[tuple[str, str], list[int | None]] = {}
    for moment, folder in stopped.items():
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in LOGS):
            for words in edits_of(path):
                found.setdefault((path.relative_to(folder).as_posix(), words), []).append(moment)
    return found


def stopped_with(case: Any, file: str, folder: Path) -> Path:
    """A file of a run that is stopped as soon as that file has two lines, or is there."""
    path = folder / file

    def is_there() -> bool:
        least = 2 if path.suffix == ".jsonl" else 0
        return path.exists() and len(lines_of(path.read_bytes())) >= least

    with stopped_after(is_there, []), pytest.raises(StoppedError):
        case.go(folder)
    return path


@pytest.mark.parametrize(
    "name, file",
    [
        ("spin", "01-spin/prompts.jsonl"),
        ("spin", "01-spin/candidates.0.jsonl"),
        ("spin", "01-spin/candidates.jsonl"),
        ("spin", "01-spin/pairs.0.jsonl"),
        ("spin", "01-spin/pairs.jsonl"),
        ("judge_examples", "01-eft/judgements.0.jsonl"),
        ("judge_examples", "01-eft/demonstrations.jsonl"),
        ("self_instruct", "02-external_reward/instructions.0.jsonl"),
        ("self_instruct", "02-external_reward/instructions.jsonl"),
        ("compare voted", "first/candidates.jsonl"),
        ("compare voted", "judged/judgements.0.jsonl"),
    ],
)
def test_records_that_were_edited_while_the_run_stood_still_are_named(name, file, tmp_path):
    """Each time that it is started, so nothing vouches for the edit meanwhile."""
    path = stopped_with(CASES[name], file, tmp_path)
    whole = path.read_bytes()
    for words in ("last value", "last value", "first line deleted", "lines swapped"):
        path.write_bytes(LINES[words](whole) or b"")
        with pytest.raises(StoreError, match=f"{path.name} is not the file that was written"):
            CASES[name].go(tmp_path)


@pytest.mark.parametrize("begun", ["now", "earlier"])
def test_where_a_stage_stopped_in_its_prompts_is_not_taken_from_a_file_that_was_edited(
    begun, tmp_path
):
    """Version 0.1.0 wrote no digest of done.json: what it says is held against the prompts."""
    case = CASES["compared"]
    if begun == "earlier":
        shutil.copytree(EARLIER / "compared" / "run", tmp_path, dirs_exist_ok=True)
        path = tmp_path / "01-two_at_once" / "done.json"
    else:
        path = stopped_with(case, "01-two_at_once/done.json", tmp_path)
    whole = path.read_bytes()
    for value in (0, 7, -3, True, None):
        path.write_text(json.dumps({**json.loads(whole), "next_prompt": value}))
        with pytest.raises(StoreError, match=r"done\.json"):
            case.go(tmp_path)
    path.write_bytes(whole)
    case.go(tmp_path)


def test_a_run_json_that_was_edited_is_named(tmp_path):
    case = CASES["sampling"]
    stopped_with(case, "02-self_reward/candidates.0.jsonl", tmp_path)
    path = tmp_path / "run.json"
    info = json.loads(path.read_text())
    for name in info:
        changed = {"format": 1, "stages": info["stages"][:1]}.get(name, other(info[name]))
        path.write_text(json.dumps({**info, name: changed}))
        for go_on in (case.go, Run.open):
            with pytest.raises(StoreError, match=r"run\.json is not the file that was written"):
                go_on(tmp_path)


@pytest.mark.parametrize("name, stage", [("spin", "01-spin"), ("contrastive", "01-kind")])
def test_a_prompt_whose_answer_is_on_disk_is_stored_again(name, stage, tmp_path):
    case = CASES[name]
    expected = case.go(tmp_path / "straight")
    path = stopped_with(case, f"{stage}/candidates.0.jsonl", tmp_path / "stopped")
    path.with_name("prompts.0.jsonl").unlink()
    assert case.go(tmp_path / "stopped") == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_file_of_a_run_that_was_edited_is_named_or_changes_nothing(name, tmp_path):
    """Each edit of each file, at one of the moments at which the run has it."""
    case, seen = CASES[name], list[tuple[str, str]]()
    with stopped_after(lambda: False, seen):
        expected = case.go(tmp_path / "straight")
    stopped = {moment: tmp_path / f"stopped {moment}" for moment in moments(seen)}
    for moment, folder in stopped.items():
        halted(case, moment, folder)
    draw, wrong, tried = random.Random(0), list[str](), 0
    for (file, words), when in places(stopped).items():
        moment = draw.choice(when)
        path, tried = stopped[moment] / file, tried + 1
        problem = gone_wrong(case, stopped[moment], path, edits_of(path)[words], expected)
        if problem is not None:
            wrong.append(f"{seen[moment] if moment else 'done'}: {file}, {words}: {problem}")
    print(f"{name}: {tried} edits, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
