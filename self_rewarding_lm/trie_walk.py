"""What a model gives for the tokens of a trie behind some rows, level by level."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from self_rewarding_lm.adapters import Session
from self_rewarding_lm.score_trie import Ids, NodeChances, ScoreTrie

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
