"""The probabilities of single tokens from an inference server, for expected scores.

Knows score tries, what a server's log-probs say, and how much they leave unknown.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from self_rewarding_lm.errors import ConfigError, setting
from self_rewarding_lm.generation.score_trie import NodeChances, ScoreTrie
from self_rewarding_lm.generation.server.client import MALFORMED, Body, HttpClient, Refusal
from self_rewarding_lm.generation.server.completions import (
    PATH,
    Abilities,
    MalformedAnswerError,
    ServedModel,
    answered_logprobs,
    prompt_logprob,
)
from self_rewarding_lm.records import Ids

T = TypeVar("T")


MOST_NAMED = 128
"""How many tokens' log-probs are asked for by id in one request, at most."""


def check_chances(abilities: Abilities) -> None:
    """Raise ConfigError if a server gives no log-probs, or does not say of which token ids."""
    if not abilities.gives_chances:
        raise ConfigError(
            "expected and forced scores need the probabilities of tokens, and the server gives no "
            "log-probs that name tokens by id (vLLM does: prompt as ids, logprobs with "
            f"return_tokens_as_token_ids). Use {setting('score_mode', 'sampled')} without "
            "forced_ending, another "
            "server, or the local engine."
        )


@dataclass(frozen=True)
class Known:
    """The known probabilities, by token id. bound: what any other token has at most."""

    chances: Mapping[int, float]
    bound: float

    def most(self, unknown: int) -> float:
        """What `unknown` further tokens have together at most."""
        rest = max(0.0, 1.0 - math.fsum(self.chances.values()))
        return min(rest, unknown * self.bound)


def known_from(logprobs: Mapping[int, float], top: int | None) -> Known:
    """What log-probs say. top: how many of the likeliest were asked for; None if they were named.

    Beside the likeliest a server may return the token that it drew, whatever its probability. So
    the second least of them bounds the tokens that are not returned. Fewer than were asked for
    bound nothing: the server left some out.
    """
    chances = {token: math.exp(value) for token, value in logprobs.items()}
    second = sorted(chances.values())[1:2]
    is_bound = top is not None and len(chances) >= top and second
    return Known(chances, second[0] if is_bound else 1.0)


class NodeAsker:
    """Asks a server what follows the inner nodes of a trie.

    longer: tokens that make another number of a score that could end. top: how many of the
    likeliest tokens are asked for if they cannot be asked for by id. max_unknown: the probability
    that may stay unknown at a node.
    """

    def __init__(
        self,
        client: HttpClient,
        served: ServedModel,
        trie: ScoreTrie,
        longer: frozenset[int],
        top: int,
        max_unknown: float,
    ) -> None:
        self.client, self.served, self.trie, self.longer = client, served, trie, longer
        vocab = served.tokens.vocab
        self._top = top if vocab is None else min(top, vocab)
        self.max_unknown = max_unknown
        self.nodes = [node for nodes in trie.levels() for node in nodes]
        self.endings = {*trie.endings()}

    def ask(self, rows: Sequence[Ids]) -> Iterator[tuple[int, dict[Ids, NodeChances]]]:
        """The chances of each row, with its index, once all its nodes are known."""
        asked = [(row, node) for row in range(len(rows)) for node in self.nodes]
        chances: dict[int, dict[Ids, NodeChances]] = defaultdict(dict)  # of rows, by node
        incomplete: list[tuple[int, Ids, Known]] = []

        # 1. one request for each node of each row
        bodies = (self._body((*rows[row], *node), node) for row, node in asked)
        for place, answer in self.client.ask(PATH, bodies):
            row, node = asked[place]
            logprobs = self._read(answer, answered_logprobs)
            if logprobs is None:
                chances[row][node] = self._unknown_chances(node)
            else:
                known = known_from(logprobs, None if self._asks_by_id(node) else self._top)
                if self._missing_children(node, known):
                    incomplete.append((row, node, known))
                    continue
                chances[row][node] = self._node_chances(node, known)
            if len(chances[row]) == len(self.nodes):
                yield row, chances.pop(row)

        # 2. one request for each child that is missing
        for row, node, known in self._scored_one_by_one(rows, incomplete):
            chances[row][node] = self._node_chances(node, known)
            if len(chances[row]) == len(self.nodes):
                yield row, chances.pop(row)
        assert not chances

    def _read(self, answer: Body | Refusal, read: Callable[[Body], T | None]) -> T | None:
        """What an answer says; None for a refusal, and for what cannot be, which the log tells."""
        if isinstance(answer, Refusal):
            return None
        try:
            return read(answer)
        except MalformedAnswerError as problem:
            self.client.logged(Refusal(MALFORMED, str(problem)))
            return None

    def _asks_by_id(self, node: Ids) -> bool:
        return self.served.abilities.exact_chances and len(self._wanted_tokens(node)) <= MOST_NAMED

    def _wanted_tokens(self, node: Ids) -> list[int]:
        """The tokens whose probabilities count at a node."""
        others = self.longer if node in self.endings else ()
        return list(dict.fromkeys((*self.trie.children(node), *sorted(others))))

    def _body(self, ids: Ids, node: Ids) -> Mapping[str, object]:
        wanted = self._wanted_tokens(node) if self._asks_by_id(node) else []
        return self.served.chances_body(ids, wanted, self._top)

    def _missing_children(self, node: Ids, known: Known) -> list[int]:
        """The children of a node that are unknown, if they may have more than max_unknown."""
        missing = [token for token in self.trie.children(node) if token not in known.chances]
        return missing if known.most(len(missing)) > self.max_unknown else []

    def _scored_one_by_one(
        self, rows: Sequence[Ids], incomplete: list[tuple[int, Ids, Known]]
    ) -> Iterator[tuple[int, Ids, Known]]:
        """What is incomplete, with the probability of each missing child asked for by itself."""
        asked = [
            (n, t)
            for n, (_, node, known) in enumerate(incomplete)
            for t in self._missing_children(node, known)
        ]
        waiting = [len(self._missing_children(node, known)) for _, node, known in incomplete]
        more: list[dict[int, float]] = [{} for _ in incomplete]
        if self.served.abilities.kind != "vllm":
            yield from incomplete
            return
        bodies = (
            self.served.scoring_body((*rows[incomplete[n][0]], *incomplete[n][1], token))
            for n, token in asked
        )
        for place, answer in self.client.ask(PATH, bodies):
            n, token = asked[place]
            logprob = self._read(answer, partial(prompt_logprob, token=token))
            if logprob is not None:
                more[n][token] = math.exp(logprob)
            waiting[n] -= 1
            if waiting[n] == 0:
                row, node, known = incomplete[n]
                yield row, node, Known({**known.chances, **more[n]}, known.bound)

    def _node_chances(self, node: Ids, known: Known) -> NodeChances:
        """What follows a node; NaN if more than `max_unknown` of it is unknown."""
        children = self.trie.children(node)
        unknown = math.nan if self._missing_children(node, known) else 0.0
        tokens = {token: known.chances.get(token, unknown) for token in children}
        if node not in self.endings:
            return NodeChances(tokens)
        goes_on = {*children, *self.longer}
        missing = [token for token in goes_on if token not in known.chances]
        if known.most(len(missing)) > self.max_unknown:
            return NodeChances(tokens, math.nan)
        mass = math.fsum(p for token, p in known.chances.items() if token in goes_on)
        return NodeChances(tokens, max(0.0, 1.0 - mass))

    def _unknown_chances(self, node: Ids) -> NodeChances:
        tokens = dict.fromkeys(self.trie.children(node), math.nan)
        return NodeChances(tokens, math.nan if node in self.endings else 0.0)
