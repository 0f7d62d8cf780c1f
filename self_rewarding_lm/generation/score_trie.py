"""What a judge may state, as paths of tokens, and what their probabilities come to.

Token ids and floats only: the ids come from whoever has a tokenizer, the probabilities of single
tokens from whoever has a model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.records import Ids
from self_rewarding_lm.scores import number_text

MIN_SCORE_MASS = 0.1
"""Below this probability of all allowed numbers together the judge was about to say something
else, and their shares of it are no score."""


DECIMALS = 9


@dataclass(frozen=True, slots=True)
class ScoreTrie:
    """The token paths of the scores behind what all of them share.

    context: ids that every encoding begins with. paths: for each score the ids that follow. A node
    is a beginning of a path; an inner node has a path that goes on from it.
    """

    context: Ids
    paths: tuple[tuple[float, Ids], ...]

    def levels(self) -> list[list[Ids]]:
        """The inner nodes by their length; the first level is the root alone."""
        deepest = max(len(path) for _, path in self.paths)
        return [
            list(dict.fromkeys(path[:n] for _, path in self.paths if len(path) > n))
            for n in range(deepest)
        ]

    def children(self, node: Ids) -> list[int]:
        """The tokens with which paths go on from a node."""
        n = len(node)
        return list(
            dict.fromkeys(path[n] for _, path in self.paths if len(path) > n and path[:n] == node)
        )

    def endings(self) -> list[Ids]:
        """The inner nodes at which a score may end: 1 where 10 is allowed too, token by token."""
        inner = {node for nodes in self.levels() for node in nodes}
        return [path for _, path in self.paths if path in inner]


@dataclass(frozen=True, slots=True)
class NodeChances:
    """What follows a node. tokens: the probability of each child. stop: that the score ends there,
    where one may: no child follows and nothing else that makes another number of it."""

    tokens: Mapping[int, float]
    stop: float = 0.0


@dataclass(frozen=True, slots=True)
class Expected:
    """The mean of the scores under their probabilities; None with its reason. mass: of all scores
    together, before they were made to sum to 1."""

    score: float | None
    mass: float | None
    reason: str | None = None


def build_trie(encodings: Mapping[float, Sequence[int]], others: Iterable[Ids] = ()) -> ScoreTrie:
    """The trie of scores' encodings, all of the same words with another number behind them.

    others: encodings that are no scores and still bound what counts as shared. With those of all
    ten digits a digit that all allowed numbers begin with (10 to 19) is no context, so that its
    probability counts. Raises ConfigError where two scores have the same ids.
    """
    ids = {score: tuple(encoding) for score, encoding in encodings.items()}
    shared = _common_beginning([*ids.values(), *others])
    paths = tuple((score, encoding[len(shared) :]) for score, encoding in sorted(ids.items()))
    seen: dict[Ids, float] = {}
    for score, path in paths:
        if path in seen or not path:
            alike = f"like {number_text(seen[path])}" if path else "as nothing"
            raise ConfigError(
                f"the tokenizer encodes {number_text(score)} {alike}, so a judge's probabilities "
                "cannot tell the scores apart. Use score_mode='sampled' without forced_ending, or "
                "other scores."
            )
        seen[path] = score
    return ScoreTrie(shared, paths)


def score_probabilities(trie: ScoreTrie, chances: Mapping[Ids, NodeChances]) -> dict[float, float]:
    """The probability of each score: the product along its path, and that it ends there.

    The end counts where another path goes on. chances: of all inner nodes.
    """
    found = {}
    for score, path in trie.paths:
        steps = [chances[path[:n]].tokens[token] for n, token in enumerate(path)]
        found[score] = math.prod(steps) * (chances[path].stop if path in chances else 1.0)
    return found


def expected_score(probabilities: Mapping[float, float]) -> Expected:
    """The mean score; None where the mass is under MIN_SCORE_MASS (`low_mass`) or no number.

    Both are rounded to 9 decimals, so that a model in float64 gives the same in any batch.
    """
    mass = math.fsum(probabilities.values())
    if not math.isfinite(mass):
        return Expected(None, None, "not_finite")
    if mass < MIN_SCORE_MASS:
        return Expected(None, round(mass, DECIMALS), "low_mass")
    mean = math.fsum(score * p for score, p in probabilities.items()) / mass
    return Expected(round(mean, DECIMALS), round(mass, DECIMALS))


def _common_beginning(rows: Sequence[Ids]) -> Ids:
    first, last = min(rows), max(rows)
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[: len(first) if length is None else length]
