"""What an engine is asked for and what it gives: token ids, and how they are chosen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Ids


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


@runtime_checkable
class Engine(Protocol):
    """What generates. Results come in any order, each with its request's index."""

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]: ...

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """What follows each inner node of a trie behind each row, at temperature 1."""
        ...

    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> AbstractContextManager[None]:
        """Around a stage's generating and judging, left before it trains.

        save: writes the present weights and the tokenizer into a folder.
        """
        ...
