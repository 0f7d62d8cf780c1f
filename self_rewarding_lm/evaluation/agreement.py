"""How well a judge's scores agree with rankings by people.

The five measures are those of arXiv:2401.10020 (Table 4): pairwise accuracy, 5-best, exact match,
Spearman and Kendall. The paper does not say what it does with ties, missing scores or undefined
correlations; docstrings name each choice of ours. An unknown measure is None, and what a measure
leaves out is counted. Knows nothing of models, prompts, texts or files.
"""

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

from self_rewarding_lm.errors import DataError
from self_rewarding_lm.stats import kendall_tau_b, spearman
from self_rewarding_lm.text import amount


@dataclass(frozen=True, slots=True)
class RankedScores:
    """Replies to one instruction: their ranks by people and their scores by the judge.

    group: names the instructions that belong together (a message tree); the unit of the bootstrap.
    ranks: 0 is best; people did not order replies of equal rank. scores: higher is better, None if
    the judge gave none. best: the rank that counts as the human top; None takes the lowest of
    `ranks`. Give 0.0 if the best reply may be missing from the set.
    Raises DataError if the lengths differ, a number is not finite or a rank is under `best`.
    """

    group: str
    ranks: tuple[float, ...]
    scores: tuple[float | None, ...]
    best: float | None = None

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.scores):
            raise DataError(
                f"every reply needs a rank and a score (or None); group {self.group!r} has "
                f"{amount(len(self.ranks), 'rank')} and {amount(len(self.scores), 'score')}."
            )
        known = [*self.ranks, *(s for s in self.scores if s is not None)]
        if not all(math.isfinite(number) for number in known):
            raise DataError(
                f"ranks and scores must be finite; group {self.group!r} has ranks {self.ranks} "
                f"and scores {self.scores}. A score that is not known is None."
            )
        if self.best is not None and any(not rank >= self.best for rank in self.ranks):
            raise DataError(
                f"no rank can be under best={self.best}; group {self.group!r} has ranks "
                f"{self.ranks}. Leave `best` out to take the lowest of them."
            )

    @property
    def ordered(self) -> bool:
        """Whether people put at least one reply above another."""
        return len(set(self.ranks)) > 1


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of the pairs of replies that people ordered, by the judge's scores. They add up.

    agree, disagree: the scores differ, in the order of the ranks or against it. tied: the scores
    are equal. unscored: at least one reply has no score. The paper does not say how it counts ties,
    so there are two accuracies; read them beside `tie_rate`.
    """

    agree: int = 0
    disagree: int = 0
    tied: int = 0
    unscored: int = 0

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def total(self) -> int:
        """All pairs that people ordered, unscored ones included."""
        return self.agree + self.disagree + self.tied + self.unscored

    @property
    def accuracy(self) -> float | None:
        """agree / (agree + disagree), without ties and unscored pairs; None for 0/0."""
        return _share(self.agree, self.agree + self.disagree)

    @property
    def accuracy_ties_half(self) -> float | None:
        """(agree + tied / 2) / (agree + disagree + tied): a tie is half right. None for 0/0."""
        return _share(self.agree + self.tied / 2, self.agree + self.disagree + self.tied)

    @property
    def tie_rate(self) -> float | None:
        """tied / (agree + disagree + tied), without unscored pairs; None for 0/0."""
        return _share(self.tied, self.agree + self.disagree + self.tied)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The measures of `agreement`; a measure is None if there is nothing to measure it on.

    pairs: counts of the pairs that people ordered; `accuracy`, `accuracy_ties_half` and `tie_rate`
    of these are the pairwise measures. best_precision: the share of the `best_count` replies with
    the top score that have the human top rank. exact_match: the share of the `ordered` instructions
    whose scores follow the human order. spearman, kendall: means over `correlated` instructions;
    `uncorrelated` others were ordered by people but have no correlation. scored: the share of all
    `replies` that have a score (the parse rate). groups, instructions: how many were given;
    ordered: the instructions with at least two replies that people ordered.
    """

    pairs: PairCounts
    best_precision: float | None
    best_count: int
    exact_match: float | None
    spearman: float | None
    kendall: float | None
    correlated: int
    uncorrelated: int
    scored: float | None
    groups: int
    instructions: int
    ordered: int
    replies: int


def pair_counts(item: RankedScores) -> PairCounts:
    """Count the pairs of one instruction that have different human ranks.

    Pairs of equal human rank are not counted. A tie is exact equality of the two scores.
    """
    counts: Counter[str] = Counter()
    replies = zip(item.ranks, item.scores, strict=True)
    for (rank, score), (other_rank, other) in combinations(replies, 2):
        if rank == other_rank:
            continue
        if score is None or other is None:
            counts["unscored"] += 1
        elif score == other:
            counts["tied"] += 1
        else:
            counts["agree" if (score > other) == (rank < other_rank) else "disagree"] += 1
    return PairCounts(**counts)


def agreement(items: Sequence[RankedScores], *, top_score: float | None) -> Agreement:
    """The five measures of arXiv:2401.10020 (Table 4) over instructions.

    top_score: the highest score that the judge can give (the paper: 5); None leaves out
    `best_precision`.

    From the paper: pairwise accuracy over the pairs of an instruction; the share of the replies
    scored exactly `top_score` that people ranked top; the share of instructions whose whole order
    by score is the human order; Spearman and Kendall correlation with the human ranks.

    Our choices, because the paper names none:
    - Instructions in which people ordered nothing count only in `scored`, `groups`, `instructions`
      and `replies`. Pairs are pooled over instructions. All replies of the top rank are top.
    - Exact match is `orders_agree`: two equal scores of different ranks are a miss, and so is a
      missing score. Replies of equal rank may be scored either way.
    - Kendall is tau-b. A correlation is that of the scores with -rank, over the scored replies of
      one instruction, averaged over instructions. It is undefined if all scores (or all ranks of
      scored replies) are equal or fewer than two replies are scored: then it is left out, not 0,
      and counted in `uncorrelated`.

    A judge that scores only the easy replies can look good: read `scored`, `tie_rate` and
    `uncorrelated` too. Averaged or expected scores are rarely exactly `top_score`: read
    `best_count` too.
    """
    ordered = [item for item in items if item.ordered]
    top = [flag for item in ordered for flag in _top_flags(item, top_score)]
    columns = [
        ([-rank for rank, _ in replies], [score for _, score in replies])
        for replies in map(scored_replies, ordered)
    ]
    spearmans = [value for both in columns if (value := spearman(*both)) is not None]
    kendalls = [value for both in columns if (value := kendall_tau_b(*both)) is not None]
    scores = [score for item in items for score in item.scores]
    return Agreement(
        pairs=sum(map(pair_counts, ordered), PairCounts()),
        best_precision=_share(sum(top), len(top)),
        best_count=len(top),
        exact_match=_share(sum(orders_agree(i.ranks, i.scores) for i in ordered), len(ordered)),
        spearman=_share(math.fsum(spearmans), len(spearmans)),
        kendall=_share(math.fsum(kendalls), len(kendalls)),
        correlated=len(spearmans),  # both are undefined in the same cases
        uncorrelated=len(ordered) - len(spearmans),
        scored=_share(sum(score is not None for score in scores), len(scores)),
        groups=len({item.group for item in items}),
        instructions=len(items),
        ordered=len(ordered),
        replies=len(scores),
    )


def agreeing(ranks: Sequence[float], scores: Sequence[float | None]) -> tuple[bool, ...]:
    """For each reply, whether its score puts it where people did: the lenient rule for EFT data.

    True if the reply has a score and stands, against every reply of another rank, strictly in the
    order of the ranks. A reply without a score has no order with any other; leave such replies out
    beforehand if they should not count against the others. True also if no reply has another rank.

    The paper accepts judgements if the order of the scores agrees with the human ranking, and says
    no more. To ask this of each reply by itself is our reading; `orders_agree` asks it of the whole
    instruction. Raises DataError if the lengths differ.
    """
    item = RankedScores("", tuple(ranks), tuple(scores))
    replies = list(zip(item.ranks, item.scores, strict=True))

    def agrees(rank: float, score: float | None) -> bool:
        return score is not None and all(
            other is not None and (score > other if rank < other_rank else score < other)
            for other_rank, other in replies
            if rank != other_rank
        )

    return tuple(agrees(rank, score) for rank, score in replies)


def orders_agree(ranks: Sequence[float], scores: Sequence[float | None]) -> bool:
    """Whether the scores put all replies in the human order: the strict rule for EFT data.

    True if every reply has a score and every two replies of different ranks have strictly the same
    order by score; a tie does not agree. Replies of equal rank may be scored either way.
    arXiv:2401.10020 (3.1.1) keeps judgements whose order agrees with the human ranking; the
    strictness about ties is ours. Raises DataError if the lengths differ.
    """
    return all(agreeing(ranks, scores))


def scored_replies(item: RankedScores) -> list[tuple[float, float]]:
    """Rank and score of each reply that has a score."""
    return [(r, s) for r, s in zip(item.ranks, item.scores, strict=True) if s is not None]


def _top_flags(item: RankedScores, top_score: float | None) -> list[bool]:
    """For each reply with the top score, whether it has the human top rank."""
    best = min(item.ranks) if item.best is None else item.best
    return [bool(rank == best) for rank, score in scored_replies(item) if score == top_score]


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
