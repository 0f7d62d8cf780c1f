"""Rotary embeddings whose factors follow the longest row of a forward.

Rows on both sides of a border in one forward would change each other: a short row would get the
factors of the long one.
"""

import math
from collections.abc import Iterator
from typing import Any


class RotaryBorders:
    """The borders of a configuration of transformers.

    longrope (arXiv:2402.13753) has one set of factors up to the original length and another beyond
    it; dynamic NTK has factors of its own for each length beyond the original one.
    """

    def __init__(self, config: Any) -> None:
        limit = getattr(config, "max_position_embeddings", None) or math.inf
        self.steps: list[float] = []
        self.grows_from = math.inf
        for rope in _ropes(config):
            kind = rope.get("rope_type") or rope.get("type")
            if kind in ("longrope", "su"):
                own = getattr(config, "original_max_position_embeddings", None)
                self.steps.append(rope.get("original_max_position_embeddings") or own or limit)
            elif kind == "dynamic":
                self.grows_from = min(self.grows_from, limit)

    @property
    def first(self) -> float:
        """The longest row on the side of short rows; infinity if there is no border."""
        return min([*self.steps, self.grows_from])

    def side(self, length: int) -> int:
        """A number that rows of two lengths share if they may be in one forward."""
        return sum(length > border for border in self.steps) + int(max(0, length - self.grows_from))


def _ropes(config: Any) -> Iterator[dict]:
    """The settings of rotary embeddings, those of each kind of layer if they have their own."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            yield settings
            yield from (inner for inner in settings.values() if isinstance(inner, dict))
