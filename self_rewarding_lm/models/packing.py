"""Rows of a training forward, packed one after the other without padding.

What a row begins with as an earlier one does is computed once: chosen and rejected have one prompt,
and the prompts of all pairs may begin with the same words.
All layers but attention work on each token alone. Attention layers call `Packing.attend`, as they
call that of `KeyValues` in a session, so that each row sees itself and the beginning it shares.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.models.attention import causal_attention, causal_mask
from self_rewarding_lm.models.dropped import dropped_attention
from self_rewarding_lm.models.noise import RowNoise, seeded

LEAST_SHARED = 8
"""Tokens that rows must begin with alike to share them: fewer are not worth a mask."""


SHORT = 160
"""Keys up to which a CPU attends in float32 where products are narrow. With its gradient PyTorch's
narrow kernel costs a row of 16 to 128 tokens 1.5 to 4 times as much as the casts and the float32
kernel; at 192 the two cost the same (9 heads of width 64; 14 of 128 at 160)."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What is computed of a row: `count` tokens of its own.

    It sees them, and before them the first `shared` tokens of the part number `leader`.
    """

    count: int
    leader: int
    shared: int


class Packing:
    """Right-padded rows (b, t) of `lengths` (b,), without their padding.

    ids, positions (lines, n): the packed tokens and their places in their rows; a few tokens fill
    up the last line. where (b, t): the packed place of each token of a row. width: tokens in a line
    at most, for models that take no more; if None there is one line. least_shared: tokens that rows
    must begin with alike to share them. noise: of dropout, whose next forward this is; if it drops,
    only sequences of one row share, so that no row's dropout depends on who else is there.
    with_whole: see `shared_beginnings`.
    """

    def __init__(
        self,
        ids: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"],
        device: torch.device,
        *,
        width: int | None = None,
        least_shared: int = LEAST_SHARED,
        noise: RowNoise | None = None,
        with_whole: bool = False,
    ) -> None:
        self.parts: list[_Part] = []
        self.noise = noise
        places: list[tuple[int, int, int]] = []  # of each part: its row, its first token, its count
        where = torch.zeros_like(ids)
        tokens, positions = [], []
        count = 0
        part_of: list[int] = []  # of each row
        owners = None if noise is None or not noise.drops else [row for row, _ in noise.keys]
        shares = shared_beginnings(ids, lengths, least_shared, owners, with_whole=with_whole)
        for row, ((leader, shared), length) in enumerate(
            zip(shares, lengths.tolist(), strict=True)
        ):
            own = length - shared
            part = len(self.parts) if leader == row else part_of[leader]
            part_of.append(len(self.parts) if own else part)
            where[row, :shared] = where[leader, :shared]
            where[row, shared:length] = torch.arange(count, count + own)
            tokens.append(ids[row, shared:length])
            positions.append(torch.arange(shared, length))
            if own:
                self.parts.append(_Part(own, part, shared))
                places.append((row, count, own))
            count += own
        lines = 1 if width is None else -(-count // width)
        self.count, self.filled = count, -(-count // lines) * lines - count
        filling = [torch.zeros(self.filled, dtype=torch.long)]
        self.ids = torch.cat(tokens + filling).view(lines, -1).to(device)
        self.positions = torch.cat(positions + filling).view(lines, -1).to(device)
        self.where = where.to(device)
        self.layers: set[int] = set()
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        if noise is not None:
            noise.lay_out(len(self.ids), self.ids.shape[1], places, padded=False)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g n d"],
        value: Float[Tensor, "b g n e"],
        *,
        scale: float | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "b h n e"]:
        """Causal attention of each token to its row, with the arguments of `KeyValues.attend`.

        Nothing is kept for later forwards.
        """
        self.layers.add(layer)
        counts = [part.count for part in self.parts] + [self.filled] * bool(self.filled)
        q, k, v = (
            rearrange(t, "b h n d -> h (b n) d").split(counts, dim=1) for t in (query, key, value)
        )
        outputs = []
        whole: list[tuple[Tensor, Tensor]] = []  # keys and values that each part sees
        # what fills up the last line is no part, and comes after all parts
        seeds: list[int | None] = [None] * len(self.parts)
        if self.noise is not None and dropout:
            seeds = [seed for seed, _ in self.noise.call().seeds()]
        for part, seed, queries, keys, values in zip(self.parts, seeds, q, k, v, strict=False):
            if part.shared:
                first_keys, first_values = (t[:, : part.shared] for t in whole[part.leader])
                keys = torch.cat([first_keys, keys], dim=1)
                values = torch.cat([first_values, values], dim=1)
            whole.append((keys, values))
            with nullcontext() if seed is None else seeded(seed, queries.device):
                outputs.append(self._attended(part, queries, keys, values, window, scale, dropout))
        if self.filled:
            outputs.append(query.new_zeros(query.shape[1], self.filled, value.shape[-1]))
        return rearrange(torch.cat(outputs, dim=1), "h (b n) e -> b h n e", b=len(query))

    def _attended(
        self,
        part: _Part,
        q: Float[Tensor, "h n d"],
        k: Float[Tensor, "g t d"],
        v: Float[Tensor, "g t e"],
        window: int | None,
        scale: float | None,
        dropout: float,
    ) -> Float[Tensor, "h n e"]:
        """Attention of a part, by the way that is fastest with its gradient."""
        narrow = _narrow_type(q)
        # without noise of its own this is a run of version 0.1.0, whose draws go on as they were
        drops_by_block = bool(dropout) and q.device.type == "cpu" and self.noise is not None
        attends = dropped_attention if drops_by_block else causal_attention
        if narrow is None or not (drops_by_block or k.shape[1] <= SHORT):
            mask = self._mask(part, window, q)
            return attends(q, k, v, mask, scale=scale, dropout=dropout)
        with torch.autocast("cpu", enabled=False):
            q, k, v = (t.float() for t in (q, k, v))
            mask = self._mask(part, window, q)
            return attends(q, k, v, mask, scale=scale, dropout=dropout).to(narrow)

    def _mask(self, part: _Part, window: int | None, like: Tensor) -> Tensor | None:
        """What is added to a part's scores: -inf at what a token must not see.

        None if each token sees all tokens before it.
        """
        length = part.shared + part.count
        if not part.shared and (window is None or window >= length):
            return None
        kind = (part.count, length, window)
        if kind not in self._masks:
            hidden = ~causal_mask(part.count, length, window, like.device)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[kind] = mask.masked_fill_(hidden, -torch.inf)
        return self._masks[kind]


def _narrow_type(query: Tensor) -> torch.dtype | None:
    """The type of less than 32 bits in which a CPU would attend; None elsewhere."""
    if query.device.type != "cpu":
        return None
    casts = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if casts else query.dtype
    return dtype if dtype.itemsize < 4 else None


def shared_beginnings(
    ids: Int[Tensor, "b t"],
    lengths: Int[Tensor, " b"],
    least: int = LEAST_SHARED,
    owners: Sequence[int] | None = None,
    *,
    with_whole: bool = False,
) -> list[tuple[int, int]]:
    """For each row the earlier row with which it begins alike for the most tokens, and how many.

    The row itself and 0 if these are fewer than `least`. Of several such rows it is the first.
    owners: of each row; rows of different owners share nothing. with_whole: a row shares with the
    last one that shares nothing itself, or not at all, as in version 0.1.0.
    """
    shares: list[tuple[int, int]] = []
    nodes: dict[tuple[int, int], int] = {}  # of the tree of beginnings: after a node, by a token
    made_by: list[int] = []  # of each node, the first row that begins so
    for row, length in enumerate(lengths.tolist()):
        tokens = ids[row, :length].tolist()
        root = node = -1 if owners is None else -1 - owners[row]
        leader, shared = row, 0
        while shared < length and (node, tokens[shared]) in nodes:
            node = nodes[node, tokens[shared]]
            leader, shared = made_by[node], shared + 1
        shares.append((leader, shared) if shared >= least else (row, 0))
        if with_whole and shared >= least:
            continue
        if with_whole:
            nodes.clear()
            node, shared = root, 0
        for token in tokens[shared:]:
            node = nodes.setdefault((node, token), len(made_by))
            made_by.append(row)
    return shares


def packed_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens go through the model for rows that follow each other."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return int(lengths.sum()) - sum(shared for _, shared in shared_beginnings(ids, lengths))
