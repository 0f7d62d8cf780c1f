"""Texts that a stage has sampled, counted."""

from dataclasses import dataclass

from self_rewarding_lm.planning.ranges import NOTHING, Range, total


@dataclass(frozen=True)
class Asking:
    """Texts of one kind that are sampled: answers, or judgements in words.

    count: texts; new: tokens of one. read: prompt tokens that are computed for all of them.
    longest: tokens of the longest prompt, None where that is not known; shared: with which all of
    them begin. at_once: texts that one call of the engine is asked for, None for all. here: whether
    the policy writes them.
    """

    count: Range = NOTHING
    new: Range = NOTHING
    read: Range = NOTHING
    longest: int | None = None
    at_once: int | None = None
    shared: int = 0
    here: bool = True

    @property
    def written(self) -> Range:
        """Tokens of all texts."""
        return self.count.times(self.new)


NOTHING_ASKED = Asking()


def together(parts: list[Asking]) -> Asking:
    """Judgements by several judge prompts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    longest = [part.longest for part in parts]
    return Asking(
        total(part.count for part in parts),
        Range(min(part.new.least for part in parts), max(part.new.most or 0 for part in parts)),
        total(part.read for part in parts),
        None if None in longest else max(n for n in longest if n is not None),
        max(part.at_once or 0 for part in parts) or None,
        min(part.shared for part in parts),
    )
