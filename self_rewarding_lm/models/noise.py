"""Dropout whose noise each row draws for itself, whatever rows go through the model with it.

A row's noise depends on a seed, on the row and on which call of a forward asks for it: neither on
the rows beside it nor on padding. So a step's gradient is the same however its rows are cut into
micro-batches and shared among processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from self_rewarding_lm.records import stable_hash


@dataclass(frozen=True, slots=True)
class Stretch:
    """The tokens of one row in a forward: `count` of them from `start` on. seed: of its noise."""

    seed: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a forward's rows are: stretches of the flat rows x columns tokens.

    padded: whether each row of the ids is one row, with padding after it.
    """

    rows: int
    columns: int
    stretches: Sequence[Stretch]
    padded: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A call that draws: the layout of its forward, and its number there."""

    layout: Layout
    number: int

    def seeds(self) -> Iterator[tuple[int, Stretch]]:
        """A seed for each stretch."""
        return ((_mixed(stretch.seed, self.number), stretch) for stretch in self.layout.stretches)


@dataclass(eq=False)
class RowNoise:
    """The noise of one step. Within it torch's functions of dropout draw for each row by itself.

    These are the layers' functions and that of attention, in torch.nn.functional. A backward
    belongs within it as well: what is checkpointed calls them again there, and finds its numbers by
    the global random state, which `torch.utils.checkpoint` restores. seed: of the step. tell: gets
    in words what draws numbers that cannot be a row's own; they come from the global random state.
    drops: whether a module's rates say that anything is left out.
    """

    seed: int
    tell: Callable[[str], None]
    drops: bool = True
    keys: Sequence[tuple[int, int]] = ()
    """Of the sequences of the next forward: the row that each belongs to, and which of it."""
    layout: Layout | None = None
    calls: dict[int, Call] = field(default_factory=dict)
    drawn: int = 0
    """Calls of this forward so far."""
    before: dict[str, Callable] = field(default_factory=dict)
    """The functions that ours stand in for: torch's, or those that somebody put in their place."""

    def __enter__(self) -> "RowNoise":
        self.before = {name: getattr(F, name) for name in OURS}
        for name, ours in OURS.items():
            setattr(F, name, partial(ours, self))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self.before.items():
            setattr(F, name, function)

    def begin(self, keys: Sequence[tuple[int, int]]) -> None:
        """The next forward is of these sequences; see `keys`."""
        self.keys = keys

    def lay_out(
        self, rows: int, columns: int, places: Sequence[tuple[int, int, int]], *, padded: bool
    ) -> None:
        """The next forward of the model begins. places: a sequence's number among `keys`, where it
        starts and how many tokens it has."""
        stretches = [
            Stretch(stable_hash(self.seed, *self.keys[i]), start, count)
            for i, start, count in places
        ]
        self.layout, self.drawn = Layout(rows, columns, stretches, padded), 0

    def call(self) -> Call:
        """The call that draws now; if a checkpointed part is computed again, that of before."""
        place = _place()
        if place not in self.calls:
            assert self.layout is not None, "a forward says first where its rows are"
            self.calls[place] = Call(self.layout, self.drawn)
            self.drawn += 1
        return self.calls[place]

    @contextmanager
    def watching(self, device: torch.device) -> Iterator[None]:
        """Within a forward: whether anything else draws from the global random state is told."""
        before, count = torch.get_rng_state(), len(self.calls)
        of_device = _state(device)
        yield
        replayed = torch.Generator()
        replayed.set_state(before)
        for _ in range(len(self.calls) - count):
            _place(replayed)
        alike = torch.equal(replayed.get_state(), torch.get_rng_state())
        if not alike or not torch.equal(of_device, _state(device)):
            self.tell("random numbers are drawn beside those of dropout layers")


def _place(generator: torch.Generator | None = None) -> int:
    """A number that names a place in a forward: the next one of the global random state."""
    return int(torch.randint(2**62, (), generator=generator))


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, the global random state is a seed's own; afterwards it is as before."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def kept(call: Call, shape: Sequence[int], rate: float, device: torch.device) -> Tensor | None:
    """Which numbers of a tensor stay; None if its shape does not say which row each belongs to."""
    layout, shape = call.layout, tuple(shape)
    rows, columns = layout.rows, layout.columns
    if layout.padded and len(shape) == 2 and shape[0] == rows:  # whole tokens, channels or units
        keeps = torch.ones(shape, dtype=torch.bool)
        for (seed, _), row in zip(call.seeds(), keeps, strict=True):
            row.copy_(_drawn(seed, row.shape, rate, keeps.device))
        return keeps.to(device)
    if shape[:2] == (rows, columns) or shape[:1] == (rows * columns,):
        rest = shape[2:] if shape[:2] == (rows, columns) else shape[1:]
        keeps = torch.ones((rows * columns, *rest), dtype=torch.bool, device=device)
        for seed, stretch in call.seeds():
            part = slice(stretch.start, stretch.start + stretch.count)
            keeps[part] = _drawn(seed, (stretch.count, *rest), rate, device)
        return keeps.view(shape)
    if not layout.padded or not shape:
        return None
    if shape[:2] == (columns, rows):  # the time comes first
        keeps = kept(call, (rows, columns, *shape[2:]), rate, device)
        return None if keeps is None else keeps.transpose(0, 1)
    axis = next((i for i, size in enumerate(shape) if i and size == columns), None)
    if shape[0] != rows:  # a row's heads follow each other
        if shape[0] % rows or axis is None:
            return None
        keeps = kept(call, (rows, shape[0] // rows, *shape[1:]), rate, device)
        return None if keeps is None else keeps.view(shape)
    if axis is None:
        return None
    keeps = torch.ones(shape, dtype=torch.bool, device=device)
    for (seed, stretch), row in zip(call.seeds(), keeps, strict=True):
        own = row.narrow(axis - 1, 0, stretch.count)
        if device.type != "cpu" and shape[-1] == columns:  # there a longer axis begins otherwise
            own = own.narrow(-1, 0, stretch.count)
        own.copy_(_drawn(seed, own.shape, rate, device))
    return keeps


def _drawn(seed: int, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """Which numbers stay. The last axis is drawn first: on a CPU a longer one begins alike."""
    *others, last = shape or (1,)
    generator = torch.Generator(device).manual_seed(seed)
    keeps = torch.empty((last, *others), device=device).bernoulli_(1 - rate, generator=generator)
    return keeps.bool().movedim(0, -1).reshape(shape)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each call (the finaliser of splitmix64)."""
    bits = (seed + (number + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (bits ^ (bits >> 31)) >> 1


class _Dropped(torch.autograd.Function):
    """Numbers that stay, times a scale, and zeros; kept for the backward is a byte a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeps: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keeps)
        ctx.scale = scale
        return (x * keeps).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keeps,) = ctx.saved_tensors
        return (gradients[0] * keeps).mul_(ctx.scale), None, None


def _dropout(
    noise: RowNoise, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or not 0 < p < 1 or not input.numel():
        return noise.before["dropout"](input, p, training, inplace)
    keeps = kept(noise.call(), input.shape, p, input.device)
    if keeps is None:
        noise.tell(f"dropout of a tensor of shape {tuple(input.shape)}")
        return noise.before["dropout"](input, p, training, inplace)
    if inplace:
        return input.mul_(keeps.to(input.dtype) / (1 - p))
    return _Dropped.apply(input, keeps, 1 / (1 - p))


def _features(
    noise: RowNoise, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout of whole channels, those of a row's (b, channels, ...)."""
    if not training or not 0 < p < 1 or input.ndim < 3:
        name = "dropout1d" if input.ndim < 4 else "dropout2d"
        return noise.before[name](input, p, training, inplace)
    ones = torch.ones(input.shape[:2], dtype=input.dtype, device=input.device)
    shares = _dropout(noise, ones, p, training).view(*ones.shape, *[1] * (input.ndim - 2))
    return input.mul_(shares) if inplace else input * shares


def _attention(
    noise: RowNoise,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Scaled dot-product attention of padded rows (b, h, t, d), each row alone."""
    torchs = partial(noise.before["scaled_dot_product_attention"], is_causal=is_causal, **others)
    if not dropout_p or noise.layout is None or not noise.layout.padded:  # a packing seeds its own
        return torchs(query, key, value, attn_mask, dropout_p)
    call = noise.call()
    shapes = {(t.ndim, t.shape[0], t.shape[-2]) for t in (query, key, value)}
    if shapes != {(4, call.layout.rows, call.layout.columns)}:
        noise.tell(f"dropout of attention of shape {tuple(query.shape)}")
        return torchs(query, key, value, attn_mask, dropout_p)
    outputs = []
    for i, (seed, stretch) in enumerate(call.seeds()):
        count = stretch.count
        q, k, v = (t[i : i + 1, :, :count] for t in (query, key, value))
        mask = attn_mask
        if mask is not None:
            of_row = mask[i : i + 1] if mask.ndim == 4 and len(mask) > 1 else mask
            mask = of_row[..., :count, :count]
        with seeded(seed, query.device):
            out = torchs(q, k, v, mask, dropout_p)
        outputs.append(F.pad(out, (0, 0, 0, call.layout.columns - count)))
    return torch.cat(outputs)


OURS: dict[str, Callable] = {
    "dropout": _dropout,
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), _features),
    "scaled_dot_product_attention": _attention,
}
"""What stands in for functions of torch.nn.functional, by their names."""
