"""Engines: what generates, and ours, which decodes in this process.

Knows nothing of text, prompts, stages or files. What prompts have in common is computed once, see
adapters/attending.py; rows are batched continuously, see flight.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

from self_rewarding_lm.adapters import Session, TokenModel
from self_rewarding_lm.adapters.inference import inferring
from self_rewarding_lm.decoding import Completion, Decoding, Request
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.flight import Flight
from self_rewarding_lm.schedule import Group, plans
from self_rewarding_lm.score_trie import Ids, NodeChances, ScoreTrie
from self_rewarding_lm.tokens import Tokens
from self_rewarding_lm.trie_walk import walk

__all__ = ["Completion", "Decoding", "Engine", "LocalEngine", "Request"]


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


class LocalEngine:
    """Decodes in this process, with the weights that are being trained.

    max_rows: rows in flight; ours: more cost memory and gain little on a CPU. cache_bytes: what
    their keys and values may take; default half of what is free when the engine is called; fewer
    rows are in flight where they do not fit. max_prefill_tokens: prompt tokens that go through the
    model at once; a longer prompt goes alone. Raises ConfigError for sizes under 1.
    """

    def __init__(
        self,
        *,
        max_rows: int = 128,
        cache_bytes: int | None = None,
        max_prefill_tokens: int = 4096,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ConfigError(f"LocalEngine: {name} must be at least 1; got {value}.")
        self.max_rows = max_rows
        self.cache_bytes = cache_bytes
        self.max_prefill_tokens = max_prefill_tokens

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        model.refresh()
        sizes = [(request.ids, request.max_new_tokens) for request in requests]
        for plan, groups in plans(model, sizes, self.max_rows, self.cache_bytes):
            flight = Flight(model, plan, groups, requests, decoding, self.max_prefill_tokens)
            while flight.busy:
                with inferring(model.module):
                    finished = flight.until_some_end()
                yield from finished

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        model.refresh()
        levels = trie.levels()
        width = max(map(len, levels))
        sizes = [(row, len(levels)) for row in rows]
        most = max(1, self.max_rows // width)
        for plan, groups in plans(model, sizes, width * most, self.cache_bytes, copies=width):
            session: Session | None = None
            for some in _batches(groups, max(1, plan.max_rows // width), self.max_prefill_tokens):
                with inferring(model.module):
                    session = session or model.session(plan)
                    found = walk(session, [group.ids for group in some], trie, longer)
                for group, chances in zip(some, found, strict=True):
                    yield from ((i, chances) for i in group.members)

    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> AbstractContextManager[None]:
        """Nothing to do: the weights are here."""
        return nullcontext()


def _batches(groups: Sequence[Group], count: int, tokens: int) -> Iterator[list[Group]]:
    """Groups in their order, at most `count` at once, and tokens with padding bounded too."""
    some: list[Group] = []
    for group in groups:
        longest = max(len(g.ids) for g in (*some, group))
        if some and (len(some) == count or (len(some) + 1) * longest > tokens):
            yield some
            some = []
        some.append(group)
    if some:
        yield some
