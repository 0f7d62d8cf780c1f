"""Ragged rows to rectangles and back, and rows to micro-batches."""

import pytest
import torch
from torch import tensor

from self_rewarding_lm.models.batching import micro_batches, pad_masks, pad_rows, unpad

ROWS = [[5, 0, 3], [0], [2, 2, 2, 0]]  # token 0 is a token, and the default pad as well
LENGTHS = [12, 3, 3, 40, 7, 1, 12, 5, 9, 26]


def test_rows_are_padded_on_the_right():
    ids, lengths = pad_rows(ROWS, pad_id=9)
    assert ids.tolist() == [[5, 0, 3, 9], [0, 9, 9, 9], [2, 2, 2, 0]]
    assert lengths.tolist() == [3, 1, 4]
    assert ids.dtype == torch.long


def test_masks_are_padded_with_false():
    assert pad_masks([[False, True], [True]]).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("pad_id", [0, 2, 9])
def test_trap_22_rows_that_hold_the_pad_id_come_back_whole(pad_id):
    ids, lengths = pad_rows(ROWS, pad_id=pad_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    assert unpad(ids, mask) == [tuple(row) for row in ROWS]


@pytest.mark.parametrize("pad_id", [0, 2, 9])
def test_rows_that_were_padded_on_the_left_come_back_whole(pad_id):
    ids = tensor([[pad_id] * (4 - len(row)) + row for row in ROWS])
    mask = tensor([[False] * (4 - len(row)) + [True] * len(row) for row in ROWS])
    assert unpad(ids, mask) == [tuple(row) for row in ROWS]


def test_a_mask_of_zeros_and_ones_unpads_like_one_of_booleans():
    ids = tensor([[0, 4, 5], [6, 0, 0]])
    assert unpad(ids, tensor([[0, 1, 1], [1, 1, 0]])) == [(4, 5), (6, 0)]


@pytest.mark.parametrize("budget", [1, 7, 24, 40, 80, 10_000])
@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_micro_batches_are_a_partition_of_the_rows(budget, max_rows):
    groups = micro_batches(LENGTHS, token_budget=budget, max_rows=max_rows)
    assert sorted(i for group in groups for i in group) == list(range(len(LENGTHS)))
    assert all(groups)


@pytest.mark.parametrize("budget", [1, 7, 24, 40, 80, 10_000])
def test_padded_tokens_of_a_micro_batch_stay_within_the_budget(budget):
    for group in micro_batches(LENGTHS, token_budget=budget):
        padded = len(group) * max(LENGTHS[i] for i in group)
        assert padded <= budget or len(group) == 1


def test_a_row_longer_than_the_budget_stands_alone():
    assert micro_batches([30, 5, 31, 5], token_budget=20) == [[1, 3], [0], [2]]


def test_max_rows_bounds_a_micro_batch_whatever_the_budget():
    groups = micro_batches(LENGTHS, token_budget=10_000, max_rows=4)
    assert [len(group) for group in groups] == [4, 4, 2]


def test_rows_of_similar_length_stand_together():
    """Sorted by length, so that little is padded; rows of one length keep their order."""
    assert micro_batches([2, 9, 2, 9, 2], token_budget=18) == [[0, 2, 4], [1, 3]]


def test_a_budget_that_holds_all_rows_makes_one_micro_batch():
    assert len(micro_batches(LENGTHS, token_budget=len(LENGTHS) * max(LENGTHS))) == 1
    assert len(micro_batches(LENGTHS, token_budget=len(LENGTHS) * max(LENGTHS) - 1)) == 2


def test_no_rows_make_no_micro_batches():
    assert micro_batches([], token_budget=10) == []
