"""The forms of a row: which columns hold the prompt, the completion, the two responses.

A form is recognised by its columns. Texts, ids and messages come out as they went in. Knows nothing
of tokenizers.
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
    """A prompt (text, ids or messages; None if there is none) and what follows it (text or ids)."""

    prompt: Any
    completion: Any


@dataclass(frozen=True)
class PromptPart:
    """A row's prompt, and the names of the columns that it came from."""

    prompt: Any
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses to it."""

    prompt: Any
    chosen: Any
    rejected: Any


def supervised_form(row: Row, where: str) -> Exchange:
    """The prompt and the completion of a supervised row. Raises DataError for other rows."""
    accepted = "A supervised row is (ids, prompt_len), (ids, prompt_mask), "
    return form_of(row, SUPERVISED, where, accepted=accepted)(row, where)


def prompt_form(row: Row, where: str) -> PromptPart:
    """The prompt of a row of any form. Raises DataError if it has none."""
    accepted = "A prompt row is a text, ids, a list of messages, "
    return form_of(row, PROMPTS, where, accepted=accepted)(row, where)


def preference_form(row: Row, where: str) -> Preference:
    """The prompt and the two responses of a preference row. Raises DataError for other rows."""
    return form_of(row, PREFERENCES, where, accepted="A preference row is ")(row, where)


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
    return {"role": role, "content": text}


def _conversation_exchange(row: Row, where: str) -> Exchange:
    """The last message, which must be the assistant's, and those before it as its prompt."""
    messages = _conversation(row, where)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the last message must be the assistant's, with a prompt before it; the "
            f"roles are {roles}."
        )
    return Exchange(messages[:-1], messages[-1]["content"])


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
    """Alpaca's instruction, with a blank line and the input behind it if there is one."""
    instruction = text_of(row, "instruction", where)
    further = text_of(row, "input", where) if row.get("input") is not None else ""
    return f"{instruction}\n\n{further}" if further.strip() else instruction


def _question_exchange(row: Row, where: str) -> Exchange:
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
    return Preference(tuple(shared), answer["content"], other_answer["content"])


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
    ("question", "choices", "answer"): _question_exchange,
    ("text",): lambda row, where: Exchange(None, row["text"]),
}
"""By the columns that a form needs; the first that fits counts."""


PROMPTS: dict[tuple[str, ...], Callable[[Row, str], PromptPart]] = {
    ("prompt",): lambda row, where: PromptPart(_prompt_column(row, where), ("prompt",)),
    ("messages",): lambda row, where: PromptPart(_conversation_prompt(row, where)),
    ("conversations",): lambda row, where: PromptPart(_conversation_prompt(row, where)),
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
