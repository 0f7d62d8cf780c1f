"""Chat templates: they turn messages into the one text that a model reads.

The same function renders for generation, judging and training. A template is the tokenizer's own,
one of those named here, or jinja text. Knows nothing of ids.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from self_rewarding_lm.errors import ConfigError, DataError

Message = Mapping[str, Any]


Messages = tuple[Message, ...]


Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text."""


RAW = "raw"


TEMPLATES = {
    "plain": (
        "{% for message in messages %}"
        "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set lead = messages[0]['content'] | trim + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{{ lead if loop.first else '' }}{{ message['content'] | trim }}<end_of_turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
"""By name. `plain` is for base models: it writes the roles as words and ends answers by the end
token."""


def messages_of(value: Any, where: str) -> Messages:
    """A prompt's messages, checked; a text becomes one message of the user.

    Raises DataError for anything else, and if a message has no role or no text.
    """
    if isinstance(value, str):
        return ({"role": "user", "content": str(value)},)
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"{where}: messages are a list of at least one; got {str(value)[:80]}.")
    return tuple(_checked_message(item, where) for item in value)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, and not of ids."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def transcript(messages: Sequence[Message]) -> str:
    """Messages as one text for people and judges; of a single user message its own text."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def renderer(
    template: str | None,
    *,
    tokenizer: Any = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> Render:
    """The function that renders messages.

    template: a name of TEMPLATES or jinja text; None takes the tokenizer's own, and the plain one
    if it has none. A Hugging Face tokenizer renders by itself; `bos_token` and `eos_token` are for
    others. Raises ConfigError for an unknown name or a template that is no jinja.
    """
    text = template_text(template)
    if text is None and not getattr(tokenizer, "chat_template", None):
        text = TEMPLATES["plain"]
    if text is not None:
        _compiled(text)
    if hasattr(tokenizer, "apply_chat_template"):

        def apply(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=text,
            )

        return _with_data_errors(apply)
    assert text is not None
    compiled = _compiled(text)
    tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
    return _with_data_errors(
        lambda messages, add_generation_prompt: compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens
        )
    )


def template_text(template: str | None) -> str | None:
    """The jinja text of a template that is a name or jinja text; None for None.

    Raises ConfigError for an unknown name.
    """
    if template is None or template in TEMPLATES:
        return None if template is None else TEMPLATES[template]
    if "{" not in template:
        raise ConfigError(
            f"chat_template must be one of {', '.join(TEMPLATES)}, {RAW} (texts as they are) or "
            f"jinja text with the variable messages; got {template!r}."
        )
    return template


def _with_data_errors(render: Render) -> Render:
    """The same function, whose errors are DataErrors that name the roles."""

    def checked_render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return render(messages, add_generation_prompt)
        except Exception as error:  # the template's own, or of its code: a text plus a number
            roles = ", ".join(str(m["role"]) for m in messages)
            reason = str(error) if isinstance(error, TemplateError) else repr(error)
            raise DataError(
                f"the chat template refuses messages with the roles {roles}: {reason}"
            ) from error

    return checked_render


class _Generation(Extension):
    """Reads `{% generation %}`, with which templates of transformers mark an assistant's text.

    It renders as if the mark were not there.
    """

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise ConfigError(f"chat_template is no valid jinja2 template: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is: jinja's own filter escapes characters such as <, for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _checked_message(item: Any, where: str) -> Message:
    role = item.get("role") if isinstance(item, Mapping) else None
    content = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f'{where}: a message is {{"role": "user", "content": "..."}}; got {str(item)[:120]}.'
        )
    return {"role": str(role), "content": str(content)}
