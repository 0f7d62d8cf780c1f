"""The scores that a judge may state, as paths of tokens, and their probabilities.

Token ids and floats only: the caller has encoded the scores, and an engine gives the probabilities
of single tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from self_rewarding_lm.errors import ConfigError, setting
from self_rewarding_lm.models.sessions import common_beginning
from self_rewarding_lm.records import Ids
from self_rewarding_lm.scores import number_text

MIN_SCORE_MASS = 0.1
"""If all allowed scores together have less probability, the judge was about to say something else,
and there is no score."""


DECIMALS = 9


@dataclass(frozen=True, slots=True)
class ScoreTrie:
    """The scores' token paths, after the ids that all their encodings begin with.

    context: these ids. paths: each score with the ids that follow them. A node is a beginning of a
    path; from an inner node a path goes on.
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
    """What follows a node. tokens: the probability of each child.

    stop: the probability that a score ends there, if one may: that neither a child follows nor
    another token that makes another number of it.
    """

    tokens: Mapping[int, float]
    stop: float = 0.0


@dataclass(frozen=True, slots=True)
class Expected:
    """The mean of the scores under their probabilities; None with its reason if there is none.

    mass: the probability of all scores together.
    """

    score: float | None
    mass: float | None
    reason: str | None = None


def build_trie(
    encodings: Mapping[float, Sequence[int]],
    others: Iterable[Ids] = (),
    said: Mapping[float, str] = {},
) -> ScoreTrie:
    """The trie of the encodings of scores, each of the same words with its number after them.

    others: further encodings of these words, which bound what all have in common. Given those of
    all ten digits, a digit that all scores begin with (10 to 19) is no context, so that its
    probability counts. said: the text of each score, for the error. Raises ConfigError if two
    scores have the same ids.
    """
    ids = {score: tuple(encoding) for score, encoding in encodings.items()}
    rows = [*ids.values(), *others]
    first, last = min(rows), max(rows)  # what these begin with alike all rows in between do
    shared = first[: common_beginning(first, last)]
    paths = tuple((score, encoding[len(shared) :]) for score, encoding in sorted(ids.items()))
    seen: dict[Ids, float] = {}
    for score, path in paths:
        if path in seen or not path:
            text, like = (said.get(s, number_text(s)) for s in (score, seen.get(path, score)))
            alike = f"like {like}" if path else "as nothing"
            raise ConfigError(
                f"the tokenizer encodes {text} {alike}, so a judge's probabilities "
                f"cannot tell the scores apart. Use {setting('score_mode', 'sampled')} without "
                "forced_ending, or "
                "other scores."
            )
        seen[path] = score
    return ScoreTrie(shared, paths)


def score_probabilities(trie: ScoreTrie, chances: Mapping[Ids, NodeChances]) -> dict[float, float]:
    """The probability of each score, from the chances of all inner nodes.

    The product of its path's tokens and, if another path goes on from its end, that it ends there.
    """
    probabilities = {}
    for score, path in trie.paths:
        steps = [chances[path[:n]].tokens[token] for n, token in enumerate(path)]
        ends = chances[path].stop if path in chances else 1.0
        probabilities[score] = math.prod(steps) * ends
    return probabilities


def expected_score(probabilities: Mapping[float, float]) -> Expected:
    """The mean score; None if the mass is under MIN_SCORE_MASS (`low_mass`) or not finite.

    Both are rounded to 9 decimals, so that a model in float64 gives the same in any batch.
    """
    mass = math.fsum(probabilities.values())
    if not math.isfinite(mass):
        return Expected(None, None, "not_finite")
    if mass < MIN_SCORE_MASS:
        return Expected(None, round(mass, DECIMALS), "low_mass")
    mean = math.fsum(score * p for score, p in probabilities.items()) / mass
    return Expected(round(mean, DECIMALS), round(mass, DECIMALS))
