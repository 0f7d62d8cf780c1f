"""Rows in, from whatever holds them; and the tokenizer between texts and ids.

The tokenizer of these tests: a is 1, b is 2, ... and the end token is 0. The vocabulary has 30.
"""

import gzip
import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import tensor
from torch.utils.data import Dataset, IterableDataset

from self_rewarding_lm import DPOConfig, Run, SelfPlayConfig
from self_rewarding_lm.config import FromStage, from_stage
from self_rewarding_lm.data.datasets import BadRows, Rows, create_mock_dataset, read_prompt
from self_rewarding_lm.data.files import SUFFIXES
from self_rewarding_lm.data.rows import prompt_of, training_row
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, TokenizerError
from self_rewarding_lm.records import Prompt, RankedReplies, TrainingRow
from self_rewarding_lm.stages.base import read_once
from tests.data.test_rows import CHAT, EOS, TOKENS, WITHOUT_TEXT, letters, text_of
from tests.support.models import Successor, context, stage_dir
from tests.support.processes import two
from tests.test_trainer import (
    QUICK,
    SHORT,
    StopError,
    external,
    model64,
    same,
    sft,
    trainer_of,
    weights_of,
)


class Listed(Dataset):
    """A torch dataset that counts how often each row is read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, [0] * len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.rows[index]


def opened(dataset, name="train_dataset", resolve=None):
    return Rows(dataset, name, resolve or (lambda part: pytest.fail("no stage is asked for")))


def all_of(rows):
    return [rows.read(i) for i in range(len(rows))]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Datasets

PAIRS = [([1, 2], 1), ([3, 4], 1), ([5, 6], 1)]


def numbers(count):
    yield from ([i] for i in range(count))


class Stream(IterableDataset):
    def __iter__(self):
        return numbers(3)


class LongStream(Stream):
    """torch gives it a __getitem__ that raises."""

    def __len__(self):
        return 3


class Endless(Dataset):
    def __getitem__(self, index):
        return [index]


@pytest.mark.parametrize(
    "dataset",
    [
        [[0], [1], [2]],
        ([0], [1], [2]),
        Listed([[0], [1], [2]]),
        Stream(),
        LongStream(),
        numbers(3),
        tensor([[0], [1], [2]]),
    ],
    ids=["list", "tuple", "torch dataset", "iterable", "iterable with len", "generator", "tensor"],
)
def test_rows_are_read_from_whatever_holds_them(dataset):
    rows = opened(dataset)
    assert len(rows) == 3
    assert [list(row) for row in all_of(rows)] == [[0], [1], [2]]
    with pytest.raises(IndexError):
        rows.read(3)


def test_a_generator_is_read_once_and_its_rows_can_be_read_again():
    rows = opened(numbers(3))
    assert [rows.peek(i) for i in rows.preview()] == [[0], [1], [2]]
    assert all_of(rows) == all_of(rows) == [[0], [1], [2]]


def written(folder, suffix, content):
    """A file of rows in one of the forms."""
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(content), path)
        return path
    by_line = "".join(json.dumps(row) + "\n" for row in content)
    text = by_line if suffix.startswith(".jsonl") else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path


MIXED = [
    {"prompt": "a", "messages": None, "n": 1},
    {"prompt": None, "messages": [{"role": "user", "content": "ü"}], "n": 2},
]


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".csv"])
def test_a_file_of_each_kind_holds_the_same_rows(suffix, tmp_path):
    path = written(tmp_path, suffix, MIXED)
    for dataset in (path, str(path)):
        rows = opened(dataset)
        assert all_of(rows) == MIXED
        assert list(rows.preview()) == [0, 1]
    assert all_of(opened([path, str(path)])) == [*MIXED, *MIXED]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked by gzip"),
        ("rows.json.gz", gzip.compress(b"[1, 2]", mtime=0)[:-6], "cannot be unpacked by gzip"),
        ("rows.parquet", b"no parquet", "is not a parquet file"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', r"A file of one row a line is named \.jsonl"),
        ("rows.json", b'"\xff"', "is not valid JSON"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_an_error(name, content, words, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train_dataset: {re.escape(str(path))}.*{words}"):
        len(opened(path))


def test_a_parquet_file_without_pyarrow_is_an_error_with_the_pip_line(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pip install .*\[data\]"'):
        len(opened(path))


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert all_of(opened(path)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_list_of_datasets_files_and_stages_is_their_concatenation(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ["c", "d"])
    asked = []

    def pairs_of(part):
        asked.append(part)
        return ["e"]

    dataset = [Listed(["a", "b"]), path, str(path), from_stage("dpo")]
    rows = opened(dataset, resolve=pairs_of)
    assert asked == []  # the stage may not be done yet
    assert all_of(rows) == ["a", "b", "c", "d", "c", "d", "e"]
    assert asked == [FromStage("dpo")]


def test_a_list_of_anything_else_is_a_list_of_rows(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ["c", "d"])
    for dataset in (["a", "b"], [[1, 2], [3]], [([1, 2], 1)], ["a", str(path)], [{"text": "a"}]):
        assert all_of(opened(dataset)) == dataset


def test_looking_ahead_does_not_read_a_row_twice():
    dataset = Listed(PAIRS)
    rows = opened(dataset)
    for _ in range(2):
        assert [(i, rows.peek(i)) for i in rows.preview()] == [(0, PAIRS[0])]
    assert all_of(rows) == PAIRS
    assert dataset.reads == [1, 1, 1]


def test_trap_10_a_row_that_was_looked_at_is_the_row_that_is_read():
    """A dataset that draws its rows at random gives another each time it is asked."""
    count = iter(range(100))
    rows = opened(create_mock_dataset(3, lambda: ([next(count), 1], 1)))
    assert list(rows.preview()) == [0]
    first = rows.peek(0)
    assert rows.read(0) is first


def test_a_list_of_conversations_is_a_list_of_rows():
    said = {"role": "user", "content": "b"}
    talks = [[said], [said]]
    rows = opened(talks)
    assert all_of(rows) == talks
    assert read_prompt(rows, 1, "sr/1/0", CHAT, None) == Prompt(
        "sr/1/0", 1, (21, 2, 1), "b", messages=(said,)
    )
    assert len(opened([[{"prompt": "a"}], [{"prompt": "b"}, {"prompt": "c"}]])) == 3  # two lists


def test_lists_of_records_are_put_together():
    ranking = RankedReplies("id", "a", ("x", "y"), (0.0, 1.0), "tree")
    assert all_of(opened([[ranking], [ranking]])) == [ranking, ranking]
    assert all_of(opened([ranking, ranking])) == [ranking, ranking]


def test_the_first_row_of_a_stage_that_is_still_to_come_is_not_known():
    assert list(opened(from_stage("dpo")).preview()) == []
    assert list(opened([Listed(PAIRS), from_stage("dpo")]).preview()) == []


def test_rows_are_named_by_dataset_and_number_and_those_of_files_by_line(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ["a", "b"])
    assert opened(["a", "b"]).where(1) == "train_dataset, row 1"
    assert opened(path).where(1) == f"{path}, line 2"
    whole = tmp_path / "rows.json"
    whole.write_text('["a", "b"]')
    assert opened(whole).where(1) == f"{whole}, row 2"


def test_rows_of_several_datasets_are_named_by_their_own_place(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ["a", "b"])
    rows = opened([Listed(["x"]), path, from_stage("dpo"), path], resolve=lambda part: ["p", "q"])
    assert [rows.where(i) for i in range(len(rows))] == [
        "train_dataset, part 0, row 0",
        f"{path}, line 1",
        f"{path}, line 2",
        "train_dataset, part 2 (from_stage('dpo')), row 0",
        "train_dataset, part 2 (from_stage('dpo')), row 1",
        f"{path}, line 1",
        f"{path}, line 2",
    ]


@pytest.mark.parametrize(
    "dataset", [[], (), Listed([]), numbers(0)], ids=lambda d: type(d).__name__
)
def test_an_empty_dataset_is_an_error(dataset):
    with pytest.raises(DataError, match="train_dataset is empty"):
        list(opened(dataset).preview())


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        ("rows.txt", r"must be \.jsonl, \.json, \.jsonl\.gz, \.json\.gz, \.csv or \.parquet; got"),
        ("missing.jsonl", r"no file 'missing\.jsonl'"),
        (
            {"prompt": "a", "completion": "b"},
            "a dict is one row or a table with 'prompt', 'completion'",
        ),
        (Endless(), "Endless has __getitem__ but neither __len__ nor __iter__"),
    ],
)
def test_what_is_no_dataset_is_refused_before_it_is_read(dataset, words):
    with pytest.raises(DataError, match=f"train_dataset.*{words}"):
        opened(dataset)


def test_a_bad_line_of_a_file_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n"\xff"\n')
    rows = opened([str(path), path])
    assert [rows.read(i) for i in (0, 2, 4, 6)] == [{"prompt": "a"}, {"prompt": "c"}] * 2
    for index, line in ((1, 2), (3, 4), (5, 2), (7, 4)):
        with pytest.raises(
            DataError, match=rf"{re.escape(str(path))}, line {line}, is not valid JSON"
        ):
            rows.read(index)


def test_lines_that_are_no_json_are_looked_at_before_the_run_however_far_they_are(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("self_rewarding_lm.data.datasets.PREVIEWED_ROWS", 2)
    path = tmp_path / "rows.jsonl"
    path.write_text('"a"\n"b"\n"c"\n{\n"e"\n')
    assert list(opened(path).preview()) == [0, 1, 3]
    assert list(opened([["a", "b"], path]).preview()) == [0, 1, 5]


def test_a_json_file_that_is_no_json_or_no_list_is_an_error(tmp_path):
    path = tmp_path / "rows.json"
    for content, words in (("[1, ", "is not valid JSON"), ('{"prompt": "a"}', "must hold a list")):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            len(opened(path))


def test_a_jsonl_file_may_end_in_an_empty_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n\n')
    assert len(opened(path)) == 2


def test_a_mock_dataset_gives_its_output_as_often_as_it_is_long():
    constant = create_mock_dataset(3, ([1, 2], 1))
    assert len(constant) == 3
    assert list(constant) == [([1, 2], 1)] * 3
    drawn = create_mock_dataset(2, lambda: torch.randint(0, 9, (4,)))
    assert [row.shape for row in drawn] == [(4,), (4,)]


def test_a_prompt_that_fills_the_model_is_an_error_that_names_it():
    rows = opened([[1, 2], [1, 2, 3]], "prompt_dataset")
    assert read_prompt(rows, 0, "sr/0/0", TOKENS, 3) == Prompt("sr/0/0", 0, (1, 2), "ab")
    with pytest.raises(DataError, match=r"prompt_dataset, row 1.* has 3 tokens.* have 3\."):
        read_prompt(rows, 1, "sr/1/0", TOKENS, 3)
    assert read_prompt(rows, 1, "sr/1/0", TOKENS, None).ids == (1, 2, 3)


# The package datasets

TALK = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_a_dataset_of_the_package_datasets_is_read_by_place_and_looked_at_in_full():
    hugging_face = pytest.importorskip("datasets")
    table = hugging_face.Dataset.from_list(TALK)
    rows = opened(table)
    assert list(rows.preview()) == [0, 1]
    assert all_of(rows) == TALK
    assert all_of(opened([table, table, TALK])) == TALK * 3


def test_a_dataset_with_a_function_over_its_rows_is_looked_at_once():
    hugging_face = pytest.importorskip("datasets")
    count = iter(range(9))
    drawn = hugging_face.Dataset.from_list(TALK).with_transform(
        lambda batch: {"prompt": [f"{next(count)}" for _ in batch["prompt"]]}
    )
    rows = opened(drawn)
    assert list(rows.preview()) == [0]
    assert rows.peek(0) == rows.peek(0) == rows.read(0) == {"prompt": "0"}


def test_an_iterable_dataset_is_read_once():
    hugging_face = pytest.importorskip("datasets")
    begun = []

    def make():
        begun.append(1)
        yield from TALK

    rows = opened(hugging_face.IterableDataset.from_generator(make))
    assert list(rows.preview()) == [0, 1]
    assert all_of(rows) == all_of(rows) == TALK
    assert len(begun) == 1


def test_a_dict_of_splits_is_refused_with_their_names():
    hugging_face = pytest.importorskip("datasets")
    table = hugging_face.Dataset.from_list(TALK)
    splits = hugging_face.DatasetDict(train=table, test=table)
    for dataset in (splits, [splits]):
        with pytest.raises(
            DataError, match=r"has the splits 'train', 'test'; give one.*\['train'\]"
        ):
            opened(dataset)


# Bad rows

GOOD = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(4)]
BAD = [
    {"prompt": "say"},
    {"prompt": "x" * 99, "completion": "b"},
    {"prompt": [999], "completion": "b"},
]
SPOILT = [GOOD[0], BAD[0], GOOD[1], BAD[1], BAD[2], GOOD[2], GOOD[3]]
GOOD_PLACES = [0, 2, 5, 6]
LIMIT = 40  # tokens; BAD[1] is too long


def skipping(**options):
    return dict(on_bad_row="skip", max_seq_len=LIMIT, **options)


def spoilt_file(folder):
    """SPOILT with a line that is no JSON at its end."""
    path = lines(folder / "spoilt.jsonl", SPOILT)
    path.write_text(path.read_text() + "{broken\n")
    return path


def test_a_bad_row_stops_a_trainer_before_its_first_stage_and_is_named_by_its_line(tmp_path):
    path = spoilt_file(tmp_path)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}, line 2: the row has no 'comp"):
        trainer_of(tmp_path / "run", [sft(), sft(train_dataset=path)])
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_left_out_counted_and_told_of_once(tmp_path, caplog):
    path = spoilt_file(tmp_path)
    run = trainer_of(tmp_path / "run", [sft(train_dataset=path, **skipping())])()
    assert [row.id for row in run.rows(0)] == [f"sft/{i}" for i in GOOD_PLACES]
    assert {"step": 0, "rows/skipped": 4} in run.metrics(0)
    assert {"step": 0, "rows/truncated": 0} in run.metrics(0)
    [warning] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "train_dataset: 4 of 8 rows cannot be used" in warning
    told = [line.strip() for line in warning.splitlines()[1:]]
    assert len(told) == 3
    assert all(f"{path}, line {n}:" in line for n, line in zip((2, 4, 5), told, strict=True))


def test_a_good_dataset_trains_the_same_whether_bad_rows_are_skipped_or_not(tmp_path):
    """And so does one with bad rows between the good."""
    weights = []
    for name, dataset, options in (
        ("raise", GOOD, {}),
        ("skip", GOOD, skipping()),
        ("spoilt", SPOILT, skipping()),
    ):
        model = model64()
        trainer_of(tmp_path / name, [sft(train_dataset=dataset, **options)], model)()
        weights.append(weights_of(model))
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


class Drawn(Dataset):
    """Every second row that is read is bad, whichever it is."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.reads += 1
        return GOOD[index % 4] if self.reads % 2 else BAD[0]


def test_a_stage_that_goes_on_has_the_rows_that_it_had(tmp_path):
    """Though the dataset would give others now, and fewer records than rows are there."""

    stops = [True]

    def score(model):
        if stops:
            raise StopError
        return 0.0

    def stage(dataset):
        often = QUICK.model_copy(update={"eval_every": 1})
        options = dict(early_stopper_eval_module=score, num_train_steps=2, optim=often)
        return sft(train_dataset=dataset, **options, **skipping())

    with pytest.raises(StopError):
        trainer_of(tmp_path, [stage(Drawn())])()
    before = Run.open(tmp_path).rows(0)
    assert [row.id for row in before] == ["sft/0", "sft/2", "sft/4"]
    stops.clear()
    other = Drawn()
    other.reads = 1  # now the other rows are good
    run = trainer_of(tmp_path, [stage(other)])()
    assert run.rows(0) == before
    assert {"step": 0, "rows/skipped": 3} in run.metrics(0)


def test_rows_that_were_not_all_written_are_read_again(tmp_path):
    ctx = context(Successor())
    out = stage_dir(ctx, tmp_path)
    made = []

    def make(row, record_id):
        made.append(row)
        if row == 1:
            raise DataError("row 1 is bad")
        return TrainingRow(record_id, (1, 2), (False, True))

    rows = opened([1, 2, 3])
    out.append([TrainingRow("stage/0", (1, 2), (False, True))])  # killed here
    found = read_once(ctx, out, rows, TrainingRow, "stage", make, on_bad_row="skip")
    assert [r.id for r in found] == ["stage/0", "stage/2"]
    assert made == [0, 1, 2]
    again = read_once(ctx, out, rows, TrainingRow, "stage", make, on_bad_row="skip")
    assert again == found
    assert made == [0, 1, 2]  # nothing was read again


def test_held_out_rows_do_not_make_the_others_look_complete(tmp_path):
    """Ids of both begin with the stage's name, and one file holds them."""
    ctx = context(Successor())
    out = stage_dir(ctx, tmp_path)

    def make(row, record_id):
        if row == 0:
            raise DataError("bad")
        return TrainingRow(record_id, (1, 2), (False, True))

    rows = opened([1, 2])
    for name in ("stage/valid", "stage"):
        found = read_once(ctx, out, rows, TrainingRow, name, make, on_bad_row="skip")
        assert [r.id for r in found] == [f"{name}/1"]


@pytest.mark.parametrize("bad", [BAD, Listed(BAD)], ids=["a list", "a dataset"])
def test_a_dataset_of_bad_rows_alone_is_an_error(bad, tmp_path):
    with pytest.raises(DataError, match=r"train_dataset: none of 3 rows can be used") as caught:
        trainer_of(tmp_path, [sft(train_dataset=bad, **skipping())])()
    assert "train_dataset, row 0: the row has no 'completion'" in str(caught.value)


def test_bad_pairs_are_left_out_of_dpo(tmp_path):
    pairs = [{"prompt": "say", "chosen": f"yes {i}", "rejected": "no"} for i in range(3)]
    same_twice = {"prompt": "say", "chosen": "no", "rejected": "no"}
    too_long = {"prompt": "x" * 99, "chosen": "yes", "rejected": "no"}
    dataset = [pairs[0], same_twice, pairs[1], too_long, pairs[2]]
    stage = DPOConfig(train_dataset=dataset, valid_dataset=dataset, optim=QUICK, **skipping())
    run = trainer_of(tmp_path, [stage])()
    assert [pair.chosen for pair in run.pairs(0)] == ["yes 0", "yes 1", "yes 2"]
    assert run.metrics(0).count({"step": 0, "rows/skipped": 2}) == 2  # and of valid_dataset


def test_bad_rows_are_left_out_of_spin(tmp_path):
    stage = SelfPlayConfig(train_dataset=SPOILT, generation=SHORT, optim=QUICK, **skipping())
    run = trainer_of(tmp_path, [stage])()
    humans = [p for p in run.prompts(0) if p.completion is not None and p.id.count("/") == 1]
    assert [p.row for p in humans] == GOOD_PLACES
    assert {"step": 0, "rows/skipped": 3} in run.metrics(0)


def test_a_bad_prompt_gives_no_pair_and_is_counted(tmp_path, caplog):
    prompts = ["tell 0", "", "tell 1", "x" * 99, {"topic": "a"}, "tell 2", [999]]
    options = dict(prompt_dataset=prompts, num_generated_preference_pairs=None, prompts_per_block=2)
    run = trainer_of(tmp_path, [external(**options, **skipping())])()
    assert [p.row for p in run.prompts(0)] == [0, 2, 5]
    [metrics] = [m for m in run.metrics(0) if "pairs/kept" in m]
    assert metrics["pairs/dropped_bad_row"] == 4
    [warning] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "4 of 7 rows" in warning
    assert "prompt_dataset, row 1: the prompt is empty" in warning


def test_prompts_that_are_all_bad_are_an_error(tmp_path):
    for number, prompts in enumerate((["", [999]], Listed(["", [999]]))):
        with pytest.raises(DataError, match="none of 2 rows can be used"):
            options = dict(prompt_dataset=prompts, num_generated_preference_pairs=None)
            trainer_of(tmp_path / str(number), [external(**options, **skipping())])()


def test_bad_rows_of_several_processes_are_told_together():
    one, other = BadRows("skip"), BadRows("skip")
    for bad, wheres in ((one, ["row 0", "row 2"]), (other, ["row 1", "row 3"])):
        for where in wheres:
            with bad.tolerated(where):
                raise TokenizerError("no ids")
    both = one.together([one, other])
    assert both.count == 4
    assert both.reasons == ["row 0: no ids", "row 2: no ids", "row 1: no ids"]
    with pytest.raises(ConfigError), one.tolerated("row 4"):
        raise ConfigError("no tokenizer")  # no row's fault
    with pytest.raises(DataError), BadRows("raise").tolerated("row 4"):
        raise DataError("bad")


def run_spoilt(folder):
    """SFT and a preference stage on spoilt rows; whether bad rows alone are refused."""
    prompts = ["tell 0", "", "tell 1", [999], "tell 2"]
    some = dict(prompt_dataset=prompts, num_generated_preference_pairs=None)
    stages = [sft(train_dataset=SPOILT, **skipping()), external(**some, **skipping())]
    trainer_of(f"{folder}/good", stages, accelerate_kwargs=dict(cpu=True))()
    bad = [sft(train_dataset=Listed(BAD), **skipping())]
    trainer = trainer_of(f"{folder}/bad", bad, accelerate_kwargs=dict(cpu=True))
    with pytest.raises(DataError, match="none of 3 rows"):
        trainer()


def test_two_processes_leave_out_the_rows_that_one_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from tests.data.test_datasets import run_spoilt\n"
        "run_spoilt(sys.argv[1])\n"
        "print('refused', flush=True)\n"
    )
    told = two(script, tmp_path / "two")
    assert told.count("refused") == 2  # every process raises, none waits for the other
    run_spoilt(tmp_path / "one")
    alone, together = Run.open(tmp_path / "one/good"), Run.open(tmp_path / "two/good")
    assert [row.id for row in together.rows(0)] == [f"sft/{i}" for i in GOOD_PLACES]
    assert together.rows(0) == alone.rows(0)
    assert [p.row for p in together.prompts(1)] == [0, 2, 4]
    assert together.prompts(1) == alone.prompts(1)
    for run in (alone, together):
        [metrics] = [m for m in run.metrics(1) if "pairs/kept" in m]
        assert metrics["pairs/dropped_bad_row"] == 2


# Tokens


def test_a_tokenizer_may_return_floats_that_are_whole_numbers():
    """The seed's examples encode to tensors of floats."""
    floats = Tokens(
        CallableTokenizer(lambda text: tensor(letters(text)).float(), text_of), eos_id=0, vocab=30
    )
    ids = floats.encode("ab")
    assert ids == (1, 2)
    assert [type(i) for i in ids] == [int, int]


@pytest.mark.parametrize("kind", [list, tuple, tensor, np.array], ids=lambda kind: kind.__name__)
def test_a_tokenizer_may_return_any_row_of_numbers(kind):
    tokens = Tokens(CallableTokenizer(lambda text: kind(letters(text)), text_of), eos_id=0, vocab=9)
    assert tokens.encode("ab") == (1, 2)


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (tensor([1.0, 2.5]), r"whole numbers; got 2\.5"),
        ([1, float("nan")], "whole numbers; got nan"),
        ([1, float("inf")], "whole numbers; got inf"),
        ([1, None], "whole numbers; got None"),
        (["1", "2"], "whole numbers; got '1'"),
        (tensor([[1, 2]]), r"one-dimensional; got shape \(1, 2\)"),
        (tensor(1), r"one-dimensional; got shape \(\)"),
        ("ab", "got str"),
        (3, "got int"),
        (None, "got NoneType"),
    ],
    ids=str,
)
def test_what_is_no_row_of_ids_is_an_error_that_names_the_text(encoded, words):
    tokens = Tokens(CallableTokenizer(lambda text: encoded, text_of), eos_id=0, vocab=30)
    with pytest.raises(TokenizerError, match=f"of the text 'some words' .*{words}"):
        tokens.encode("some words")


@pytest.mark.parametrize("bad", [30, 31, -1])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_id_and_vocabulary(bad):
    with pytest.raises(TokenizerError, match=f"0 to 29; got {bad}"):
        TOKENS.checked([1, bad], "of row 3")


def test_ids_at_the_ends_of_the_vocabulary_are_in_it():
    assert TOKENS.checked([0, 29], "of row 3") == (0, 29)


def test_ids_of_a_row_outside_the_vocabulary_name_the_row():
    with pytest.raises(TokenizerError, match=r"train_dataset, row 17.*got 99"):
        training_row(([1, 99], 1), "train_dataset, row 17", TOKENS)


def test_a_text_without_a_tokenizer_is_an_error_that_says_what_to_give():
    with pytest.raises(ConfigError, match="Give tokenizer="):
        prompt_of("ab", "row", WITHOUT_TEXT)


def test_decoding_leaves_out_the_end_token():
    assert TOKENS.decode((1, 2, EOS)) == "ab"
    assert WITHOUT_TEXT.decode((1, 2)) is None


def test_decoding_to_something_else_than_text_is_an_error():
    with pytest.raises(TokenizerError, match="must give a str; got list"):
        Tokens(Own(), eos_id=None, vocab=30).decode((1, 2))


def test_the_end_token_is_the_tokenizers_own_unless_another_is_given():
    assert Tokens(Own(), eos_id=None, vocab=30).eos_id == 7
    assert Tokens(Own(), eos_id=0, vocab=30).eos_id == 0


class Own:
    """A tokenizer that knows its end token, and whose decoding is broken."""

    eos_token_id = 7

    def encode(self, text):
        return letters(text)

    def decode(self, ids):
        return list(ids)


@pytest.mark.parametrize("eos_id", [30, -1])
def test_an_end_token_outside_the_vocabulary_is_an_error(eos_id):
    with pytest.raises(ConfigError, match=f"30 tokens .0 to 29.; got {eos_id}"):
        Tokens(None, eos_id=eos_id, vocab=30)
