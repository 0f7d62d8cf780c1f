"""Rows of different lengths as rectangles, and rows in micro-batches.

Padding is on the right, but for caches of keys and values that grow on the right.
Masks come from lengths; padding is never recognised by its value, so any valid id may pad.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.packing import packed_length


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
    """Rows of ids, right-padded with `pad_id`, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, lengths


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
    """Rows of ids, left-padded with 0, and at which column each begins."""
    longest = max(map(len, rows))
    starts = [longest - len(row) for row in rows]
    ids = [[0] * start + [*row] for start, row in zip(starts, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(starts, device=device)


def pad_masks(rows: Sequence[Sequence[bool]]) -> Bool[Tensor, "b t"]:
    """Rows of booleans, right-padded with False."""
    return pad_rows(rows)[0].bool()


def unpad(ids: Int[Tensor, "b t"], mask: Tensor) -> list[tuple[int, ...]]:
    """The rows of a padded batch without its padding, whichever side that is on."""
    return [tuple(row[keep].tolist()) for row, keep in zip(ids, mask.bool(), strict=True)]


def micro_batches(
    lengths: Sequence[int], *, token_budget: int, max_rows: int | None = None, padded: bool = True
) -> list[list[int]]:
    """Indices of rows, in groups of similar length.

    A group has at most `token_budget` tokens, or a single row that is longer. If rows are padded
    its tokens are its rows times its longest row, else the sum of its rows. max_rows: rows of a
    group at most.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    tokens = 0
    for i in order:  # ascending, so row i is the longest of its group
        group = groups[-1] if groups else []
        tokens = (len(group) + 1) * lengths[i] if padded else tokens + lengths[i]
        if group and tokens <= token_budget and (max_rows is None or len(group) < max_rows):
            group.append(i)
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups


def by_side(lengths: Sequence[int], side: Callable[[int], int]) -> list[list[int]]:
    """Indices of rows, in groups of the same side; see TokenModel.side."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(side(length), []).append(i)
    return list(groups.values())


def packs(model: TokenModel) -> bool:
    """Whether rows go through a model packed, without padding."""
    return model.training is not None and model.training.packs


def grouped(
    model: TokenModel,
    rows: Sequence[Sequence[Sequence[int]]],
    *,
    token_budget: int,
    max_rows: int | None = None,
) -> list[list[int]]:
    """Indices of rows, each of one or more sequences, in groups that go through the model at once.

    token_budget: tokens of a group at most, padding included if the model does not pack.
    """
    packed = packs(model)
    if packed:
        lengths = [packed_length(sequences) for sequences in rows]
    else:
        lengths = [max(map(len, sequences)) for sequences in rows]
        token_budget //= max(map(len, rows), default=1)
    return micro_batches(lengths, token_budget=token_budget, max_rows=max_rows, padded=not packed)
