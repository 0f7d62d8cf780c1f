"""How good a judge is: agreement with people, intervals, order effects, calibration.

Replies that people ranked are given to the judge as candidates, as if the model had sampled them.
What agreement means is in `agreement.py`; where rows come from is in `data/`.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    ComparisonConfig,
    FromStage,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.data.ranked import Asked, as_candidates, ranked_row
from self_rewarding_lm.data.tokenizers import Tokenizer
from self_rewarding_lm.errors import ConfigError, DataError, typed
from self_rewarding_lm.evaluation.agreement import Agreement, RankedScores, agreement
from self_rewarding_lm.evaluation.contexts import Opening, open_context
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.make import check_judge, make_judge, top_score_of
from self_rewarding_lm.judges.tally import judge_metrics
from self_rewarding_lm.records import Judgement, RankedReplies
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.scores import both_orders
from self_rewarding_lm.stats import Interval, fit_logistic, ratio_interval

BINS = 10
"""Of equal width over probabilities from 0 to 1."""


@dataclass(frozen=True)
class PositionBias:
    """What the order in which two responses are shown does to a pairwise judge.

    first, second, ties: verdicts for the response shown first, for the other, and for neither.
    compared: pairs with a verdict in both orders; consistent: those with the same one in both.
    """

    first: int
    second: int
    ties: int
    compared: int
    consistent: int

    @property
    def first_share(self) -> float | None:
        """first / (first + second); 0.5 without bias, as every pair is shown in both orders."""
        decided = self.first + self.second
        return self.first / decided if decided else None

    @property
    def consistency(self) -> float | None:
        """consistent / compared."""
        return self.consistent / self.compared if self.compared else None


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose predicted probability lies in [low, high), the last bin with its end.

    predicted: its mean; agreed: the share of them that people ordered so.
    """

    low: float
    high: float
    count: int
    predicted: float
    agreed: float


@dataclass(frozen=True)
class Calibration:
    """How often people agree where a judge is as sure as it is; bins without a pair are left out.

    error: the expected calibration error, the mean of |predicted - agreed| over the bins, weighted
    by their counts; bins are of width 0.1. slope: of a judge that scores single responses, the
    log-odds by which one point more between two scores makes people's agreement likelier, fitted
    to these very pairs, so that the error says only how far that curve is from them; None for a
    pairwise judge, whose own probabilities are measured.
    """

    bins: tuple[CalibrationBin, ...]
    error: float
    pairs: int
    slope: float | None = None


def position_bias(judgements: Iterable[Judgement]) -> PositionBias | None:
    """Of the judgements of two responses; None where there is none with a verdict."""
    own = [j for j in judgements if len(j.candidate_ids) == 2 and j.score is not None]
    scores = [j.score for j in own if j.score is not None]
    orders = [found for found in both_orders(own).values() if None not in found]
    if not scores:
        return None
    return PositionBias(
        first=sum(score > 0.5 for score in scores),
        second=sum(score < 0.5 for score in scores),
        ties=sum(score == 0.5 for score in scores),
        compared=len(orders),
        consistent=sum(there == back for there, back in orders),
    )


def calibration_of_scores(items: Iterable[RankedScores]) -> Calibration | None:
    """Of a judge that scores single responses; None where no ordered pair has two scores."""
    gaps = np.array(
        [
            (score - other) if rank < other_rank else (other - score)
            for item in items
            for (rank, score), (other_rank, other) in combinations(_known(item), 2)
            if rank != other_rank
        ],
        dtype=float,
    )
    if not len(gaps):
        return None
    slope = float(fit_logistic(gaps[:, None], np.ones(len(gaps)))[0])
    chances = 1 / (1 + np.exp(-slope * np.abs(gaps)))
    agreed = (np.sign(gaps) + 1) / 2
    return calibration(list(zip(chances.tolist(), agreed.tolist(), strict=True)), slope=slope)


def calibration_of_verdicts(
    judgements: Iterable[Judgement], ranks: dict[str, float]
) -> Calibration | None:
    """Of a pairwise judge's probabilities: the mean of both orders, for the likelier response.

    ranks: people's, by candidate id. None where no pair that people ordered has both.
    """
    shown = {j.candidate_ids: j.score for j in judgements if len(j.candidate_ids) == 2}
    found = []
    for (one, other), score in shown.items():
        back = shown.get((other, one))
        if one < other and score is not None and back is not None and ranks[one] != ranks[other]:
            chance = (score + 1 - back) / 2
            right = float(ranks[one] < ranks[other])
            found.append((chance, right) if chance >= 0.5 else (1 - chance, 1 - right))
    return calibration([(c, 0.5 if c == 0.5 else right) for c, right in found])


def calibration(
    predictions: Sequence[tuple[float, float]], *, slope: float | None = None
) -> Calibration | None:
    """Of (probability, 1 where it came so, 0 where not, 0.5 for neither); None for none."""
    places: dict[int, list[tuple[float, float]]] = {}
    for chance, right in predictions:
        places.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, right))
    bins = []
    for place, own in sorted(places.items()):
        chances, rights = zip(*own, strict=True)
        means = sum(chances) / len(own), sum(rights) / len(own)
        bins.append(CalibrationBin(place / BINS, (place + 1) / BINS, len(own), *means))
    if not bins:
        return None
    total = len(predictions)
    error = sum(b.count * abs(b.predicted - b.agreed) for b in bins) / total
    return Calibration(tuple(bins), error, total, slope)


def agreement_intervals(
    items: Sequence[RankedScores], *, top_score: float | None, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals of the measures of `agreement`: a bootstrap of whole groups (message trees).

    The replies of one tree are no independent evidence, so each resample draws as many groups as
    there are, with replacement, and takes all their items. Every measure is a sum over instructions
    or pairs divided by another sum, so each group is measured once and only its sums are resampled.
    The same seed gives the same intervals, whatever the order of the groups. None with fewer than
    two groups, or if no resample has a value. The method is ours; the paper gives no intervals.

    An interval says how far a figure would move with other trees of the same kind. The chance in
    the judge's sampling and in training is not in it. Models whose figures lie inside each other's
    intervals are not ranked by these data. With few groups an interval is too narrow, and if all
    groups give one value its width of 0 is no certainty.
    """
    name = operator.attrgetter("group")
    groups = [list(part) for _, part in groupby(sorted(items, key=name), key=name)]
    sums = [_sums(agreement(part, top_score=top_score)) for part in groups]
    found: dict[str, Interval] = {}
    for measure in sums[0] if sums else ():
        parts, wholes = zip(*(own[measure] for own in sums), strict=True)
        found[measure] = ratio_interval(parts, wholes, seed=seed)
    return found


def _sums(found: Agreement) -> dict[str, tuple[float, float]]:
    """Each measure as a part and its whole."""
    pairs = found.pairs
    decided, scored = pairs.agree + pairs.disagree, pairs.total - pairs.unscored
    means = {
        "best_precision": (found.best_precision, found.best_count),
        "exact_match": (found.exact_match, found.ordered),
        "spearman": (found.spearman, found.correlated),
        "kendall": (found.kendall, found.correlated),
        "scored": (found.scored, found.replies),
    }
    return {
        "accuracy": (pairs.agree, decided),
        "accuracy_ties_half": (pairs.agree + pairs.tied / 2, scored),
        "tie_rate": (pairs.tied, scored),
        **{name: ((mean or 0.0) * count, count) for name, (mean, count) in means.items()},
    }


def _known(item: RankedScores) -> list[tuple[float, float]]:
    return [(r, s) for r, s in zip(item.ranks, item.scores, strict=True) if s is not None]


@dataclass(frozen=True)
class JudgeEvaluation:
    """A judge against human rankings.

    parse_rate: the share of judgements with a score. agreement: the five measures of
    arXiv:2401.10020, Table 4; `agreement.pairs` has the pairwise accuracy with and without ties
    and the tie rate. intervals: of each measure of agreement, 95 %, resampling groups (message
    trees); they rank no models that lie inside them. histogram: judgements by score, rounded to one
    decimal. self_agreement: of pairs of judgements of one reply those with the same score (rounded
    to one decimal), a plain share, not corrected for chance; None where each reply was judged once.
    position: of a pairwise judge. calibration: of its certainty. items: ranks and scores of each
    row, in the rows' order. A share of nothing is None.
    """

    parse_rate: float | None
    agreement: Agreement
    intervals: Mapping[str, Interval]
    histogram: Mapping[float, int]
    self_agreement: float | None
    position: PositionBias | None
    calibration: Calibration | None
    items: tuple[RankedScores, ...]
    judgements: tuple[Judgement, ...]

    @property
    def pairwise_interval(self) -> Interval:
        """Of `agreement.pairs.accuracy`."""
        return self.intervals["accuracy"]

    def metrics(self) -> dict[str, float]:
        """All measures by name, as numbers; those that nothing is known of are left out."""
        found, pairs, position = self.agreement, self.agreement.pairs, self.position
        measures = {
            "accuracy": pairs.accuracy,
            "accuracy_ties_half": pairs.accuracy_ties_half,
            "tie_rate": pairs.tie_rate,
            "best_precision": found.best_precision,
            "best_count": found.best_count,
            "exact_match": found.exact_match,
            "spearman": found.spearman,
            "kendall": found.kendall,
            "uncorrelated": found.uncorrelated,
            "parse_rate": self.parse_rate,
            "self_agreement": self.self_agreement,
            "first_share": None if position is None else position.first_share,
            "position_agreement": None if position is None else position.consistency,
            "calibration_error": None if self.calibration is None else self.calibration.error,
        }
        return {name: float(value) for name, value in measures.items() if value is not None}


@typed
def evaluate_judge(
    model: nn.Module | str | Path,
    ranked: Any,
    *,
    tokenizer: Tokenizer | None = None,
    reward: RewardConfig | None = None,
    comparison: ComparisonConfig | None = None,
    judging: SamplingConfig | None = None,
    num_judgements: int = 1,
    chat_template: str | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    quiet: bool = False,
) -> JudgeEvaluation:
    """Let a model judge replies that people ranked, and compare.

    model: as for the trainer; it stays where it is and is not changed. ranked: a dataset of
    RankedReplies or of other ranked rows (see `ranked.ranked_row`), a list or a file, which may be
    one of Open Assistant trees: all their ranked first replies. reward: the judge's prompt, default
    the library's. comparison: a prompt that shows two replies, in its place; every two replies of a
    row are then compared once in both orders. judging: default
    temperature 0.7, top-p 0.9 (arXiv:2401.10020, 3.1.3). num_judgements of each reply are averaged
    to its score. tokenizer, chat_template, eos_id: as for the trainer. The same seed gives the same
    judgements. With several processes each that calls this judges everything; `judge_ranked` gives
    each a part.

    Raises DataError for rows that are no ranking, ConfigError and JudgeError for a reward prompt
    that cannot be used.
    """
    if reward is not None and comparison is not None:
        raise ConfigError("a judge has reward (it scores) or comparison (it compares), not both.")
    asked = comparison or reward or DEFAULT_REWARD_CONFIG
    judge = make_judge(asked, judging=judging, num_judgements=num_judgements)
    opening = Opening(tokenizer, chat_template, eos_id, seed, engine or LocalEngine(), quiet)
    ctx = open_context(model, opening)
    check_judge(asked, ctx)
    rows = read_ranked(ranked)
    found = _asked(ctx, rows)
    told, top = _judged(ctx, found, judge), top_score_of(asked)
    return _evaluation(judge, rows, found, told, top_score=top, seed=seed)


def judge_ranked(
    ctx: Context,
    ranked: Sequence[RankedReplies],
    judge: Judge,
    *,
    top_score: float | None = None,
) -> JudgeEvaluation:
    """The same within a trainer: a judge of its context on ranked replies.

    Several processes judge a part each; all get the whole. top_score: the highest score the judge
    can give, see `agreement.agreement`. Judgements are named <stage>/<row>/0/<reply>/j<k>.
    """
    asked = _asked(ctx, ranked)
    judgements = ctx.runtime.gather(_judged(ctx, ctx.runtime.share(asked), judge))
    return _evaluation(judge, ranked, asked, judgements, top_score=top_score, seed=ctx.seed)


def read_ranked(dataset: Any) -> list[RankedReplies]:
    """All rows of a ranked dataset; of a file of Open Assistant trees all ranked first replies.

    Raises DataError for a dataset that is none, and for no row.
    """

    def no_stage(source: FromStage) -> Sequence[Any]:
        raise DataError(f"from_stage({source.stage!r}) names a stage, and there is no run here.")

    rows = Rows(dataset, "ranked", no_stage)
    if len(rows) == 0:
        raise DataError("ranked is empty; it needs at least one row.")
    first = rows.read(0) if isinstance(dataset, str | Path) else None
    if isinstance(first, Mapping) and isinstance(first.get("prompt"), Mapping):
        return open_assistant(dataset, shares=(0.0, 0.0, 1.0), lang=None).eft_eval
    return [ranked_row(rows.read(i), rows.where(i)) for i in range(len(rows))]


def _asked(ctx: Context, ranked: Sequence[RankedReplies]) -> list[Asked]:
    named = [replace(item, id=f"{ctx.stage}/{row}") for row, item in enumerate(ranked)]
    return [as_candidates(item, ctx.tokens) for item in named]


def _judged(ctx: Context, asked: Sequence[Asked], judge: Judge) -> list[Judgement]:
    found: list[Judgement] = []
    total = judge.num_judgements * sum(len(candidates) for _, candidates in asked)
    with ctx.runtime.progress(total, f"{ctx.stage}: judging", "judgement") as bar:
        for judgement in judge.judge(ctx, [p for p, _ in asked], [own for _, own in asked]):
            found.append(judgement)
            bar.update()
    return found


def _evaluation(
    judge: Judge,
    ranked: Sequence[RankedReplies],
    asked: Sequence[Asked],
    judgements: Sequence[Judgement],
    *,
    top_score: float | None,
    seed: int,
) -> JudgeEvaluation:
    everyone = [candidate for _, own in asked for candidate in own]
    scores = judge.scores(everyone, judgements)
    items = tuple(
        RankedScores(item.group, item.ranks, tuple(scores[c.id] for c in candidates))
        for item, (_, candidates) in zip(ranked, asked, strict=True)
    )
    known = [j.score for j in judgements if j.score is not None]
    ranks = {
        candidate.id: rank
        for item, (_, own) in zip(ranked, asked, strict=True)
        for candidate, rank in zip(own, item.ranks, strict=True)
    }
    position = position_bias(judgements)
    return JudgeEvaluation(
        parse_rate=len(known) / len(judgements) if judgements else None,
        agreement=agreement(items, top_score=top_score),
        intervals=agreement_intervals(items, top_score=top_score, seed=seed),
        histogram=dict(sorted(Counter(round(score, 1) for score in known).items())),
        self_agreement=judge_metrics(everyone, judgements).get("judge/self_agreement"),
        position=position,
        calibration=calibration_of_scores(items)
        if position is None
        else calibration_of_verdicts(judgements, ranks),
        items=items,
        judgements=tuple(sorted(judgements, key=lambda j: id_order(j.id))),
    )
