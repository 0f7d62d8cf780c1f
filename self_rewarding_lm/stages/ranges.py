"""Numbers of which only bounds are known before a run. Knows nothing of what they count."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; most None: no upper bound is known. Range() is what is unknown."""

    least: int = 0
    most: int | None = None

    @classmethod
    def of(cls, number: int) -> "Range":
        """A number that is known."""
        return cls(number, number)

    @property
    def is_unknown(self) -> bool:
        return self.least == 0 and self.most is None

    def __add__(self, other: "Range") -> "Range":
        most = None if self.most is None or other.most is None else self.most + other.most
        return Range(self.least + other.least, most)

    def times(self, factor: "Range | float") -> "Range":
        """Both bounds multiplied, rounded to whole numbers."""
        if not isinstance(factor, Range):
            most = None if self.most is None else round(self.most * factor)
            return Range(round(self.least * factor), most)
        most = None if self.most is None or factor.most is None else self.most * factor.most
        if 0 in (self.most, factor.most):  # nothing, however often
            most = 0
        return Range(self.least * factor.least, most)

    def capped(self, most: int | None) -> "Range":
        """The same, and never more than `most`."""
        if most is None:
            return self
        return Range(min(self.least, most), most if self.most is None else min(self.most, most))


NOTHING = Range.of(0)


UNKNOWN = Range()


def total(ranges: Iterable[Range]) -> Range:
    """The sum of ranges; 0 of none."""
    found = NOTHING
    for each in ranges:
        found = found + each
    return found
