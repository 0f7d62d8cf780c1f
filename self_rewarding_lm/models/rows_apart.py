"""Rows over a model's own kind of cache that must not be in one forward with all others.

They are in groups, each with a cache of its own. A row that comes to another side while it is
decoded is computed whole once more, as its keys so far are those of the side that it leaves.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from self_rewarding_lm.models.batching import by_side
from self_rewarding_lm.models.interface import Cache
from self_rewarding_lm.models.sessions import Start


class RowsApart:
    """A Cache of rows. side: of a row's length; rows of different sides are never in one forward.

    groups: the places of each group's rows, and their cache.
    """

    def __init__(
        self, start: Start, side: Callable[[int], int], rows: Sequence[Sequence[int]]
    ) -> None:
        self.start, self.side = start, side
        self.rows = [list(row) for row in rows]
        self.groups: list[tuple[list[int], Cache]] = []
        self.logits = self._merged(self._begin(range(len(rows))))  # of the first new token

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        before = [self.side(len(row)) for row in self.rows]
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        crossing = [i for i, row in enumerate(self.rows) if self.side(len(row)) != before[i]]
        self._keep([[i for i in places if i not in crossing] for places, _ in self.groups])
        parts = [(places, cache.extend(tokens[places])) for places, cache in self.groups]
        if not crossing:
            return self._merged(parts)

        # groups that are no larger than what joins them are computed with it, so that there are
        # few groups, and a row is computed whole a few times
        joining = list(crossing)
        sides = {self.side(len(self.rows[i])) for i in crossing}
        small = []
        for places, _ in sorted(self.groups, key=lambda group: len(group[0])):
            if self.side(len(self.rows[places[0]])) in sides and len(places) <= len(joining):
                joining += places
                small.append(places)
        self.groups = [group for group in self.groups if group[0] not in small]
        parts = [part for part in parts if part[0] not in small]
        return self._merged([*parts, *self._begin(sorted(joining))])

    def select(self, rows: Int[Tensor, " n"]) -> None:
        chosen = rows.tolist()
        kept = [[i for i in chosen if i in places] for places, _ in self.groups]
        self._keep(kept)
        new_places: dict[int, list[int]] = {}
        for place, row in enumerate(chosen):
            new_places.setdefault(row, []).append(place)
        self.groups = [
            ([new_places[row].pop(0) for row in places], cache) for places, cache in self.groups
        ]
        self.rows = [list(self.rows[row]) for row in chosen]

    def copy(self) -> Cache:
        other = copy(self)
        other.rows = [list(row) for row in self.rows]
        other.groups = [(list(places), cache.copy()) for places, cache in self.groups]
        return other

    @property
    def bytes_per_token(self) -> int:
        return max(cache.bytes_per_token for _, cache in self.groups)  # type: ignore[attr-defined]

    def _begin(self, places: Sequence[int]) -> list[tuple[list[int], Tensor]]:
        """New groups for rows, computed whole; the places of each and the logits after them."""
        parts = []
        for group in by_side([len(self.rows[i]) for i in places], self.side):
            some = [places[i] for i in group]
            logits, cache = self.start([self.rows[i] for i in some])
            self.groups.append((some, cache))
            parts.append((some, logits))
        return parts

    def _keep(self, kept: list[list[int]]) -> None:
        """Each group keeps the rows that are named, some perhaps several times."""
        groups = []
        for (places, cache), wanted in zip(self.groups, kept, strict=True):
            if wanted and wanted != places:
                where = torch.tensor([places.index(row) for row in wanted])
                cache.select(where.to(self.logits.device))
            if wanted:
                groups.append((wanted, cache))
        self.groups = groups

    def _merged(self, parts: list[tuple[list[int], Tensor]]) -> Tensor:
        """The logits (r, v) of all rows, in their order."""
        order = torch.tensor([i for places, _ in parts for i in places])
        joined = torch.cat([logits for _, logits in parts])
        return joined[order.argsort().to(joined.device)]
