"""Keys and values of rows that are decoded together, and attention over them.

What rows have in common is stored and computed once, so keys and values stand in three parts: the
root, with which all prompts begin; a stem for each prompt, its tokens after the root; and each
row's own tokens, those that it has sampled. They are written in place, and lie as products of
matrices read them: keys by their width, values by their tokens, and on a CPU without a gap, as it
would copy all of a tensor with gaps for each product in a narrow type. So the memory of stems and
rows is there as wide as their longest, in blocks of tokens; nothing is copied from token to token.
Rows' own keys in a narrow type lie by their tokens on a CPU, as the left side of a product, which
it does not bring into a layout of its own; a new key is then written in one piece.
Knows tensors; nothing of models, tokens or sampling.

Axes: h heads of queries, g heads of keys, n = h / g heads of queries that look at one head of keys,
t tokens, r rows, s stems, d and e the widths of keys and values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from self_rewarding_lm.models.inference import product_dtype

BLOCK = 32
"""Tokens by which the memory of stems and rows becomes wider on a CPU, to its size at most."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a session holds at most. root, stem, new: tokens of the root, a stem, a row's own."""

    root: int
    stems: int
    stem: int
    rows: int
    new: int

    @property
    def tokens(self) -> int:
        return self.root + self.stems * self.stem + self.rows * self.new


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that a prompt adds to a forward of several prompts, packed one after the other.

    stem: the place of the prompt's stem. start, count: where its tokens are among the packed ones.
    reused: how many tokens before those are copied from the stem at the place `source`.
    """

    stem: int
    start: int
    count: int
    reused: int = 0
    source: int = 0


@dataclass(slots=True)
class _Layer:
    """Keys and values of one attention layer, each pair (g, d, t) and (g, t, e).

    stems and own have an axis more before these, of stems and of rows.
    """

    root: tuple[Tensor, Tensor]
    stems: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class KeyValues:
    """A session's keys and values, which a model's attention layers call.

    `attend` is their attention; `needed` picks the tokens whose logits are wanted, before the last
    linear layer. Before each forward `at_root`, `at_prompts` or `at_step` says what its tokens are.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.layers: dict[int, _Layer] = {}
        self.windows: set[int] = set()
        self._stem_lengths = [0] * sizes.stems  # by place; of one that is free, the last one there
        self._widths = self._width(0, sizes.stem), self._width(1, sizes.new)  # of stems and rows
        self._wanted: Tensor | None = None
        self._forward: _Root | _Prompts | _Step | None = None

    def at_root(self) -> None:
        """The next forward's tokens are the root."""
        self._forward = _Root()
        self._wanted = torch.tensor([self.sizes.root - 1], device=self.device)

    def at_prompts(self, spans: Sequence[Span]) -> None:
        """The next forward's tokens are those of the spans, one after the other."""
        ends = [span.start + span.count - 1 for span in spans]
        for span in spans:
            self._stem_lengths[span.stem] = span.reused + span.count
        self._widen(self._width(max(self._stem_lengths), self.sizes.stem), self._widths[1])
        self._forward = _Prompts(spans)
        self._wanted = torch.tensor(ends, device=self.device)

    def at_step(
        self, stems: Sequence[int], stem_lengths: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """The next forward has one token of each row.

        stems: the place of each row's stem; stem_lengths: its tokens; lengths: how many tokens of
        its own each row has already.
        """
        columns = max(stem_lengths), max(lengths) + 1
        self._widen(self._widths[0], self._width(columns[1], self.sizes.new))
        if self.device.type == "cpu":  # all of them: a part of a tensor would be copied
            columns = self._widths
        seen = self.sizes.root, *columns
        self._forward = _Step(seen, stems, stem_lengths, lengths, self.device)
        self._wanted = None

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "1 h n d"],
        key: Float[Tensor, "1 g n d"],
        value: Float[Tensor, "1 g n e"],
        *,
        scale: float | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "1 h n e"]:
        """Causal attention of the n present tokens to the whole past of their rows, and to
        themselves.

        Keys and values are kept for later forwards. The number of heads h is a multiple of g
        (grouped-query attention, arXiv:2305.13245); keys are not repeated for it. scale: of the
        scores, default 1 / sqrt(d). window: how many of the last tokens are seen, the present one
        included (sliding attention). dropout: must be 0, as nothing is trained in a session.
        """
        assert dropout == 0.0, "a session's forward is without dropout"
        assert self._forward is not None, "attend is called inside a session's forward alone"
        dtype = product_dtype(query)
        kept = self._layer(layer, key, value, dtype)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if window is not None:
            self.windows.add(window)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (t[0].to(dtype) for t in (query, key, value))
            return self._forward.attend(kept, q * factor, k, v, window)[None].to(query.dtype)

    def needed(self, hidden: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 m d"]:
        """The hidden states of the tokens whose logits are wanted."""
        return hidden if self._wanted is None else hidden[:, self._wanted]

    @property
    def wanted(self) -> Tensor | None:
        """Places of the tokens whose logits are wanted; None if those of all are."""
        return self._wanted

    def move_rows(self, rows: Sequence[int], length: int) -> None:
        """Row i gets the own tokens of rows[i]. length: of the row that has the most of them."""
        moved = [i for i, row in enumerate(rows) if i != row]
        if not moved or not length:
            return
        target = torch.tensor(moved, device=self.device)
        source = torch.tensor([rows[i] for i in moved], device=self.device)
        for layer in self.layers.values():
            for filled in _first(layer.own, length):
                filled[target] = filled[source]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take in all layers that were attended to."""
        pairs = [layer.own for layer in self.layers.values()]
        return sum(
            keys.shape[1] * (keys.shape[2] + values.shape[3]) * keys.element_size()
            for keys, values in pairs
        )

    def _width(self, tokens: int, most: int) -> int:
        """How wide memory for so many tokens is, of at most `most`."""
        if self.device.type != "cpu":  # products there read parts of a tensor in place
            return most
        return min(most, BLOCK * math.ceil(tokens / BLOCK))

    def _widen(self, stem: int, own: int) -> None:
        """Make the memory of stems and rows so wide, or so narrow, in all layers."""
        if self._widths != (stem, own):
            self._widths = stem, own
            for layer in self.layers.values():
                layer.stems, layer.own = _resized(layer.stems, stem), _resized(layer.own, own)

    def _layer(self, number: int, key: Tensor, value: Tensor, dtype: torch.dtype) -> _Layer:
        """The memory of a layer, which is allocated when it is first attended to."""
        if number not in self.layers:
            sizes, heads = self.sizes, key.shape[1]

            def zeros(tokens: int, *leading: int, by_tokens: bool = False) -> Pair:
                keys = (*leading, key.shape[-1], tokens)
                values = (*leading, tokens, value.shape[-1])
                return (
                    _zeros_of_keys(keys, dtype, self.device, by_tokens=by_tokens),
                    _zeros(values, dtype, self.device),
                )

            narrow_on_cpu = self.device.type == "cpu" and dtype.itemsize < 4
            self.layers[number] = _Layer(
                root=zeros(sizes.root, heads),
                stems=zeros(self._widths[0], sizes.stems, heads),
                own=zeros(self._widths[1], sizes.rows, heads, by_tokens=narrow_on_cpu),
            )
        return self.layers[number]


Pair = tuple[Tensor, Tensor]
"""Keys (*n, d, t) and values (*n, t, e)."""


def _first(pair: Pair, tokens: int) -> Pair:
    """The first so many tokens of keys and values."""
    return pair[0][..., :tokens], pair[1][..., :tokens, :]


def _resized(pair: Pair, tokens: int) -> Pair:
    """Keys and values with room for so many tokens, the first of which are kept."""
    keys, values = pair
    if keys.shape[-1] == tokens:
        return pair
    shape, by_tokens = (*keys.shape[:-1], tokens), _lie_by_tokens(keys)
    resized = (
        _zeros_of_keys(shape, keys.dtype, keys.device, by_tokens=by_tokens),
        _zeros((*values.shape[:-2], tokens, values.shape[-1]), values.dtype, values.device),
    )
    kept = min(keys.shape[-1], tokens)
    for new, old in zip(_first(resized, kept), _first(pair, kept), strict=True):
        new.copy_(old)
    return resized


class _Root:
    """A forward of the tokens with which all prompts begin."""

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        for tensor, new in zip(kept.root, (k.mT, v), strict=True):
            tensor.copy_(new)
        length = q.shape[1]
        mask = None if window is None else causal_mask(length, length, window, q.device)
        return causal_attention(q, k, v, mask)


class _Prompts:
    """A forward of prompts of any lengths, packed one after the other without padding."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        (root_keys, root_values), (stem_keys, stem_values) = kept.root, kept.stems
        outputs = []
        for i, span in enumerate(self.spans):  # what a span reuses was written by one before it
            packed, end = slice(span.start, span.start + span.count), span.reused + span.count

            # 1. keep its keys and values, after those that it reuses
            if span.reused:
                before = _first((stem_keys[span.source], stem_values[span.source]), span.reused)
                stem_keys[span.stem, ..., : span.reused] = before[0]
                stem_values[span.stem, :, : span.reused] = before[1]
            stem_keys[span.stem, ..., span.reused : end] = k[:, packed].mT
            stem_values[span.stem, :, span.reused : end] = v[:, packed]

            # 2. its attention to the root, to what it reuses and to itself
            of_stem, values = _first((stem_keys[span.stem], stem_values[span.stem]), end)
            keys = torch.cat([root_keys.mT, of_stem.mT], dim=1)  # (g, t, d)
            values = torch.cat([root_values, values], dim=1)  # (g, t, e)
            mask = self._mask(i, keys.shape[1], window, q.device)
            outputs.append(causal_attention(q[:, packed], keys, values, mask))
        return torch.cat(outputs, dim=1)  # (h, t, e)

    def _mask(self, i: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """What the tokens of span i see of `length` tokens; None if all those up to themselves."""
        if (i, window) not in self.masks:
            count = self.spans[i].count
            whole = length == count and window is None
            self.masks[i, window] = None if whole else causal_mask(count, length, window, device)
        return self.masks[i, window]


@dataclass(slots=True)
class _Step:
    """A forward of one token of each row.

    columns: how many of the root, the stems and the rows' own tokens are looked at. stems,
    stem_lengths, lengths: as `KeyValues.at_step` takes them. ends (r,): the place of each row's new
    token. members (s, m): the rows of each stem, filled up with row 0, whose products are not read.
    place (r,): of each row in the flattened members.
    """

    columns: tuple[int, int, int]
    stems: Sequence[int]
    stem_lengths: Sequence[int]
    lengths: Sequence[int]
    device: torch.device
    rows: Tensor = field(init=False)
    ends: Tensor = field(init=False)
    members: Tensor = field(init=False)
    place: Tensor = field(init=False)
    masks: dict[tuple, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows_of: list[list[int]] = [[] for _ in range(max(self.stems) + 1)]
        places = []
        for row, stem in enumerate(self.stems):
            places.append(len(rows_of[stem]))
            rows_of[stem].append(row)
        most = max(map(len, rows_of))
        self.rows = torch.arange(len(self.stems), device=self.device)
        self.ends = torch.tensor(self.lengths, device=self.device)
        self.members = torch.tensor(
            [rows + [0] * (most - len(rows)) for rows in rows_of], device=self.device
        )
        flat = [stem * most + place for stem, place in zip(self.stems, places, strict=True)]
        self.place = torch.tensor(flat, device=self.device)

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        groups, count, stems = k.shape[0], k.shape[1], len(self.members)
        root, stem, own = self.columns

        # 1. write each row's new key and value after its own ones
        kept.own[0][self.rows, :, :, self.ends] = k.transpose(0, 1)  # (r, g, d)
        kept.own[1][self.rows, :, self.ends] = v.transpose(0, 1)  # (r, g, e)
        root_keys, root_values = kept.root
        stem_keys, stem_values = _first((kept.stems[0][:stems], kept.stems[1][:stems]), stem)
        own_keys, own_values = _first((kept.own[0][:count], kept.own[1][:count]), own)

        # 2. score root, stem and own tokens (r, g, n, t) side by side, for one softmax over them
        q = rearrange(q, "(g n) r d -> r g n d", g=groups)
        scores = [self._times_stems(q, stem_keys), _times_own_keys(q, own_keys)]
        if root:
            scores.insert(0, _times_root(q, root_keys))
        joined = torch.cat(scores, dim=-1)  # (r, g, n, root + stem + own)
        joined += self._mask(window, joined.dtype, joined.shape[1:3])
        exact = torch.float32 if joined.dtype.itemsize < 4 else joined.dtype
        shares = torch.softmax(joined, dim=-1, dtype=exact).to(joined.dtype)

        # 3. sum up the values by their shares
        of_root, of_stem, of_own = shares.split(self.columns, dim=-1)
        out = self._times_stems(of_stem, stem_values)  # (r, g, n, e)
        out += of_own @ own_values
        if root:
            out += _times_root(of_root, root_values)
        return rearrange(out, "r g n e -> (g n) r e")

    def _times_stems(self, left: Tensor, right: Tensor) -> Tensor:
        """Each row's (r, g, n, a) by its stem's (s, g, a, b), the rows of a stem in one product.

        Views instead of einops here and in `_times_root`, where its calls took as long as a small
        model's products.
        """
        stems, members = self.members.shape
        _, groups, queries, _ = left.shape
        grouped = left.index_select(0, self.members.flatten())  # (s m, g, n, a)
        grouped = grouped.view(stems, members, *left.shape[1:]).transpose(1, 2)  # (s, g, m, n, a)
        grouped = grouped.reshape(stems * groups, members * queries, -1)  # (s g, m n, a)
        products = torch.bmm(grouped, right.flatten(0, 1))  # (s g, m n, b)
        products = products.view(stems, groups, members, queries, -1)  # (s, g, m, n, b)
        products = products.transpose(1, 2).reshape(stems * members, groups, queries, -1)
        return products.index_select(0, self.place)  # (r, g, n, b)

    def _mask(self, window: int | None, dtype: torch.dtype, heads: tuple[int, ...]) -> Tensor:
        """-inf at the columns that a row must not see, 0 at the others:
        (r, *heads, root + stem + own), made once for all layers.

        To be added: filling by a broadcast mask took several times as long on a CPU, adding one
        twice.
        """
        if (window, heads) not in self.masks:
            root = self.columns[0]
            device, shape = self.device, (len(self.rows), -1)
            stem_lengths = torch.tensor(self.stem_lengths, device=device)[:, None]  # (r, 1)
            ends = self.ends[:, None]  # (r, 1)
            in_root, in_stem, in_own = (torch.arange(n, device=device)[None] for n in self.columns)
            hidden = [(in_root < 0).expand(shape), in_stem >= stem_lengths, in_own > ends]
            is_hidden = torch.cat(hidden, dim=1)  # (r, root + stem + own)
            if window is not None:
                before = [in_root.expand(shape), (root + in_stem).expand(shape)]
                positions = torch.cat([*before, root + stem_lengths + in_own], dim=1)
                is_hidden |= positions <= root + stem_lengths + ends - window
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device)
            mask.masked_fill_(is_hidden, -torch.inf)
            whole = mask[:, None, None].expand(-1, *heads, -1).contiguous()
            self.masks[window, heads] = whole
        return self.masks[window, heads]


def _times_own_keys(left: Tensor, keys: Tensor) -> Tensor:
    """Each row's (r, g, n, d) by its own keys (r, g, d, t)."""
    return (keys.mT @ left.mT).mT if _lie_by_tokens(keys) else left @ keys


def _times_root(left: Tensor, right: Tensor) -> Tensor:
    """Each row's (r, g, n, a) by the root's (g, a, b), all rows in one product."""
    rows, groups, queries, _ = left.shape
    flat = left.transpose(0, 1).reshape(groups, rows * queries, -1)  # (g, r n, a)
    products = torch.bmm(flat, right).view(groups, rows, queries, -1)  # (g, r, n, b)
    return products.transpose(0, 1)  # (r, g, n, b)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention (h, n, e) of queries (h, n, d) to keys (g, t, d) and values (g, t, e).

    mask (n, t): True at what a query sees, or numbers to be added to the scores; if None, each
    query sees the keys up to its own place, and n is t. scale: of the scores; if None, 1 / sqrt(d).
    """
    return F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]


def causal_mask(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """True where one of the last `count` of `length` tokens sees a token: (n, t)."""
    places = torch.arange(length - count, length, device=device)[:, None]  # (n, 1)
    columns = torch.arange(length, device=device)[None]  # (1, t)
    sees = columns <= places
    return sees if window is None else sees & (columns > places - window)


def _zeros_of_keys(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, by_tokens: bool
) -> Tensor:
    """Zeros (*n, d, t) that lie in memory by their width or by their tokens."""
    if not by_tokens:
        return _zeros(shape, dtype, device)
    return _zeros((*shape[:-2], shape[-1], shape[-2]), dtype, device).mT


def _lie_by_tokens(keys: Tensor) -> bool:
    return keys.stride(-1) != 1


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their pages are taken from the machine only when they are written."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
