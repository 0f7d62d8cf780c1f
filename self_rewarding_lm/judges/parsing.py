"""The text of a judge becomes a score or a verdict.

A score that cannot be read is None with a reason, never a number. Only the judge's own words are
parsed, so a response that contains `Score: 5` does not score itself. Knows nothing of models and
tokens.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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


_SCALE = r"(?:\s{0,4}(?:/|out\s{1,4}of|of)\s{0,4}(?P<scale>\d{1,9}(?:[.,]\d{1,6})?)(?![^\W_]))"


_LOW = r"(?:\d{1,9}\s{0,2}(?:[-‐-―]|to\b)\s{0,2})"  # the "1 to" of "1 to 10"


_IN_WORDS = (  # "on a scale of 1 to 10", "(on a 10-point scale)", "points out of 10"
    r"(?:[\s*_`\"'”’)\]]{0,8}(?:(?:points?|stars?)\s{1,4})?[(\[,‐-―-]?\s?(?:"
    r"out\s{1,4}of\s{1,4}(?P<scale_whole>\d{1,9})(?=[\s*_`]{0,8}(?:[)\].,;!]|\Z))"
    r"|(?<![^\W_])(?:[oi]n\s{1,4})?(?:(?:an?|the)\s{1,4})?scale(?:\s?:)?\s{1,4}"
    rf"(?:(?:of|from)\s{{1,4}})?{_LOW}?(?P<scale_high>\d{{1,9}})(?![^\W_])"
    rf"|(?<![^\W_])(?:[oi]n\s{{1,4}})?(?:an?|the)\s{{1,4}}{_LOW}?(?P<scale_points>\d{{1,9}})"
    r"(?:[-\s]points?)?[-\s]scale(?![^\W_])))"
)


_BESIDE = (  # a scale between the words and their colon: "Score (0-5):", "Score out of 5:"
    rf"[(（\[]?\s?(?:{_LOW}|(?:out\s{{1,4}}of|max\.?|/)\s{{0,4}})"
    r"(?P<scale_beside>\d{1,9})(?:\s(?:points?|stars?))?\s?[)）\]]?"
)


_ARROW = r"[*_`~]{0,4}[^\S\n]{0,2}(?:[-=]{1,2}>|[→⇒⟶➔➜➡])[^\S\n]{0,2}[*_`]{0,4}"


_CHANGED = (  # the "5 ->" of "5 -> 4"; "4/5 -> 80" and "4/5 -> 0.8" say the same in another way
    rf"(?:\d{{1,9}}(?!\d)(?:[.,]\d{{1,6}})?(?:{_ARROW}|/(?P<was>\d{{1,9}}){_ARROW}"
    r"(?=\d{1,9}(?:[.,]\d{1,6})?/(?P=was)(?!\d))))"
)


_LONE_LINE = re.compile(  # also "5 -> 4" and "4 on a scale of 1 to 5"
    rf"\A(?:{_BARE_LINE.pattern}"
    rf"|\W{{0,8}}{_NUMBER.replace('number', 'graded')}{_IN_WORDS}\W{{0,8}}"
    rf"|\W{{0,8}}{_CHANGED}{{1,4}}{_NUMBER.replace('number', 'changed')}"
    r"(?:/(?P<scale_same>\d{1,9}))?\W{0,8})",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A number or label that a judge's text states.

    said: as it is written. start: where it begins in the text. before: the words that lead to it.
    scale: the 5 of "4/5" and "4 on a scale of 1 to 5"; None if the text names none. points: what a
    mark of an additive rubric is worth; 1 if the statement is the whole score.
    """

    said: str
    start: int
    before: str
    scale: str | None = None
    points: float = 1.0


def score_pattern(before: str, after: str) -> re.Pattern[str]:
    """The pattern of a number between two texts: the group `number`, its scale in `scale...`."""
    words, after = _ascii_digits(before), words_pattern(_ascii_digits(after))
    lead = f"{_lead_of(words)}{_OPENING}(?:{_CHANGED}{{1,4}}|{_SUM})"
    lead = lead if words_pattern(words) else _FRESH
    scale = f"(?:{_SCALE}|{_IN_WORDS})?"
    if after:
        end = r"(?![^\W_])" if after[-1:].isalnum() else ""
        scale += f"{_CLOSING}{after}{end}{_IN_WORDS.replace('<scale_', '<scale_behind_')}?"
    return re.compile(f"{lead}{_NUMBER}{_WHOLE}{_NO_RANGE}{scale}", re.IGNORECASE)


def earlier_score_pattern(before: str, after: str) -> re.Pattern[str]:
    """The pattern by which runs of format 1 read: without scales in words, keys and arrows."""
    before, after = (words_pattern(_ascii_digits(part)) for part in (before, after))
    lead = f"{_word_start(before)}{before}{_OPENING}{_SUM}" if before else _FRESH
    tail = f"{_CLOSING}{after}" + (r"(?![^\W_])" if after[-1:].isalnum() else "") if after else ""
    return re.compile(f"{lead}{_NUMBER}{_WHOLE}{_NO_RANGE}{_SCALE}?{tail}", re.IGNORECASE)


def verdict_pattern(prefix: str, labels: Sequence[str]) -> re.Pattern[str]:
    """The pattern of a verdict such as `Better: A`; case, space and markup as in a reward template.

    Labels count only in their own case and as whole words; `A or B` and `A/B` are no verdict.
    """
    before = words_pattern(prefix)
    either = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    no_choice = rf"(?![^\W_])(?!\s{{0,4}}(?:/|\||or\b|and\b){_OPENING}(?:{either})(?![^\W_]))"
    return re.compile(f"(?i:{_word_start(before)}{before}){_OPENING}(?P<label>{either}){no_choice}")


def find_score(
    text: str, pattern: re.Pattern[str], lone_line: re.Pattern[str] = _LONE_LINE
) -> Statement | None:
    """The last score that `text` states, as it is written; `parse_score` says what counts."""
    skipped = max(0, len(text) - PARSED_CHARACTERS)
    text = _ascii_digits(text[skipped:])
    matches = list(pattern.finditer(text))
    if matches:
        return _statement(text, matches[-1], "number", matches[-1].start(), skipped)
    return _bare_score(text, skipped, lone_line)


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


def _lead_of(words: str) -> str:
    """The pattern of a template's words before the number.

    Words with a colon or an equals sign may also be a key (`"score": 4`) or have a scale beside
    them (`Score (0-5): 4`).
    """
    literal = words_pattern(words)
    parts = re.fullmatch(r"(.*[^\W_])\s*([:=])\s*", words, re.DOTALL)
    plain = f"{_word_start(literal)}{literal}"
    if parts is None:
        return plain
    said = words_pattern(parts[1])
    key = rf"[\"'“‘]{said}[\"'”’]\s{{0,4}}[:=]"
    beside = f"{_word_start(said)}{said}{_FILLER}{_BESIDE}{_FILLER}{parts[2]}"
    return f"(?:{plain}|{key}|{beside})"


def _statement(text: str, match: re.Match[str], group: str, begin: int, skipped: int) -> Statement:
    """The statement of a match. begin: of its first word. skipped: characters before `text`."""
    start, groups = match.start(group), match.groupdict()
    scale = next((s for name, s in groups.items() if name.startswith("scale") and s), None)
    return Statement(match[group], start + skipped, text[begin:start], scale)


def _bare_score(text: str, skipped: int, lone_line: re.Pattern[str]) -> Statement | None:
    """The score of a text that is nothing but a number, or whose last line is nothing but one."""
    alone = re.fullmatch(rf"\s*{_NUMBER}\s*", text)
    if alone is not None:
        return _statement(text, alone, "number", 0, skipped)
    end = len(text.rstrip())
    begin = text.rfind("\n", 0, end) + 1
    indent = len(text[begin:end]) - len(text[begin:end].lstrip())
    match = lone_line.fullmatch(text[begin + indent : end])
    if match is None:
        return None
    names = ("number", "bold", "graded", "changed")
    group = next(name for name in names if match.groupdict().get(name))
    found = _statement(match.string, match, group, 0, begin + indent + skipped)
    return replace(found, before=text[begin : begin + indent] + found.before)


def _word_start(pattern: str) -> str:
    """What keeps a pattern from beginning within a word."""
    return r"(?<![^\W_])" if pattern[:1].isascii() and pattern[:1].isalnum() else ""


def words_pattern(text: str) -> str:
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
    numbers, so a digit after one makes another number. find: gives what a judge's text states: its
    last statement, or one for each item of a rubric; nothing if there is no score. read: gives the
    score, or None with the reason. goes_on: whether what a text that was cut off states could
    become another statement with its next words, as the 1 of "Score: 1" could. several: whether the
    score is the sum of several statements. earlier: the form by which runs of format 1 read, if it
    is another.
    """

    prefix: str
    values: Mapping[str, float]
    numeric: bool
    find: Callable[[str], Sequence[Statement]]
    read: Callable[[str], ParsedScore]
    goes_on: Callable[[str], bool]
    several: bool = False
    earlier: "VerdictForm | None" = None

    def of(self, run_format: int) -> "VerdictForm":
        """The form by which a run of a format reads."""
        return self.earlier if run_format == 1 and self.earlier is not None else self

    def read_answer(self, text: str, finished: bool | None, *, before: str = "") -> ParsedScore:
        """The score of an answer; None with the reason `unfinished` if it could become another.

        finished: False if the answer was cut off, None if that is not known. before: what the
        assistant's turn begins with, such as an open thought.
        """
        if finished is not True and thought_is_open(before + text):
            return ParsedScore(None, "unfinished")
        if finished is False and self.goes_on(text):
            return ParsedScore(None, "unfinished")
        return self.read(text)


_THOUGHT = re.compile(
    r"[<\[◁](?P<closes>/?)(?:\w{1,20}:)?(?:think|thinking|thought|reasoning)[>\]▷]", re.IGNORECASE
)


def thought_is_open(text: str) -> bool:
    """Whether a text ends within a thought: after a `<think>` without its `</think>`."""
    marks = [*_THOUGHT.finditer(text)]
    return bool(marks) and not marks[-1]["closes"]


def behind_thoughts(text: str) -> int:
    """Where the text after its last closed thought begins; 0 without a thought."""
    return max((mark.end() for mark in _THOUGHT.finditer(text) if mark["closes"]), default=0)


def opened_thought(prompt: str) -> str:
    """The `<think>` with which a prompt ends, so that the answer begins within a thought; or ""."""
    marks = [*_THOUGHT.finditer(prompt.rstrip())]
    is_last = bool(marks) and marks[-1].end() == len(prompt.rstrip())
    return marks[-1][0] if is_last and not marks[-1]["closes"] else ""


def score_form(
    template: str,
    *,
    numbers: Sequence[float] = (),
    score_range: tuple[float, float] | None = None,
    allowed_scores: Sequence[float] | None = None,
) -> VerdictForm:
    """The form of a reward template. numbers: the scores whose probabilities may be asked for."""
    before, after = template_parts(template)

    def form(
        pattern: re.Pattern[str], lone_line: re.Pattern[str], earlier: VerdictForm | None = None
    ) -> VerdictForm:
        def last(text: str) -> Statement | None:
            return find_score(text, pattern, lone_line)

        def read(text: str) -> ParsedScore:
            return _within(last(text), score_range, allowed_scores)

        def goes_on(text: str) -> bool:
            digits = () if text[-1:].isalpha() else ("97",)  # "4 stars" does not go on with digits
            return any(read(text + more) != read(text) for more in (" 97", *digits))

        values = {number_text(number): float(number) for number in numbers}
        return VerdictForm(
            before, values, True, lambda text: _given(last(text)), read, goes_on, earlier=earlier
        )

    earlier = form(earlier_score_pattern(before, after), _BARE_LINE)
    return form(score_pattern(before, after), _LONE_LINE, earlier)


def comparison_form(prefix: str, labels: tuple[str, str], tie_label: str | None) -> VerdictForm:
    """The form of a verdict between two: 1 for the first label, 0 for the second, 0.5 for a tie.

    If none is stated the reason is `no_verdict`.
    """
    values = {labels[0]: 1.0, labels[1]: 0.0} | ({} if tie_label is None else {tie_label: 0.5})
    pattern = verdict_pattern(prefix, list(values))

    def last(text: str) -> Statement | None:
        return find_verdict(text, pattern, list(values))

    def read(text: str) -> ParsedScore:
        verdict = last(text)
        if verdict is None:
            return ParsedScore(None, "no_verdict")
        return ParsedScore(values[verdict.said])

    def goes_on(text: str) -> bool:
        more = (space + label for space in ("", " ") for label in values)
        return any(read(text + label) != read(text) for label in more)

    return VerdictForm(prefix, values, False, lambda text: _given(last(text)), read, goes_on)


def _given(statement: Statement | None) -> tuple[Statement, ...]:
    return () if statement is None else (statement,)


def parser_form(parse_reward: Callable[[str], object]) -> VerdictForm:
    """The form of a user's parser: where it finds a number, and whether one goes on, it knows."""

    def read(text: str) -> ParsedScore:
        return call_parse_reward(parse_reward, text)

    return VerdictForm("", {}, True, lambda text: (), read, lambda text: False)


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
    return _within(find_score(text, pattern), score_range, allowed_scores)


def _within(
    statement: Statement | None,
    score_range: tuple[float, float] | None,
    allowed_scores: Sequence[float] | None,
) -> ParsedScore:
    """The score of a statement if it is within the limits, or None with the reason."""
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
            f"None if there is no score. It was given: {text[:300]!r}"
        ) from error
    return score_of(value)
