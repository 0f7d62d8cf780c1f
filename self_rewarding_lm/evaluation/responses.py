"""What responses are like, and how two models' responses compare: numbers of texts and outcomes.

Pure: knows nothing of models, judges or files. Words are what white space separates. A measure of
nothing is None. Intervals say how far a figure would move with other prompts of the same kind.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.stats import Rate, bootstrap, fit_logistic, wilson_interval

NGRAM = 3  # words, of repetition


@dataclass(frozen=True)
class ResponseMeasures:
    """What responses to prompts are like.

    characters, words: means over responses. distinct: for n = 1, 2, 3 the share of different
    n-grams of words among all of them (arXiv:1510.03055); it falls with the amount of text, so
    compare equal numbers of responses. repetition: the share of the 3-grams of words of a response
    that stood in it before, the mean over responses that have any. empty: share without a word.
    """

    count: int
    characters: float | None
    words: float | None
    distinct: Mapping[int, float | None]
    repetition: float | None
    empty: float | None


def measure_responses(texts: Sequence[str]) -> ResponseMeasures:
    """Length, diversity and repetition of responses."""
    words = [text.split() for text in texts]
    repeated = [found for own in words if (found := repetition(own)) is not None]
    return ResponseMeasures(
        count=len(texts),
        characters=_mean(map(len, texts)),
        words=_mean(map(len, words)),
        distinct={n: distinct_n(words, n) for n in (1, 2, 3)},
        repetition=_mean(repeated),
        empty=_mean(not own for own in words),
    )


def distinct_n(texts: Iterable[Sequence[str]], n: int) -> float | None:
    """Different n-grams over all n-grams of texts given as words; None where there are none."""
    found = [gram for words in texts for gram in _ngrams(words, n)]
    return len(set(found)) / len(found) if found else None


def repetition(words: Sequence[str], n: int = NGRAM) -> float | None:
    """The share of a text's n-grams that stood in it before; None where it has none."""
    distinct = distinct_n([words], n)
    return None if distinct is None else 1 - distinct


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k responses is correct, of which `samples` were seen.

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
    """The first model against the second, comparison by comparison.

    wins, ties, losses: of the first. unknown: comparisons without a verdict, left out of all
    rates. prompts: those with a known comparison. win_rate: (wins + ties / 2) / (wins + ties +
    losses), its interval from resampling prompts. won, tied, lost: shares, with Wilson's intervals
    (which take comparisons for independent: with one of each prompt they are). length_controlled:
    see `length_controlled`; None where a length is not known.
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
    """What comparisons come to. outcomes: 1 the first won, 0.5 a tie, 0 it lost, None unknown.

    lengths: of both responses of each, in characters; None: no length-controlled rate. groups: the
    prompt of each comparison, by default each has its own. Raises DataError for any other outcome.
    """
    wrong = [found for found in outcomes if found not in (1, 0.5, 0, None)]
    if wrong:
        raise DataError(f"an outcome is 1, 0.5, 0 or None (unknown); got {wrong[0]!r}.")
    known = [i for i, found in enumerate(outcomes) if found is not None]
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
    """1 where the first score is higher, 0 where it is lower, 0.5 for a tie; None unknown."""
    if one is None or other is None:
        return None
    return 0.5 + 0.5 * (one > other) - 0.5 * (one < other)


def length_controlled(
    outcomes: Float[np.ndarray, " n"], lengths: Float[np.ndarray, "n 2"]
) -> float:
    """The first model's win rate were all responses of one prompt equally long.

    A logistic model of the outcome, as in arXiv:2404.04475: a term for the models and one for
    tanh(d / std(d)), d the first length minus the second, in characters (population std). Its mean
    prediction with the length term at zero is given. Their third term, how difficult each
    instruction is, comes from many models' results; of two models alone it cannot be known, and is
    left out.
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
    found = list(values)
    return math.fsum(found) / len(found) if found else None
