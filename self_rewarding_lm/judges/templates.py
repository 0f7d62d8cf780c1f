"""Templates of judge prompts, compiled and checked: of one response, of two, of two judgements."""

import re
from collections.abc import Callable, Collection, Iterator
from textwrap import dedent
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from self_rewarding_lm.data.control_tokens import Filled, fill
from self_rewarding_lm.errors import ConfigError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # around each value put into a template; no text has them


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    autoescape=False,
    keep_trailing_newline=True,
    undefined=StrictUndefined,  # else what the sandbox refuses would be rendered as nothing
    finalize=lambda value: f"{_OPEN}{value}{_CLOSE}",
)


def compile_prompt_template(template: str, *, auto_dedent: bool) -> Callable[[str, str], Filled]:
    """The function (prompt, response) -> judge prompt of a Jinja template.

    The judge prompt knows which of its characters are data, not the template's. Raises ConfigError
    if `prompt` or `response` is missing in the template or it has another variable.
    """
    return _compiled(template, ("prompt", "response"), auto_dedent)


def compile_comparison_template(
    template: str, *, auto_dedent: bool
) -> Callable[[str, str, str], Filled]:
    """The function (prompt, response_a, response_b) -> judge prompt of a Jinja template.

    Raises ConfigError if the template has not exactly these variables.
    """
    return _compiled(template, ("prompt", "response_a", "response_b"), auto_dedent)


def compile_meta_template(template: str, *, auto_dedent: bool) -> Callable[[str, str, str], Filled]:
    """The function (judge_prompt, judgement_a, judgement_b) -> meta-judge prompt of a template.

    All three are data in it, the judge prompt too. Raises ConfigError if the template has not
    exactly these variables.
    """
    return _compiled(template, ("judge_prompt", "judgement_a", "judgement_b"), auto_dedent)


def template_parts(template: str) -> tuple[str, str]:
    """The texts before and after {{ reward }}; ConfigError unless the template has it once."""
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


def template_errors(settings: Any) -> Iterator[tuple[str, ConfigError]]:
    """What is wrong with the templates of a judge's settings, each error with its field's name.

    settings: a RewardConfig, a ComparisonConfig or the like; of others there are no errors.
    """
    wanted = getattr(settings, "template_variables", None)
    if wanted is None:
        return
    try:
        _compiled(settings.prompt_template, wanted, settings.auto_dedent)
    except ConfigError as error:
        yield "prompt_template", error
    read_by = getattr(settings, "reward_regex_template", None)
    if read_by is not None:
        try:
            template_parts(read_by)
        except ConfigError as error:
            yield "reward_regex_template", error


def _compiled(template: str, wanted: tuple[str, ...], auto_dedent: bool) -> Callable[..., Filled]:
    names = _variables(template, "prompt_template")
    if names != set(wanted):
        missing, unknown = set(wanted) - names, names - set(wanted)
        found = [f"it has no {_braced(missing)}"] if missing else []
        found += [f"there is no value for {_braced(unknown)}"] if unknown else []
        raise ConfigError(
            f"a judge's prompt_template must have the variables {_braced(wanted)} and no others; "
            f"{', and '.join(found)}. It has: {_braced(names)}."
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
    """A rendering without the marks around its values, which may be nested."""
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
        raise ConfigError(f"{name} is not a valid jinja2 template: {error}") from error


def _braced(names: Collection[str]) -> str:
    in_order = sorted(names) if isinstance(names, set) else names
    return ", ".join(f"{{{{ {name} }}}}" for name in in_order) or "none"
