"""One row of a dataset as token ids: prompts, supervised rows, preferences.

All texts and messages go through `Tokens`, which generation uses too, so that what is generated
from is what is trained on. `forms` knows which columns hold what, `ranked` reads ranked replies,
and `datasets` opens what rows come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from self_rewarding_lm.data.chat import MEDIA, is_empty, is_messages
from self_rewarding_lm.data.forms import (
    BEFORE,
    FURTHER,
    PREFERENCES,
    PROMPTS,
    SUPERVISED,
    Exchange,
    PromptPart,
    in_words,
    is_conversation,
    open_messages,
    preference_form,
    prompt_form,
    shape_of,
    supervised_form,
    unread_columns,
)
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError, said, setting
from self_rewarding_lm.records import (
    VARIABLES,
    Demonstration,
    Ids,
    PreferencePair,
    RankedReplies,
    is_number,
)
from self_rewarding_lm.text import amount

PAIR_NUMBERS = {
    "weight": math.inf,
    "win_probability": 1.0,
    "rejected_win_probability": 1.0,
    "label_smoothing": 1.0,
}
"""Columns of a preference row that losses read, and the greatest number allowed in each."""


NEW_COLUMNS = {*BEFORE, *FURTHER[1:], *MEDIA, "label"}
"""Columns that version 0.1.0 did not look at."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt as it is generated from.

    text: for people and judges; None if only ids were given and there is no tokenizer. messages:
    what a chat template rendered; None if none was used. columns: the row's other columns, as far
    as a record can hold them.
    """

    ids: Ids
    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None = None
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _MarkedIds:
    """Ids, and whether each belongs to the prompt. prompt: the prompt alone, if it is known."""

    ids: Ids
    is_prompt: tuple[bool, ...]
    prompt: PromptRow | None = None


def prompt_of(row: Any, where: str, tokens: Tokens) -> PromptRow:
    """The prompt of a row and its other plain columns.

    row: a text, a list of messages, ids, `{"prompt": one of these}`, or a row of any other form
    that has a prompt: `{"messages"}` and `{"conversations"}` (without the last message if it is
    the assistant's), `{"instruction", "input", "context"}`, `{"question", "choices"}`, `{"chosen",
    "rejected"}` with a shared beginning, `{"input", "output_1", "output_2"}`; a record of an
    earlier stage. After `system`, `history` and what the chat template reads of `tools`,
    `documents` and `chat_template_kwargs`. where: names the row in errors. Raises DataError for
    any other row, for one with images and for an empty prompt.
    """
    if isinstance(row, PreferencePair):
        return PromptRow(row.prompt_ids, row.prompt, row.messages)
    if isinstance(row, Demonstration):
        return PromptRow(row.prompt_ids, row.prompt)
    part, columns = PromptPart(row), None
    if isinstance(row, RankedReplies):
        part = PromptPart(row.prompt)
    elif isinstance(row, Mapping) or is_conversation(row):
        row = row if isinstance(row, Mapping) else {"messages": row}
        seen = _seen(row, where, tokens)
        part = prompt_form(seen, where)
        given_to_functions = {name for name in row if _is_plain(row[name])}
        of_forms = {name for needs in (*SUPERVISED, *PREFERENCES) for name in needs}
        tokens.name_unread(unread_columns(seen, PROMPTS, given_to_functions | of_forms), where)
        others = {k: v for k, v in row.items() if k not in part.columns and _is_plain(v)}
        columns = others or None
    prompt = _prompt(part.prompt, where, tokens)
    is_empty = isinstance(part.prompt, str) and not part.prompt
    _check_not_empty(() if is_empty else prompt.ids, f"{where}: the prompt")
    return PromptRow(prompt.ids, prompt.text, prompt.messages, columns)


def training_row(row: Any, where: str, tokens: Tokens) -> tuple[Ids, tuple[bool, ...]]:
    """The ids of a supervised row, and whether each is a target of the loss.

    Ids are taken as they are: `(ids, prompt_len)`, `(ids, prompt_mask)` (True on the prompt), and
    ids in place of any text below. So are records of earlier stages, of which the completion, or
    the chosen response, is learnt. Texts and messages become ids as in generation, and responses
    get the end token after them:

    - `{"prompt": text or messages, "completion": text or one message of the assistant}`
    - `{"messages": [...]}`, or that list alone: the last message, which must be the assistant's,
      is learnt; all before it is the prompt. Earlier answers are read, not learnt.
    - `{"conversations": [{"from": "human", "value": ...}, ...]}` (ShareGPT): the same; from is
      human, user, gpt, assistant or system.
    - `{"instruction", "input", "output"}` (Alpaca) and `{"instruction", "context", "response"}`
      (Dolly): the prompt is the instruction, a blank line and the input or context; that may be
      missing or empty.
    - `{"question", "choices", "answer"}`: the prompt is the question with its choices after A.,
      B., ...; the completion is the right one, as `B. text`. answer is its place from 0, its
      letter or its text.
    - `{"text"}`: learnt from its second token on, without a template.

    A row of any form may have the columns that `prompt_of` names. A message may say more than its
    text (calls of tools, a thought): the chat template is given all of it.

    Raises DataError for any other row, if nothing is left to learn, and for what must not be
    learnt: `label` False, a weight that is not 1, images.
    """
    marked = _marked_ids(row, where, tokens)
    targets = tuple(i > 0 and not p for i, p in enumerate(marked.is_prompt))
    if not any(targets):
        raise DataError(
            f"{where}: nothing to learn: the prompt takes all of the row's "
            f"{amount(len(marked.ids), 'token')}."
        )
    return marked.ids, targets


def prompt_and_completion(row: Any, where: str, tokens: Tokens) -> tuple[PromptRow, Ids]:
    """The prompt and the completion of a supervised row.

    Raises DataError if the row has no prompt, or one that does not stand before all else.
    """
    marked = _marked_ids(row, where, tokens)
    flags, length = marked.is_prompt, sum(marked.is_prompt)
    if not 0 < length < len(flags) or not all(flags[:length]):
        raise DataError(
            f"{where}: a prompt followed by a completion is needed here, to sample an answer to "
            f"the same prompt; got {shape_of(row)}."
        )
    ids = marked.ids[:length]
    return marked.prompt or PromptRow(ids, tokens.decode(ids)), marked.ids[length:]


def preference_row(row: Any, where: str, tokens: Tokens) -> PreferencePair:
    """A preference pair, without an id.

    `{"prompt", "chosen", "rejected"}` with texts, ids, or messages (the responses: one of the
    assistant each); or `{"chosen", "rejected"}`, two lists of messages that share all but their
    last. These columns are kept too, if a row has them: weight (0 or more), win_probability,
    rejected_win_probability, label_smoothing (0 to 1). A pair of an earlier stage is taken as it
    is. Raises DataError for any other row, for a value out of bounds in one of these columns, for a
    prompt without tokens, as no model gives the first token of a row a probability, and if both
    responses are the same.
    """
    if isinstance(row, PreferencePair):
        _check_not_empty(row.prompt_ids, f"{where}: the prompt")
        return row
    if not isinstance(row, Mapping):
        raise DataError(
            f'{where}: a preference row is {{"prompt", "chosen", "rejected"}}; got {shape_of(row)}.'
        )
    seen = _seen(row, where, tokens)
    form = preference_form(seen, where)
    tokens.name_unread(unread_columns(seen, PREFERENCES, {"prompt", "id", *PAIR_NUMBERS}), where)
    prompt = _prompt(form.prompt, where, tokens)
    _check_not_empty(prompt.ids, f"{where}: the prompt")
    sides = {"chosen": form.chosen, "rejected": form.rejected}
    ids = {
        name: _response_ids(form.prompt, side, f"{where}: {name}", tokens)
        for name, side in sides.items()
    }
    if ids["chosen"] == ids["rejected"]:
        raise DataError(f"{where}: chosen and rejected are the same; nothing is preferred.")
    given_as_text = isinstance(form.prompt, str) or is_messages(form.prompt)
    weight, wins, rejected_wins, smoothing = (_pair_number(row, n, where) for n in PAIR_NUMBERS)
    return PreferencePair(
        id="",
        prompt_ids=prompt.ids,
        chosen_ids=ids["chosen"],
        rejected_ids=ids["rejected"],
        prompt=prompt.text if given_as_text else None,
        chosen=_text_of(form.chosen, ids["chosen"], tokens),
        rejected=_text_of(form.rejected, ids["rejected"], tokens),
        messages=prompt.messages,
        weight=weight,
        win_probability=wins,
        rejected_win_probability=rejected_wins,
        label_smoothing=smoothing,
    )


def truncated(ids: Ids, prompt_len: int, limit: int | None, where: str) -> tuple[Ids, bool]:
    """Ids cut at the end to `limit` tokens, and whether they were cut.

    Raises DataError if the prompt leaves no room for a response.
    """
    if limit is None or len(ids) <= limit:
        return ids, False
    if prompt_len >= limit:
        raise DataError(
            f"{where}: the prompt alone has {prompt_len} tokens, and prompt and response together "
            f"may have {limit}: no room for a response. {_shorter(limit)}"
        )
    return ids[:limit], True


def _shorter(limit: int) -> str:
    """What can be done about a prompt that takes all room."""
    return (
        f"Shorten it; or leave such rows out ({setting('on_bad_row', 'skip')}); or raise "
        f"max_seq_len, if the model takes more than {limit}."
    )


def check_prompt(ids: Ids, where: str, limit: int | None) -> None:
    """Raise DataError if a prompt leaves no room for a response in `limit` tokens."""
    if limit is not None and len(ids) >= limit:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens, and prompt and response together may "
            f"have {limit}. {_shorter(limit)}"
        )


def _marked_ids(row: Any, where: str, tokens: Tokens) -> _MarkedIds:
    """The ids of a supervised row of any form."""
    if isinstance(row, PreferencePair):
        prompt = PromptRow(row.prompt_ids, row.prompt, row.messages)
        return _joined(prompt, row.chosen_ids)
    if isinstance(row, Demonstration):
        return _joined(PromptRow(row.prompt_ids, row.prompt), row.completion_ids)
    if isinstance(row, Mapping) or is_conversation(row):
        row = row if isinstance(row, Mapping) else {"messages": row}
        seen = _seen(row, where, tokens)
        _check_wanted(seen, where)
        form = supervised_form(seen, where)
        read = {"weight", "label"} | ({*BEFORE} if form.prompt is not None else set())
        tokens.name_unread(unread_columns(seen, SUPERVISED, read), where)
        return _exchange_ids(form, where, tokens)
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        ids = _ids(row[0], f"{where}: the ids", tokens)
        return _MarkedIds(ids, _prompt_mask(row[1], ids, where))
    raise DataError(
        f"{where}: a supervised row is (ids, prompt_len), (ids, prompt_mask), a list of messages, "
        f"{in_words(SUPERVISED)}; got {shape_of(row)}."
    )


def _seen(row: Mapping[str, Any], where: str, tokens: Tokens) -> Mapping[str, Any]:
    """The columns of a row that a stage may read. Raises DataError if some are of media.

    A run that 0.1.0 began sees what that did. Without a chat template, none reads variables.
    """
    if tokens.rules == 1:
        columns = {name: _first_messages(row[name]) for name in row if name not in NEW_COLUMNS}
        return {**dict.fromkeys(row), **columns}
    media = [name for name in MEDIA if not is_empty(row.get(name))]
    if media:
        raise DataError(
            f"{where}: the row has {' and '.join(map(repr, media))}, which the model does not "
            "read, so its text alone would mean something else. Leave such rows out, for example "
            f"by {setting('on_bad_row', 'skip')}."
        )
    unread = {"tools", "documents", VARIABLES} & row.keys() if not tokens.renders else set()
    tokens.name_unread((name for name in unread if not is_empty(row[name])), where)
    return {name: row[name] for name in row if name not in unread}


def _first_messages(value: Any) -> Any:
    """Messages as version 0.1.0 saw them, which was their role and their text; others as are."""
    if not is_messages(value) or "role" not in value[0]:
        return value
    return [{k: v for k, v in m.items() if k in ("role", "content")} for m in value]


def _check_wanted(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError if a row says that it is not to be learnt, or not like others."""
    weight, label = row.get("weight", 1), row.get("label")
    problem = None
    if label is False:
        problem = "label False: its completion is unwanted, but would be learnt like any other"
    elif is_number(weight) and weight != 1:
        problem = f"the weight {weight:g}, but all supervised rows count equally"
    if problem is not None:
        raise DataError(
            f"{where}: the row has {problem}. Leave such rows out "
            f"({setting('on_bad_row', 'skip')})."
        )


def _text_of(response: Any, ids: Ids, tokens: Tokens) -> str | None:
    """The text of one side of a preference; None if it was given as ids."""
    if isinstance(response, Mapping):
        return tokens.decode(ids)
    return response if isinstance(response, str) else None


def _exchange_ids(form: Exchange, where: str, tokens: Tokens) -> _MarkedIds:
    if form.prompt is None:
        ids = _whole_text_ids(form.completion, f"{where}: the text", tokens)
        return _MarkedIds(ids, (False,) * len(ids))
    prompt = _prompt(form.prompt, where, tokens)
    completion = _response_ids(form.prompt, form.completion, f"{where}: the completion", tokens)
    return _joined(prompt, completion)


def _joined(prompt: PromptRow, completion: Ids) -> _MarkedIds:
    flags = (True,) * len(prompt.ids) + (False,) * len(completion)
    return _MarkedIds((*prompt.ids, *completion), flags, prompt)


def _prompt(value: Any, where: str, tokens: Tokens) -> PromptRow:
    """A prompt that is a text, messages or ids; ids are taken as they are."""
    if isinstance(value, str) or is_messages(value):
        prompt = value if isinstance(value, str) else open_messages(value, where)
        rendered = tokens.prompt(prompt, f"{where}: the prompt")
        return PromptRow(rendered.ids, rendered.text, rendered.messages)
    _check_there(value, f"{where}: the prompt")
    ids = tokens.checked(value, f"({where}: the prompt)")
    return PromptRow(ids, tokens.decode(ids))


def _response_ids(prompt: Any, value: Any, whose: str, tokens: Tokens) -> Ids:
    """The ids of a response: a text gets the end token after it, ids are taken as they are."""
    _check_there(value, whose)
    if not isinstance(value, str | Mapping):
        ids = tokens.checked(value, f"({whose})")
    elif isinstance(prompt, str) or is_messages(prompt):
        ids = tokens.response(prompt, value, whose)
    elif isinstance(value, str):
        ids = tokens.ended(tokens.encode_part(value))
    else:
        raise DataError(f"{whose}: a message needs a prompt of texts or messages; this one is ids.")
    _check_not_empty(ids, whose)
    return ids


def _check_there(value: Any, whose: str) -> None:
    """Raise DataError for a value that a row does not have."""
    if value is None:
        raise DataError(
            f"{whose} must be a text, messages or token ids; it is {said('None', 'null')}. Give "
            f"one, or leave such rows out ({setting('on_bad_row', 'skip')})."
        )


def _check_not_empty(ids: Ids, whose: str) -> None:
    if not ids:
        raise DataError(f"{whose} is empty; it must have at least one token.")


def _whole_text_ids(text: Any, whose: str, tokens: Tokens) -> Ids:
    """Ids with the end token; a text that was rendered may have one, with blanks after it."""
    ids = _ids(text, whose, tokens)
    last = max((i for i, token in enumerate(ids) if token in tokens.end_ids), default=None)
    if tokens.renders and last is not None and not (tokens.decode(ids[last:]) or "").strip():
        return ids
    return tokens.ended(ids)


def _ids(value: Any, whose: str, tokens: Tokens) -> Ids:
    return tokens.encode(value) if isinstance(value, str) else tokens.checked(value, f"({whose})")


def _prompt_mask(value: Any, ids: Ids, where: str) -> tuple[bool, ...]:
    """Whether each id belongs to the prompt, from the prompt's length or from a mask."""
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor, an array, a scalar
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value <= len(ids):
            return tuple(i < value for i in range(len(ids)))
    elif isinstance(value, Sequence) and all(isinstance(flag, bool) for flag in value):
        if len(value) == len(ids):
            return tuple(value)
    raise DataError(
        f"{where}: beside {amount(len(ids), 'id')} there must be prompt_len, an int from 0 to "
        f"{len(ids)}, or prompt_mask, {amount(len(ids), 'boolean')}; got {str(value)[:80]}."
    )


def _pair_number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    """A column of PAIR_NUMBERS; None if the row does not have it."""
    value, most = row.get(name), PAIR_NUMBERS[name]
    if value is None:
        return None
    if not is_number(value) or not 0 <= value <= most:
        bounds = "0 or more" if most == math.inf else f"from 0 to {most:g}"
        raise DataError(f"{where}: {name} must be a number {bounds}; got {str(value)[:80]}.")
    return float(value)


def _is_plain(value: Any) -> bool:
    """Whether a record can hold a column's value."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
