"""Sessions: the rows that are decoded together over one model, as the engine sees them.

A session belongs to one call of the engine, so the weights do not change under it, and its memory
is given back with it. What prompts have in common is computed once: the beginning of all prompts is
the session's root, and of two prompts that follow each other the second reuses what it begins with
alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.models.attention import KeyValues, Sizes, Span
from self_rewarding_lm.models.interface import Cache, Plan

Start = Callable[[Sequence[Sequence[int]]], tuple[Tensor, Cache]]
"""Rows of ids to the logits (r, v) of what follows each, and their cache."""


class BatchSession:
    """A session over a model's own kind of cache: prompts are computed whole and rows are copied.

    Rows are not joined to others in flight, as that would copy the whole cache.
    """

    joins = False

    def __init__(self, start: Start, *, max_rows: int, device: torch.device) -> None:
        self.start, self.max_rows, self.device = start, max_rows, device
        self.held = 0
        self._prompts: dict[int, tuple[Cache, int]] = {}  # by number: a cache and a row of it
        self._running: Cache | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        logits, cache = self.start(prompts)
        for row in range(len(prompts)):
            self._prompts[self.held] = cache, row
            self.held += 1
        return logits

    def room(self) -> int:
        return self.max_rows - len(self._prompts)

    def add(self, prompts: Sequence[int]) -> None:
        places = [self._prompts[number] for number in prompts]
        assert self._running is None and len({id(cache) for cache, _ in places}) == 1
        self._running = places[0][0].copy()
        self._running.select(torch.tensor([row for _, row in places], device=self.device))

    def release(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            del self._prompts[number]

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        assert self._running is not None
        return self._running.extend(tokens)

    def select(self, rows: Sequence[int]) -> None:
        if not rows:
            self._running = None
        elif self._running is not None:
            self._running.select(torch.tensor(rows, device=self.device))


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike.

    `os.path.commonprefix` would tell as well, but Python 3.15 deprecates it.
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


Forward = Callable[[Tensor, Tensor, KeyValues], Tensor]
"""ids (1, n) and positions (1, n) to the logits (1, m, v) of the tokens that are wanted."""


@dataclass(eq=False, slots=True)
class _Stem:
    """A prompt's tokens after the root, and their place in memory.

    users: rows that go on from it, and one for each reason to keep it: that the prompt was not
    released, and that the next prompt may copy from it. Without users its place is free.
    """

    place: int
    ids: Sequence[int]
    users: int = 1


@dataclass(slots=True)
class _Row:
    """A row in flight. length: how many tokens of its own it has."""

    stem: _Stem
    length: int = 0


class AttendingSession:
    """A session over our own keys and values, see `attention.py`.

    max_packed: tokens that the model takes in one packed row; None if any number.
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
        self.held = 0
        self._prompts: dict[int, _Stem] = {}  # by number
        self._rows: list[_Row] = []
        self._latest: _Stem | None = None  # of the last prompt; the next one may copy from it
        self._free_places = list(range(plan.stems - 1, -1, -1))
        if plan.root:
            self.memory.at_root()
            self._run(plan.root, range(len(plan.root)))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        batches: list[list[Sequence[int]]] = [[]]
        packed = 0
        for prompt in prompts:
            packed += len(prompt)
            if self.max_packed is not None and batches[-1] and packed > self.max_packed:
                batches.append([])
                packed = len(prompt)
            batches[-1].append(prompt)
        return torch.cat([self._prefill_packed(batch) for batch in batches])

    def _prefill_packed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hold prompts that go through the model in one packed row; the logits (n, v)."""
        # 1. a stem for each prompt, and what it copies from the one before
        root, spans, ids, positions = len(self.plan.root), [], [], []
        latest = self._latest
        for prompt in prompts:
            rest = prompt[root:]
            reused, source = 0, 0
            if latest is not None:  # the last token is always computed, for its logits
                reused = min(common_beginning(latest.ids, rest), len(rest) - 1)
                source = latest.place if reused else 0
            stem = _Stem(self._free_places.pop(), rest)
            spans.append(Span(stem.place, len(ids), len(rest) - reused, reused, source))
            ids += rest[reused:]
            positions += range(root + reused, root + len(rest))
            self._prompts[self.held] = latest = stem
            self.held += 1

        # 2. one forward of all their new tokens
        self.memory.at_prompts(spans)
        logits = self._run(ids, positions)

        # 3. keep the last stem for the next prompt, in place of the one before these prompts
        if latest is not None:
            latest.users += 1
        before, self._latest = self._latest, latest
        if before is not None:
            self._leave(before)
        return logits

    def room(self) -> int:
        return len(self._free_places)

    def add(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            stem = self._prompts[number]
            stem.users += 1
            self._rows.append(_Row(stem))

    def release(self, prompts: Sequence[int]) -> None:
        for number in prompts:
            self._leave(self._prompts.pop(number))

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        rows = self._rows
        stem_lengths = [len(row.stem.ids) for row in rows]
        lengths = [row.length for row in rows]
        self.memory.at_step([row.stem.place for row in rows], stem_lengths, lengths)
        root = len(self.plan.root)
        positions = [root + stem + own for stem, own in zip(stem_lengths, lengths, strict=True)]
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
        """The logits (m, v) of the wanted tokens of one packed row."""
        packed = torch.as_tensor(ids, device=self.device)[None]  # (1, n)
        places = torch.tensor([*positions], device=self.device)[None]  # (1, n)
        return self.forward(packed, places, self.memory)[0]

    def _leave(self, stem: _Stem) -> None:
        """One user of a stem less; without any its place is free."""
        stem.users -= 1
        if not stem.users:
            self._free_places.append(stem.place)
            # the lowest place is taken first: a step looks at all stems up to the last one in use
            self._free_places.sort(reverse=True)
