"""How well a judge's scores agree with rankings by people, and how sure that figure is.

The five measures are those of arXiv:2401.10020 (Table 4): pairwise accuracy, 5-best, exact match,
Spearman and Kendall. The paper does not say what it does with ties, missing scores or undefined
correlations; each choice of ours is named where it is made. Unknown is None; what is left out is
counted. Knows nothing of models, prompts, texts or files.
"""

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

from self_rewarding_lm.errors import DataError
from self_rewarding_lm.stats import kendall_tau_b, spearman


@dataclass(frozen=True, slots=True)
class RankedScores:
    """Replies to one instruction: what people ranked and what the judge scored.

    group: what the instruction belongs to with others (a message tree); the unit of the bootstrap.
    ranks: 0 is best; equal ranks were not ordered by people. scores: higher is better, None where
    the judge gave none. best: the rank that counts as the human top, None for the lowest of
    `ranks`; give 0.0 where the best reply may be missing from the set.
    Raises DataError where the lengths differ, a number is not finite or a rank is under `best`.
    """

    group: str
    ranks: tuple[float, ...]
    scores: tuple[float | None, ...]
    best: float | None = None

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.scores):
            raise DataError(
                f"every reply needs a rank and a score (or None); group {self.group!r} has "
                f"{len(self.ranks)} ranks and {len(self.scores)} scores."
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
    """Pairs of replies that people ordered, by what the judge made of them. Counts can be added.

    agree and disagree: the scores differ, in the order of the ranks or against it. tied: the same
    score. unscored: at least one of the two has none. The paper does not say what becomes of
    ties, so there are two accuracies; read them beside `tie_rate`.
    """

    agree: int = 0
    disagree: int = 0
    tied: int = 0
    unscored: int = 0

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def total(self) -> int:
        """All pairs that people ordered, the unscored ones too."""
        return self.agree + self.disagree + self.tied + self.unscored

    @property
    def accuracy(self) -> float | None:
        """agree / (agree + disagree), ties and unscored pairs left out; None for 0/0."""
        return _share(self.agree, self.agree + self.disagree)

    @property
    def accuracy_ties_half(self) -> float | None:
        """(agree + tied / 2) / (agree + disagree + tied): a tie is a coin. None for 0/0."""
        return _share(self.agree + self.tied / 2, self.agree + self.disagree + self.tied)

    @property
    def tie_rate(self) -> float | None:
        """tied / (agree + disagree + tied): unscored pairs are left out. None for 0/0."""
        return _share(self.tied, self.agree + self.disagree + self.tied)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What `agreement` found; a measure is None where there is nothing to measure it on.

    pairs: the pairs people ordered; its `accuracy`, `accuracy_ties_half` and `tie_rate` are the
    pairwise measures. best_precision: of the `best_count` replies with the top score, the share
    with the human top rank. exact_match: of the `ordered` instructions, the share that the scores
    put in the human order. spearman, kendall: means over `correlated` instructions; `uncorrelated`
    more were ordered by people but have no correlation. scored: the share of all `replies` that
    have a score (the parse rate). instructions, groups: how many came; ordered: how many
    instructions hold two replies that people ordered.
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
    """The pairs of one instruction with different human ranks, by what the judge made of them.

    Pairs of equal human rank are not counted at all. A tie is exact equality of the two scores.
    """
    found: Counter[str] = Counter()
    replies = zip(item.ranks, item.scores, strict=True)
    for (rank, score), (other_rank, other) in combinations(replies, 2):
        if rank == other_rank:
            continue
        if score is None or other is None:
            found["unscored"] += 1
        elif score == other:
            found["tied"] += 1
        else:
            found["agree" if (score > other) == (rank < other_rank) else "disagree"] += 1
    return PairCounts(**found)


def agreement(items: Sequence[RankedScores], *, top_score: float | None) -> Agreement:
    """The five measures of arXiv:2401.10020 (Table 4) over instructions.

    top_score: the highest score a judge can give (the paper: 5); None leaves out `best_precision`.

    The paper's: pairwise accuracy over the pairs of an instruction; the share of the replies scored
    exactly `top_score` that people ranked top; the share of instructions whose whole order by
    score is the human one; Spearman and Kendall correlation with the human ranks.

    Ours, where the paper is silent: instructions in which people ordered nothing count in
    `scored`, `groups`, `instructions` and `replies` only. Pairs are pooled over instructions. All
    replies of the top rank are top. Exact match is `orders_agree`: two scores that tie across
    different ranks are a miss, so is a missing score; replies of equal rank may be scored either
    way. Kendall is tau-b. Each correlation is that of the scores with -rank over the scored replies
    of one instruction, averaged over instructions; where all scores (or the ranks of the scored
    replies) are the same, or fewer than two are scored, it is undefined: dropped, not 0, and
    counted in `uncorrelated`. A judge that tells only easy replies apart can look good: read
    `scored`, `tie_rate` and `uncorrelated` beside it. Averaged or expected scores are rarely just
    `top_score`: read `best_count` too.
    """
    ordered = [item for item in items if item.ordered]
    top = [flag for item in ordered for flag in _top_flags(item, top_score)]
    twos = [([-r for r, _ in known], [s for _, s in known]) for known in map(_scored, ordered)]
    spearmans = [value for two in twos if (value := spearman(*two)) is not None]
    kendalls = [value for two in twos if (value := kendall_tau_b(*two)) is not None]
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
    """For each reply whether it stands where people put it: the lenient rule for EFT data.

    True where the reply has a score and every pair with a differently ranked reply has strictly
    the order of the ranks. A pair with a missing score has no order: where a judge that failed on
    one reply should not cost the others, leave that reply out before. A scored reply without a
    differently ranked one is True: nothing contradicts it.

    The paper accepts judgements where the order of the scores agrees with the human ranking and
    says no more; that this may be asked of each reply by itself is our reading. `orders_agree` asks
    it of the instruction as a whole. Raises DataError for lengths that differ.
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
    """Whether the scores put the replies in the human order: the strict rule for EFT data.

    True where every reply has a score and every pair with different human ranks has strictly the
    same order by score; a tie is no agreement. Replies of equal rank may be scored either way, and
    where people ordered nothing all is True. arXiv:2401.10020 (3.1.1) keeps judgements whose order
    agrees with the human ranking; strictness in ties is ours. Raises DataError as `agreeing` does.
    """
    return all(agreeing(ranks, scores))


def _top_flags(item: RankedScores, top_score: float | None) -> list[bool]:
    best = min(item.ranks) if item.best is None else item.best
    return [bool(rank == best) for rank, score in _scored(item) if score == top_score]


def _scored(item: RankedScores) -> list[tuple[float, float]]:
    """Rank and score of the replies that have a score."""
    return [(r, s) for r, s in zip(item.ranks, item.scores, strict=True) if s is not None]


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
