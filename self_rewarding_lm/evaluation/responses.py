"""Measures of responses, and rates of one model's wins over another, from texts and outcomes.

Knows nothing of models, judges or files. White space separates words. A measure of nothing is None.
An interval says how far a figure would move with other prompts of the same kind.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.stats import Rate, bootstrap, fit_logistic, wilson_interval

NGRAM = 3  # words of an n-gram whose repetition is counted


@dataclass(frozen=True)
class ResponseMeasures:
    """Length, diversity and repetition of responses.

    characters, words: means over responses. distinct: for n = 1, 2, 3 the number of different
    n-grams of words divided by the number of all (arXiv:1510.03055); it falls with the amount of
    text, so compare equal numbers of responses. repetition: the share of a response's 3-grams of
    words that occur earlier in it, the mean over responses that have any. empty: the share of
    responses without a word.
    """

    count: int
    characters: float | None
    words: float | None
    distinct: Mapping[int, float | None]
    repetition: float | None
    empty: float | None


def measure_responses(texts: Sequence[str]) -> ResponseMeasures:
    """Length, diversity and repetition of responses, given as texts.

    The result has count; characters and words, means over responses; distinct, by n = 1, 2, 3 the
    different n-grams of words divided by all; repetition, the share of a response's 3-grams that
    occur earlier in it; empty, the share of responses without a word. A measure of nothing is None.
    """
    words = [text.split() for text in texts]
    repetitions = [share for split in words if (share := repetition(split)) is not None]
    return ResponseMeasures(
        count=len(texts),
        characters=_mean(map(len, texts)),
        words=_mean(map(len, words)),
        distinct={n: distinct_n(words, n) for n in (1, 2, 3)},
        repetition=_mean(repetitions),
        empty=_mean(not split for split in words),
    )


def distinct_n(texts: Iterable[Sequence[str]], n: int) -> float | None:
    """Different n-grams divided by all n-grams of texts, which are lists of words; None for 0/0."""
    ngrams = [ngram for words in texts for ngram in _ngrams(words, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repetition(words: Sequence[str], n: int = NGRAM) -> float | None:
    """The share of a text's n-grams that occur earlier in it; None if it has no n-gram."""
    distinct = distinct_n([words], n)
    return None if distinct is None else 1 - distinct


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k responses is correct, from `samples` checked responses.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv:2107.03374 (Eq. 1). Raises ConfigError
    unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ConfigError(
            f"pass@k of n samples with c correct ones needs 1 <= k <= n and 0 <= c <= n; got "
            f"k={k}, n={samples}, c={correct}. Sample more responses of each prompt, or lower k."
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass(frozen=True)
class WinRates:
    """How often the first model wins against the second.

    wins, ties, losses: comparisons, as the first model sees them. unknown: comparisons without a
    verdict, left out of all rates. prompts: those with a known comparison. win_rate: (wins + ties /
    2) / (wins + ties + losses); its interval resamples prompts. won, tied, lost: shares with
    Wilson's intervals, which take comparisons for independent (they are with one for each prompt).
    length_controlled: see `length_controlled`; None if lengths are not known.
    """

    wins: int
    ties: int
    losses: int
    unknown: int
    prompts: int
    win_rate: Rate
    won: Rate
    tied: Rate
    lost: Rate
    length_controlled: Rate


def win_rates(
    outcomes: Sequence[float | None],
    lengths: Sequence[tuple[float, float]] | None = None,
    *,
    groups: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> WinRates:
    """The rates of comparisons. outcomes: 1 if the first won, 0.5 for a tie, 0 if it lost, or None.

    lengths: characters of both responses of each comparison; None gives no length-controlled rate.
    groups: the prompt of each comparison; by default each has a prompt of its own. Raises DataError
    for any other outcome.
    """
    wrong = [value for value in outcomes if value not in (1, 0.5, 0, None)]
    if wrong:
        raise DataError(f"an outcome is 1, 0.5, 0 or None (unknown); got {wrong[0]!r}.")
    known = [i for i, value in enumerate(outcomes) if value is not None]
    values = np.array([outcomes[i] for i in known], dtype=np.float64)
    names = [str(i) if groups is None else groups[i] for i in known]
    of_group = {name: place for place, name in enumerate(dict.fromkeys(names))}
    members: list[list[int]] = [[] for _ in of_group]
    for place, name in enumerate(names):
        members[of_group[name]].append(place)
    counts = [int((values == outcome).sum()) for outcome in (1, 0.5, 0)]
    total = len(known)

    def rate(value: Callable[[np.ndarray], float]) -> Rate:
        def drawn(picks: np.ndarray) -> float:
            return value(np.concatenate([members[pick] for pick in picks]).astype(np.intp))

        whole = value(np.arange(total)) if total else None
        interval = bootstrap(drawn, len(members), samples=samples, level=0.95, seed=seed)
        return Rate(whole, interval)

    controlled = Rate(None, None)
    if lengths is not None:
        sizes = np.array([lengths[i] for i in known], dtype=np.float64).reshape(-1, 2)
        controlled = rate(lambda at: length_controlled(values[at], sizes[at]))
    won, tied, lost = (
        Rate(count / total if total else None, wilson_interval(count, total)) for count in counts
    )
    return WinRates(
        *counts,
        unknown=len(outcomes) - total,
        prompts=len(members),
        win_rate=rate(lambda at: float(values[at].mean())),
        won=won,
        tied=tied,
        lost=lost,
        length_controlled=controlled,
    )


def outcome(one: float | None, other: float | None) -> float | None:
    """1 if the first score is higher, 0 if it is lower, 0.5 if they are equal; None if unknown."""
    if one is None or other is None:
        return None
    return 0.5 + 0.5 * (one > other) - 0.5 * (one < other)


def length_controlled(
    outcomes: Float[np.ndarray, " n"], lengths: Float[np.ndarray, "n 2"]
) -> float:
    """The first model's win rate if both responses to each prompt were equally long.

    outcomes (n,), lengths (n, 2) in characters. A logistic model of the outcome, as in
    arXiv:2404.04475, has a term for the models and one for tanh(d / std(d)), where d is the first
    length minus the second (population std). The result is its prediction with d = 0. The paper's
    third term, the difficulty of each instruction, comes from the results of many models; two
    models do not determine it, so it is left out.
    """
    difference = lengths[:, 0] - lengths[:, 1]
    spread = difference.std()
    features = np.ones((len(outcomes), 2))
    features[:, 1] = np.tanh(difference / spread) if spread > 0 else 0.0
    weights = fit_logistic(features, outcomes)
    return float(1 / (1 + np.exp(-weights[0])))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None
