"""The marks of an additive rubric in a judge's text: after each item a word for yes or for no.

What stands between the marks may be anything, and a sum that the judge states counts for nothing.
"""

import re
import string
from collections.abc import Sequence

from self_rewarding_lm.judges.parsing import (
    PARSED_CHARACTERS,
    Statement,
    VerdictForm,
    behind_thoughts,
    words_pattern,
)
from self_rewarding_lm.scores import ParsedScore, exact, exact_sum

LEAD = 32
"""Characters before a mark, at most, whose tokens may depend on those of the mark."""


MARKUP = string.whitespace + "*_`"
"""What a word may have around it, and between its parts."""


def marks_form(
    yes: str, no: str, points: Sequence[float], names: Sequence[str] = ()
) -> VerdictForm:
    """The form of a rubric whose items are marked: the sum of the points of those marked yes.

    points: of each item. names: the first stands before the first mark, each further one between
    two marks; none if items are only counted. A text with fewer or more marks than items, or
    without a name, has no score (`no_score`). Thoughts that are closed are left out.
    """
    yes, no = yes.strip(MARKUP), no.strip(MARKUP)
    words = sorted((yes, no), key=len, reverse=True)  # one may begin with the other
    pattern, is_yes = _pattern("|".join(map(_whole, words))), _pattern(words_pattern(yes))
    named = [_pattern(_whole(name)) for name in names]

    def marks(text: str) -> list[re.Match[str]]:
        return list(pattern.finditer(text, behind_thoughts(text)))

    def find(text: str) -> tuple[Statement, ...]:
        skipped = max(0, len(text) - PARSED_CHARACTERS)
        text = text[skipped:]
        found = marks(text)
        begins = [behind_thoughts(text), *(mark.end() for mark in found)]
        are_named = all(
            name.search(text, begin, mark.start())
            for name, begin, mark in zip(named, begins, found, strict=False)
        )
        if len(found) != len(points) or not are_named:
            return ()
        return tuple(
            Statement(mark[0], mark.start() + skipped, _lead(text, mark.start()), points=worth)
            for mark, worth in zip(found, points, strict=True)
        )

    def read(text: str) -> ParsedScore:
        statements = find(text)
        if not statements:
            return ParsedScore(None, "no_score")
        met = [exact(s.points) for s in statements if is_yes.fullmatch(s.said)]
        return ParsedScore(float(exact_sum(met)))

    def goes_on(text: str) -> bool:
        if len(marks(text[-PARSED_CHARACTERS:])) < len(points):
            return True
        ends = (word[n:] for word in words for n in range(1, len(word)))
        return any(read(text + more) != read(text) for more in ("a", *ends))

    return VerdictForm("", {yes: 1.0, no: 0.0}, False, find, read, goes_on, several=True)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


def _whole(words: str) -> str:
    """The pattern of words that neither begin nor end within other words."""
    bare = words.strip(MARKUP)
    before = r"(?<![^\W_])" if _joins(bare[0]) else ""
    return before + words_pattern(bare) + (r"(?![^\W_])" if _joins(bare[-1]) else "")


def _joins(character: str) -> bool:
    """Whether words that have spaces between them are written with a character."""
    return character.isdecimal() or character.islower() or character.isupper()


def _lead(text: str, end: int) -> str:
    """The last word before a place, with the space before it and what follows it."""
    near = text[max(0, end - LEAD) : end]
    last = re.search(r"\s?\S*\s*\Z", near)
    return near if last is None else last[0]
