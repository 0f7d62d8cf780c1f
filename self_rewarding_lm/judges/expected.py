"""Expected scores: the place where a judge states a score, and the mean of the allowed ones there.

Knows tokens, the forms of verdicts and the model; nothing of prompts, candidates and records.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from self_rewarding_lm.data.tokens import Rendered, Tokens
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.generation.score_trie import (
    DECIMALS,
    Expected,
    Ids,
    ScoreTrie,
    build_trie,
    expected_score,
    score_probabilities,
)
from self_rewarding_lm.judges.parsing import Statement, VerdictForm
from self_rewarding_lm.models.interface import TokenModel

DIGITS = "0123456789"


@dataclass(frozen=True)
class Place:
    """A place for a score: all ids before it, and the token paths of the scores that may follow.

    points: what a score of 1 counts there, as a part of a sum.
    """

    ids: Ids
    trie: ScoreTrie
    points: float = 1.0

    @property
    def length(self) -> int:
        """The most tokens that the model reads: all but the last of the longest path."""
        return len(self.ids) + len(self.trie.levels()) - 1


class VerdictReader:
    """Finds the places in a tokenizer's ids at which verdicts of a form stand."""

    def __init__(self, form: VerdictForm, tokens: Tokens) -> None:
        self.form, self.tokens = form, tokens
        self._tries: dict[tuple[str, bool], ScoreTrie] = {}
        self._digits: tuple[int, frozenset[int]] | None = None

    def stated(self, prompt: Ids, answer: Ids) -> tuple[Place, ...]:
        """The places of what an answer states; none if at one of them no token begins.

        The number, or the mark, that the judge took at a place does not matter. No token begins
        there if the answer's tokens divide the text in another way than the paths do.
        """
        body = [i for i in answer if i not in self.tokens.end_ids]
        text = self._decode(body)
        places = [self._place(s, prompt, body, text) for s in self.form.find(text)]
        found = tuple(place for place in places if place is not None)
        return found if len(found) == len(places) else ()

    def _place(
        self, statement: Statement, prompt: Ids, body: Sequence[int], text: str
    ) -> Place | None:
        """The place of a statement in a text; None if no token begins there."""
        # 1. the character at which the paths begin
        opens = statement.start == len(statement.before)
        trie = self._trie(statement.before, opens=opens)
        start = max(0, statement.start - self._lead(trie, opens))
        # 2. the token at that character, if one begins there
        token = self._token_at(start, body)
        if self._decode(body[:token]) != text[:start]:
            return None
        return Place((*prompt, *body[:token]), trie, statement.points)

    def forced(self, prompt: Rendered, answer: Ids) -> Place:
        """The place after an answer to which the form's words are appended.

        End tokens at the answer's end are removed, and the words begin a new line. Without an
        answer the words begin the assistant's turn, or a line if no chat template opened a turn.
        """
        end = len(answer)
        while end and answer[end - 1] in self.tokens.end_ids:
            end -= 1
        text = self._decode(answer[:end])
        if not text:
            text = "" if prompt.messages is not None else prompt.text
        is_open = not text or text[-1].isspace()
        trie = self._trie(self.form.prefix if is_open else f"\n{self.form.prefix}", opens=is_open)
        return Place((*prompt.ids, *answer[:end], *trie.context), trie)

    @cached_property
    def forced_length(self) -> int:
        """The most tokens that a forced ending takes, without the last token of a number."""
        words = self.form.prefix
        tries = (self._trie(words, opens=True), self._trie(f"\n{words}", opens=False))
        return max(len(trie.context) + len(trie.levels()) - 1 for trie in tries)

    @property
    def path_length(self) -> int:
        """Tokens of the longest number after the form's own words."""
        return len(self._trie(self.form.prefix, opens=True).levels())

    def longer(self, trie: ScoreTrie, vocab: int) -> frozenset[int]:
        """The tokens that turn a score that could end here into another number.

        These are the tokens that begin with a digit: after ids that end in a digit, the text goes
        on with a digit. Empty if no score ends at an inner node of the trie.
        """
        endings = trie.endings() if self.form.numeric else []
        if not endings:
            return frozenset()
        if self._digits is None or self._digits[0] != vocab:
            before = (*trie.context, *endings[0])
            self._digits = vocab, _digit_tokens(before, vocab, self.tokens)
        return self._digits[1]

    def _trie(self, before: str, *, opens: bool) -> ScoreTrie:
        """The token paths of the scores after some words. opens: the words begin a text."""
        if (before, opens) not in self._tries:
            # a mark's own first tokens are no context: its probability is that of the whole word
            others = DIGITS if self.form.numeric else DIGITS[0] if self.form.several else ""
            said = {value: text for text, value in self.form.values.items()}
            self._tries[before, opens] = build_trie(
                {value: self._encode(before + text, opens) for value, text in said.items()},
                [self._encode(before + digit, opens) for digit in others],
                said,
            )
        return self._tries[before, opens]

    def _encode(self, text: str, opens: bool) -> Ids:
        """Ids of a text; unless it `opens` one, without what tokenizers put before a beginning."""
        if opens:
            return self.tokens.encode_part(text)
        head, whole = (self.tokens.encode_part(DIGITS[0] + t) for t in ("", text))
        is_part = whole[: len(head)] == head
        return whole[len(head) :] if is_part else self.tokens.encode_part(text)

    def _lead(self, trie: ScoreTrie, opens: bool) -> int:
        """Characters of a path before its number: 1 if a token joins the space to the number."""
        value, path = trie.paths[0]
        number = next(text for text, v in self.form.values.items() if v == value)
        before = (*(() if opens else self.tokens.encode_part(DIGITS[0])), *trie.context)
        return self._length((*before, *path)) - self._length(before) - len(number)

    def _token_at(self, character: int, ids: Sequence[int]) -> int:
        """The index of the token that holds a character of the text of `ids`.

        As many ids stand before it as have a text of at most `character` characters. The text grows
        with the number of ids, so a binary search decodes few beginnings.
        """
        beginnings = range(len(ids) + 1)
        return bisect_right(beginnings, character, key=lambda n: self._length(ids[:n])) - 1

    def _decode(self, ids: Sequence[int]) -> str:
        return (self.tokens.decode(ids) or "") if len(ids) else ""

    def _length(self, ids: Sequence[int]) -> int:
        return len(self._decode(ids))


def _digit_tokens(before: Ids, vocab: int, tokens: Tokens) -> frozenset[int]:
    """The ids whose text, after `before`, begins with a digit; `before` ends in one."""
    text = tokens.decode(before) or ""

    def begins_with_digit(token: int) -> bool:
        try:
            longer = tokens.decode((*before, token)) or ""
        except Exception:  # the model has ids that the tokenizer does not know
            return False
        return longer.startswith(text) and longer[len(text) : len(text) + 1].isdecimal()

    return frozenset(filter(begins_with_digit, range(vocab)))


def expected_scores(
    model: TokenModel, places: Sequence[Place], reader: VerdictReader, engine: Engine
) -> Iterator[tuple[int, Expected]]:
    """The index of each place and its expected score, in any order.

    The probabilities are the model's own, without a temperature.
    """
    by_paths: dict[tuple[tuple[float, Ids], ...], list[int]] = {}
    for i, place in enumerate(places):
        by_paths.setdefault(place.trie.paths, []).append(i)
    for members in by_paths.values():
        trie = places[members[0]].trie
        longer = reader.longer(trie, model.vocab)
        for i, chances in engine.chances(model, [places[m].ids for m in members], trie, longer):
            yield members[i], expected_score(score_probabilities(trie, chances))


def summed(places: Sequence[Place], parts: Sequence[Expected]) -> Expected:
    """The sum of the expected scores at an answer's places, each times its points.

    None if one of them is None, with the reason of the first. The mass is the least of them.
    """
    masses = [part.mass for part in parts if part.mass is not None]
    mass = min(masses) if len(masses) == len(parts) else None
    scores = [part.score for part in parts if part.score is not None]
    if len(scores) < len(parts):
        reason = next(part.reason for part in parts if part.score is None)
        return Expected(None, mass, reason)
    points = (place.points * score for place, score in zip(places, scores, strict=True))
    return Expected(round(math.fsum(points), DECIMALS), mass)
