"""What an engine is asked for and what it gives: token ids, and how tokens are chosen."""

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
    """How tokens are chosen and when a response ends.

    end_ids: the tokens that end it. stop: the texts that end it; stop_fn: the function of its text
    that ends it. is_stop: whether new ids are ended by one of these. logprobs: whether completions
    shall have them. The others are as in SamplingConfig.
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
    logprobs: bool = False
    stop_fn: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A response that is asked for. ids: of its prompt. key: of its noise, see sampling.uniforms.

    name: what messages call it.
    """

    ids: tuple[int, ...]
    key: int
    max_new_tokens: int
    name: str = "?"


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request. ids: the new tokens, the end token included.

    finished: whether it ended by itself; None if there is nothing that could end it. tokens:
    "re-encoded" if the ids were encoded from a text. reason: why there is no response.
    max_new_tokens: the limit that was in force, where it was lower than the request's. logprobs: of
    each token, of the model alone: at temperature 1, before filters and penalties; None if nobody
    asked for them or the engine gives none.
    """

    ids: tuple[int, ...]
    finished: bool | None
    tokens: str | None = None
    reason: str | None = None
    max_new_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None


@runtime_checkable
class Engine(Protocol):
    """What generates. Results come in any order, each with the index of its request."""

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]: ...

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """For each row the probabilities, at temperature 1, after each inner node of a trie.

        longer: tokens that make another number of a score that could end.
        """
        ...

    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> AbstractContextManager[None]:
        """Around all generating and judging with one set of weights.

        save: writes these weights and the tokenizer into a folder.
        """
        ...
