"""The text of a judge becomes a score or a verdict.

A score that cannot be read is None with a reason, never a number. Only the judge's own words are
parsed, so a response that contains `Score: 5` does not score itself. Knows nothing of models and
tokens.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.templates import template_parts
from self_rewarding_lm.scores import ParsedScore, number_text, score_of

PARSED_CHARACTERS = 20_000  # at the end of a judge's text that are parsed; bounds the work


_FILLER = r"[\s*_`]{0,8}"  # white space and markup between the words of a score statement


_OPENING = r"[\s*_`\"'“”‘’«<(\[{$]{0,8}(?:\\boxed\{)?"


_CLOSING = r"[\s*_`\"'“”‘’»>)\]}$]{0,8}"


_NUMBER = r"(?P<number>[-+]?\d{1,9}(?:\.\d{1,6}|,\d{1,2})?)"


_SUM = r"(?:\d{1,9}(?:[^\S\n]?\+[^\S\n]?\d{1,9}){1,12}[^\S\n]?=[^\S\n]?)?"  # "1 + 1 + 1 = 3"


_WHOLE = (  # no part of a longer number, word, percentage, fraction or sum
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
    """A number or label that a judge's text states.

    said: as it is written. start: where it begins in the text. before: the words that lead to it.
    scale: the 5 of "4/5"; None if the text names none.
    """

    said: str
    start: int
    before: str
    scale: str | None = None


def score_pattern(before: str, after: str) -> re.Pattern[str]:
    """The pattern of a number between two texts, with the groups `number` and `scale`."""
    before, after = (_literal(_ascii_digits(part)) for part in (before, after))
    lead = f"{_word_start(before)}{before}{_OPENING}{_SUM}" if before else _FRESH
    tail = f"{_CLOSING}{after}" + (r"(?![^\W_])" if after[-1:].isalnum() else "") if after else ""
    body = f"{lead}{_NUMBER}{_WHOLE}{_NO_RANGE}{_SCALE}{tail}"
    return re.compile(body, re.IGNORECASE)


def verdict_pattern(prefix: str, labels: Sequence[str]) -> re.Pattern[str]:
    """The pattern of a verdict such as `Better: A`; case, space and markup as in a reward template.

    Labels count only in their own case and as whole words; `A or B` and `A/B` are no verdict.
    """
    before = _literal(prefix)
    either = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    no_choice = rf"(?![^\W_])(?!\s{{0,4}}(?:/|\||or\b|and\b){_OPENING}(?:{either})(?![^\W_]))"
    return re.compile(f"(?i:{_word_start(before)}{before}){_OPENING}(?P<label>{either}){no_choice}")


def find_score(text: str, pattern: re.Pattern[str]) -> Statement | None:
    """The last score that `text` states, as it is written; `parse_score` says what counts."""
    skipped = max(0, len(text) - PARSED_CHARACTERS)
    text = _ascii_digits(text[skipped:])
    matches = list(pattern.finditer(text))
    if matches:
        return _statement(text, matches[-1], "number", matches[-1].start(), skipped)
    return _bare_score(text, skipped)


def find_verdict(text: str, pattern: re.Pattern[str], labels: Sequence[str]) -> Statement | None:
    """The last verdict that `text` states, or the label if the text is nothing else."""
    skipped = max(0, len(text) - PARSED_CHARACTERS)
    text = text[skipped:]
    matches = list(pattern.finditer(text))
    if matches:
        return _statement(text, matches[-1], "label", matches[-1].start(), skipped)
    either = "|".join(map(re.escape, labels))
    bare = re.fullmatch(rf"\W{{0,8}}(?P<label>{either})\W{{0,8}}", text)
    return None if bare is None else _statement(text, bare, "label", 0, skipped)


def number_of(said: str) -> float:
    """The value of a number as it is written; a comma is a decimal point."""
    return float(said.replace(",", "."))


def _statement(text: str, match: re.Match[str], group: str, begin: int, skipped: int) -> Statement:
    """The statement of a match. begin: of its first word. skipped: characters before `text`."""
    start = match.start(group)
    scale = match.groupdict().get("scale")
    return Statement(match[group], start + skipped, text[begin:start], scale)


def _bare_score(text: str, skipped: int) -> Statement | None:
    """The score of a text that is nothing but a number, or whose last line is nothing but one."""
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
    """What keeps a pattern from beginning within a word."""
    return r"(?<![^\W_])" if pattern[:1].isascii() and pattern[:1].isalnum() else ""


def _literal(text: str) -> str:
    """The pattern of a template's text: markup and space may stand between all its words."""
    pieces = re.findall(r"[^\W_]+|[^\w\s*`]", text)
    return _FILLER.join(re.escape(piece) for piece in pieces)


def _ascii_digits(text: str) -> str:
    """A text of the same length with digits and signs of other scripts in ASCII."""
    if text.isascii():
        return text
    return "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else _FULL_WIDTH.get(c, c) for c in text
    )


_FULL_WIDTH = {"\uff1a": ":", "\uff0f": "/", "\uff0e": ".", "\u2212": "-", "\u066b": "."}


@dataclass(frozen=True)
class VerdictForm:
    """How a judge states what it decides: some words, and one of several texts after them.

    prefix: the words. values: the score of each text, such as 4.0 of "4". numeric: the texts are
    numbers, so a digit after one makes another number. find: gives the last statement in a judge's
    text. read: gives its score, or None with the reason.
    """

    prefix: str
    values: Mapping[str, float]
    numeric: bool
    find: Callable[[str], Statement | None]
    read: Callable[[str], ParsedScore]


def score_form(
    template: str,
    *,
    numbers: Sequence[float] = (),
    score_range: tuple[float, float] | None = None,
    allowed_scores: Sequence[float] | None = None,
) -> VerdictForm:
    """The form of a reward template. numbers: the scores whose probabilities may be asked for."""
    pattern = compile_score_pattern(template)
    limits = {"score_range": score_range, "allowed_scores": allowed_scores}
    return VerdictForm(
        prefix=template_parts(template)[0],
        values={number_text(number): float(number) for number in numbers},
        numeric=True,
        find=lambda text: find_score(text, pattern),
        read=lambda text: parse_score(text, pattern, **limits),
    )


def comparison_form(prefix: str, labels: tuple[str, str], tie_label: str | None) -> VerdictForm:
    """The form of a verdict between two: 1 for the first label, 0 for the second, 0.5 for a tie.

    If none is stated the reason is `no_verdict`.
    """
    values = {labels[0]: 1.0, labels[1]: 0.0} | ({} if tie_label is None else {tie_label: 0.5})
    pattern = verdict_pattern(prefix, list(values))

    def find(text: str) -> Statement | None:
        return find_verdict(text, pattern, list(values))

    def read(text: str) -> ParsedScore:
        verdict = find(text)
        if verdict is None:
            return ParsedScore(None, "no_verdict")
        return ParsedScore(values[verdict.said])

    return VerdictForm(prefix, values, numeric=False, find=find, read=read)


def compile_score_pattern(template: str) -> re.Pattern[str]:
    """The pattern of a template such as `Score: {{ reward }}`, which is matched as plain text.

    Case and the amount of white space do not matter; markup around the words and the number
    (`**Score:** 4`, `"Score: [4]"`) is skipped; `4/5` and `4 out of 5` give the scale too. Raises
    ConfigError if the template has another variable than `reward`, or does not have it once.
    """
    return score_pattern(*template_parts(template))


def parse_score(
    text: str,
    pattern: re.Pattern[str],
    *,
    score_range: tuple[float, float] | None = None,
    allowed_scores: Sequence[float] | None = None,
) -> ParsedScore:
    """The last score that `text` states, or None with the reason.

    If the pattern does not occur, a last line that is only a score (`4/5`, `**4**`) or a text that
    is only a number states it too. Reasons: `no_score`, `other_scale` (8/10 if the range ends at
    5), `out_of_range`, `not_allowed`.
    """
    statement = find_score(text, pattern)
    if statement is None:
        return ParsedScore(None, "no_score")
    score = number_of(statement.said)
    if score_range is not None:
        low, high = score_range
        if statement.scale is not None and number_of(statement.scale) != high:
            return ParsedScore(None, "other_scale")
        if not low <= score <= high:
            return ParsedScore(None, "out_of_range")
    if allowed_scores is not None and score not in allowed_scores:
        return ParsedScore(None, "not_allowed")
    return ParsedScore(score)


def call_parse_reward(parse_reward: Callable[[str], object], text: str) -> ParsedScore:
    """The score that a user's parser reads in `text`; NaN, texts and booleans are no scores.

    Raises JudgeError if the parser raises.
    """
    try:
        value = parse_reward(text)
    except Exception as error:
        raise JudgeError(
            f"parse_reward raised {type(error).__name__}: {error}. It must return a number, or "
            f"None where there is no score. It was given: {text[:300]!r}"
        ) from error
    return score_of(value)
