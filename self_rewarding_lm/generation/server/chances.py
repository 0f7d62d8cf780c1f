"""The probabilities of single tokens from an inference server, for expected scores.

Knows score tries and what a server's log-probs say, and how much they leave open.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.generation.server.client import HttpClient, Refusal
from self_rewarding_lm.generation.server.completions import (
    PATH,
    Abilities,
    Speaker,
    given_chances,
    given_score,
)
from self_rewarding_lm.records import Ids

MOST_NAMED = 128
"""Tokens whose log-probs are asked for by id in one request, at most."""


def check_chances(abilities: Abilities) -> None:
    """ConfigError where a server gives no log-probs, or none that say which token they are of."""
    if not abilities.gives_chances:
        raise ConfigError(
            "expected and forced scores need the probabilities of tokens, and the server gives no "
            "log-probs that name tokens by id (vLLM does: prompt as ids, logprobs with "
            "return_tokens_as_token_ids). Use score_mode='sampled' without forced_ending, another "
            "server, or the local engine."
        )


@dataclass(frozen=True)
class Seen:
    """Probabilities by token id. bound: what any other token may have at most."""

    chances: Mapping[int, float]
    bound: float

    def most(self, unknown: int) -> float:
        """What so many tokens that are not there may have together at most."""
        rest = max(0.0, 1.0 - math.fsum(self.chances.values()))
        return min(rest, unknown * self.bound)


def seen_in(logprobs: Mapping[int, float], *, named: bool) -> Seen:
    """What log-probs say. named: of tokens that were asked for; else of the likeliest.

    Among the likeliest there may be one more, the token that was drawn: so the second least bounds
    those that are not there.
    """
    chances = {token: math.exp(value) for token, value in logprobs.items()}
    second = sorted(chances.values())[1:2]
    return Seen(chances, 1.0 if named or not second else second[0])


class NodeAsker:
    """Asks a server for what follows the inner nodes of a trie."""

    def __init__(
        self,
        client: HttpClient,
        speaker: Speaker,
        trie: ScoreTrie,
        longer: frozenset[int],
        top: int,
        max_unknown: float,
    ) -> None:
        self.client, self.speaker, self.trie, self.longer = client, speaker, trie, longer
        self.top, self.max_unknown = top, max_unknown
        self.nodes = [node for nodes in trie.levels() for node in nodes]
        self.endings = {*trie.endings()}

    def ask(self, rows: Sequence[Ids]) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """The chances of each row, with its index, once all its nodes are known."""
        asked = [(row, node) for row in range(len(rows)) for node in self.nodes]
        found: dict[int, dict[Ids, NodeChances]] = {}
        open_: list[tuple[int, Ids, Seen]] = []
        bodies = (self._body((*rows[row], *node), node) for row, node in asked)
        for place, answer in self.client.ask(PATH, bodies):
            row, node = asked[place]
            seen = None if isinstance(answer, Refusal) else given_chances(answer)
            if seen is None:
                found.setdefault(row, {})[node] = self._unknown(node)
            else:
                known = seen_in(seen, named=self._names(node))
                if self._missing(node, known):
                    open_.append((row, node, known))
                    continue
                found.setdefault(row, {})[node] = self._chances(node, known)
            if len(found[row]) == len(self.nodes):
                yield row, found.pop(row)
        for row, node, known in self._scored(rows, open_):
            found.setdefault(row, {})[node] = self._chances(node, known)
            if len(found[row]) == len(self.nodes):
                yield row, found.pop(row)
        assert not found

    def _names(self, node: Ids) -> bool:
        return self.speaker.abilities.exact_chances and len(self._wanted(node)) <= MOST_NAMED

    def _wanted(self, node: Ids) -> list[int]:
        """The tokens whose probabilities matter at a node."""
        others = self.longer if node in self.endings else ()
        return list(dict.fromkeys((*self.trie.children(node), *sorted(others))))

    def _body(self, ids: Ids, node: Ids) -> Mapping[str, object]:
        wanted = self._wanted(node) if self._names(node) else []
        return self.speaker.chances_body(ids, wanted, self.top)

    def _missing(self, node: Ids, seen: Seen) -> list[int]:
        """The children of a node that may have more than what may stay unknown."""
        missing = [token for token in self.trie.children(node) if token not in seen.chances]
        return missing if seen.most(len(missing)) > self.max_unknown else []

    def _scored(
        self, rows: Sequence[Ids], open_: list[tuple[int, Ids, Seen]]
    ) -> Iterator[tuple[int, Ids, Seen]]:
        """The same with the probabilities of missing children, each asked for by itself."""
        asked = [
            (n, t) for n, (_, node, seen) in enumerate(open_) for t in self._missing(node, seen)
        ]
        waiting = [len(self._missing(node, seen)) for _, node, seen in open_]
        more: list[dict[int, float]] = [{} for _ in open_]
        if self.speaker.abilities.kind != "vllm":
            yield from open_
            return
        bodies = (
            self.speaker.scoring_body((*rows[open_[n][0]], *open_[n][1], token))
            for n, token in asked
        )
        for place, answer in self.client.ask(PATH, bodies):
            n, token = asked[place]
            value = None if isinstance(answer, Refusal) else given_score(answer, token)
            if value is not None:
                more[n][token] = math.exp(value)
            waiting[n] -= 1
            if waiting[n] == 0:
                row, node, seen = open_[n]
                yield row, node, Seen({**seen.chances, **more[n]}, seen.bound)

    def _chances(self, node: Ids, seen: Seen) -> NodeChances:
        """What follows a node; NaN where more than `max_unknown` of it is unknown."""
        children = self.trie.children(node)
        unknown = math.nan if self._missing(node, seen) else 0.0
        tokens = {token: seen.chances.get(token, unknown) for token in children}
        if node not in self.endings:
            return NodeChances(tokens)
        goes_on = {*children, *self.longer}
        missing = [token for token in goes_on if token not in seen.chances]
        if seen.most(len(missing)) > self.max_unknown:
            return NodeChances(tokens, math.nan)
        known = math.fsum(p for token, p in seen.chances.items() if token in goes_on)
        return NodeChances(tokens, max(0.0, 1.0 - known))

    def _unknown(self, node: Ids) -> NodeChances:
        tokens = dict.fromkeys(self.trie.children(node), math.nan)
        return NodeChances(tokens, math.nan if node in self.endings else 0.0)
