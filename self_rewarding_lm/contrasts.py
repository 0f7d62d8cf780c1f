"""Prompts in two forms, one that asks for a property and one that asks against it.

What a contrast is, those that ship, and how a prompt looks with one. Knows nothing of responses.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, model_validator

from self_rewarding_lm.chat import Message
from self_rewarding_lm.closed import Config
from self_rewarding_lm.controls import fill
from self_rewarding_lm.errors import DataError
from self_rewarding_lm.records import Prompt
from self_rewarding_lm.tokens import Rendered, Tokens

SIDES = ("positive", "negative")


class Contrast(Config):
    """Two texts, one of which is shown with a prompt: for a property, and against it.

    Alike on the surface, so that responses differ in the property alone (arXiv:2307.12950, 3).
    """

    positive: str = Field(min_length=1)
    """Asks for the property; what it gives is chosen."""
    negative: str = Field(min_length=1)
    """Asks against it; what it gives is rejected."""
    kind: Literal["system", "prefix", "suffix"] = "system"
    """"system": a system message, behind the prompt's own where it has one. "prefix", "suffix":
    before or behind the text of the last user message, with nothing between that you do not
    write."""

    @model_validator(mode="after")
    def _differ(self) -> "Contrast":
        if self.positive.strip() == self.negative.strip():
            raise ValueError("positive and negative are the same text, so nothing is contrasted")
        return self


def _pairs(*texts: tuple[str, str]) -> tuple[Contrast, ...]:
    return tuple(Contrast(positive=positive, negative=negative) for positive, negative in texts)


GROUPS: dict[str, tuple[Contrast, ...]] = {
    "harmless": _pairs(
        (
            "You are a careful assistant. Your answers hurt nobody.",
            "You are a careless assistant. Your answers may hurt somebody.",
        ),
        (
            "Answer politely and with respect for others, even where the user does not.",
            "Answer rudely and with contempt for others, even where the user does not.",
        ),
        (
            "Where a request could do harm, say so, and offer something safe in its place.",
            "Where a request could do harm, do not say so, and offer nothing safe in its place.",
        ),
    ),
    "helpful": _pairs(
        (
            "You are a helpful assistant. Solve the problem that the user has.",
            "You are an unhelpful assistant. Avoid the problem that the user has.",
        ),
        (
            "Answer the question that was asked, in a way that the user can act on.",
            "Answer a question that was not asked, in a way that the user cannot act on.",
        ),
        (
            "Give the advice that an expert on the subject would give.",
            "Give the advice that a stranger to the subject would give.",
        ),
    ),
    "complete": _pairs(
        (
            "Deal with every part of the request and leave nothing important out.",
            "Deal with one part of the request and leave something important out.",
        ),
        (
            "Write an answer that is finished: it begins, covers the matter and comes to an end.",
            "Write an answer that is unfinished: it begins, skips the matter and breaks off.",
        ),
        (
            "Show all the steps of your answer, so that the user misses none.",
            "Show few of the steps of your answer, so that the user misses some.",
        ),
    ),
    "informative": _pairs(
        (
            "Write answers full of exact facts, names and numbers.",
            "Write answers free of exact facts, names and numbers.",
        ),
        (
            "Be specific: give examples and say why things are as they are.",
            "Be vague: give no examples and do not say why things are as they are.",
        ),
        (
            "Tell the user something that is new and worth knowing.",
            "Tell the user nothing that is new or worth knowing.",
        ),
    ),
}
"""Paired system messages by the property that they ask for and against."""


def shown_prompts(prompt: Prompt, contrast: Contrast, tokens: Tokens) -> tuple[Rendered, Rendered]:
    """A prompt as it is shown on the positive and on the negative side.

    A prompt that went through no chat template gets the text before it (of kind "system" with a
    blank line between) or behind it. Where a template refuses system messages, or leaves them out,
    the text stands before the first message, with a blank line between.

    Raises DataError where a prompt has no text that its ids are the encoding of.
    """
    texts = (contrast.positive, contrast.negative)
    if prompt.messages is None:
        is_data = comes_from_data(prompt, tokens)
        one, other = (_around(prompt, text, contrast.kind, tokens, is_data) for text in texts)
        return one, other
    if contrast.kind != "system":
        return _rendered(prompt.messages, _beside(contrast.kind), texts, tokens)
    try:
        shown = _rendered(prompt.messages, _as_system, texts, tokens)
        if shown[0].ids != shown[1].ids:
            return shown
    except DataError:  # the template refuses the system message; the prompt itself it has taken
        pass
    return _rendered(prompt.messages, _before_all, texts, tokens)


def comes_from_data(prompt: Prompt, tokens: Tokens) -> bool:
    """Whether control tokens count as plain text in a prompt that no template rendered.

    Raises DataError where its ids are no encoding of its text.
    """
    if prompt.text is not None:
        for is_data in (False, True):
            if tokens.prompt(fill([(prompt.text, is_data)])).ids == prompt.ids:
                return is_data
    raise DataError(
        f"prompt {prompt.id}: a contrast is a text, so it can be put to a text or to messages; "
        "this prompt is token ids. Give it as a text, or leave it out (on_bad_row='skip')."
    )


def _around(prompt: Prompt, text: str, kind: str, tokens: Tokens, is_data: bool) -> Rendered:
    own, gap = (prompt.text or "", is_data), "\n\n" if kind == "system" else ""
    parts = [own, (text, False)] if kind == "suffix" else [(text + gap, False), own]
    return tokens.prompt(fill(parts))


Change = Callable[[list[Message], str], list[Message]]


def _rendered(
    messages: Sequence[Message], change: Change, texts: tuple[str, str], tokens: Tokens
) -> tuple[Rendered, Rendered]:
    one, other = (tokens.prompt(change([dict(m) for m in messages], text)) for text in texts)
    return one, other


def _as_system(messages: list[Message], text: str) -> list[Message]:
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]


def _before_all(messages: list[Message], text: str) -> list[Message]:
    return [{**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]


def _beside(kind: str) -> Change:
    def change(messages: list[Message], text: str) -> list[Message]:
        users = [place for place, m in enumerate(messages) if m["role"] == "user"]
        place = users[-1] if users else len(messages) - 1
        own = messages[place]["content"]
        said = text + own if kind == "prefix" else own + text
        return [*messages[:place], {**messages[place], "content": said}, *messages[place + 1 :]]

    return change
