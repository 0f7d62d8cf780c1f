"""Text to token ids and back, whatever tokenizer the user has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from self_rewarding_lm.errors import ConfigError, TokenizerError


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


class Tokens:
    """A tokenizer, its end token and the model's vocabulary, with their results checked."""

    def __init__(
        self, tokenizer: Tokenizer | None, *, eos_id: int | None, vocab: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab = vocab
        found = getattr(tokenizer, "eos_token_id", None) if eos_id is None else eos_id
        self.eos_id: int | None = found
        if found is not None and vocab is not None and not 0 <= found < vocab:
            raise ConfigError(
                f"eos_id must be one of the model's {vocab} tokens (0 to {vocab - 1}); got {found}."
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text; TokenizerError where they are no ids of the model."""
        if self.tokenizer is None:
            raise ConfigError(
                f"a text needs a tokenizer: {text[:60]!r}. Give the trainer tokenizer_encode and "
                "tokenizer_decode, or tokenizer."
            )
        return self.checked(self.tokenizer.encode(text), f"of the text {text[:60]!r}")

    def decode(self, ids: Sequence[int]) -> str | None:
        """The text of ids, without the end token; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        kept = [i for i in ids if i != self.eos_id]
        text = self.tokenizer.decode(kept)
        if not isinstance(text, str):
            raise TokenizerError(f"decoding must give a str; got {type(text).__name__}: {text!r}")
        return text

    def ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids with the end token behind them, where one is known."""
        return ids if self.eos_id is None or ids[-1:] == (self.eos_id,) else (*ids, self.eos_id)

    def checked(self, ids: Any, whose: str) -> tuple[int, ...]:
        """Ids of any number type as a tuple of ints within the vocabulary."""
        if isinstance(ids, Tensor) or hasattr(ids, "tolist"):
            if getattr(ids, "ndim", 1) != 1:
                raise TokenizerError(
                    f"token ids {whose} must be one-dimensional; got shape {tuple(ids.shape)}."
                )
            ids = ids.tolist()
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
            raise TokenizerError(
                f"token ids {whose} must be a list or 1-D tensor of numbers; got "
                f"{type(ids).__name__}. Does tokenizer_encode return ids?"
            )
        return tuple(self._checked_id(i, whose) for i in ids)

    def _checked_id(self, value: Any, whose: str) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != value or isinstance(value, bool):
            raise TokenizerError(f"token ids {whose} must be whole numbers; got {value!r}.")
        if number < 0 or (self.vocab is not None and number >= self.vocab):
            limit = "" if self.vocab is None else f" to {self.vocab - 1}"
            raise TokenizerError(
                f"token ids {whose} must be ids of the model, 0{limit}; got {number}. "
                "The tokenizer does not fit the model's vocabulary."
            )
        return number
