"""Keys and values of rows that are decoded together, and attention over them.

What rows have in common is stored and computed once, so keys and values stand in three parts: the
root, with which all prompts begin; a stem for each prompt, its tokens after the root; and each
row's own tokens, those that it has sampled. A session's memory is allocated at its first forward
and written in place: nothing grows, and nothing is copied from token to token. Knows tensors;
nothing of models, tokens or sampling.

Axes: h heads of queries, g heads of keys, n = h / g heads of queries that look at one head of keys,
t tokens, r rows, s stems, d and e the widths of keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from self_rewarding_lm.models.inference import product_dtype


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
    """Keys and values of one attention layer.

    root: (g, t, d); stems: (s, g, t, d); own: (r, g, t, d); values have e in the place of d.
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
        self._wanted: Tensor | None = None
        self._forward: _Root | _Prompts | _Step | None = None

    def at_root(self) -> None:
        """The next forward's tokens are the root."""
        self._forward = _Root()
        self._wanted = torch.tensor([self.sizes.root - 1], device=self.device)

    def at_prompts(self, spans: Sequence[Span]) -> None:
        """The next forward's tokens are those of the spans, one after the other."""
        ends = [span.start + span.count - 1 for span in spans]
        self._forward = _Prompts(spans, self.sizes.root)
        self._wanted = torch.tensor(ends, device=self.device)

    def at_step(
        self, stems: Sequence[int], stem_lengths: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """The next forward has one token of each row.

        stems: the place of each row's stem; stem_lengths: its tokens; lengths: how many tokens of
        its own each row has already.
        """
        self._forward = _Step(self.sizes.root, stems, stem_lengths, lengths, self.device)
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
            for tensor in layer.own:
                filled = tensor[:, :, :length]  # (r, g, t, d)
                filled[target] = filled[source]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take in all layers that were attended to."""
        return sum(
            t.shape[1] * t.shape[3] * t.element_size()
            for layer in self.layers.values()
            for t in layer.own
        )

    def _layer(self, number: int, key: Tensor, value: Tensor, dtype: torch.dtype) -> _Layer:
        """The memory of a layer, which is allocated when it is first attended to."""
        if number not in self.layers:
            sizes, heads = self.sizes, key.shape[1]

            def zeros(*leading: int) -> tuple[Tensor, Tensor]:
                keys = _zeros((*leading, key.shape[-1]), dtype, self.device)
                return keys, _zeros((*leading, value.shape[-1]), dtype, self.device)

            self.layers[number] = _Layer(
                root=zeros(heads, sizes.root),
                stems=zeros(sizes.stems, heads, sizes.stem),
                own=zeros(sizes.rows, heads, sizes.new),
            )
        return self.layers[number]


class _Root:
    """A forward of the tokens with which all prompts begin."""

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        for tensor, new in zip(kept.root, (k, v), strict=True):
            tensor.copy_(new)  # (g, t, d)
        length = q.shape[1]
        mask = None if window is None else causal_mask(length, length, window, q.device)
        return causal_attention(q, k, v, mask)


class _Prompts:
    """A forward of prompts of any lengths, packed one after the other without padding."""

    def __init__(self, spans: Sequence[Span], root: int) -> None:
        self.spans, self.root = spans, root
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        # 1. write each prompt's keys and values into its stem
        for tensor, new in zip(kept.stems, (k, v), strict=True):  # (s, g, t, d), (g, t, d)
            for span in self.spans:  # a span whose stem is copied comes before those that copy it
                end = span.reused + span.count
                if span.reused:
                    tensor[span.stem, :, : span.reused] = tensor[span.source, :, : span.reused]
                tensor[span.stem, :, span.reused : end] = new[:, _packed(span)]

        # 2. each prompt's attention to the root, to what it reuses and to itself
        outputs = []
        for i, span in enumerate(self.spans):
            keys, values = (t[span.stem, :, : span.reused + span.count] for t in kept.stems)
            if self.root:
                keys = torch.cat([kept.root[0], keys], dim=1)  # (g, t, d)
                values = torch.cat([kept.root[1], values], dim=1)  # (g, t, e)
            mask = self._mask(i, keys.shape[1], window, q.device)
            outputs.append(causal_attention(q[:, _packed(span)], keys, values, mask))
        return torch.cat(outputs, dim=1)  # (h, t, e)

    def _mask(self, i: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """What the tokens of span i see of `length` tokens; None if all those up to themselves."""
        if (i, window) not in self.masks:
            count = self.spans[i].count
            whole = length == count and window is None
            self.masks[i, window] = None if whole else causal_mask(count, length, window, device)
        return self.masks[i, window]


def _packed(span: Span) -> slice:
    """Where a span's tokens are among the packed ones."""
    return slice(span.start, span.start + span.count)


@dataclass(slots=True)
class _Step:
    """A forward of one token of each row.

    stems, stem_lengths, lengths: as `KeyValues.at_step` takes them. ends (r,): the place of each
    row's new token. columns: how many of the root, the stems and the rows' own tokens are looked
    at. members (s, m): the rows of each stem, filled up with row 0, whose products are not read.
    place: stem and place in it of each row, so that members[place] are all rows.
    """

    root: int
    stems: Sequence[int]
    stem_lengths: Sequence[int]
    lengths: Sequence[int]
    device: torch.device
    columns: tuple[int, int, int] = field(init=False)
    rows: Tensor = field(init=False)
    ends: Tensor = field(init=False)
    members: Tensor = field(init=False)
    place: tuple[Tensor, Tensor] = field(init=False)
    masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows_of: list[list[int]] = [[] for _ in range(max(self.stems) + 1)]
        places = []
        for row, stem in enumerate(self.stems):
            places.append(len(rows_of[stem]))
            rows_of[stem].append(row)
        most = max(map(len, rows_of))
        self.columns = self.root, max(self.stem_lengths), max(self.lengths) + 1
        self.rows = torch.arange(len(self.stems), device=self.device)
        self.ends = torch.tensor(self.lengths, device=self.device)
        self.members = torch.tensor(
            [rows + [0] * (most - len(rows)) for rows in rows_of], device=self.device
        )
        self.place = (
            torch.tensor(self.stems, device=self.device),
            torch.tensor(places, device=self.device),
        )

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        groups, count, _ = k.shape
        root, stem, own = self.columns

        # 1. write each row's new key and value after its own ones
        for tensor, new in zip(kept.own, (k, v), strict=True):
            tensor[self.rows, :, self.ends] = new.transpose(0, 1)  # (r, g, d)
        root_keys, root_values = kept.root  # (g, t, d)
        stem_keys, stem_values = (t[: len(self.members), :, :stem] for t in kept.stems)
        own_keys, own_values = (t[:count, :, :own] for t in kept.own)  # (r, g, t, d)

        # 2. score root, stem and own tokens side by side, for one softmax over all of them
        q = rearrange(q, "(g n) r d -> r g n d", g=groups)
        scores = [self._times_stems(q, stem_keys.mT), q @ own_keys.mT]  # (r, g, n, t) each
        if root:
            scores.insert(0, _times_root(q, root_keys.mT))
        joined = torch.cat(scores, dim=-1)  # (r, g, n, root + stem + own)
        joined += self._mask(window, joined.dtype)[:, None, None]
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
        grouped = left[self.members].transpose(1, 2)  # (s, g, m, n, a)
        grouped = grouped.reshape(stems * groups, members * queries, -1)  # (s g, m n, a)
        products = torch.bmm(grouped, right.flatten(0, 1))  # (s g, m n, b)
        products = products.view(stems, groups, members, queries, -1)  # (s, g, m, n, b)
        return products[self.place[0], :, self.place[1]]  # (r, g, n, b)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """-inf at the columns that a row must not see, 0 at the others: (r, root + stem + own).

        To be added: filling by a broadcast mask took several times as long on a CPU.
        """
        if window not in self.masks:
            root = self.root
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
            self.masks[window] = mask.masked_fill_(is_hidden, -torch.inf)
        return self.masks[window]


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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their pages are taken from the machine only when they are written."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
