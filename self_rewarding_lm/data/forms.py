"""The forms of a row: which columns hold the prompt, the completion, the two responses.

A form is known by its columns. Texts, ids and messages come out as they went in; knows nothing of
tokenizers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from self_rewarding_lm.data.chat import Messages, is_messages, messages_of
from self_rewarding_lm.errors import DataError

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


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Exchange:
    """A prompt (text, ids or messages; None: there is none) and what follows it (text or ids)."""

    prompt: Any
    completion: Any


@dataclass(frozen=True)
class PromptPart:
    """A row's prompt, and the names of the columns that it was made of."""

    prompt: Any
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses to it."""

    prompt: Any
    chosen: Any
    rejected: Any


def supervised_form(row: Row, where: str) -> Exchange:
    """The prompt and the completion of a supervised row; DataError where it has no such form."""
    accepted = "A supervised row is (ids, prompt_len), (ids, prompt_mask), "
    return form_of(row, SUPERVISED, where, accepted=accepted)(row, where)


def prompt_form(row: Row, where: str) -> PromptPart:
    """The prompt part of a row of any form; DataError where it has none."""
    accepted = "A prompt row is a text, ids, a list of messages, "
    return form_of(row, PROMPTS, where, accepted=accepted)(row, where)


def preference_form(row: Row, where: str) -> Preference:
    """The prompt and the two responses of a row; DataError where it has no such form."""
    return form_of(row, PREFERENCES, where, accepted="A preference row is ")(row, where)


def form_of(row: Row, forms: Mapping[tuple[str, ...], Form], where: str, *, accepted: str) -> Form:
    """The first form whose columns a row has; a column of None counts where none is found without.

    accepted: the words before the list of forms in the DataError that says what is missing.
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
    """The accepted forms by their columns, for an error or a help text."""
    words = ["{" + ", ".join(f'"{name}"' for name in names) + "}" for names in forms]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def shape_of(row: Any) -> str:
    """Words for what came in place of a row."""
    if isinstance(row, Mapping):
        return f"a dict with {', '.join(map(repr, row)) or 'nothing'}"
    return f"{type(row).__name__} {str(row)[:60]!r}"


def is_conversation(row: Any) -> bool:
    """Whether a row is a bare list of messages."""
    return is_messages(row) and "role" in row[0] and "content" in row[0]


def open_messages(value: Any, where: str) -> Messages:
    """Messages that an answer can follow; DataError where the last is an answer."""
    messages = messages_of(value, f"{where}: the prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the prompt's last message is the assistant's; a prompt ends in what is to "
            'be answered. (A whole conversation is {"messages": [...]}.)'
        )
    return messages


def text_of(row: Row, name: str, where: str) -> str:
    """A column that must hold a text."""
    if not isinstance(row[name], str):
        raise DataError(f"{where}: {name!r} must be a text; got {shape_of(row[name])}.")
    return row[name]


def lettered(row: Row, where: str) -> tuple[str, list[str]]:
    """A multiple-choice question with its choices below it, and each choice as an answer.

    The answers are `A. text`, `B. text`, ...
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
    """The place of the right choice: `answer` is that place, a choice's text or its letter."""
    choices, answer = list(row["choices"]), row["answer"]
    found: list[int] = []
    if isinstance(answer, str):
        found = [place for place, choice in enumerate(choices) if choice == answer]
        letter = answer.strip().upper()
        if not found and len(letter) == 1 and letter in LETTERS[: len(choices)]:
            found = [LETTERS.index(letter)]
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        found = [answer]
    if len(found) != 1:
        raise DataError(
            f"{where}: answer must be a place from 0 to {len(choices) - 1}, a letter from A to "
            f"{LETTERS[len(choices) - 1]}, or the text of one choice; got {answer!r}."
        )
    return found[0]


def _conversation(row: Row, where: str) -> Messages:
    if row.get("messages") is not None:
        return messages_of(row["messages"], f"{where}: messages")
    turns = row["conversations" if "conversations" in row else "messages"]
    if not is_messages(turns):
        raise DataError(f"{where}: conversations are a list of turns; got {shape_of(turns)}.")
    if "role" in turns[0]:
        return messages_of(turns, f"{where}: conversations")
    return tuple(_turn(turn, where) for turn in turns)


def _turn(turn: Any, where: str) -> Row:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    text = turn.get("value") if isinstance(turn, Mapping) else None
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise DataError(
            f'{where}: a turn is {{"from": {" or ".join(SPEAKERS)}, "value": a text}}; got '
            f"{str(turn)[:120]}."
        )
    return {"role": role, "content": text}


def _last_answer(row: Row, where: str) -> Exchange:
    messages = _conversation(row, where)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the last message must be the assistant's, with a prompt before it; the "
            f"roles are {roles}."
        )
    return Exchange(messages[:-1], messages[-1]["content"])


def _before_answer(row: Row, where: str) -> Messages:
    messages = _conversation(row, where)
    answered = messages[-1]["role"] == "assistant" and len(messages) > 1
    return messages[:-1] if answered else messages


def _own_prompt(row: Row, where: str) -> Any:
    """The prompt column; of a preference row the prompt that the pair has."""
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    return _pair(row, where).prompt if is_pair else row["prompt"]


def _instruction(row: Row, where: str) -> str:
    instruction = text_of(row, "instruction", where)
    given = text_of(row, "input", where) if row.get("input") is not None else ""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _question(row: Row, where: str) -> Exchange:
    question, answers = lettered(row, where)
    return Exchange(question, answers[right_choice(row, where)])


def _reply(value: Any, name: str, where: str) -> Any:
    """A response: a text, ids, or a list that holds one message, the assistant's."""
    if not is_messages(value):
        return value
    messages = messages_of(value, f"{where}: {name}")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: {name} must be one message, the assistant's; got {roles}.")
    return messages[0]["content"]


def _pair(row: Row, where: str) -> Preference:
    """`chosen` and `rejected` behind their prompt, or both with it as their shared beginning."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected) and len(chosen) > 1:
        pair = _split(chosen, rejected, where)
        _check_same_prompt(prompt, pair.prompt, where)
        return pair
    if prompt is None:
        raise DataError(
            f"{where}: without a prompt, chosen and rejected are lists of messages that begin "
            "alike and end in different answers."
        )
    return Preference(prompt, _reply(chosen, "chosen", where), _reply(rejected, "rejected", where))


def _split(chosen: Any, rejected: Any, where: str) -> Preference:
    """The beginning that two conversations share, and the answer that each ends in."""
    ours = messages_of(chosen, f"{where}: chosen")
    theirs = messages_of(rejected, f"{where}: rejected")
    last = {ours[-1]["role"], theirs[-1]["role"]}
    if ours[:-1] != theirs[:-1] or last != {"assistant"}:
        raise DataError(
            f"{where}: chosen and rejected must share all messages but the last, and those must be "
            f"the assistant's; they have {len(ours)} and {len(theirs)} messages."
        )
    return Preference(ours[:-1], ours[-1]["content"], theirs[-1]["content"])


def _check_same_prompt(prompt: Any, shared: Messages, where: str) -> None:
    """Raise DataError where a row's prompt is another than its conversations begin with."""
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
    ("messages",): _last_answer,
    ("conversations",): _last_answer,
    ("instruction", "output"): lambda row, where: Exchange(
        _instruction(row, where), text_of(row, "output", where)
    ),
    ("question", "choices", "answer"): _question,
    ("text",): lambda row, where: Exchange(None, row["text"]),
}
"""By the columns that a form needs; the first that fits counts."""


PROMPTS: dict[tuple[str, ...], Callable[[Row, str], PromptPart]] = {
    ("prompt",): lambda row, where: PromptPart(_own_prompt(row, where), ("prompt",)),
    ("messages",): lambda row, where: PromptPart(_before_answer(row, where)),
    ("conversations",): lambda row, where: PromptPart(_before_answer(row, where)),
    ("instruction",): lambda row, where: PromptPart(
        _instruction(row, where), ("instruction", "input")
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
