"""Attention over a session's keys and values, against its definition in float64."""

import pytest
import torch
from torch import Tensor

from self_rewarding_lm.models import attention
from self_rewarding_lm.models.attention import KeyValues, Sizes, Span

GROUPS, QUERIES, WIDTH = 2, 3, 8  # heads of keys, heads of queries for each, numbers of each
ROOT, STEMS = 4, (5, 2)
ROWS_OF = (0, 1, 1, 0, 0)  # the stem of each row
STEPS = 8
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def drawn(tokens: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of so many tokens: (1, heads, tokens, width)."""

    def some(heads: int) -> Tensor:
        numbers = torch.randn(1, heads, tokens, WIDTH, generator=generator, dtype=torch.float64)
        return numbers.to(dtype)

    return some(GROUPS * QUERIES), some(GROUPS), some(GROUPS)


def defined(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """softmax(q k' / sqrt(d)) v of one token (h, d), head by head, over its whole past (g, t, d)."""
    outputs = []
    for head, q in enumerate(query.double()):
        k, v = (t[head // QUERIES].double()[-(window or len(t[0])) :] for t in (keys, values))
        outputs.append(torch.softmax(k @ q / WIDTH**0.5, dim=0) @ v)
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rows_of_any_age_attend_to_root_stem_and_their_own_tokens(dtype, window, monkeypatch):
    """Rows begin one after the other, so that memory grows while they have different ages."""
    monkeypatch.setattr(attention, "BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    memory = KeyValues(
        Sizes(ROOT, len(STEMS), max(STEMS), len(ROWS_OF), STEPS), torch.device("cpu")
    )

    memory.at_root()
    root = drawn(ROOT, generator, dtype)
    memory.attend(0, *root, window=window)
    memory.at_prompts([Span(0, 0, STEMS[0]), Span(1, STEMS[0], STEMS[1])])
    stems = drawn(sum(STEMS), generator, dtype)
    memory.attend(0, *stems, window=window)
    own = slice(0, STEMS[0]), slice(STEMS[0], None)
    past = [
        tuple(
            torch.cat([a[0], b[0, :, own[stem]]], dim=1)
            for a, b in zip(root[1:], stems[1:], strict=True)
        )
        for stem in ROWS_OF
    ]

    lengths: list[int] = []
    for step in range(STEPS):
        if step < len(ROWS_OF):
            lengths.append(0)
        rows = ROWS_OF[: len(lengths)]
        memory.at_step(rows, [STEMS[stem] for stem in rows], lengths)
        query, key, value = drawn(len(rows), generator, dtype)
        found = memory.attend(0, query, key, value, window=window)
        for row in range(len(rows)):
            new = key[0, :, row, None], value[0, :, row, None]
            keys, values = past[row] = tuple(
                torch.cat([old, more], dim=1) for old, more in zip(past[row], new, strict=True)
            )
            expected = defined(query[0, :, row], keys, values, window)
            error = (found[0, :, row].double() - expected).abs().max()
            assert error < BOUNDS[dtype], (step, row)
            lengths[row] += 1


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_rows_keys_lie_by_their_tokens_in_a_narrow_type_also_when_they_grew(dtype, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    generator = torch.Generator().manual_seed(0)
    memory = KeyValues(Sizes(0, 1, 1, 2, 6), torch.device("cpu"))
    memory.at_prompts([Span(0, 0, 1)])
    memory.attend(0, *drawn(1, generator, dtype))
    shapes = set()
    for length in range(5):
        memory.at_step([0, 0], [1, 1], [length] * 2)
        memory.attend(0, *drawn(2, generator, dtype))
        [layer] = memory.layers.values()
        keys, values = layer.own
        shapes.add(keys.shape)
        assert values.is_contiguous() and layer.stems[0].is_contiguous()
        is_narrow = keys.dtype.itemsize < 4  # not where this CPU has no products in that type
        assert keys.mT.is_contiguous() == is_narrow
        assert keys.is_contiguous() == (not is_narrow)
    assert len(shapes) == 3
