"""What an engine is asked for and what it gives: token ids, and how they are chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen and when a row ends.

    is_stop: whether a row's new ids end it though no end token came; stop: the texts it looks for.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    filter_fn: Callable[[Tensor], Tensor] | None = None
    end_ids: tuple[int, ...] = ()
    is_stop: Callable[[Sequence[int]], bool] | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """ids to go on from; key: of the noise, see sampling.uniforms; name: for messages."""

    ids: tuple[int, ...]
    key: int
    max_new_tokens: int
    name: str = "?"


@dataclass(frozen=True, slots=True)
class Completion:
    """New ids, the end token included. finished: None where nothing is known that ends a row.

    tokens: "re-encoded" where the ids were encoded from a text. reason: why there is no completion.
    """

    ids: tuple[int, ...]
    finished: bool | None
    tokens: str | None = None
    reason: str | None = None
