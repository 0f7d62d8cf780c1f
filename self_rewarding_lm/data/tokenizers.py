"""Kinds of tokenizers, and how they turn texts into ids. Knows nothing of templates and prompts."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from self_rewarding_lm.data.control_tokens import THOUGHT, Controls, Piece, Span
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.records import Ids

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Special tokens that end a text in the vocabularies that have them."""


CONTEXTS = ("\n", "<", "0", "a")
"""Texts that a piece is encoded after, so that it is no beginning; the first whose own ids stay as
they are is taken."""


WINDOW = 64
"""So many characters of a text are first searched for a control token, then twice as many."""


BRACKETED = re.compile(r"[<\[].*[>\]]", re.DOTALL)


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    def encode(self, text: str) -> Any:
        """Token ids: a list, or a 1-D tensor or array of any number dtype."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of ids."""
        ...


@dataclass(frozen=True)
class CallableTokenizer:
    """Two functions as a tokenizer: str -> 1-D tensor, and 1-D long tensor -> str."""

    encode_fn: Callable[[str], Any]
    decode_fn: Callable[[Tensor], str]

    def encode(self, text: str) -> Any:
        return self.encode_fn(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_fn(torch.tensor(list(ids), dtype=torch.long))


def tokenizer_of(
    tokenizer: Tokenizer | None,
    encode: Callable[[str], Any] | None,
    decode: Callable[[Tensor], str] | None,
) -> Tokenizer | None:
    """The tokenizer, or the two functions as one; None if neither is given.

    Raises ConfigError if both are, or one function alone.
    """
    if tokenizer is not None and (encode is not None or decode is not None):
        raise ConfigError("give tokenizer, or tokenizer_encode and tokenizer_decode, not both.")
    if (encode is None) != (decode is None):
        raise ConfigError("tokenizer_encode and tokenizer_decode go together; one is missing.")
    if encode is not None and decode is not None:
        return CallableTokenizer(encode, decode)
    return tokenizer


class HuggingFaceTokenizer:
    """A tokenizer of transformers, which puts special tokens around whole texts only.

    special: ids of all special and added tokens. begin_ids: what it puts before every text, its
    begin token or nothing. text_ends: tokens that end a text. controls: the texts of its control
    tokens. thoughts_count: whether tokens of thoughts, such as <think>, may be control tokens, as
    version 0.1.0 had it.
    """

    def __init__(self, tokenizer: Any, *, thoughts_count: bool = False) -> None:
        self.tokenizer = tokenizer
        self._is_no_control = (lambda text: False) if thoughts_count else THOUGHT.fullmatch
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        self.special = {*tokenizer.all_special_ids, *self._added}
        # 1. what stands before a text
        whole, part = tokenizer.encode("a"), self.encode_part("a")
        places = range(len(whole) - len(part) + 1)
        start = next((i for i in places if whole[i : i + len(part)] == part), 0)
        self.begin_ids: Ids = tuple(whole[:start])
        first_token = str(tokenizer.convert_ids_to_tokens(part[0])) if part else ""
        self._opens_with_space = first_token.startswith(("▁", "Ġ", " "))
        # 2. what ends a text
        names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(self.special)}
        self.text_ends: Ids = tuple(i for i, name in names.items() if name in END_OF_TEXT)
        # 3. control tokens
        declared = {i for i, token in self._added.items() if token.special}
        declared |= {*tokenizer.all_special_ids}
        self._thoughts = {i: names[i] for i in declared if self._is_no_control(names[i])}
        self._hidden_in_text = declared - self._thoughts.keys()
        self._set_controls(declared - self._thoughts.keys())

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text: with its begin token, if there is one, and no end token."""
        return self.with_begin(self.encode_part(text))

    def encode_part(self, text: str) -> list[int]:
        """The ids of a text that something may stand before."""
        return self._encode(text)

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of pieces that make up one text; in plain ones no control token is recognised."""
        ids: list[int] = []
        for place, (text, is_plain) in enumerate(pieces):
            if is_plain:
                ids += self._encode_plain(text, is_beginning=place == 0)
            else:
                ids += self._encode_continuation(text) if place else self.encode_part(text)
        return ids

    def with_begin(self, ids: list[int]) -> list[int]:
        """The ids with the begin token before them, if the tokenizer has one and they lack it."""
        has_begin = tuple(ids[: len(self.begin_ids)]) == self.begin_ids
        return ids if has_begin else [*self.begin_ids, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; those of thoughts are in it."""
        if self._thoughts:
            ids = [i for i in ids if i not in self._hidden_in_text]
        return self.tokenizer.decode(
            list(ids),
            skip_special_tokens=not self._thoughts,
            clean_up_tokenization_spaces=False,
        )

    def has_control(self, text: str) -> bool:
        """Whether a control token is among the ids of a text."""
        return not self._forbidden.isdisjoint(self._encode(text))

    def control_spans(self, text: str) -> list[Span]:
        """Where control tokens stand in a text, those too that only this tokenizer sees in it.

        A normaliser may make one of other characters: full-width ones, capitals, or some between
        which it leaves others out.
        """
        spans, start, size = [], 0, WINDOW
        while start < len(text):
            if not self.has_control(text[start : start + size]):
                if start + size >= len(text):
                    break
                size *= 2
                continue
            spans.append(self._shortest(text, start, min(start + size, len(text))))
            start, size = spans[-1][1], WINDOW
        return spans

    def _shortest(self, text: str, start: int, last: int) -> Span:
        """Where the first control token between two places of a text stands; there is one.

        That is the shortest beginning that holds one, and the shortest end of it that does.
        """
        places = range(last + 1)
        end = bisect_left(
            places, True, start + 1, last, key=lambda k: self.has_control(text[start:k])
        )
        behind = bisect_left(
            places, True, start + 1, end, key=lambda k: not self.has_control(text[k:end])
        )
        return behind - 1, end

    def unwritten(self, pieces: Iterable[Piece], ids: Iterable[int]) -> list[str]:
        """The control tokens among the ids of pieces that stand in no piece of a template."""
        found = Counter(i for i in ids if i in self._forbidden)
        if not found:
            return []
        spelled = (t[a:b] for t, plain in pieces if not plain for a, b in self.controls.spans(t))
        written = Counter(self.tokenizer.convert_tokens_to_ids(text) for text in spelled)
        return [str(self.tokenizer.convert_ids_to_tokens(i)) for i in found - written]

    def add_controls(self, written: str) -> None:
        """Count the added tokens that a template writes between turns as control tokens too.

        written: what a template rendered of harmless turns. Some tokenizers do not declare the
        tokens that open a turn as special. Only those in brackets count: white space may be an
        added token too.
        """
        ids = {i for i in self.encode_part(written) if i in self._added}
        names = {i: str(self._added[i].content) for i in ids}
        markers = {i for i, name in names.items() if BRACKETED.fullmatch(name)}
        markers = {i for i in markers if not self._is_no_control(names[i])}
        self._set_controls(self._control_ids | markers)

    def _set_controls(self, ids: set[int]) -> None:
        self._control_ids = ids
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        self._forbidden = ids - {unknown}  # unknown characters have that id, and do no harm
        texts = [str(token.content) for i, token in self._added.items() if i in ids]
        named = [
            text for text in self.tokenizer.all_special_tokens if not self._is_no_control(text)
        ]
        self.controls = Controls([*texts, *named], self._thoughts.values())

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        """The ids of a text. plain: ask the tokenizer to split special tokens into characters."""
        how = {"split_special_tokens": True} if plain else {}
        return self.tokenizer.encode(text, add_special_tokens=False, **how)

    def _encode_continuation(self, text: str, *, plain: bool = False) -> list[int]:
        """The ids of a text that goes on, without the space that some put before a beginning."""
        if self._opens_with_space:
            for context in CONTEXTS:
                head = self._encode(context, plain=plain)
                ids = self._encode(context + text, plain=plain)
                if ids[: len(head)] == head:
                    return ids[len(head) :]
        return self._encode(text, plain=plain)

    def _encode_plain(self, text: str, *, is_beginning: bool) -> list[int]:
        """The ids of a text in which no control token is recognised.

        Some vocabularies have a control token among their words, or recognise it whatever is asked.
        The text is then cut after the first character of each, until none remains.
        """
        encode = self._encode if is_beginning else self._encode_continuation
        ids = encode(text, plain=True)
        if self._forbidden.isdisjoint(ids):
            return ids
        if len(text) < 2:
            return [i for i in ids if i not in self._forbidden]
        cuts = [start + 1 for start, _ in self.controls.spans(text) if start + 1 < len(text)]
        cuts = [0, *(cuts or [len(text) // 2]), len(text)]
        ids = []
        for start, end in pairwise(cuts):
            is_first = is_beginning and start == 0
            ids += self._encode_plain(text[start:end], is_beginning=is_first)
        return ids
