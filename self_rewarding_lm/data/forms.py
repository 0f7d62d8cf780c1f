"""The forms of a row: which columns hold the prompt, the completion, the two responses.

A form is recognised by its columns. Texts, ids and messages come out as they went in. Knows nothing
of tokenizers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from self_rewarding_lm.data.chat import (
    Message,
    Messages,
    is_empty,
    is_messages,
    messages_of,
    without_nones,
)
from self_rewarding_lm.errors import DataError, setting
from self_rewarding_lm.records import VARIABLES

Row = Mapping[str, Any]


Form = TypeVar("Form")


SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""ShareGPT's names for the roles."""


BEFORE = ("system", "history", "tools", "documents", VARIABLES)
"""Columns that stand before the prompt of a row of any form: a system message, earlier turns as
[question, answer], and what a chat template reads beside the messages."""


FURTHER = ("input", "context")
"""Columns that follow an instruction: Alpaca's and Dolly's."""


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Exchange:
    """A prompt (text, ids or messages; None if there is none) and what follows it.

    completion: a text, ids, or a message of the assistant that says more than a text.
    """

    prompt: Any
    completion: Any


@dataclass(frozen=True)
class PromptPart:
    """A row's prompt, and the names of the columns that it came from."""

    prompt: Any
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses to it, each like the completion of an exchange."""

    prompt: Any
    chosen: Any
    rejected: Any


def supervised_form(row: Row, where: str) -> Exchange:
    """The prompt and the completion of a supervised row. Raises DataError for other rows."""
    accepted = "A supervised row is (ids, prompt_len), (ids, prompt_mask), "
    form = form_of(row, SUPERVISED, where, accepted=accepted)(row, where)
    return replace(form, prompt=with_beginning(form.prompt, row, where))


def prompt_form(row: Row, where: str) -> PromptPart:
    """The prompt of a row of any form. Raises DataError if it has none."""
    accepted = "A prompt row is a text, ids, a list of messages, "
    part = form_of(row, PROMPTS, where, accepted=accepted)(row, where)
    return replace(part, prompt=with_beginning(part.prompt, row, where))


def preference_form(row: Row, where: str) -> Preference:
    """The prompt and the two responses of a preference row. Raises DataError for other rows."""
    form = form_of(row, PREFERENCES, where, accepted="A preference row is ")(row, where)
    return replace(form, prompt=with_beginning(form.prompt, row, where))


def with_beginning(prompt: Any, row: Row, where: str) -> Any:
    """A prompt after the columns BEFORE of its row; as it is if the row has none of them.

    Raises DataError for columns of another kind, and if the prompt is ids.
    """
    given = {name: row[name] for name in BEFORE if not is_empty(row.get(name))}
    if prompt is None or not given:
        return prompt
    if not isinstance(prompt, str) and not is_messages(prompt):
        raise DataError(
            f"{where}: {' and '.join(map(repr, given))} can stand before a prompt of texts or "
            "messages; this prompt is token ids. Put its ids there, and leave the column out."
        )
    # 1. the system message and earlier turns
    messages = list(messages_of(prompt, f"{where}: the prompt"))
    lead: list[Message] = []
    if "system" in given:
        system = {"role": "system", "content": text_of(row, "system", where)}
        if messages[0]["role"] != "system":
            lead.append(system)
        elif messages[0]["content"] != system["content"]:
            raise DataError(f"{where}: its messages begin with another text than 'system' holds.")
    history = given.get("history", [])
    for turn in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(
                f"{where}: history is a list of [question, answer]; got {shape_of(turn)}."
            )
        said = zip(("user", "assistant"), turn, strict=True)
        lead += messages_of([{"role": role, "content": text} for role, text in said], where)
    messages = [*lead, *messages]
    # 2. variables of the template, kept with the first message
    variables = {
        **_parsed(given.get(VARIABLES, {}), dict, VARIABLES, where),
        **{k: _parsed(given[k], list, k, where) for k in ("tools", "documents") if k in given},
    }
    if variables:
        messages[0] = {**messages[0], VARIABLES: variables}
    return tuple(messages)


def unread_columns(row: Row, forms: Mapping[tuple[str, ...], Any], others: set[str]) -> set[str]:
    """The columns of a row that say something and that its form does not read.

    others: names that are read beside the form's own.
    """
    filled = {name for name in row if not is_empty(row[name])}
    needs = next((needs for needs in forms if filled >= set(needs)), ())
    if "instruction" in needs:
        others = {*others, *FURTHER}
    return filled - {*needs} - {*BEFORE} - others


def form_of(row: Row, forms: Mapping[tuple[str, ...], Form], where: str, *, accepted: str) -> Form:
    """The first form whose columns a row has, preferring one whose columns are not None.

    accepted: the words before the list of forms in the DataError that says which columns are
    missing.
    """
    filled = {name for name in row if row[name] is not None}
    for columns in (filled, set(row)):
        for needs, form in forms.items():
            if columns >= set(needs):
                return form
    nearest = max(forms, key=lambda needs: len(set(needs) & set(row)))
    missing = " and no ".join(repr(name) for name in nearest if name not in row)
    raise DataError(
        f"{where}: the row has no {missing}; it has {', '.join(map(repr, row)) or 'nothing'}. "
        f"{accepted}{in_words(forms)}."
    )


def in_words(forms: Mapping[tuple[str, ...], Any]) -> str:
    """The accepted forms, each by its columns, for an error or a help text."""
    words = ["{" + ", ".join(f'"{name}"' for name in names) + "}" for names in forms]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def shape_of(row: Any) -> str:
    """Words for an error about what came in place of a row."""
    if isinstance(row, Mapping):
        return f"a dict with {', '.join(map(repr, row)) or 'nothing'}"
    return f"{type(row).__name__} {str(row)[:60]!r}"


def is_conversation(row: Any) -> bool:
    """Whether a row is a list of messages, without a dict around it."""
    return is_messages(row) and "role" in row[0] and "content" in row[0]


def open_messages(value: Any, where: str) -> Messages:
    """Messages that an answer can follow. Raises DataError if the last is itself an answer."""
    messages = messages_of(value, f"{where}: the prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the prompt's last message is the assistant's; a prompt ends in what is to "
            'be answered. (A whole conversation is {"messages": [...]}.)'
        )
    return messages


def text_of(row: Row, name: str, where: str) -> str:
    """The text in a column. Raises DataError if it holds something else."""
    if not isinstance(row[name], str):
        raise DataError(f"{where}: {name!r} must be a text; got {shape_of(row[name])}.")
    return row[name]


def lettered(row: Row, where: str) -> tuple[str, list[str]]:
    """A multiple-choice question with its choices below it, and the choices as answers.

    Both have the choices as `A. text`, `B. text`, ... Raises DataError for choices that are no
    list of 2 to 26 texts.
    """
    question, choices = text_of(row, "question", where), row["choices"]
    texts = [] if isinstance(choices, str) or not isinstance(choices, Sequence) else list(choices)
    if not 2 <= len(texts) <= len(LETTERS) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: choices must be a list of 2 to {len(LETTERS)} texts; got "
            f"{shape_of(choices)}."
        )
    answers = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return "\n".join([question, "", *answers]), answers


def right_choice(row: Row, where: str) -> int:
    """The place of the right choice, from `answer`: that place, the choice's text or its letter.

    Raises DataError if `answer` names no choice or several.
    """
    choices, answer = list(row["choices"]), row["answer"]
    places: list[int] = []
    if isinstance(answer, str):
        places = [place for place, choice in enumerate(choices) if choice == answer]
        letter = answer.strip().upper()
        if not places and len(letter) == 1 and letter in LETTERS[: len(choices)]:
            places = [LETTERS.index(letter)]
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        places = [answer]
    if len(places) != 1:
        raise DataError(
            f"{where}: answer must be a place from 0 to {len(choices) - 1}, a letter from A to "
            f"{LETTERS[len(choices) - 1]}, or the text of one choice; got {answer!r}."
        )
    return places[0]


def _parsed(value: Any, kind: type, name: str, where: str) -> Any:
    """A column of plain data, or that data as JSON, as tables hold it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: {name!r} is not valid JSON: {error}") from error
    value = without_nones(value)
    if not isinstance(value, kind) or (
        kind is list and not all(isinstance(v, dict) for v in value)
    ):
        wanted = "a list of dicts" if kind is list else "a dict"
        raise DataError(f"{where}: {name!r} must be {wanted}; got {shape_of(value)}.")
    return value


def _answer(message: Message, where: str) -> Any:
    """An answer that is learnt: its text, or the message if it says more than a text.

    Raises DataError if its weight is not 1.
    """
    weight = message.get("weight", 1)
    if weight != 1:
        raise DataError(
            f"{where}: the last message, which would be learnt, has the weight {weight!r}. Leave "
            f"such rows out ({setting('on_bad_row', 'skip')}); a weight of 1 is accepted."
        )
    message = {key: value for key, value in message.items() if key != "weight"}
    return message if len(message) > 2 else message["content"]


def _conversation(row: Row, where: str) -> Messages:
    """The messages in `messages` or in `conversations`, which may be ShareGPT's turns."""
    if row.get("messages") is not None:
        return messages_of(row["messages"], f"{where}: messages")
    turns = row["conversations" if "conversations" in row else "messages"]
    if not is_messages(turns):
        raise DataError(f"{where}: conversations are a list of turns; got {shape_of(turns)}.")
    if "role" in turns[0]:
        return messages_of(turns, f"{where}: conversations")
    return tuple(_turn_as_message(turn, where) for turn in turns)


def _turn_as_message(turn: Any, where: str) -> Row:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    text = turn.get("value") if isinstance(turn, Mapping) else None
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise DataError(
            f'{where}: a turn is {{"from": {" or ".join(SPEAKERS)}, "value": a text}}; got '
            f"{str(turn)[:120]}."
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return messages_of([{**others, "role": role, "content": text}], where)[0]


def _conversation_exchange(row: Row, where: str) -> Exchange:
    """The last message, which must be the assistant's, and those before it as its prompt."""
    messages = _conversation(row, where)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the last message must be the assistant's, with a prompt before it; the "
            f"roles are {roles}."
        )
    return Exchange(messages[:-1], _answer(messages[-1], where))


def _conversation_prompt(row: Row, where: str) -> Messages:
    """The messages, without the last one if it is the assistant's."""
    messages = _conversation(row, where)
    is_answered = messages[-1]["role"] == "assistant" and len(messages) > 1
    return messages[:-1] if is_answered else messages


def _prompt_column(row: Row, where: str) -> Any:
    """The column `prompt`; in a preference row the pair's prompt, which its responses may hold."""
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    return _pair(row, where).prompt if is_pair else row["prompt"]


def _instruction(row: Row, where: str) -> str:
    """Alpaca's instruction, with blank lines and the input, or Dolly's context, after it."""
    given = [name for name in ("instruction", *FURTHER) if row.get(name) is not None]
    first, *further = (text_of(row, name, where) for name in given or ["instruction"])
    return "\n\n".join([first, *(text for text in further if text.strip())])


def _question_exchange(row: Row, where: str) -> Exchange:
    question, answers = lettered(row, where)
    return Exchange(question, answers[right_choice(row, where)])


def _reply(value: Any, name: str, where: str) -> Any:
    """A response: a text, ids, or what one message of the assistant, in a list or not, says."""
    if isinstance(value, Mapping):
        value = [value]
    if not is_messages(value):
        return value
    messages = messages_of(value, f"{where}: {name}")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: {name} must be one message, the assistant's; got {roles}.")
    return _answer(messages[0], f"{where}: {name}")


def _pair(row: Row, where: str) -> Preference:
    """A preference: the responses alone, beside their prompt, or each in a whole conversation."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected) and len(chosen) > 1:
        pair = _split_conversations(chosen, rejected, where)
        _check_same_prompt(prompt, pair.prompt, where)
        return pair
    if prompt is None:
        raise DataError(
            f"{where}: without a prompt, chosen and rejected are lists of messages that begin "
            "alike and end in different answers."
        )
    return Preference(prompt, _reply(chosen, "chosen", where), _reply(rejected, "rejected", where))


def _split_conversations(chosen: Any, rejected: Any, where: str) -> Preference:
    """The beginning that two conversations share, and the answer in which each ends."""
    *shared, answer = messages_of(chosen, f"{where}: chosen")
    *others, other_answer = messages_of(rejected, f"{where}: rejected")
    roles = {answer["role"], other_answer["role"]}
    if shared != others or roles != {"assistant"}:
        raise DataError(
            f"{where}: chosen and rejected must share all messages but the last, and those must be "
            f"the assistant's; they have {len(shared) + 1} and {len(others) + 1} messages."
        )
    answers = (_answer(message, where) for message in (answer, other_answer))
    return Preference(tuple(shared), *answers)


def _check_same_prompt(prompt: Any, shared: Messages, where: str) -> None:
    """Raise DataError if a row's prompt is not the one that its conversations begin with."""
    if prompt is None or prompt == shared[-1]["content"]:
        return
    if not is_messages(prompt) or messages_of(prompt, f"{where}: the prompt") != shared:
        raise DataError(
            f"{where}: chosen and rejected begin with a prompt of their own, which is not the "
            f"row's prompt: {str(shared)[:120]} and {str(prompt)[:120]}."
        )


SUPERVISED: dict[tuple[str, ...], Callable[[Row, str], Exchange]] = {
    ("prompt", "completion"): lambda row, where: Exchange(
        row["prompt"], _reply(row["completion"], "the completion", where)
    ),
    ("messages",): _conversation_exchange,
    ("conversations",): _conversation_exchange,
    ("instruction", "output"): lambda row, where: Exchange(
        _instruction(row, where), text_of(row, "output", where)
    ),
    ("instruction", "response"): lambda row, where: Exchange(
        _instruction(row, where), text_of(row, "response", where)
    ),
    ("question", "choices", "answer"): _question_exchange,
    ("text",): lambda row, where: Exchange(None, row["text"]),
}
"""By the columns that a form needs; the first that fits counts."""


PROMPTS: dict[tuple[str, ...], Callable[[Row, str], PromptPart]] = {
    ("prompt",): lambda row, where: PromptPart(_prompt_column(row, where), ("prompt",)),
    ("messages",): lambda row, where: PromptPart(_conversation_prompt(row, where)),
    ("conversations",): lambda row, where: PromptPart(_conversation_prompt(row, where)),
    ("instruction",): lambda row, where: PromptPart(
        _instruction(row, where), ("instruction", *FURTHER)
    ),
    ("question", "choices"): lambda row, where: PromptPart(lettered(row, where)[0], ("question",)),
    ("chosen", "rejected"): lambda row, where: PromptPart(_pair(row, where).prompt),
    ("input", "output_1", "output_2"): lambda row, where: PromptPart(
        text_of(row, "input", where), ("input",)
    ),
}


PREFERENCES: dict[tuple[str, ...], Callable[[Row, str], Preference]] = {
    ("prompt", "chosen", "rejected"): _pair,
    ("chosen", "rejected"): _pair,
}
