"""The local engine: decodes in this process, with the weights that are being trained.

Knows nothing of text, prompts, stages or files. What prompts have in common is computed once, see
`models/sessions.py`; sequences are batched continuously, see `flight.py`. The exact probabilities
of a few texts come from a trie, level by level.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, said, typed
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.flight import Flight
from self_rewarding_lm.generation.schedule import Group, plan_sessions
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Plan, Session, TokenModel
from self_rewarding_lm.models.narrow import NarrowMatrices
from self_rewarding_lm.models.packed import PackedMatrices
from self_rewarding_lm.records import Ids
from self_rewarding_lm.runtime import MemoryUsedUpError, give_back_memory, memory_told
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


ROWS_AT_ONCE = 16  # rows whose probabilities are held in float64


Plans = Callable[[Sequence[tuple[Ids, int]]], Iterator[tuple[Plan, list[Group]]]]
"""What plans the sessions of requests, given their ids and new tokens."""


T = TypeVar("T")


def trie_chances(
    session: Session, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
) -> list[dict[Ids, NodeChances]]:
    """For each row the probabilities, at temperature 1, after each inner node of the trie.

    One forward of the rows, and if paths have several tokens one more token for each inner node, so
    that what comes before it is computed once. longer: tokens that make another number of a path
    that could end. Probabilities are in float64 (float32 on devices without it). The session holds
    afterwards what it held before.
    """
    chances: list[dict[Ids, NodeChances]] = [{} for _ in rows]
    first = session.held
    logits = session.prefill(rows)  # (rows, v)
    prompts = range(first, first + len(rows))
    parents: list[Ids] = [()]
    for depth, nodes in enumerate(trie.levels()):
        # 1. one row of the session for each (row, node), the nodes of a row side by side
        if depth:
            if depth == 1:
                session.add([prompt for prompt in prompts for _ in nodes])
            else:
                places = [parents.index(node[:-1]) for node in nodes]
                session.select(
                    [row * len(parents) + place for row in range(len(rows)) for place in places]
                )
            tokens = [node[-1] for node in nodes] * len(rows)
            logits = session.extend(torch.tensor(tokens, device=logits.device))  # (rows nodes, v)
            parents = nodes
        # 2. what follows each node
        for place, node in enumerate(nodes):
            after_node = _chances_after(logits[place :: len(nodes)], node, trie, longer)
            for of_row, node_chances in zip(chances, after_node, strict=True):
                of_row[node] = node_chances
    session.select([])
    session.release(prompts)
    return chances


def _chances_after(
    logits: Tensor, node: Ids, trie: ScoreTrie, longer: frozenset[int]
) -> Iterator[NodeChances]:
    """What follows a node, for each row of logits (r, v)."""
    children = trie.children(node)
    may_stop = node in trie.endings()
    goes_on = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)  # (v,)
    goes_on[[*children, *longer]] = True
    for part in logits.split(ROWS_AT_ONCE):
        exact = part.float() if part.device.type == "mps" else part.double()
        probabilities = exact.softmax(dim=-1)
        stops = probabilities[:, ~goes_on].sum(dim=-1).tolist()
        for row, stop in zip(probabilities[:, children].tolist(), stops, strict=True):
            tokens = dict(zip(children, row, strict=True))
            yield NodeChances(tokens, stop if may_stop else 0.0)


class LocalEngine:
    """Decodes in this process, with the weights that are being trained.

    max_rows: sequences that run at once; the default is ours: more cost memory and gain little on a
    CPU. cache_bytes: what their keys and values may take, by default half of what is free when the
    engine is called; if max_rows do not fit there are fewer, and half as many where memory is used
    up all the same. max_prefill_tokens: prompt tokens that
    go through the model at once; a longer prompt goes alone. Raises ConfigError for sizes under 1.
    """

    @typed
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
        self.fitting_rows = max_rows
        self._is_serving = False
        self._copies: dict[nn.Module, _Copies] = {}

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        model.refresh()
        with self._copied(model.module, len(requests)) as copies:

            def sampled(places: Sequence[int], plans: Plans) -> Iterator[tuple[int, Completion]]:
                some = [requests[place] for place in places]
                sizes = [(request.ids, request.max_new_tokens) for request in some]
                for plan, groups in plans(sizes):
                    told = partial(self._memory_told, "sampling", plan.max_rows)
                    flight = Flight(model, plan, groups, some, decoding, self.max_prefill_tokens)
                    while not flight.is_done:
                        with told(), inferring(model.module), copies.used():
                            finished = flight.until_some_finish()
                        yield from ((places[i], completion) for i, completion in finished)

            yield from self._within_memory(model, len(requests), sampled)

    def chances(
        self, model: TokenModel, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
    ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        model.refresh()
        levels = trie.levels()
        width = max(map(len, levels))  # rows of the session that each row needs
        with self._copied(model.module) as copies:

            def scored(
                places: Sequence[int], plans: Plans
            ) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
                for plan, groups in plans([(rows[place], len(levels)) for place in places]):
                    session: Session | None = None
                    told = partial(self._memory_told, "scoring", plan.max_rows)
                    at_once = max(1, plan.max_rows // width)
                    for batch in _batches(groups, at_once, self.max_prefill_tokens):
                        with told(), inferring(model.module), copies.used():
                            session = session or model.session(plan)
                            rows_of = [group.ids for group in batch]
                            per_row = trie_chances(session, rows_of, trie, longer)
                        for group, chances in zip(batch, per_row, strict=True):
                            yield from ((places[i], chances) for i in group.members)

            yield from self._within_memory(model, len(rows), scored, width)

    def _within_memory(
        self,
        model: TokenModel,
        count: int,
        work: Callable[[Sequence[int], Plans], Iterator[tuple[int, T]]],
        width: int = 1,
    ) -> Iterator[tuple[int, T]]:
        """What `work` gives of `count` requests: (request, result), in any order.

        If memory is used up, those that have no result yet are worked again with half of the rows,
        as results depend on no other row. work: takes requests, and what plans sessions of their
        sizes. width: rows that each request needs at once.
        """
        left = dict.fromkeys(range(count))
        while left:
            most = width * max(1, min(self.fitting_rows // width, len(left)))
            limits = {"max_rows": most, "cache_bytes": self.cache_bytes, "copies": width}
            plans = partial(plan_sessions, model, **limits)  # type: ignore[arg-type]
            try:
                for place, result in work(list(left), plans):
                    del left[place]
                    yield place, result
            except MemoryUsedUpError as error:
                if most <= width:
                    raise
                words = str(error).partition(". ")[0]
            if left:
                give_back_memory(after_error=True)
                if self.fitting_rows == self.max_rows:  # it is said once a stage
                    logger.warning("%s. Tried again with half of the sequences at once.", words)
                self.fitting_rows = most // 2

    @contextmanager
    def _copied(self, module: nn.Module, requests: int | None = None) -> Iterator["_Copies"]:
        """Copies of a module's matrices, which are kept to the end of `serving`, or of this."""
        copies = self._copies.setdefault(module, _Copies(module))
        rows = None if requests is None else min(requests, self.fitting_rows)
        with self._memory_told("copying the weights", self.max_rows):
            copies.prepare(rows)  # before it is seen how much memory is left for keys and values
        try:
            yield copies
        finally:
            if not self._is_serving:
                self._copies.pop(module, None)
                self._end()

    def _memory_told(self, what: str, rows: int) -> AbstractContextManager[None]:
        from_python = said("", ", from Python,")
        held = "half of what is free" if self.cache_bytes is None else f"{self.cache_bytes:,}"
        return memory_told(
            what,
            f"{amount(rows, 'sequence')} ran at once: allow fewer max_new_tokens, or{from_python} "
            f"lower LocalEngine(max_rows=...) (now {self.max_rows}), cache_bytes=... (now {held}) "
            f"or max_prefill_tokens=... (now {self.max_prefill_tokens:,}). A run goes on with "
            "another engine; what it has finished is on disk.",
        )

    @contextmanager
    def serving(self, save: Callable[[Path], None], tokens: Tokens) -> Iterator[None]:
        """Within, copies of the weights for products are kept; the weights are here."""
        if self._is_serving:
            yield
            return
        self._is_serving = True
        try:
            yield
        finally:
            self._is_serving = False
            self._copies.clear()
            self._end()

    def _end(self) -> None:
        """Give back what generating has held, and begin with all rows the next time."""
        self.fitting_rows = self.max_rows
        give_back_memory()


class _Copies:
    """A module's matrices as its products want them: in another type, in another layout."""

    def __init__(self, module: nn.Module) -> None:
        self.narrow, self.packed = NarrowMatrices(module), PackedMatrices(module)

    def prepare(self, rows: int | None) -> None:
        self.narrow.prepare()
        self.packed.prepare(rows)

    @contextmanager
    def used(self) -> Iterator[None]:
        with self.narrow.used(), self.packed.used():
            yield


def _batches(groups: Sequence[Group], count: int, max_tokens: int) -> Iterator[list[Group]]:
    """Groups in their order, at most `count` of them and `max_tokens` with padding in a batch."""
    batch: list[Group] = []
    for group in groups:
        longest = max(len(other.ids) for other in (*batch, group))
        if batch and (len(batch) == count or (len(batch) + 1) * longest > max_tokens):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
