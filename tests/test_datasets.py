"""Rows in, whatever their form; and the tokenizer between texts and ids.

The tokenizer of these tests: a is 1, b is 2, ... and the end token is 0. The vocabulary has 30.
"""

import json
import re

import numpy as np
import pytest
import torch
from torch import tensor
from torch.utils.data import Dataset, IterableDataset

from self_rewarding_lm.datasets import (
    FromStage,
    Rows,
    create_mock_dataset,
    from_stage,
    preference_row,
    prompt_and_completion,
    prompt_of,
    read_prompt,
    training_row,
    truncated,
)
from self_rewarding_lm.errors import ConfigError, DataError, TokenizerError
from self_rewarding_lm.records import PreferencePair, Prompt
from self_rewarding_lm.tokens import CallableTokenizer, Tokens

EOS = 0


def letters(text):
    return [ord(c) - 96 for c in text]


def text_of(ids):
    return "".join(chr(96 + i) for i in ids.tolist())


TOKENS = Tokens(CallableTokenizer(letters, text_of), eos_id=EOS, vocab=30)
WITHOUT_EOS = Tokens(CallableTokenizer(letters, text_of), eos_id=None, vocab=30)
WITHOUT_TEXT = Tokens(None, eos_id=EOS, vocab=30)
T, F = True, False


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


# Supervised rows

SUPERVISED = {
    "ids and prompt_len": ((tensor([1, 2, 3, 4]), 2), (1, 2, 3, 4), (F, F, T, T)),
    "ids and prompt_len as a tensor": ((tensor([1, 2, 3]), tensor(1)), (1, 2, 3), (F, T, T)),
    "lists": (([1, 2, 3, 4], 2), (1, 2, 3, 4), (F, F, T, T)),
    "a pair from JSON": ([[1, 2, 3, 4], 3], (1, 2, 3, 4), (F, F, F, T)),
    "arrays": ((np.array([1, 2, 3]), np.array([T, T, F])), (1, 2, 3), (F, F, T)),
    "an array of ids and its number": ((np.array([1, 2, 3]), np.int64(1)), (1, 2, 3), (F, T, T)),
    "a text and prompt_len": (("abc", 1), (1, 2, 3), (F, T, T)),
    "no prompt: the first token has nothing before it": (([1, 2, 3], 0), (1, 2, 3), (F, T, T)),
    "ids and prompt_mask": ((tensor([1, 2, 3]), tensor([T, T, F])), (1, 2, 3), (F, F, T)),
    "prompt_mask as a list": (([1, 2, 3, 4], [T, F, T, F]), (1, 2, 3, 4), (F, T, F, T)),
    "prompt and completion": (
        {"prompt": "ab", "completion": "cd"},
        (1, 2, 3, 4, EOS),
        (F, F, T, T, T),
    ),
    "prompt and completion as ids": (
        {"prompt": [1, 2], "completion": tensor([3, 4])},
        (1, 2, 3, 4),
        (F, F, T, T),
    ),
    "other columns": ({"prompt": "a", "completion": "b", "id": 7}, (1, 2, EOS), (F, T, T)),
    "text": ({"text": "abc"}, (1, 2, 3, EOS), (F, T, T, T)),
    "text as ids": ({"text": [1, 2, 3]}, (1, 2, 3, EOS), (F, T, T, T)),
    "a pair of an earlier stage": (
        PreferencePair("dpo/0", (1, 2), (3, EOS), (4, EOS)),
        (1, 2, 3, EOS),
        (F, F, T, T),
    ),
}


@pytest.mark.parametrize(("row", "ids", "targets"), SUPERVISED.values(), ids=SUPERVISED)
def test_a_supervised_row_gives_these_ids_and_targets(row, ids, targets):
    assert training_row(row, "row", TOKENS) == (ids, targets)


def test_trap_18_the_end_token_is_put_behind_texts_and_is_the_last_target():
    for row in ({"prompt": "a", "completion": "b"}, {"text": "ab"}):
        ids, targets = training_row(row, "row", TOKENS)
        assert (ids[-1], targets[-1]) == (EOS, True)


def test_an_end_token_that_is_there_already_is_not_doubled():
    ids, _ = training_row({"prompt": "a", "completion": "b`"}, "row", TOKENS)  # ` is token 0
    assert ids == (1, 2, EOS)


def test_ids_get_no_end_token():
    assert training_row({"prompt": [1], "completion": [2, 3]}, "row", TOKENS)[0] == (1, 2, 3)
    assert training_row(([1, 2, 3], 1), "row", TOKENS)[0] == (1, 2, 3)


def test_texts_get_no_end_token_where_none_is_known():
    assert training_row({"text": "ab"}, "row", WITHOUT_EOS) == ((1, 2), (F, T))


def test_trap_22_token_0_in_the_ids_is_a_target_like_any_other():
    assert training_row(([0, 1, 0, 0], 2), "row", WITHOUT_EOS) == ((0, 1, 0, 0), (F, F, T, T))


NOT_SUPERVISED = {
    "ids alone": (tensor([1, 2, 3]), "a supervised row is"),
    "a text alone": ("abc", "a supervised row is"),
    "two letters": ("ab", "a supervised row is"),
    "a number": (3, "got int '3'"),
    "nothing": (None, "a supervised row is"),
    "three parts": (([1], 1, 1), "a supervised row is"),
    "no completion": ({"prompt": "a"}, "has no 'completion'; it has 'prompt'"),
    "other columns": ({"question": "a", "answer": "b"}, "has no 'prompt' and no 'completion'"),
    "an empty dict": ({}, "it has nothing"),
    "prompt_len beyond the row": (([1, 2, 3], 4), "an int from 0 to 3"),
    "prompt_len below 0": (([1, 2, 3], -1), "an int from 0 to 3"),
    "prompt_len of float": (([1, 2, 3], 1.5), "an int from 0 to 3"),
    "prompt_len of bool": (([1, 2, 3], True), "an int from 0 to 3"),
    "a mask of another length": (([1, 2, 3], [True, False]), "3 booleans"),
    "a mask of numbers": (([1, 2, 3], [1, 0, 0]), "3 booleans"),
    "the prompt takes all": (([1, 2, 3], 3), "nothing to learn"),
    "the mask takes all": (([1, 2], [True, True]), "nothing to learn"),
    "one token": (([1], 0), "nothing to learn"),
    "no token": (([], 0), "nothing to learn"),
    "an empty completion of ids": ({"prompt": "a", "completion": []}, "the completion is empty"),
}


@pytest.mark.parametrize(("row", "words"), NOT_SUPERVISED.values(), ids=NOT_SUPERVISED)
def test_a_row_that_is_not_supervised_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"train_dataset, row 17.*{words}"):
        training_row(row, "train_dataset, row 17", TOKENS)


def test_an_empty_completion_text_teaches_the_end_token_alone():
    ids, targets = training_row({"prompt": "a", "completion": ""}, "row", TOKENS)
    assert (ids, targets) == ((1, EOS), (F, T))


# Preference rows


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "cd"}, ((1,), (2, EOS), (3, 4, EOS))),
        ({"prompt": [1], "chosen": [2], "rejected": tensor([3, 4])}, ((1,), (2,), (3, 4))),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, ((1,), (2, EOS), (EOS,))),
    ],
    ids=["texts", "ids", "an empty answer ends at once"],
)
def test_a_preference_row_gives_these_ids(row, ids):
    pair = preference_row(row, "row", TOKENS)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ids


def test_a_preference_row_of_texts_keeps_them_and_one_of_ids_has_none():
    pair = preference_row({"prompt": "a", "chosen": "b", "rejected": "c"}, "row", TOKENS)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a", "b", "c")
    pair = preference_row({"prompt": [1], "chosen": [2], "rejected": [3]}, "row", TOKENS)
    assert (pair.prompt, pair.chosen, pair.rejected) == (None, None, None)


def test_a_pair_of_an_earlier_stage_is_taken_as_it_is():
    pair = PreferencePair("sr/0", (1,), (2,), (3,))
    assert preference_row(pair, "row", TOKENS) is pair


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("a", "b", "c"), "a preference row is"),
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'; it has 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": [1], "chosen": [2], "rejected": []}, "rejected is empty"),
    ],
)
def test_a_row_that_is_no_preference_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        preference_row(row, "train_dataset, row 17", TOKENS)


# Prompt rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("ab", ("ab", (1, 2), None)),
        ({"prompt": "ab"}, ("ab", (1, 2), None)),
        ({"prompt": [1, 2], "topic": "x", "n": 3}, ("ab", (1, 2), {"topic": "x", "n": 3})),
        ({"prompt": "a", "big": [1], "no": {1}}, ("a", (1,), {"big": [1]})),
        ([1, 2], ("ab", (1, 2), None)),
        (tensor([1, 2]), ("ab", (1, 2), None)),
        (np.array([1, 2]), ("ab", (1, 2), None)),
        ((1, 2), ("ab", (1, 2), None)),
    ],
    ids=str,
)
def test_a_prompt_row_gives_its_text_its_ids_and_its_plain_columns(row, expected):
    assert prompt_of(row, "row", TOKENS) == expected


def test_a_prompt_of_ids_has_no_text_without_a_tokenizer():
    assert prompt_of([1, 2], "row", WITHOUT_TEXT) == (None, (1, 2), None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ({"text": "a"}, "has no 'prompt'; it has 'text'"),
    ],
)
def test_a_row_without_a_prompt_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        prompt_of(row, "prompt_dataset, row 17", TOKENS)


@pytest.mark.parametrize("row", [None, 3, 2.5, {"prompt": None}], ids=str)
def test_a_prompt_that_is_neither_text_nor_ids_is_an_error_that_names_its_row(row):
    with pytest.raises(TokenizerError, match="row 17"):
        prompt_of(row, "prompt_dataset, row 17", TOKENS)


def test_a_prompt_that_fills_the_model_is_an_error_that_names_it():
    rows = opened([[1, 2], [1, 2, 3]], "prompt_dataset")
    assert read_prompt(rows, 0, "sr/0/0", TOKENS, 3) == Prompt("sr/0/0", 0, (1, 2), "ab")
    with pytest.raises(DataError, match=r"prompt_dataset, row 1.* has 3 tokens.* have 3\."):
        read_prompt(rows, 1, "sr/1/0", TOKENS, 3)
    assert read_prompt(rows, 1, "sr/1/0", TOKENS, None).ids == (1, 2, 3)


# A prompt and its completion


@pytest.mark.parametrize(
    "row",
    [{"prompt": "ab", "completion": "c"}, ([1, 2, 3, EOS], 2), ([1, 2, 3, EOS], [T, T, F, F])],
    ids=str,
)
def test_a_supervised_row_is_cut_between_prompt_and_completion(row):
    assert prompt_and_completion(row, "row", TOKENS) == ((1, 2), (3, EOS))


@pytest.mark.parametrize(
    "row", [{"text": "abc"}, ([1, 2, 3], [T, F, T]), ([1, 2, 3, 4], [T, F, T, F])], ids=str
)
def test_a_row_that_is_no_prompt_with_its_completion_is_an_error(row):
    with pytest.raises(DataError, match=r"row 17.* a prompt followed by a completion"):
        prompt_and_completion(row, "train_dataset, row 17", TOKENS)


def test_a_row_without_a_prompt_cannot_be_answered():
    with pytest.raises(DataError, match="a prompt followed by a completion"):
        prompt_and_completion(([1, 2, 3], 0), "row", TOKENS)


# Cutting


def test_a_row_is_cut_at_its_end():
    assert truncated((1, 2, 3, 4), 2, 3, "row") == ((1, 2, 3), True)


def test_a_row_that_fits_is_left_alone():
    for limit in (4, 9, None):
        assert truncated((1, 2, 3, 4), 4, limit, "row") == ((1, 2, 3, 4), False)


def test_a_prompt_that_leaves_no_room_for_a_response_is_an_error():
    assert truncated((1, 2, 3, 4), 2, 3, "row") == ((1, 2, 3), True)
    with pytest.raises(DataError, match=r"row 17.*3 tokens.*max_seq_len is 3"):
        truncated((1, 2, 3, 4), 3, 3, "train_dataset, row 17")


# Datasets

PAIRS = [([1, 2], 1), ([3, 4], 1), ([5, 6], 1)]


def numbers(count):
    yield from ([i] for i in range(count))


class Stream(IterableDataset):
    def __iter__(self):
        return numbers(3)


@pytest.mark.parametrize(
    "dataset",
    [[[0], [1], [2]], ([0], [1], [2]), Listed([[0], [1], [2]]), Stream(), numbers(3)],
    ids=["list", "tuple", "torch dataset", "iterable dataset", "generator"],
)
def test_rows_are_read_from_whatever_holds_them(dataset):
    rows = opened(dataset)
    assert len(rows) == 3
    assert all_of(rows) == [[0], [1], [2]]
    with pytest.raises(IndexError):
        rows.read(3)


def test_a_generator_is_read_once_and_its_rows_can_be_read_again():
    rows = opened(numbers(3))
    assert list(rows.preview()) == [(0, [0]), (1, [1]), (2, [2])]
    assert all_of(rows) == all_of(rows) == [[0], [1], [2]]


def test_a_jsonl_and_a_json_file_hold_the_same_rows(tmp_path):
    content = [{"prompt": "a"}, {"prompt": "b"}]
    jsonl = lines(tmp_path / "rows.jsonl", content)
    plain = tmp_path / "rows.json"
    plain.write_text(json.dumps(content))
    for dataset in (jsonl, str(jsonl), plain, str(plain)):
        assert all_of(opened(dataset)) == content


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
    assert list(rows.preview()) == list(rows.preview()) == [(0, PAIRS[0])]
    assert all_of(rows) == PAIRS
    assert dataset.reads == [1, 1, 1]


def test_trap_10_a_row_that_was_looked_at_is_the_row_that_is_read():
    """A dataset that draws its rows at random gives another each time it is asked."""
    count = iter(range(100))
    rows = opened(create_mock_dataset(3, lambda: ([next(count), 1], 1)))
    [(_, first)] = rows.preview()
    assert rows.read(0) is first


def test_the_first_row_of_a_stage_that_is_still_to_come_is_not_known():
    assert list(opened(from_stage("dpo")).preview()) == []
    assert list(opened([Listed(PAIRS), from_stage("dpo")]).preview()) == []


def test_rows_are_named_by_dataset_and_number_and_those_of_files_by_line(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ["a", "b"])
    assert opened(["a", "b"]).where(1) == "train_dataset, row 1"
    assert opened(path).where(1) == f"{path}, line 2"


@pytest.mark.parametrize("dataset", [[], (), Listed([]), numbers(0)], ids=repr)
def test_an_empty_dataset_is_an_error(dataset):
    with pytest.raises(DataError, match="train_dataset is empty"):
        list(opened(dataset).preview())


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        ("rows.csv", r"must be \.jsonl or \.json"),
        ("missing.jsonl", r"no file 'missing\.jsonl'"),
    ],
)
def test_what_is_no_dataset_is_refused_before_it_is_read(dataset, words):
    with pytest.raises(DataError, match=f"train_dataset.*{words}"):
        opened(dataset)


def test_a_bad_line_of_a_file_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}, line 2, is no JSON"):
        opened(path).read(0)


def test_a_json_file_that_is_no_json_or_no_list_is_an_error(tmp_path):
    path = tmp_path / "rows.json"
    for content, words in (("[1, ", "is no JSON"), ('{"prompt": "a"}', "must hold a list")):
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
    with pytest.raises(ConfigError, match="tokenizer_encode"):
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
