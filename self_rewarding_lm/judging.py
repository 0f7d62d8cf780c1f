"""Judge prompts and what a judge's text says: rendering, parsing, averaging.

A score that cannot be read is None with a reason, never a number. Only the judge's own
continuation is parsed, so a response that contains `Score: 5` does not score itself.
Knows nothing of models and tokens.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from self_rewarding_lm.controls import Filled, fill
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.records import Candidate, Judgement
from self_rewarding_lm.statements import (
    Statement,
    find_score,
    find_verdict,
    number_of,
    number_text,
    score_pattern,
    verdict_pattern,
)

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # around what is put into a template; no text has them
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    autoescape=False,
    keep_trailing_newline=True,
    undefined=StrictUndefined,  # what the sandbox refuses would be rendered as nothing
    finalize=lambda put: f"{_OPEN}{put}{_CLOSE}",
)


@dataclass(frozen=True, slots=True)
class ParsedScore:
    """A score, or None and the reason why there is none."""

    score: float | None
    reason: str | None = None


@dataclass(frozen=True)
class VerdictForm:
    """How a judge says what it decides: words, and one of some texts behind them.

    prefix: the words. values: what each text counts, such as "4" 4.0. numeric: they are numbers,
    so that a digit behind one makes another of it. find: the last statement in a judge's text;
    read: what that counts, or None with the reason.
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
    """Scores as a reward template says them. numbers: those whose probabilities may be asked."""
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
    """Verdicts between two: 1 for the first label, 0 for the second, 0.5 for a tie.

    Where none is stated the reason is `no_verdict`.
    """
    values = {labels[0]: 1.0, labels[1]: 0.0} | ({} if tie_label is None else {tie_label: 0.5})
    pattern = verdict_pattern(prefix, list(values))

    def find(text: str) -> Statement | None:
        return find_verdict(text, pattern, list(values))

    def read(text: str) -> ParsedScore:
        found = find(text)
        return ParsedScore(None, "no_verdict") if found is None else ParsedScore(values[found.said])

    return VerdictForm(prefix, values, numeric=False, find=find, read=read)


def compile_prompt_template(template: str, *, auto_dedent: bool) -> Callable[[str, str], Filled]:
    """The function (prompt, response) -> judge prompt of a jinja2 template.

    The judge prompt knows which of its characters the template put in. Raises ConfigError where
    `prompt` or `response` is missing or another variable is asked for.
    """
    return _compiled(template, ("prompt", "response"), auto_dedent)


def compile_comparison_template(
    template: str, *, auto_dedent: bool
) -> Callable[[str, str, str], Filled]:
    """The function (prompt, response_a, response_b) -> judge prompt; errors as above."""
    return _compiled(template, ("prompt", "response_a", "response_b"), auto_dedent)


def compile_meta_template(template: str, *, auto_dedent: bool) -> Callable[[str, str, str], Filled]:
    """The function (judge prompt, judgement a, judgement b) -> meta-judge prompt; errors as above.

    All three are data in it, the judge prompt too.
    """
    return _compiled(template, ("judge_prompt", "judgement_a", "judgement_b"), auto_dedent)


def compile_score_pattern(template: str) -> re.Pattern[str]:
    """The pattern of a text such as `Score: {{ reward }}`, which is matched as text.

    Upper and lower case are one; white space is folded; markup around the words and the number
    (`**Score:** 4`, `"Score: [4]"`) is passed over; `4/5` and `4 out of 5` give the scale too.
    Raises ConfigError where `reward` is not its only variable.
    """
    return score_pattern(*template_parts(template))


def template_parts(template: str) -> tuple[str, str]:
    """The texts before and behind {{ reward }}; ConfigError where it is not there once."""
    names = _variables(template, "reward_regex_template")
    if names != {"reward"}:
        raise ConfigError(
            "a reward_regex_template needs exactly the variable {{ reward }}, for example "
            f"'Score: {{{{ reward }}}}'; it has {_braced(names)}."
        )
    parts = re.split(r"\{\{\s*reward\s*\}\}", template.strip())
    if len(parts) != 2 or any(mark in "".join(parts) for mark in ("{{", "{#", "{%")):
        raise ConfigError(
            "a reward_regex_template is plain text with {{ reward }} in it once; "
            f"got {template.strip()!r}."
        )
    return parts[0], parts[1]


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
    found = find_score(text, pattern)
    if found is None:
        return ParsedScore(None, "no_score")
    score = number_of(found.said)
    if score_range is not None:
        low, high = score_range
        if found.scale is not None and number_of(found.scale) != high:
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


def candidate_scores(
    candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> dict[str, float | None]:
    """What judgements come to for each candidate, by its id; None where nothing is known.

    Judgements of one candidate: their mean. Judgements of two, which are `score` 1 where the first
    shown wins, 0 where the second does: each two candidates are shown in both orders; who wins in
    both wins, all else is a tie, and an order without a score makes the comparison unknown. The
    mean over a candidate's known comparisons counts, 1 won, 0.5 tied, 0 lost. Several judges (by
    name) count alike: the mean of what each comes to, None where one of them comes to nothing, for
    a mean over fewer judges is no measure of the same thing.
    """
    by_judge: dict[tuple[str, bool], list[Judgement]] = {}
    for judgement in judgements:
        key = judgement.judge, len(judgement.candidate_ids) == 2
        by_judge.setdefault(key, []).append(judgement)
    found: dict[str, list[float | None]] = {candidate.id: [] for candidate in candidates}
    for (_, compared), own in by_judge.items():
        for candidate_id, score in (_compared if compared else _means)(own).items():
            if candidate_id in found:
                found[candidate_id].append(score)
    return {
        candidate_id: None if None in scores else mean_score(scores)
        for candidate_id, scores in found.items()
    }


def label_of(judgement: Judgement) -> str | None:
    """The member of an ensemble, or the earlier model, that a judgement is by; else None.

    Ids: <candidate id>/j0 or <candidate id>/vs/3, and with a label <candidate id>/m0/j0.
    """
    own = judgement.id.removeprefix(f"{judgement.candidate_ids[0]}/")
    first, _, rest = own.partition("/")
    return first if rest and first != "vs" else None


def _means(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    by_candidate: dict[str, list[float | None]] = {}
    for judgement in judgements:
        by_candidate.setdefault(judgement.candidate_ids[0], []).append(judgement.score)
    return {candidate_id: mean_score(scores) for candidate_id, scores in by_candidate.items()}


def _compared(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    outcomes: dict[str, list[float | None]] = {
        candidate_id: [] for j in judgements for candidate_id in j.candidate_ids
    }
    for (one, other), (there, back) in both_orders(judgements).items():
        if there is not None and back is not None:
            won = there if there == back else 0.5
            outcomes[one].append(won)
            outcomes[other].append(1 - won)
    return {candidate_id: mean_score(scores) for candidate_id, scores in outcomes.items()}


def both_orders(
    judgements: Iterable[Judgement],
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """For each two candidates how the first of them did in each order: 1, 0.5, 0 or None."""
    shown: dict[tuple[str, ...], list[float | None]] = {}
    for judgement in judgements:
        shown.setdefault(judgement.candidate_ids, []).append(judgement.score)
    found = {}
    for one, other in (order for order in shown if order[::-1] not in shown or order < order[::-1]):
        there = _outcome(mean_score(shown[one, other]))
        back = _outcome(mean_score(shown.get((other, one), ())))
        found[one, other] = there, None if back is None else 1 - back
    return found


def _outcome(score: float | None) -> float | None:
    return None if score is None else 0.5 + 0.5 * (score > 0.5) - 0.5 * (score < 0.5)


def _compiled(template: str, wanted: tuple[str, ...], auto_dedent: bool) -> Callable[..., Filled]:
    names = _variables(template, "prompt_template")
    if names != set(wanted):
        braced = [f"{{{{ {name} }}}}" for name in wanted]
        raise ConfigError(
            f"a judge's prompt_template needs exactly the variables {', '.join(braced[:-1])} and "
            f"{braced[-1]}; it has {_braced(names)}."
        )
    text = dedent(template).strip("\n") if auto_dedent else template

    def render(*texts: str) -> Filled:
        data = (re.sub(f"[{_OPEN}{_CLOSE}]", "\ufffd", str(text)) for text in texts)
        try:  # a template may divide by zero, or by the length of a text
            return _filled(compiled.render(**dict(zip(wanted, data, strict=True))))
        except Exception as error:
            raise _unrenderable(error) from error

    try:
        compiled = _ENVIRONMENT.from_string(text)  # here filters are looked up
    except TemplateError as error:
        raise _unrenderable(error) from error
    render(*wanted)
    return render


def _filled(marked: str) -> Filled:
    """A rendering without the marks around what was put in; they may stand within each other."""
    parts, depth = [], 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if part in (_OPEN, _CLOSE):
            depth += 1 if part == _OPEN else -1
        else:
            parts.append((part, depth > 0))
    return fill(parts)


def _unrenderable(error: Exception) -> ConfigError:
    return ConfigError(
        f"prompt_template cannot be rendered with texts: {type(error).__name__}: {error}"
    )


def _variables(template: str, name: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
    except TemplateError as error:
        raise ConfigError(f"{name} is no valid jinja2 template: {error}") from error


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{{ {name} }}}}" for name in sorted(names)) or "none"
