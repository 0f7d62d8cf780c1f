"""What is on disk: records, weights, markers; and a run as a whole, read back or gone on with."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.errors import Interrupted, RunMismatchError, StoreError
from self_rewarding_lm.records import (
    Candidate,
    Judgement,
    PreferencePair,
    Prompt,
    RankedReplies,
    ReferenceLogprobs,
    TrainingRow,
    to_json,
)
from self_rewarding_lm.runs.fingerprint import FREE_SETTINGS, as_named_now, fingerprint_of
from self_rewarding_lm.runs.lines import append_lines, read_lines
from self_rewarding_lm.runs.resume import begin_run, save_initial
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stage_files import read_json
from self_rewarding_lm.runs.stage_folder import StageDir, clear, remove_stage, write_json
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.runs.weights import read_weights, weights_hash, write_weights
from self_rewarding_lm.runtime import Runtime


class Saved:
    """A bare module as a stage's weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def save(self, folder: Path) -> None:
        write_weights(self.module, folder / "model.safetensors")

    def load(self, file: Path) -> None:
        read_weights(self.module, file)


TEXT = 'two\nlines, "quotes", \\, tab\t, nul\0, \u2028, \x85, ü, 語, 🙂'


def stage_dir(tmp_path, settings=None):
    stage = StageDir(tmp_path / "00-sft", Runtime({}, quiet=True))
    stage.begin(settings or {})
    return stage


def candidate(record_id, text="t"):
    return Candidate(record_id, record_id.rsplit("/", 1)[0], (1, 2), text, True, 8)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# Records


@pytest.mark.parametrize(
    "record",
    [
        Prompt("sr/0/1", 0, (0, 5, 2), TEXT, {"topic": TEXT, "n": 3, "x": 0.1, "no": None}, (7,)),
        Prompt("sr/0/1", 0, (0,)),
        Candidate("sr/0/1/2", "sr/0/1", (), TEXT, None, 256),
        Candidate("sr/0/1/2", "sr/0/1", (0,), None, False, 1),
        Judgement("sr/0/1/2/j0", ("sr/0/1/2", "sr/0/1/3"), "self", 0.1 + 0.2, None, TEXT),
        Judgement("sr/0/1/2/j0", ("sr/0/1/2",), "self", None, "no_score"),
        PreferencePair("sr/0/1", (1,), (2, 3), (4,), TEXT, TEXT, "", "a", None, 5.0, -0.0),
        ReferenceLogprobs("sr/0/1/r0", (-1e-30, -0.1, 0.0), (-math.inf, -123456.789)),
        TrainingRow("sft/0", (0, 1, 2), (False, True, True)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_comes_back_from_disk_as_it_was(tmp_path, record):
    stage = stage_dir(tmp_path)
    stage.append([record])
    assert stage.read(type(record)) == [record]
    stage.merge(type(record))
    assert stage.read(type(record)) == [record]


def test_records_of_two_types_do_not_mix(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([Prompt("a/0", 0, (1,))])
    stage.append([candidate("a/0/0")])
    assert [p.id for p in stage.read(Prompt)] == ["a/0"]
    assert [c.id for c in stage.read(Candidate)] == ["a/0/0"]


def test_nothing_on_disk_reads_as_no_records(tmp_path):
    assert stage_dir(tmp_path).read(Candidate) == []


def test_merging_makes_one_file_ordered_by_id_with_numbers_as_numbers(tmp_path):
    stage = stage_dir(tmp_path)
    ids = ["sr/10/0/0", "sr/9/0/0", "sr/2/0/11", "sr/2/0/3", "sr-2/0/0/0"]
    for record_id in ids:
        stage.append([candidate(record_id)])
    stage.merge(Candidate)
    assert [c.id for c in stage.read(Candidate)] == [
        "sr/2/0/3",
        "sr/2/0/11",
        "sr/9/0/0",
        "sr/10/0/0",
        "sr-2/0/0/0",
    ]
    assert files(stage.path) == ["candidates.jsonl", "config.json", "events.jsonl", "files.json"]


def write_as_rank(stage, rank, records):
    append_lines(stage.path / f"candidates.{rank}.jsonl", map(to_json, records), sealed=True)


def test_merging_takes_in_what_the_other_processes_wrote(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0"), candidate("a/2/0")])
    write_as_rank(stage, 1, [candidate("a/1/0")])
    write_as_rank(stage, 11, [candidate("a/3/0")])
    assert {c.id for c in stage.read(Candidate)} == {"a/0/0", "a/1/0", "a/2/0", "a/3/0"}
    stage.merge(Candidate)
    assert [c.id for c in stage.read(Candidate)] == ["a/0/0", "a/1/0", "a/2/0", "a/3/0"]
    assert files(stage.path) == ["candidates.jsonl", "config.json", "events.jsonl", "files.json"]


def test_merging_again_adds_to_what_was_merged_before(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/1/0")])
    stage.merge(Candidate)
    stage.append([candidate("a/0/0")])
    stage.merge(Candidate)
    stage.merge(Candidate)
    assert [c.id for c in stage.read(Candidate)] == ["a/0/0", "a/1/0"]


def test_a_record_that_two_files_hold_is_there_once_and_the_merged_one_counts(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0", "first")])
    stage.merge(Candidate)
    stage.append([candidate("a/0/0", "second")])
    write_as_rank(stage, 1, [candidate("a/0/0", "third")])
    stage.merge(Candidate)
    assert stage.read(Candidate) == [candidate("a/0/0", "first")]


def test_kept_records_are_on_disk_when_they_are_given_in_lists_of_64(tmp_path):
    stage, sizes = stage_dir(tmp_path), []
    records = [candidate(f"a/{i}") for i in range(150)]
    for some in stage.keep(iter(records)):
        sizes.append(len(some))
        assert [c.id for c in stage.stored(Candidate)][-len(some) :] == [c.id for c in some]
    assert sizes == [64, 64, 22]
    assert stage.read(Candidate) == records
    assert list(stage.keep([])) == []


def test_records_that_came_before_an_error_are_kept(tmp_path):
    def coming():
        yield from (candidate(f"a/{i}") for i in range(70))
        raise KeyError("the seventy-first")

    stage, sizes = stage_dir(tmp_path), []
    with pytest.raises(KeyError):
        for some in stage.keep(coming()):
            sizes.append(len(some))
    assert sizes == [64, 6] and len(stage.read(Candidate)) == 70


def test_a_signal_is_heeded_behind_the_record_at_hand_which_is_kept(tmp_path):
    stage, seen = stage_dir(tmp_path), []

    def coming():
        for i in range(5):
            if i == 2:
                stage.runtime.stopping.asked = "SIGTERM"
            yield candidate(f"a/{i}")

    with pytest.raises(Interrupted):
        for some in stage.keep(coming()):
            seen += [c.id for c in some]
    assert seen == [c.id for c in stage.read(Candidate)] == ["a/0", "a/1", "a/2"]


def test_whoever_stops_asking_has_kept_what_was_given(tmp_path):
    stage = stage_dir(tmp_path)
    lists = stage.keep(candidate(f"a/{i}") for i in range(100))
    assert len(next(lists)) == 64
    lists.close()
    assert len(stage.read(Candidate)) == 64


def test_missing_are_the_ids_without_a_record_in_the_order_asked_for(tmp_path):
    stage = stage_dir(tmp_path)
    assert stage.missing(Candidate, ["b", "a"]) == ["b", "a"]
    stage.append([candidate("x/1"), candidate("x/3")])
    stage.append([Judgement("x/2", ("x/1",), "judge", 1.0)])
    asked = (f"x/{i}" for i in (4, 3, 2, 1))
    assert stage.missing(Candidate, asked) == ["x/4", "x/2"]
    stage.merge(Candidate)
    assert stage.missing(Candidate, ["x/3", "x/2"]) == ["x/2"]


def test_merging_leaves_the_files_of_other_kinds_alone(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([Prompt("a/0", 0, (1,))])
    stage.append([candidate("a/0/0")])
    stage.merge(Candidate)
    names = ["candidates.jsonl", "config.json", "events.jsonl", "files.json", "prompts.0.jsonl"]
    assert files(stage.path) == names


def test_trap_8_stages_have_files_of_their_own(tmp_path):
    runtime = Runtime({}, quiet=True)
    one, other = StageDir(tmp_path / "00-a", runtime), StageDir(tmp_path / "01-b", runtime)
    one.begin({}), other.begin({})
    one.append([candidate("a/0/0")])
    other.append([candidate("b/0/0")])
    assert [c.id for c in one.read(Candidate)] == ["a/0/0"]
    assert [c.id for c in other.read(Candidate)] == ["b/0/0"]


@pytest.mark.parametrize(
    "torn", [b'{"id": "a/1/0", "prom', '{"id": "a/1/0", "text": "ü'.encode()[:-1]]
)
def test_a_torn_last_line_is_cut_off_and_the_next_record_is_not_glued_onto_it(tmp_path, torn):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0")])
    path = stage.path / "candidates.0.jsonl"
    with path.open("ab") as file:
        file.write(torn)
    assert [c.id for c in stage.read(Candidate)] == ["a/0/0"]
    stage.append([candidate("a/1/0")])
    assert [c.id for c in stage.read(Candidate)] == ["a/0/0", "a/1/0"]
    assert path.read_bytes().count(b"\n") == 2


def test_a_file_that_is_nothing_but_a_torn_line_begins_anew(tmp_path):
    stage = stage_dir(tmp_path)
    path = stage.path / "candidates.0.jsonl"
    path.write_bytes(b'{"id": "a/0')
    assert stage.read(Candidate) == []
    stage.append([candidate("a/0/0")])
    assert stage.read(Candidate) == [candidate("a/0/0")]


def test_a_torn_line_of_metrics_is_cut_off_too(tmp_path):
    stage = stage_dir(tmp_path)
    stage.log({"step": 1, "loss": 0.5})
    with (stage.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    stage.log({"step": 2, "loss": 0.25})
    lines = (stage.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_a_training_that_begins_anew_takes_back_what_it_said_and_nothing_of_the_one_before(
    tmp_path,
):
    """Both check for early stopping after step 2: the one before at its end, this one at first."""
    check = "early_stopping/score"
    before = [{"step": 0, check: 1.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    before += [{"step": 2, check: 2.0}, {"step": 0, "rows/truncated": 0}]
    own = [{"step": 2, check: 2.0}, {"step": 3, "loss": 1.0}, {"step": 3, check: 3.0}]

    def left(lines, step):
        metrics = tmp_path / "00-sft" / "metrics.jsonl"
        metrics.parent.mkdir(exist_ok=True)
        metrics.unlink(missing_ok=True)
        append_lines(metrics, lines)
        stage = stage_dir(tmp_path)
        stage.cut_metrics(step)
        for line in own:
            stage.log(line, again=False)
        stage.log({"step": 0, "rows/truncated": 0})  # said again
        return list(read_lines(metrics))

    assert left(before + own, 2) == left(before, 2) == before + own
    assert left([*before, *own, {"step": 4, "loss": 1.0}], 3) == before + own + own
    assert left([{"step": 0, check: 1.0}, {"step": 0, "rows/truncated": 0}], 0) == [
        {"step": 0, "rows/truncated": 0},
        *own,
    ]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_file_and_line(tmp_path):
    stage = stage_dir(tmp_path)
    for i in range(3):
        stage.append([candidate(f"a/{i}/0")])
    path = stage.path / "candidates.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(StoreError, match=r"candidates\.0\.jsonl is not .* line 2"):
        stage.read(Candidate)


@pytest.mark.parametrize(
    "line",
    ['{"id": "a/0/0", "colour": 3}', '{"id": "a/0/0"}', '{"prompt_id": "a"}', "[1, 2]", "null"],
)
def test_a_line_that_is_json_but_no_record_is_an_error_that_names_the_file(tmp_path, line):
    stage = stage_dir(tmp_path)
    (stage.path / "candidates.jsonl").write_text(line + "\n")
    with pytest.raises(StoreError, match=r"candidates\.jsonl"):
        stage.read(Candidate)


def test_lone_surrogates_in_a_text_do_not_stop_the_run(tmp_path):
    """A byte-level decoder may give them; UTF-8 cannot hold them."""
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0", "before \ud83d after"), candidate("a/1/0", TEXT)])
    stage.log({"text": "\udc80"})
    stage.merge(Candidate)
    broken, whole = stage.read(Candidate)
    assert whole == candidate("a/1/0", TEXT)
    assert broken.text is not None
    assert broken.text.startswith("before ") and broken.text.endswith(" after")


def test_ids_are_ordered_part_by_part_with_numbers_as_numbers():
    ids = ["a/2/0", "a/10/0", "a/2", "a/2/0/j1", "b/1", "a/x/0", "a/2/0/j0"]
    assert sorted(ids, key=id_order) == [
        "a/2",
        "a/2/0",
        "a/2/0/j0",
        "a/2/0/j1",
        "a/10/0",
        "a/x/0",
        "b/1",
    ]


# Markers and settings


def test_done_is_written_at_the_finish_and_holds_the_summary(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0")])
    stage.merge(Candidate)
    stage.save_weights(Saved(nn.Linear(2, 2)))
    stage.summary |= {"steps": 3}
    assert not stage.is_done and not (stage.path / "done.json").exists()
    stage.finish()
    assert stage.is_done
    assert read_json(stage.path / "done.json") == {"steps": 3}


def test_what_a_stage_needs_until_it_is_done_goes_with_a_draft_of_the_ledger(tmp_path):
    """A run that was killed while the ledger took done.json has one."""
    stage = stage_dir(tmp_path)
    stage.finish()
    before = files(tmp_path)
    for name in ("files.json.tmp", "state.safetensors"):
        (stage.path / name).write_text("{")
    clear(stage.path)
    assert files(tmp_path) == before


def test_a_stage_that_began_keeps_the_settings_it_began_with(tmp_path):
    stage_dir(tmp_path, {"beta": 0.1})
    again = stage_dir(tmp_path, {"beta": 0.2})
    assert read_json(again.path / "config.json") == {"beta": 0.1}


def test_a_json_file_is_written_whole_and_leaves_no_draft(tmp_path):
    path = tmp_path / "x.json"
    for values in ({"text": TEXT, "n": None}, {"n": [1, 2.5]}):
        write_json(path, values)
        assert read_json(path) == values
    assert files(tmp_path) == ["files.json", "x.json"]


def test_settings_with_lone_surrogates_can_be_written(tmp_path):
    write_json(tmp_path / "x.json", {"text": "before \ud83d", "n": 1})
    assert read_json(tmp_path / "x.json")["n"] == 1


def test_a_json_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "missing.json"):
        with pytest.raises(StoreError, match=name):
            read_json(tmp_path / name)


# Weights


class Odd(nn.Module):
    """Tied, transposed, and of several number types."""

    def __init__(self, seed, width=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.transposed = nn.Parameter(torch.randn(4, 2).t())
        self.in_float64 = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.in_bfloat16 = nn.Parameter(torch.randn(2).to(torch.bfloat16))
        self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("mask", torch.tensor([True, False]))


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def test_weights_come_back_bit_for_bit_tied_transposed_and_of_any_number_type(tmp_path):
    first, second = Odd(1), Odd(2)
    assert not same(first, second)
    path = tmp_path / "model" / "model.safetensors"
    write_weights(first, path)
    read_weights(second, path)
    assert same(first, second)
    assert second.head.weight is second.embed.weight
    assert files(tmp_path) == ["model/model.safetensors"]


def test_saving_leaves_a_module_as_it_was(tmp_path):
    module, twin = Odd(1), Odd(1)
    write_weights(module, tmp_path / "model.safetensors")
    assert same(module, twin)
    assert not module.transposed.is_contiguous()
    assert module.head.weight is module.embed.weight


def test_reading_fills_the_tensors_that_an_optimiser_already_holds(tmp_path):
    module = Odd(2)
    held = module.embed.weight
    write_weights(Odd(1), tmp_path / "model.safetensors")
    read_weights(module, tmp_path / "model.safetensors")
    assert module.embed.weight is held
    assert torch.equal(held, Odd(1).embed.weight)


def test_weights_of_another_shape_are_an_error(tmp_path):
    write_weights(Odd(1), tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match="cannot be loaded into this model"):
        read_weights(Odd(1, width=4), tmp_path / "model.safetensors")


def test_weights_of_another_model_are_an_error(tmp_path):
    write_weights(nn.Linear(2, 2), tmp_path / "model.safetensors")
    for other in (nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(StoreError, match="cannot be loaded into this model"):
            read_weights(other, tmp_path / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 20, 150])
def test_a_damaged_or_missing_file_of_weights_is_an_error(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    write_weights(nn.Linear(4, 4), path)
    path.write_bytes(path.read_bytes()[:kept])
    for where in (path, tmp_path / "missing.safetensors"):
        with pytest.raises(StoreError, match=where.name):
            read_weights(nn.Linear(4, 4), where)


@pytest.mark.parametrize("name", ["transposed", "in_bfloat16", "scalar", "steps", "mask"])
def test_the_hash_of_weights_changes_with_any_of_them(name):
    module = Odd(1)
    before = weights_hash(module)
    assert weights_hash(Odd(1)) == before
    with torch.no_grad():
        tensor = module.state_dict()[name]
        tensor.copy_(~tensor if name == "mask" else tensor + 1)
    assert weights_hash(module) != before


# Removing a stage


def test_removing_a_stage_removes_all_that_the_library_wrote(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0")])
    stage.merge(Candidate)
    stage.append([candidate("a/1/0")])
    stage.append([Prompt("a/0", 0, (1,))])
    stage.log({"step": 1})
    stage.save_weights(Saved(nn.Linear(2, 2)))
    stage.save_weights(Saved(nn.Linear(2, 2)), "checkpoint-10")
    (stage.path / "candidates.jsonl.tmp").write_text("half")
    stage.finish()
    remove_stage(stage.path)
    assert not stage.path.exists()


def test_removing_a_stage_leaves_foreign_files(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append([candidate("a/0/0")])
    stage.save_weights(Saved(nn.Linear(2, 2)))
    foreign = ["notes.txt", "model/README.md", "plots/a.png", "my.jsonl", "candidates.old.jsonl"]
    for name in foreign:
        (stage.path / name).parent.mkdir(exist_ok=True)
        (stage.path / name).write_text("mine")
    remove_stage(stage.path)
    assert files(stage.path) == sorted(foreign)


def test_removing_a_stage_leaves_weights_in_a_folder_that_the_library_did_not_make(tmp_path):
    stage = stage_dir(tmp_path)
    write_weights(nn.Linear(2, 2), stage.path / "my-best" / "model.safetensors")
    remove_stage(stage.path)
    assert files(stage.path) == ["my-best/model.safetensors"]


def test_at_a_stages_end_go_the_weights_that_it_needed_until_then(tmp_path):
    stage = stage_dir(tmp_path)
    for name in ("model", "checkpoint-10", "best", "ahead", "iteration-0"):
        stage.save_weights(Saved(nn.Linear(2, 2)), name)
    (stage.path / "ahead" / "notes.txt").write_text("mine")
    stage.finish()
    folders = {p.name: files(p) for p in stage.path.iterdir() if p.is_dir()}
    file = ["model.safetensors"]
    assert folders == {"model": file, "checkpoint-10": file, "ahead": ["notes.txt"]}


def test_dropping_weights_leaves_others(tmp_path):
    stage = stage_dir(tmp_path)
    for name in ("model", "iteration-0"):
        stage.save_weights(Saved(nn.Linear(2, 2)), name)
    stage.drop_weights("iteration-0")
    assert stage.weights("iteration-0") is None
    assert stage.weights() == stage.path / "model" / "model.safetensors"


# A run as a whole


def writable(run):
    """The run's SFT stage, to write."""
    return StageDir(run.stage("sft").path, Runtime({}, quiet=True))


STAGES = ["00-sft", "01-self_reward"]


def begin(folder, *, settings=({"a": 1}, {"b": 1}), stages=STAGES, overwrite=False, model=None):
    return begin_run(
        folder,
        runtime=Runtime({}, quiet=True),
        stages=stages,
        settings=settings,
        model=model or nn.Linear(2, 2),
        seed=3,
        overwrite=overwrite,
    )


def test_a_folder_without_a_run_cannot_be_opened(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="holds no run"):
            Run.open(folder)


def test_a_run_is_read_back_from_its_folder_alone(tmp_path):
    run = begin(tmp_path)
    stage = writable(run)
    stage.begin({"a": 1})
    pair = PreferencePair("sft/0", (1,), (2,), (3,), "p", "c", "r")
    stage.append([pair, PreferencePair("sft/1", (4,), (5,), (6,))])
    stage.append([candidate("sft/0/0")])
    stage.log({"step": 1, "loss": 2.0})
    stage.save_weights(Saved(nn.Linear(2, 2)))
    stage.summary |= {"steps": 1}
    stage.finish()

    back = Run.open(str(tmp_path))
    assert back.stages == ["sft", "self_reward"]
    assert back.is_done("sft") and not back.is_done("self_reward")
    assert "1 of 2 stages done" in repr(back)
    assert back.info["seed"] == 3
    assert back.settings("sft") == {"a": 1} and back.settings("self_reward") == {}
    assert back.summary("sft") == {"steps": 1} and back.summary("self_reward") == {}
    assert back.metrics("sft") == [{"step": 1, "loss": 2.0}]
    assert back.candidates("sft") == [candidate("sft/0/0")]
    assert back.pairs("sft")[0] == pair
    assert back.judgements("sft") == back.prompts("sft") == back.rows("sft") == []
    assert back.preference_rows("sft") == [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": (4,), "chosen": (5,), "rejected": (6,)},
    ]


def test_a_stage_is_named_by_its_name_its_folder_or_its_place(tmp_path):
    run = begin(tmp_path)
    for which in ("self_reward", "01-self_reward", 1, -1):
        assert run.stage(which).path == tmp_path / "01-self_reward"
    for which in ("spin", 2, -3):
        with pytest.raises(StoreError, match="it has: sft, self_reward"):
            run.stage(which)


def test_weights_of_a_stage_are_loaded_and_missing_ones_are_an_error(tmp_path):
    run, trained, other = begin(tmp_path), nn.Linear(2, 2), nn.Linear(2, 2)
    writable(run).save_weights(Saved(trained))
    run.load_weights(other, "sft")
    assert same(trained, other)
    with pytest.raises(StoreError, match="'self_reward'"):
        run.weights("self_reward")


def test_the_initial_weights_are_kept_as_they_were_at_the_first_start(tmp_path):
    first, other = nn.Linear(2, 2), nn.Linear(2, 2)
    run = begin(tmp_path, model=first)
    with pytest.raises(StoreError, match="were not kept"):
        save_initial(run, Saved(other), other, Runtime({}, quiet=True))
    for module in (first, other):  # the second time they are there already
        save_initial(run, Saved(module), module, Runtime({}, quiet=True))
    run.load_weights(other, "initial")
    assert same(first, other)


def test_a_run_goes_on_with_the_same_settings_and_keeps_its_beginning(tmp_path):
    first = begin(tmp_path)
    writable(first).begin({"a": 1})
    writable(first).finish()
    again = begin(tmp_path)
    assert again.info["created"] == first.info["created"]
    assert again.info["model"]["hash"] == first.info["model"]["hash"]


def test_a_started_stage_with_other_settings_is_refused_with_the_difference(tmp_path):
    writable(begin(tmp_path)).begin({"a": 1})
    with pytest.raises(RunMismatchError, match=r'(?s)-\s*"a": 1.*\+\s*"a": 2'):
        begin(tmp_path, settings=({"a": 2}, {"b": 1}))


def test_a_stage_that_has_not_started_may_change(tmp_path):
    writable(begin(tmp_path)).begin({"a": 1})
    run = begin(tmp_path, settings=({"a": 1}, {"c": 2}), stages=["00-sft", "01-dpo"])
    assert run.stages == ["sft", "dpo"]


def test_a_started_stage_cannot_be_left_out(tmp_path):
    writable(begin(tmp_path)).begin({"a": 1})
    with pytest.raises(RunMismatchError, match="not among this run's"):
        begin(tmp_path, stages=["00-dpo"], settings=({"b": 1},))


def test_overwriting_starts_anew_and_removes_nothing_foreign(tmp_path):
    first = nn.Linear(2, 2)
    run = begin(tmp_path, model=first)
    writable(run).begin({"a": 1})
    writable(run).append([candidate("sft/0/0")])
    save_initial(run, Saved(first), first, Runtime({}, quiet=True))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "02-other").mkdir()
    (tmp_path / "02-other" / "candidates.jsonl").write_text("mine")
    again = begin(tmp_path, settings=({"a": 2}, {"b": 1}), overwrite=True)
    assert again.candidates("sft") == []
    assert files(tmp_path) == ["02-other/candidates.jsonl", "files.json", "notes.txt", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_in_a_stages_place_that_no_run_made_stop_the_start(tmp_path, overwrite):
    (tmp_path / "00-sft").mkdir()
    (tmp_path / "00-sft" / "candidates.jsonl").write_text("mine")
    with pytest.raises(StoreError, match=r"00-sft holds files"):
        begin(tmp_path, overwrite=overwrite)
    assert files(tmp_path) == ["00-sft/candidates.jsonl"]


def test_files_in_the_way_of_a_run_that_starts_anew_leave_the_earlier_run_as_it_was(tmp_path):
    run = begin(tmp_path)
    writable(run).begin({})
    (tmp_path / "02-more").mkdir()
    (tmp_path / "02-more" / "notes.txt").write_text("mine")
    before = files(tmp_path)
    more = {"stages": [*STAGES, "02-more"], "settings": ({}, {}, {})}
    with pytest.raises(StoreError, match="02-more holds files"):
        begin(tmp_path, overwrite=True, **more)
    assert files(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_file_of_another_program_stops_the_start(tmp_path, overwrite):
    (tmp_path / "run.json").write_text('{"library": "another"}')
    with pytest.raises(StoreError, match="was not written by self_rewarding_lm"):
        begin(tmp_path, overwrite=overwrite)
    assert json.loads((tmp_path / "run.json").read_text()) == {"library": "another"}


def test_a_run_file_of_another_program_cannot_be_opened(tmp_path):
    (tmp_path / "run.json").write_text('{"library": "another"}')
    with pytest.raises(StoreError, match=r"run\.json"):
        Run.open(tmp_path)


# How settings are described


def test_plain_values_describe_themselves():
    for value in (None, True, 3, 0.1, "text", [1, "a", None], {"a": [1.5]}):
        assert fingerprint_of(value) == value
    assert fingerprint_of((1, 2)) == [1, 2]


def test_a_file_is_described_by_its_content(tmp_path):
    paths = [tmp_path / folder / "rows.jsonl" for folder in ("a", "b", "c")]
    for path, content in zip(paths, ("1", "1", "2"), strict=True):
        path.parent.mkdir()
        path.write_text(content)
    same_content = fingerprint_of(paths[0])
    assert fingerprint_of(str(paths[0])) == same_content == fingerprint_of(paths[1])
    assert fingerprint_of(paths[2]) != same_content


@pytest.mark.parametrize("length", [200, 300, 1_000, 2_000])
def test_a_long_text_of_one_line_describes_itself(length):
    """A name of a file has 255 characters at most; asking for it must not fail."""
    assert fingerprint_of("x" * length) == "x" * length
    assert fingerprint_of(["x" * length]) == ["x" * length]


def test_functions_and_classes_are_described_by_their_qualified_name():
    assert fingerprint_of(best) == f"{__name__}.best"
    assert fingerprint_of(SamplingConfig) == "self_rewarding_lm.SamplingConfig"


def best(scores):
    return max(scores)


def test_datasets_are_described_by_type_and_length_not_by_their_rows():
    rows = torch.utils.data.TensorDataset(torch.arange(5))
    assert fingerprint_of(rows) == "torch.utils.data.dataset.TensorDataset[5]"
    assert fingerprint_of([("a", i) for i in range(100)]) == "builtins.list[100]"


def test_other_objects_are_described_by_their_type_so_that_the_next_process_agrees():
    assert fingerprint_of(Odd(1)) == f"{__name__}.Odd" == fingerprint_of(Odd(2))
    assert fingerprint_of(functools.partial(best, [1])) == "functools.partial"


def test_changes_of_free_settings_do_not_show_and_others_do():
    plain = fingerprint_of(OptimConfig())
    free = {"micro_batch_tokens": 7, "micro_batch_size": 2, "checkpoint_every": 9}
    free |= {"save_state_every": 3, "save_state_minutes": 1.5}
    assert set(free) == set(FREE_SETTINGS) - {"checks", "min_parse_rate"}  # of stages
    assert fingerprint_of(OptimConfig(**free)) == plain
    assert fingerprint_of(OptimConfig(batch_size=7)) != plain


def test_a_described_config_is_json_and_says_what_is_in_it():
    config = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}", parse_reward=best, score_range=(0, 5)
    )
    found = fingerprint_of(config)
    assert json.loads(json.dumps(found)) == found
    assert found["score_range"] == [0, 5]
    assert found["parse_reward"] == f"{__name__}.best"


def test_records_in_a_setting_are_named_by_their_content():
    one = RankedReplies("a", "q", ("x", "y"), (0.0, 1.0), "tree")
    assert fingerprint_of([one]) == fingerprint_of(
        [RankedReplies("a", "q", ("x", "y"), (0.0, 1.0), "tree")]
    )
    assert fingerprint_of([one]) != fingerprint_of(
        [RankedReplies("a", "q", ("x", "z"), (0.0, 1.0), "tree")]
    )


def test_names_of_an_earlier_version_are_read_as_those_of_now():
    """Whatever file an object of the library stood in when its run began."""
    old = {
        "judge": "self_rewarding_lm.votes.VoteJudge",
        "dataset": "self_rewarding_lm.datasets.create_mock_dataset.<locals>.MockDataset[4]",
        "adapter": ["self_rewarding_lm.adapters.plain.PlainModel", 1, None],
        "other": "tests.fixtures.judges.vowels",
        "text": "self_rewarding_lm is a library. It is.",
    }
    assert as_named_now(old) == {
        "judge": "self_rewarding_lm.VoteJudge",
        "dataset": "self_rewarding_lm.create_mock_dataset.<locals>.MockDataset[4]",
        "adapter": ["self_rewarding_lm.PlainModel", 1, None],
        "other": "tests.fixtures.judges.vowels",
        "text": "self_rewarding_lm is a library. It is.",
    }
    assert as_named_now(as_named_now(old)) == as_named_now(old)
