"""Sessions of models whose attention layers turn to `KeyValues`, and the trial of such a model.

What prompts have in common is computed once: the beginning of all of them as the session's root,
and of two prompts that come one after the other the beginning they share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.adapters.key_values import KeyValues, Sizes, Span
from self_rewarding_lm.adapters.sessions import Ids, Plan, common_beginning

Forward = Callable[[Tensor, Tensor, KeyValues], Tensor]
"""ids (1, n) and positions (1, n) to the logits (1, m, v) of the tokens that are wanted."""


@dataclass(eq=False, slots=True)
class _Stem:
    """A prompt behind the root. users: its rows, and one for each who may still need it."""

    place: int
    ids: Ids
    users: int = 1


@dataclass(slots=True)
class _Row:
    stem: _Stem
    length: int = 0


class AttendingSession:
    """Rows of one model over one memory, see key_values.py.

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

    def prefill(self, prompts: Sequence[Ids]) -> Float[Tensor, "n v"]:
        parts: list[list[Ids]] = [[]]
        packed = 0
        for prompt in prompts:
            packed += len(prompt)
            if self.max_packed is not None and parts[-1] and packed > self.max_packed:
                parts.append([])
                packed = len(prompt)
            parts[-1].append(prompt)
        return torch.cat([self._prefill(part) for part in parts])

    def _prefill(self, prompts: Sequence[Ids]) -> Tensor:
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

    def _run(self, ids: Tensor | Ids, positions: Ids) -> Tensor:
        """Logits of the wanted tokens; ids and positions of one packed row."""
        packed = torch.as_tensor(ids, device=self.device)[None]
        at = torch.tensor([*positions], device=self.device)[None]
        return self.forward(packed, at, self.memory)[0]

    def _leave(self, stem: _Stem) -> None:
        stem.users -= 1
        if not stem.users:
            self._free.append(stem.place)
            self._free.sort(reverse=True)  # the lowest place is taken first: fewer stems to pass
