"""Ranked rows: several replies to one prompt, in the order that people gave them.

Their replies are texts, as judges read them; `as_candidates` turns a row into records.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from self_rewarding_lm.data.chat import is_messages, spoken, transcript
from self_rewarding_lm.data.forms import (
    Row,
    form_of,
    lettered,
    open_messages,
    preference_form,
    right_choice,
    shape_of,
    text_of,
    with_beginning,
)
from self_rewarding_lm.data.rows import prompt_of
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError
from self_rewarding_lm.records import (
    Candidate,
    PreferencePair,
    Prompt,
    RankedReplies,
    is_number,
)
from self_rewarding_lm.text import amount


@dataclass(frozen=True)
class _Ranking:
    """Prompt, replies and ranks as they stand in a row, unchecked."""

    prompt: Any
    replies: Any
    ranks: Any


def ranked_row(row: Any, where: str) -> RankedReplies:
    """Replies to one prompt with their human ranks, 0 for the best; without an id.

    - a RankedReplies, taken as it is; a PreferencePair with texts, which has ranks 0 and 1
    - `{"prompt": text or messages, "replies": [text, ...]}`, best first, or in any order with
      `"ranks": [number, ...]`; equal ranks were not ordered
    - `{"question", "choices", "answer"}`: the right choice has rank 0, all others rank 1
    - `{"prompt", "chosen", "rejected"}` or `{"chosen", "rejected"}`, as preference rows of texts or
      messages: ranks 0 and 1
    - `{"input", "output_1", "output_2", "label"}` (LLMBar): label, 1 or 2, names the better output

    group: the column of that name, else a digest of the prompt, so that rows with the same prompt
    are one group. Raises DataError for any other row, for fewer than two replies, unless each reply
    has a finite number as its rank, and if all ranks are equal.
    """
    if isinstance(row, RankedReplies):
        _check_ranking(row.replies, row.ranks, where)
        return row
    if isinstance(row, PreferencePair):
        sides = {"chosen": row.chosen, "rejected": row.rejected}
        row = {"prompt": row.prompt if row.messages is None else list(row.messages), **sides}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a ranked row is a dict with replies; got {shape_of(row)}.")
    ranking = form_of(row, RANKED, where, accepted="A ranked row is ")(row, where)
    prompt = _checked_prompt(ranking.prompt, where)
    _check_ranking(ranking.replies, ranking.ranks, where)
    group = row.get("group")
    if group is None:
        text = prompt if isinstance(prompt, str) else transcript(prompt)
        group = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    ranks = tuple(float(rank) for rank in ranking.ranks)
    return RankedReplies("", prompt, tuple(ranking.replies), ranks, str(group))


def _checked_prompt(value: Any, where: str) -> str | tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) and value:
        return value
    if is_messages(value):
        return open_messages(value, where)
    raise DataError(
        f"{where}: judges read texts, so the prompt must be a text or a list of messages; got "
        f"{shape_of(value)}."
    )


def _check_ranking(replies: Any, ranks: Any, where: str) -> None:
    """Raise DataError unless these are two or more texts with a rank each, not all equal."""
    if isinstance(replies, str) or not isinstance(replies, Sequence):
        raise DataError(f"{where}: replies must be a list of texts; got {shape_of(replies)}.")
    wrong = [reply for reply in replies if not isinstance(reply, str)]
    if wrong:
        raise DataError(
            f"{where}: judges read texts, so a reply must be a text; got {shape_of(wrong[0])}."
        )
    if not isinstance(ranks, Sequence) or not all(map(is_number, ranks)):
        raise DataError(f"{where}: ranks must be numbers, 0 for the best; got {str(ranks)[:80]}.")
    if len(replies) < 2 or len(replies) != len(ranks):
        raise DataError(
            f"{where}: at least two replies with a rank each are needed; got "
            f"{amount(len(replies), 'reply', 'replies')} and {amount(len(ranks), 'rank')}."
        )
    if len(set(ranks)) < 2:
        raise DataError(
            f"{where}: all {len(ranks)} replies have the rank {ranks[0]:g}; nothing is preferred."
        )


def _rank_replies(row: Row, where: str) -> _Ranking:
    replies, ranks = row["replies"], row.get("ranks")
    if ranks is None and isinstance(replies, Sequence):
        ranks = range(len(replies))
    return _Ranking(with_beginning(row["prompt"], row, where), replies, ranks)


def _rank_choices(row: Row, where: str) -> _Ranking:
    question, answers = lettered(row, where)
    right = right_choice(row, where)
    question = with_beginning(question, row, where)
    return _Ranking(question, answers, [int(place != right) for place in range(len(answers))])


def _rank_pair(row: Row, where: str) -> _Ranking:
    pair = preference_form(row, where)
    sides = (pair.chosen, pair.rejected)
    replies = [spoken(side) if isinstance(side, Mapping) else side for side in sides]
    return _Ranking(pair.prompt, replies, [0, 1])


def _rank_outputs(row: Row, where: str) -> _Ranking:
    if row["label"] not in (1, 2):
        raise DataError(f"{where}: label must be 1 or 2, the better output; got {row['label']!r}.")
    ranks = [0, 1] if row["label"] == 1 else [1, 0]
    prompt = with_beginning(text_of(row, "input", where), row, where)
    return _Ranking(prompt, [row["output_1"], row["output_2"]], ranks)


RANKED: dict[tuple[str, ...], Callable[[Row, str], _Ranking]] = {
    ("prompt", "replies"): _rank_replies,
    ("question", "choices", "answer"): _rank_choices,
    ("prompt", "chosen", "rejected"): _rank_pair,
    ("chosen", "rejected"): _rank_pair,
    ("input", "output_1", "output_2", "label"): _rank_outputs,
}
"""By the columns that a form needs; the first that fits counts."""


Asked = tuple[Prompt, list[Candidate]]
"""A prompt and the replies to it."""


def as_candidates(ranked: RankedReplies, tokens: Tokens, *, where: str | None = None) -> Asked:
    """A ranked row as the records that judges read; its id is <stage>/<row>.

    The prompt is <stage>/<row>/0 and the replies <stage>/<row>/0/<reply>, in the order of the row.
    They were not sampled: `finished` is None and `max_new_tokens` 0. where: names the row in
    errors.
    """
    where = where or ranked.id
    asked = prompt_of(ranked, where, tokens)
    row = int(ranked.id.rsplit("/", 1)[1])
    prompt = Prompt(f"{ranked.id}/0", row, asked.ids, asked.text, messages=asked.messages)
    return prompt, [
        Candidate(
            id=f"{prompt.id}/{place}",
            prompt_id=prompt.id,
            ids=tokens.response(ranked.prompt, reply, f"{where}: reply {place}"),
            text=reply,
            finished=None,
            max_new_tokens=0,
        )
        for place, reply in enumerate(ranked.replies)
    ]
