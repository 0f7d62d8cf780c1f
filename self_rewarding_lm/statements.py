"""What a judge's text states: where a score or a verdict stands in it, and how it is written.

Text in, places out. Knows nothing of templates, ranges and tokens.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

PARSED_CHARACTERS = 20_000  # of the end of a judge's text; bounds the work of a parse

_FILLER = r"[\s*_`]{0,8}"  # white space and markup between the words of a score statement
_OPENING = r"[\s*_`\"'“”‘’«<(\[{$]{0,8}(?:\\boxed\{)?"
_CLOSING = r"[\s*_`\"'“”‘’»>)\]}$]{0,8}"
_NUMBER = r"(?P<number>[-+]?\d{1,9}(?:\.\d{1,6}|,\d{1,2})?)"
_SUM = r"(?:\d{1,9}(?:[^\S\n]?\+[^\S\n]?\d{1,9}){1,12}[^\S\n]?=[^\S\n]?)?"  # "1 + 1 + 1 = 3"
_WHOLE = (  # not a piece of a longer number, word, percentage, fraction or sum
    r"(?![.,]?\d)(?![^\W_])(?!\s?[%½¼¾])(?![^\S\n]\d+/\d)(?![^\S\n]?\+[^\S\n]?\d)"
)
# "0-5", "0 to 5", "4 or 5" state no score
_NO_RANGE = r"(?!(?:\s{1,4}(?:to|or)\b|[^\S\n]{0,4}[-‐-―~])[^\S\n]{0,4}\d)"
_FRESH = r"(?<![^\W_])(?<!\d[.,])(?<!\d to )(?<!\d or )(?<!\d-)(?<!\d - )"  # begins a number
_BARE_LINE = re.compile(  # a last line that is nothing but a score: "4/5", "**4**"
    rf"\W{{0,8}}{_NUMBER}\s{{0,4}}(?:/|out\s{{1,4}}of)\s{{0,4}}(?P<scale>\d{{1,9}})\W{{0,8}}"
    rf"|\*\*{_NUMBER.replace('number', 'bold')}\*\*"
)
_SCALE = r"(?:\s{0,4}(?:/|out\s{1,4}of|of)\s{0,4}(?P<scale>\d{1,9}(?:[.,]\d{1,6})?)(?![^\W_]))?"


@dataclass(frozen=True, slots=True)
class Statement:
    """What a judge's text states: `said`, of the scale `scale` where it names one.

    start: where `said` begins in the text. before: the words that lead to it.
    """

    said: str
    start: int
    before: str
    scale: str | None = None


def score_pattern(before: str, after: str) -> re.Pattern[str]:
    """The pattern of a number between two texts; groups `number` and `scale`."""
    before, after = (_literal(_ascii_digits(part)) for part in (before, after))
    lead = f"{_word_start(before)}{before}{_OPENING}{_SUM}" if before else _FRESH
    tail = f"{_CLOSING}{after}" + (r"(?![^\W_])" if after[-1:].isalnum() else "") if after else ""
    body = f"{lead}{_NUMBER}{_WHOLE}{_NO_RANGE}{_SCALE}{tail}"
    return re.compile(body, re.IGNORECASE)


def verdict_pattern(prefix: str, labels: Sequence[str]) -> re.Pattern[str]:
    """The pattern of a verdict such as `Better: A`, folded as a reward template is.

    Labels count in their own case only, as whole words; `A or B` and `A/B` are no verdict.
    """
    before = _literal(prefix)
    either = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    no_choice = rf"(?![^\W_])(?!\s{{0,4}}(?:/|\||or\b|and\b){_OPENING}(?:{either})(?![^\W_]))"
    return re.compile(f"(?i:{_word_start(before)}{before}){_OPENING}(?P<label>{either}){no_choice}")


def find_score(text: str, pattern: re.Pattern[str]) -> Statement | None:
    """The last score that `text` states, as it is written; what counts as one: `parse_score`."""
    skipped = max(0, len(text) - PARSED_CHARACTERS)
    text = _ascii_digits(text[skipped:])
    found = list(pattern.finditer(text))
    if found:
        return _statement(text, found[-1], "number", found[-1].start(), skipped)
    return _bare_score(text, skipped)


def find_verdict(text: str, pattern: re.Pattern[str], labels: Sequence[str]) -> Statement | None:
    """The last verdict that `text` states, or the label that is all of it."""
    skipped = max(0, len(text) - PARSED_CHARACTERS)
    text = text[skipped:]
    found = list(pattern.finditer(text))
    if found:
        return _statement(text, found[-1], "label", found[-1].start(), skipped)
    either = "|".join(map(re.escape, labels))
    bare = re.fullmatch(rf"\W{{0,8}}(?P<label>{either})\W{{0,8}}", text)
    return None if bare is None else _statement(text, bare, "label", 0, skipped)


def number_of(said: str) -> float:
    """The number that a statement says; a comma is a decimal point."""
    return float(said.replace(",", "."))


def number_text(score: float) -> str:
    """A score as it is written: whole numbers without a point."""
    return str(int(score)) if score == int(score) else repr(float(score))


def _statement(text: str, found: re.Match[str], group: str, begin: int, skipped: int) -> Statement:
    start = found.start(group)
    scale = found.groupdict().get("scale")
    return Statement(found[group], start + skipped, text[begin:start], scale)


def _bare_score(text: str, skipped: int) -> Statement | None:
    alone = re.fullmatch(rf"\s*{_NUMBER}\s*", text)
    if alone is not None:
        return _statement(text, alone, "number", 0, skipped)
    end = len(text.rstrip())
    begin = text.rfind("\n", 0, end) + 1
    indent = len(text[begin:end]) - len(text[begin:end].lstrip())
    line = _BARE_LINE.fullmatch(text, begin + indent, end)
    if line is None:
        return None
    return _statement(text, line, "number" if line["number"] else "bold", begin, skipped)


def _word_start(pattern: str) -> str:
    return r"(?<![^\W_])" if pattern[:1].isascii() and pattern[:1].isalnum() else ""


def _literal(text: str) -> str:
    pieces = re.findall(r"[^\W_]+|[^\w\s*`]", text)  # markup is filler, wherever it stands
    return _FILLER.join(re.escape(piece) for piece in pieces)


def _ascii_digits(text: str) -> str:
    if text.isascii():
        return text
    return "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else _FULL_WIDTH.get(c, c) for c in text
    )


_FULL_WIDTH = {"\uff1a": ":", "\uff0f": "/", "\uff0e": ".", "\u2212": "-", "\u066b": "."}
