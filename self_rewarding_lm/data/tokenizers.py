"""Kinds of tokenizers, and how each makes ids of texts. Knows nothing of templates and prompts."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from self_rewarding_lm.data.control_tokens import Controls, Piece
from self_rewarding_lm.records import Ids

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Special tokens that end a text in the vocabularies that have them."""


BEFORE = ("\n", "<", "0", "a")
"""Texts behind which a piece is encoded as one that goes on; the first that keeps its own ids."""


MARKER = re.compile(r"[<\[].*[>\]]", re.DOTALL)


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


class HuggingFaceTokenizer:
    """A tokenizer of transformers; special tokens are put around whole texts only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        self.special = {*tokenizer.all_special_ids, *self._added}
        whole, part = tokenizer.encode("a"), self.encode_part("a")
        places = range(len(whole) - len(part) + 1)
        start = next((i for i in places if whole[i : i + len(part)] == part), 0)
        self.lead: Ids = tuple(whole[:start])
        """What it puts before every text: its begin token, or nothing."""
        names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(self.special)}
        self.text_ends: Ids = tuple(i for i, name in names.items() if name in END_OF_TEXT)
        self._opens_with_space = bool(part) and str(
            tokenizer.convert_ids_to_tokens(part[0])
        ).startswith(("▁", "Ġ", " "))
        declared = {i for i, token in self._added.items() if token.special}
        self._set_controls({*tokenizer.all_special_ids, *declared})

    def encode(self, text: str) -> list[int]:
        """With the begin token where the tokenizer adds one, never with an end token."""
        return self.led(self.encode_part(text))

    def encode_part(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of pieces that make one text; in plain ones no control token is recognised."""
        ids: list[int] = []
        for place, (text, plain) in enumerate(pieces):
            if plain:
                ids += self._plain(text, opens=place == 0)
            else:
                ids += self._behind(text) if place else self.encode_part(text)
        return ids

    def led(self, ids: list[int]) -> list[int]:
        """The ids with the begin token before them, where the tokenizer adds one."""
        return ids if tuple(ids[: len(self.lead)]) == self.lead else [*self.lead, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def add_controls(self, written: str) -> None:
        """Count the added tokens that a template writes between turns as control tokens too.

        written: what a template made of harmless turns. Some tokenizers do not declare the tokens
        that open a turn as special. Only those in brackets count: blanks may be added tokens too.
        """
        found = {i for i in self.encode_part(written) if i in self._added}
        turns = {i for i in found if MARKER.fullmatch(str(self._added[i].content))}
        self._set_controls(self._control_ids | turns)

    def _set_controls(self, ids: set[int]) -> None:
        self._control_ids = ids
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        self._forbidden = ids - {unknown}  # an unknown character gives that id and means no harm
        texts = [str(token.content) for i, token in self._added.items() if i in ids]
        self.controls = Controls([*texts, *self.tokenizer.all_special_tokens])

    def _behind(self, text: str, **how: bool) -> list[int]:
        """The ids of a text that goes on: without the space that some put before a beginning."""
        if self._opens_with_space:
            for before in BEFORE:
                head, whole = self._encoded(before, **how), self._encoded(before + text, **how)
                if whole[: len(head)] == head:
                    return whole[len(head) :]
        return self._encoded(text, **how)

    def _encoded(self, text: str, **how: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, **how)

    def _plain(self, text: str, *, opens: bool = False) -> list[int]:
        """The ids of a text in which no control token is recognised.

        Some vocabularies have a control token among their words, or recognise it whatever is asked:
        there the text is cut behind the first character of each, until none is left.
        """
        encoded = self._encoded if opens else self._behind
        ids = encoded(text, split_special_tokens=True)
        if self._forbidden.isdisjoint(ids):
            return ids
        if len(text) < 2:
            return [i for i in ids if i not in self._forbidden]
        cuts = [start + 1 for start, _ in self.controls.spans(text) if start + 1 < len(text)]
        cuts = [0, *(cuts or [len(text) // 2]), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [
            i for k, part in enumerate(parts) for i in self._plain(part, opens=opens and k == 0)
        ]
