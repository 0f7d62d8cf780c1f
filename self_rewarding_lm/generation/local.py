"""The local engine: decodes in this process, with the weights that are being trained.

Knows nothing of text, prompts, stages or files. What prompts have in common is computed once, see
`models/sessions.py`; rows are batched continuously, see `flight.py`. Exact probabilities of a few
texts come from a trie, level by level.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.flight import Flight
from self_rewarding_lm.generation.schedule import Group, plans
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Session, TokenModel
from self_rewarding_lm.records import Ids

ROWS_AT_ONCE = 16  # rows whose probabilities are held in float64


def walk(
    session: Session, rows: Sequence[Ids], trie: ScoreTrie, longer: frozenset[int]
) -> list[dict[Ids, NodeChances]]:
    """For each row what follows each inner node of the trie behind it, at temperature 1.

    One forward of the rows, and where paths have several tokens one more token for each inner node,
    with what comes before shared. longer: tokens that make another number of a path that could end.
    Probabilities are in float64 (float32 on devices without it). The session is left as it was.
    """
    found: list[dict[Ids, NodeChances]] = [{} for _ in rows]
    first = session.held
    logits = session.prefill(rows)
    above: list[Ids] = [()]
    held = range(first, first + len(rows))
    for depth, nodes in enumerate(trie.levels()):
        if depth:  # the rows of a level are those of each place side by side
            parents = [above.index(node[:-1]) for node in nodes]
            if depth == 1:
                session.add([number for number in held for _ in nodes])
            else:
                places = range(len(rows))
                session.select([row * len(above) + p for row in places for p in parents])
            tokens = [node[-1] for node in nodes] * len(rows)
            logits = session.extend(torch.tensor(tokens, device=logits.device))
            above = nodes
        for place, node in enumerate(nodes):
            own = _node_chances(logits[place :: len(nodes)], node, trie, longer)
            for of_row, chances in zip(found, own, strict=True):
                of_row[node] = chances
    session.select([])
    session.release(held)
    return found


def _node_chances(
    logits: Tensor, node: Ids, trie: ScoreTrie, longer: frozenset[int]
) -> Iterator[NodeChances]:
    """What follows a node, for each row of logits (r, v)."""
    children = trie.children(node)
    may_stop = node in trie.endings()
    goes_on = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    goes_on[[*children, *longer]] = True
    for part in logits.split(ROWS_AT_ONCE):
        exact = part.float() if part.device.type == "mps" else part.double()
        probabilities = exact.softmax(dim=-1)
        stops = probabilities[:, ~goes_on].sum(dim=-1).tolist()
        for row, stop in zip(probabilities[:, children].tolist(), stops, strict=True):
            follow = dict(zip(children, row, strict=True))
            yield NodeChances(follow, stop if may_stop else 0.0)


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
