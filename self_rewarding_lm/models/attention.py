"""Keys and values of rows that are decoded together, and attention over them.

Three parts, so that what rows have in common is stored and computed once: the root, with which all
prompts begin; a stem for each prompt, its tokens behind the root; and each row's own tokens. The
memory of a session is allocated at its first forward and written in place: nothing grows and
nothing is copied from token to token. Knows tensors; nothing of models, tokens or sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from self_rewarding_lm.models.inference import product_dtype


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a session holds at most. stem and new: tokens of a stem and of a row's own."""

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
    """A prompt's new tokens among those that go through the model together.

    stem: its place. start, count: among the packed tokens. reused: tokens before them that are
    copied from the stem `source`.
    """

    stem: int
    start: int
    count: int
    reused: int = 0
    source: int = 0


@dataclass(slots=True)
class _Layer:
    """(Hkv, root, d), (stems, Hkv, stem, d) and (rows, Hkv, new, d), each of keys and of values."""

    root: tuple[Tensor, Tensor]
    stems: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class KeyValues:
    """A session's keys and values, to which a model's attention layers turn.

    `attend` is their attention; `needed` picks the tokens whose logits are wanted, before the last
    linear layer. What the tokens of a forward are is set before it by `at_root`, `at_prompts` or
    `at_step`.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.layers: dict[int, _Layer] = {}
        self.windows: set[int] = set()
        self._wanted: Tensor | None = None
        self._now: _Root | _Prompts | _Step | None = None

    def at_root(self) -> None:
        """The next forward's tokens are the root."""
        self._now, self._wanted = _Root(), torch.tensor([self.sizes.root - 1], device=self.device)

    def at_prompts(self, spans: Sequence[Span]) -> None:
        """The next forward's tokens are those of the spans, one after the other."""
        ends = [span.start + span.count - 1 for span in spans]
        self._now = _Prompts(spans, self.sizes.root)
        self._wanted = torch.tensor(ends, device=self.device)

    def at_step(
        self, stems: Sequence[int], stem_lengths: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """The next forward has a token of each row.

        stems: each row's stem, its length, and how many tokens of its own a row has already.
        """
        self._wanted = None
        self._now = _Step(self.sizes.root, stems, stem_lengths, lengths, self.device)

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
        """Causal attention of the present tokens to their rows' whole past, themselves included.

        Keys and values are kept. Heads of queries are a multiple of those of keys (grouped-query
        attention), nothing is repeated for it. scale: default 1 / sqrt(d). window: how many of the
        last tokens are seen, the present one included (sliding attention). dropout: 0, nothing is
        trained in a session.
        """
        assert dropout == 0.0, "a session's forward is without dropout"
        assert self._now is not None, "attend is called inside a session's forward alone"
        dtype = product_dtype(query)
        kept = self._layer(layer, key, value, dtype)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if window is not None:
            self.windows.add(window)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (t[0].to(dtype) for t in (query, key, value))
            return self._now.attend(kept, q * factor, k, v, window)[None].to(query.dtype)

    def needed(self, hidden: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 m d"]:
        """The hidden states of the tokens whose logits are wanted."""
        return hidden if self._wanted is None else hidden[:, self._wanted]

    @property
    def wanted(self) -> Tensor | None:
        """Places of the tokens whose logits are wanted; None: of all."""
        return self._wanted

    def move_rows(self, rows: Sequence[int], length: int) -> None:
        """Row i's own tokens, of which no row has more than `length`, become those of rows[i]."""
        to = [i for i, row in enumerate(rows) if i != row]
        if not to or not length:
            return
        target = torch.tensor(to, device=self.device)
        source = torch.tensor([rows[i] for i in to], device=self.device)
        for kept in self.layers.values():
            for tensor in kept.own:
                part = tensor[:, :, :length]
                part[target] = part[source]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers that were attended to."""
        return sum(
            t.shape[1] * t.shape[3] * t.element_size()
            for la in self.layers.values()
            for t in la.own
        )

    def _layer(self, number: int, key: Tensor, value: Tensor, dtype: torch.dtype) -> _Layer:
        if number not in self.layers:
            s = self.sizes

            def made(*leading: int) -> tuple[Tensor, Tensor]:
                shapes = [(*leading, t.shape[-1]) for t in (key, value)]
                return _zeros(shapes[0], dtype, self.device), _zeros(shapes[1], dtype, self.device)

            heads = key.shape[1]
            self.layers[number] = _Layer(
                made(heads, s.root), made(s.stems, heads, s.stem), made(s.rows, heads, s.new)
            )
        return self.layers[number]


class _Root:
    """The beginning that all prompts have."""

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        for tensor, new in zip(kept.root, (k, v), strict=True):
            tensor.copy_(new)
        mask = None if window is None else seen(q.shape[1], q.shape[1], window, q.device)
        return whole_attention(q, k, v, mask)


class _Prompts:
    """Prompts of any lengths, packed one behind the other: no token of padding is computed."""

    def __init__(self, spans: Sequence[Span], root: int) -> None:
        self.spans, self.root = spans, root
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        for tensor, new in zip(kept.stems, (k, v), strict=True):
            for s in self.spans:
                if s.reused:  # a source in this forward stands before the spans that copy from it
                    tensor[s.stem, :, : s.reused] = tensor[s.source, :, : s.reused]
                own = new[:, s.start : s.start + s.count]
                tensor[s.stem, :, s.reused : s.reused + s.count] = own
        out = []
        for i, s in enumerate(self.spans):
            keys, values = (t[s.stem, :, : s.reused + s.count] for t in kept.stems)
            if self.root:
                keys = torch.cat([kept.root[0], keys], dim=1)
                values = torch.cat([kept.root[1], values], dim=1)
            mask = self._mask(i, keys.shape[1], window, q.device)
            out.append(whole_attention(q[:, s.start : s.start + s.count], keys, values, mask))
        return torch.cat(out, dim=1)

    def _mask(self, i: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
        if (i, window) not in self.masks:
            count = self.spans[i].count
            plain = length == count and window is None
            self.masks[i, window] = None if plain else seen(count, length, window, device)
        return self.masks[i, window]


@dataclass(slots=True)
class _Step:
    """A token a row. Scores of root, stem and own tokens are side by side in one softmax."""

    root: int
    stems: Sequence[int]
    stem_lengths: Sequence[int]
    lengths: Sequence[int]
    device: torch.device
    rows: Tensor = field(init=False)
    ends: Tensor = field(init=False)
    table: Tensor = field(init=False)
    place: tuple[Tensor, Tensor] = field(init=False)
    masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        members: list[list[int]] = [[] for _ in range(max(self.stems) + 1)]
        places = []
        for row, stem in enumerate(self.stems):
            places.append(len(members[stem]))
            members[stem].append(row)
        most = max(map(len, members))
        table = [rows + [0] * (most - len(rows)) for rows in members]  # a row too many is harmless
        self.rows = torch.arange(len(self.stems), device=self.device)
        self.ends = torch.tensor(self.lengths, device=self.device)
        self.table = torch.tensor(table, device=self.device)
        self.place = (
            torch.tensor(self.stems, device=self.device),
            torch.tensor(places, device=self.device),
        )

    def attend(self, kept: _Layer, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        groups, count, size = k.shape
        for tensor, new in zip(kept.own, (k, v), strict=True):
            tensor[self.rows, :, self.ends] = new.transpose(0, 1)
        q = q.view(groups, -1, count, size).permute(2, 0, 1, 3).contiguous()  # rows g repeats d
        stem, own = max(self.stem_lengths), max(self.lengths) + 1
        parts = []
        if self.root:
            flat = q.transpose(0, 1).reshape(groups, -1, size)
            found = torch.bmm(flat, kept.root[0].transpose(1, 2))
            parts.append(found.view(groups, count, -1, self.root).transpose(0, 1))
        parts.append(self._of_stems(q, kept.stems[0][:, :, :stem].transpose(2, 3)))
        parts.append(_of_rows(q, kept.own[0][:count, :, :own].transpose(2, 3)))
        scores = torch.cat(parts, dim=-1)
        scores += self._hidden(stem, own, window, scores.dtype)[:, None, None]
        exact = torch.float32 if scores.dtype.itemsize < 4 else scores.dtype
        shares = torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)
        of_root, of_stem, of_own = shares.split([self.root, stem, own], dim=-1)
        out = self._of_stems(of_stem, kept.stems[1][:, :, :stem])
        out += _of_rows(of_own, kept.own[1][:count, :, :own])
        if self.root:
            flat = of_root.transpose(0, 1).reshape(groups, -1, self.root)
            out += (
                torch.bmm(flat, kept.root[1]).view(groups, count, -1, v.shape[-1]).transpose(0, 1)
            )
        return out.permute(1, 2, 0, 3).flatten(0, 1)

    def _of_stems(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of each row (r, g, repeats, a) with its stem's matrix (stems, g, a, b).

        Rows of one stem are side by side in one product.
        """
        stems, most = self.table.shape
        groups, repeats = left.shape[1:3]
        grouped = left[self.table].transpose(1, 2).reshape(stems * groups, most * repeats, -1)
        found = torch.bmm(grouped, right[:stems].flatten(0, 1))
        found = found.view(stems, groups, most, repeats, -1)
        return found[self.place[0], :, self.place[1]]

    def _hidden(self, stem: int, own: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """-inf for the columns that a row must not see, else 0: (r, root + stem + own).

        Added, because filling by a broadcast mask took several times as long on a CPU.
        """
        if window not in self.masks:
            stem_lengths = torch.tensor(self.stem_lengths, device=self.device)[:, None]
            of_stem = torch.arange(stem, device=self.device)[None]
            of_own = torch.arange(own, device=self.device)[None]
            of_root = torch.zeros(len(self.rows), self.root, dtype=torch.bool, device=self.device)
            ends = self.ends[:, None]
            hidden = torch.cat([of_root, of_stem >= stem_lengths, of_own > ends], dim=1)
            if window is not None:
                of_root = torch.arange(self.root, device=self.device).expand(len(self.rows), -1)
                at = [of_root, (self.root + of_stem).expand(len(self.rows), -1)]
                columns = torch.cat([*at, self.root + stem_lengths + of_own], dim=1)
                hidden |= columns <= self.root + stem_lengths + ends - window
            shown = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self.masks[window] = shown.masked_fill_(hidden, -torch.inf)
        return self.masks[window]


def _of_rows(left: Tensor, right: Tensor) -> Tensor:
    """Products of (r, g, repeats, a) and (r, g, a, b), neither of them copied."""
    found = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return found.view(*left.shape[:3], -1)


def whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention (h, n, e) of queries (h, n, d) to (g, t, d) and (g, t, e).

    mask: which of them each sees, or what is added to the scores; None: those up to itself, where n
    is t. scale: of the scores; None: 1 / sqrt(d).
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


def seen(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `length` tokens each of the last `count` sees (n, t)."""
    at = torch.arange(length - count, length, device=device)[:, None]
    columns = torch.arange(length, device=device)[None]
    seen = columns <= at
    return seen if window is None else seen & (columns > at - window)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their pages are taken from the machine only when they are written."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
