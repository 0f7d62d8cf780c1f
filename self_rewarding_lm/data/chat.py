"""Chat templates: they turn messages into the one text that a model reads.

The same function renders for generation, judging and training. A template is the tokenizer's own,
one of those named here, or jinja text. Knows nothing of ids.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from self_rewarding_lm.errors import ConfigError, DataError, did_you_mean, setting
from self_rewarding_lm.records import VARIABLES

Message = Mapping[str, Any]


Messages = tuple[Message, ...]


Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text. A key VARIABLES of a message holds variables."""


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thought; transformers gives a template the same under the first two."""


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of a row, keys of a message and kinds of a part that a language model cannot read."""


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
    return "\n\n".join(f"{m['role'].capitalize()}: {spoken(m)}" for m in messages)


def spoken(message: Message) -> str:
    """A message's text, its calls of tools after it as JSON."""
    calls = message.get("tool_calls")
    parts = (message["content"], _to_json(calls) if calls else "")
    return "\n".join(part for part in parts if part)


def is_empty(value: Any) -> bool:
    """Whether a column or a key says nothing: None, an empty text or an empty list."""
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def without_nones(value: Any) -> Any:
    """Plain data without the keys that are None, which tables fill in where a row has none."""
    if isinstance(value, Mapping):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nones(item) for item in value]
    return value


def renderer(
    template: str | None,
    *,
    tokenizer: Any = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> Render:
    """The function that renders messages.

    template: a name of TEMPLATES or jinja text; None takes the tokenizer's own, and the plain one
    if it has none. A Hugging Face tokenizer renders by itself, unless its template asks for the
    date, which is `now()`; `bos_token` and `eos_token` are for others. Raises ConfigError for an
    unknown name or a template that is no jinja.
    """
    text = template_text(template)
    if text is None and not getattr(tokenizer, "chat_template", None):
        text = TEMPLATES["plain"]
    if text is not None:
        _compiled(text)
    tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def apply(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        said, variables = _with_variables_apart(messages)
        own = text
        if hasattr(tokenizer, "apply_chat_template"):
            if "strftime_now" not in (own or str(tokenizer.chat_template)):
                return tokenizer.apply_chat_template(
                    said,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=own,
                    **variables,
                )
            own = own or tokenizer.get_chat_template(tools=variables.get("tools"))
            tokens.update(tokenizer.special_tokens_map)
        assert own is not None
        date = {"strftime_now": lambda form: now().strftime(form)}
        given = {"tools": None, "documents": None, **tokens, **date, **variables}
        return _compiled(own).render(
            messages=said, add_generation_prompt=add_generation_prompt, **given
        )

    return _with_data_errors(apply)


def variables_of(template: str | None, tokenizer: Any = None) -> frozenset[str]:
    """The variables that a template reads; its arguments are those of `renderer`."""
    text = template_text(template) or getattr(tokenizer, "chat_template", None)
    texts = text.values() if isinstance(text, Mapping) else [text or TEMPLATES["plain"]]
    environment = _environment()
    try:
        trees = [environment.parse(str(each)) for each in texts]
    except TemplateError:  # of a dialect of the tokenizer's own
        return frozenset({"tools", "documents"})
    return frozenset().union(*map(meta.find_undeclared_variables, trees))


def template_text(template: str | None) -> str | None:
    """The jinja text of a template that is a name or jinja text; None for None.

    Raises ConfigError for an unknown name.
    """
    if template is None or template in TEMPLATES:
        return None if template is None else TEMPLATES[template]
    if "{" not in template:
        raise ConfigError(
            f"chat_template must be one of {', '.join(TEMPLATES)}, {RAW} (texts as they are) or "
            f"jinja text with the variable messages; got {template!r}"
            f"{did_you_mean(template, (*TEMPLATES, RAW))}"
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
    try:
        return _environment().from_string(text)
    except TemplateError as error:
        raise ConfigError(f"chat_template is not a valid jinja2 template: {error}") from error


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes characters such as <, for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _with_variables_apart(
    messages: Sequence[Message],
) -> tuple[list[Message], dict[str, Any]]:
    """Messages as a template gets them, and the variables that came with them."""
    said, variables = [], {}
    for message in messages:
        variables |= message.get(VARIABLES, {})
        message = {key: value for key, value in message.items() if key != VARIABLES}
        thought = next((message[name] for name in REASONING if name in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        said.append(message)
    return said, variables


def _checked_message(item: Any, where: str) -> Message:
    """A message with its role, its text and all else that it says; keys that are None are not."""
    said = without_nones(item) if isinstance(item, Mapping) else {}
    role, content = said.get("role"), said.get("content")
    media = [name for name in MEDIA if not is_empty(said.get(name))]
    if isinstance(content, list) and content and all(isinstance(p, Mapping) for p in content):
        kinds = [str(part.get("type")) for part in content]
        media += [kind for kind in kinds if {*kind.split("_")} & {*MEDIA}]
        if all(kind == "text" for kind in kinds):
            texts = [part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if media:
        raise DataError(
            f"{where}: a message has {' and '.join(map(repr, media))}, which the model does not "
            "read, so the text alone would mean something else. Leave such rows out, for example "
            f"by {setting('on_bad_row', 'skip')}."
        )
    if content is None and role == "assistant" and len(said) > 1:
        content = ""  # it calls a tool, or only thinks
    if not isinstance(said.get(VARIABLES, {}), Mapping):
        raise DataError(f"{where}: {VARIABLES!r} of a message must be a dict; got {item!s:.120}.")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f'{where}: a message is {{"role": "user", "content": "..."}}; got {str(item)[:120]}.'
        )
    return {**said, "role": str(role), "content": str(content)}
