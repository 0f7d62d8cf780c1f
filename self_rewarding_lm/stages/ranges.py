"""Ranges: numbers of which only a lower and an upper bound are known before a run."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """A number from `least` to `most`. If `most` is None, no upper bound is known; Range() is an
    unknown number."""

    least: int = 0
    most: int | None = None

    @classmethod
    def of(cls, number: int) -> "Range":
        """The range of a number that is known."""
        return cls(number, number)

    @property
    def is_unknown(self) -> bool:
        """Whether neither bound says anything."""
        return self.least == 0 and self.most is None

    def __add__(self, other: "Range") -> "Range":
        most = None if self.most is None or other.most is None else self.most + other.most
        return Range(self.least + other.least, most)

    def times(self, factor: "Range | float") -> "Range":
        """The range of the product: both bounds multiplied, rounded to whole numbers."""
        if not isinstance(factor, Range):
            most = None if self.most is None else round(self.most * factor)
            return Range(round(self.least * factor), most)
        most = None if self.most is None or factor.most is None else self.most * factor.most
        if 0 in (self.most, factor.most):  # zero times an unknown number is zero
            most = 0
        return Range(self.least * factor.least, most)

    def capped(self, most: int | None) -> "Range":
        """The range with both bounds lowered to `most` if they are higher; None lowers neither."""
        if most is None:
            return self
        return Range(min(self.least, most), most if self.most is None else min(self.most, most))


NOTHING = Range.of(0)


UNKNOWN = Range()


def total(ranges: Iterable[Range]) -> Range:
    """The sum of ranges, NOTHING if there are none."""
    result = NOTHING
    for part in ranges:
        result = result + part
    return result
