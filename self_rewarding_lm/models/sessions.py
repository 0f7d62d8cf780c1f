"""Sessions: the rows in flight over one model, as the engine sees them.

A session belongs to one call of the engine, so the weights do not change under it, and its memory
is given back with it. What prompts have in common is computed once: the beginning that all of
them share is the session's root, and two prompts that follow each other share their own
beginning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.models.attention import KeyValues, Sizes, Span
from self_rewarding_lm.models.interface import Cache, Plan

Start = Callable[[Sequence[Sequence[int]]], tuple[Tensor, Cache]]


class BatchSession:
    """A session over a model's own kind of cache: prompts are computed whole and rows are copied.

    Rows are not joined, as that copies the whole cache. start: the first logits and the cache of
    some rows.
    """

    joins = False

    def __init__(self, start: Start, *, max_rows: int, device: torch.device) -> None:
        self.start, self.max_rows, self.device = start, max_rows, device
        self.held = 0
        self._running: Cache | None = None
        self._held: dict[int, tuple[Cache, int]] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        logits, cache = self.start(prompts)
        for row in range(len(prompts)):
            self._held[self.held] = cache, row
            self.held += 1
        return logits

    def room(self) -> int:
        return self.max_rows - len(self._held)

    def add(self, prompts: Sequence[int]) -> None:
        held = [self._held[number] for number in prompts]
        assert self._running is None and len({id(cache) for cache, _ in held}) == 1
        self._running = held[0][0].copy()
        self._running.select(torch.tensor([row for _, row in held], device=self.device))

    def release(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            del self._held[number]

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        assert self._running is not None
        return self._running.extend(tokens)

    def select(self, rows: Sequence[int]) -> None:
        if not rows:
            self._running = None
        elif self._running is not None:
            self._running.select(torch.tensor(rows, device=self.device))


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


Forward = Callable[[Tensor, Tensor, KeyValues], Tensor]
"""ids (1, n) and positions (1, n) to the logits (1, m, v) of the tokens that are wanted."""


@dataclass(eq=False, slots=True)
class _Stem:
    """A prompt behind the root. users: its rows, and one for each who may still need it."""

    place: int
    ids: Sequence[int]
    users: int = 1


@dataclass(slots=True)
class _Row:
    stem: _Stem
    length: int = 0


class AttendingSession:
    """Rows of one model over one memory, see `attention.py`.

    max_packed: tokens that the model takes in one row; None: any number.
    """

    joins = True

    def __init__(
        self,
        forward: Forward,
        plan: Plan,
        device: torch.device,
        *,
        max_packed: int | None = None,
    ) -> None:
        self.max_packed = max_packed
        self.forward, self.plan, self.device = forward, plan, device
        sizes = Sizes(
            root=len(plan.root),
            stems=plan.stems,
            stem=plan.longest - len(plan.root),
            rows=plan.max_rows,
            new=plan.max_new,
        )
        self.memory = KeyValues(sizes, device)
        self._free = list(range(plan.stems - 1, -1, -1))
        self._held: dict[int, _Stem] = {}
        self._rows: list[_Row] = []
        self._last: _Stem | None = None
        self.held = 0
        if plan.root:
            self.memory.at_root()
            self._run(plan.root, range(len(plan.root)))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        parts: list[list[Sequence[int]]] = [[]]
        packed = 0
        for prompt in prompts:
            packed += len(prompt)
            if self.max_packed is not None and parts[-1] and packed > self.max_packed:
                parts.append([])
                packed = len(prompt)
            parts[-1].append(prompt)
        return torch.cat([self._prefill(part) for part in parts])

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        root, spans, ids, positions = len(self.plan.root), [], [], []
        before = self._last
        for prompt in prompts:
            rest = prompt[root:]
            shared = 0 if before is None else min(common_beginning(before.ids, rest), len(rest) - 1)
            stem = _Stem(self._free.pop(), rest)
            source = before.place if before is not None and shared else 0
            spans.append(Span(stem.place, len(ids), len(rest) - shared, shared, source))
            ids += rest[shared:]
            positions += range(root + shared, root + len(rest))
            self._held[self.held] = before = stem
            self.held += 1
        if before is not None:
            before.users += 1
        self.memory.at_prompts(spans)
        logits = self._run(ids, positions)
        last, self._last = self._last, before
        if last is not None:
            self._leave(last)
        return logits

    def room(self) -> int:
        return len(self._free)

    def add(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            stem = self._held[number]
            stem.users += 1
            self._rows.append(_Row(stem))

    def release(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            self._leave(self._held.pop(number))

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        root, rows = len(self.plan.root), self._rows
        lengths = [len(row.stem.ids) for row in rows]
        self.memory.at_step([r.stem.place for r in rows], lengths, [r.length for r in rows])
        positions = [root + n + row.length for n, row in zip(lengths, rows, strict=True)]
        logits = self._run(tokens, positions)
        for row in rows:
            row.length += 1
        return logits

    def select(self, rows: Sequence[int]) -> None:
        before = self._rows
        self.memory.move_rows(rows, max((before[i].length for i in rows), default=0))
        self._rows = [_Row(before[i].stem, before[i].length) for i in rows]
        for row in self._rows:
            row.stem.users += 1
        for row in before:
            self._leave(row.stem)

    def _run(self, ids: Tensor | Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits of the wanted tokens; ids and positions of one packed row."""
        packed = torch.as_tensor(ids, device=self.device)[None]
        at = torch.tensor([*positions], device=self.device)[None]
        return self.forward(packed, at, self.memory)[0]

    def _leave(self, stem: _Stem) -> None:
        stem.users -= 1
        if not stem.users:
            self._free.append(stem.place)
            self._free.sort(reverse=True)  # the lowest place is taken first: fewer stems to pass
