"""Judge prompts and what a judge's text says: rendering, parsing, averaging.

A score that cannot be read is None with a reason, never a number. Only the judge's own
continuation is parsed, so a response that contains `Score: 5` does not score itself.
Knows nothing of models and tokens.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from textwrap import dedent

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.records import Candidate, Judgement

PARSED_CHARACTERS = 20_000  # of the end of a judge's text; bounds the work of a parse

_ENVIRONMENT = ImmutableSandboxedEnvironment(autoescape=False, keep_trailing_newline=True)
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
class ParsedScore:
    """A score, or None and the reason why there is none."""

    score: float | None
    reason: str | None = None


def compile_prompt_template(template: str, *, auto_dedent: bool) -> Callable[[str, str], str]:
    """The function (prompt, response) -> judge prompt of a jinja2 template.

    Raises ConfigError where `prompt` or `response` is missing or another variable is asked for.
    """
    names = _variables(template, "prompt_template")
    if names != {"prompt", "response"}:
        raise ConfigError(
            "a judge's prompt_template needs exactly the variables {{ prompt }} and "
            f"{{{{ response }}}}; it has {_braced(names)}."
        )
    compiled = _ENVIRONMENT.from_string(dedent(template).strip("\n") if auto_dedent else template)
    try:
        compiled.render(prompt="prompt", response="response")
    except TemplateError as error:
        raise ConfigError(f"prompt_template cannot be rendered with two texts: {error}") from error
    return lambda prompt, response: compiled.render(prompt=prompt, response=response)


def compile_score_pattern(template: str) -> re.Pattern[str]:
    """The pattern of a text such as `Score: {{ reward }}`, which is matched as text.

    Upper and lower case are one; white space is folded; markup around the words and the number
    (`**Score:** 4`, `"Score: [4]"`) is passed over; `4/5` and `4 out of 5` give the scale too.
    Raises ConfigError where `reward` is not its only variable.
    """
    names = _variables(template, "reward_regex_template")
    if names != {"reward"}:
        raise ConfigError(
            "a reward_regex_template needs exactly the variable {{ reward }}, for example "
            f"'Score: {{{{ reward }}}}'; it has {_braced(names)}."
        )
    parts = re.split(r"\{\{\s*reward\s*\}\}", template.strip())
    if len(parts) != 2 or "{#" in template or "{%" in template:
        raise ConfigError(
            "a reward_regex_template is plain text with {{ reward }} in it once; "
            f"got {template.strip()!r}."
        )
    before, after = (_literal(_ascii_digits(part)) for part in parts)
    start = r"(?<![^\W_])" if before[:1].isascii() and before[:1].isalnum() else ""
    lead = f"{start}{before}{_OPENING}{_SUM}" if before else _FRESH
    tail = f"{_CLOSING}{after}" + (r"(?![^\W_])" if after[-1:].isalnum() else "") if after else ""
    body = f"{lead}{_NUMBER}{_WHOLE}{_NO_RANGE}{_SCALE}{tail}"
    return re.compile(body, re.IGNORECASE)


def parse_score(
    text: str,
    pattern: re.Pattern[str],
    *,
    score_range: tuple[float, float] | None = None,
    allowed_scores: Sequence[float] | None = None,
) -> ParsedScore:
    """The last score that `text` states, or None with the reason.

    Where the pattern occurs nowhere, a last line that is nothing but a score (`4/5`, `**4**`), or
    a text that is nothing but a number, states it too. Reasons: `no_score`, `other_scale` (8/10
    where the range ends at 5), `out_of_range`, `not_allowed`.
    """
    text = _ascii_digits(text[-PARSED_CHARACTERS:])
    statements = list(pattern.finditer(text))
    number, scale = (
        (statements[-1]["number"], statements[-1]["scale"]) if statements else _bare_score(text)
    )
    if number is None:
        return ParsedScore(None, "no_score")
    score = _number(number)
    if score_range is not None:
        low, high = score_range
        if scale is not None and _number(scale) != high:
            return ParsedScore(None, "other_scale")
        if not low <= score <= high:
            return ParsedScore(None, "out_of_range")
    if allowed_scores is not None and score not in allowed_scores:
        return ParsedScore(None, "not_allowed")
    return ParsedScore(score)


def call_parse_reward(parse_reward: Callable[[str], object], text: str) -> ParsedScore:
    """What a user's own parser says of `text`; NaN, text and booleans are no scores."""
    try:
        value = parse_reward(text)
    except Exception as error:
        raise JudgeError(
            f"parse_reward raised {type(error).__name__}: {error}. It must return a number, or "
            f"None where there is no score. It was given: {text[:300]!r}"
        ) from error
    return score_of(value)


def score_of(value: object) -> ParsedScore:
    """A user function's result as a score: a finite number, else None with its reason."""
    if value is None:
        return ParsedScore(None, "no_score")
    if isinstance(value, bool | str | bytes) or "bool" in str(getattr(value, "dtype", "")):
        return ParsedScore(None, f"not_a_number: {type(value).__name__}")
    try:
        score = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return ParsedScore(None, "not_finite")
    except (TypeError, ValueError):
        return ParsedScore(None, f"not_a_number: {type(value).__name__}")
    return ParsedScore(score) if math.isfinite(score) else ParsedScore(None, "not_finite")


def mean_score(scores: Iterable[float | None]) -> float | None:
    """The mean of the scores that there are; None where there is none."""
    valid = [score for score in scores if score is not None]
    return math.fsum(valid) / len(valid) if valid else None


def _bare_score(text: str) -> tuple[str | None, str | None]:
    text = text.strip()
    if re.fullmatch(_NUMBER, text):
        return text, None
    line = _BARE_LINE.fullmatch(text[text.rfind("\n") + 1 :].strip())
    return (line["number"] or line["bold"], line["scale"]) if line else (None, None)


def judge_metrics(
    candidates: Sequence[Candidate], judgements: Sequence[Judgement]
) -> dict[str, float]:
    """How a judge did on a stage's candidates.

    judge/parse_rate: judgements with a score. judge/score_mean: of those. judge/modal_share: the
    commonest score's share (1.0 for a judge that always says the same). judge/self_agreement: of
    pairs of judgements of one candidate, those with the same score. judge/tie_rate: of prompts
    with two scored candidates, those where the best and the worst have the same mean. A measure
    that nothing is known of is left out.
    """
    scores = [j.score for j in judgements if j.score is not None]
    by_candidate: dict[str, list[float]] = {}
    for judgement in judgements:
        if judgement.score is not None:
            by_candidate.setdefault(judgement.candidate_ids[0], []).append(judgement.score)
    by_prompt: dict[str, list[float]] = {}
    for candidate in candidates:
        if candidate.id in by_candidate:
            own = by_candidate[candidate.id]
            by_prompt.setdefault(candidate.prompt_id, []).append(sum(own) / len(own))
    twos = [pair for own in by_candidate.values() for pair in combinations(own, 2)]
    ranked = [means for means in by_prompt.values() if len(means) >= 2]
    shares = {
        "judge/parse_rate": (len(scores), len(judgements)),
        "judge/score_mean": (sum(scores), len(scores)),
        "judge/modal_share": (max(Counter(scores).values(), default=0), len(scores)),
        "judge/self_agreement": (sum(a == b for a, b in twos), len(twos)),
        "judge/tie_rate": (sum(max(m) == min(m) for m in ranked), len(ranked)),
    }
    return {name: part / whole for name, (part, whole) in shares.items() if whole}


def _variables(template: str, name: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
    except TemplateError as error:
        raise ConfigError(f"{name} is no valid jinja2 template: {error}") from error


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{{ {name} }}}}" for name in sorted(names)) or "none"


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


def _number(text: str) -> float:
    return float(text.replace(",", "."))
