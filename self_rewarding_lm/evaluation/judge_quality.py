"""How good a judge is: agreement with people, intervals, position bias, calibration.

The judge is given replies that people ranked, as if the model had sampled them. `agreement.py`
defines the measures of agreement.
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
from self_rewarding_lm.evaluation.agreement import (
    Agreement,
    RankedScores,
    agreement,
    scored_replies,
)
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
"""Bins of calibration, of equal width, over probabilities from 0 to 1."""


@dataclass(frozen=True)
class PositionBias:
    """How the order in which two responses are shown moves the verdicts of a pairwise judge.

    first, second, ties: verdicts for the response shown first, for the other one, for neither.
    compared: pairs with a verdict in both orders; consistent: those with the same verdict in both.
    """

    first: int
    second: int
    ties: int
    compared: int
    consistent: int

    @property
    def first_share(self) -> float | None:
        """first / (first + second): 0.5 without bias, because each pair is shown in both orders."""
        decided = self.first + self.second
        return self.first / decided if decided else None

    @property
    def consistency(self) -> float | None:
        """consistent / compared."""
        return self.consistent / self.compared if self.compared else None


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose predicted probability lies in [low, high); the last bin includes its end.

    predicted: their mean probability. agreed: the share that people ordered as predicted.
    """

    low: float
    high: float
    count: int
    predicted: float
    agreed: float


@dataclass(frozen=True)
class Calibration:
    """How often people agree with a judge, by how sure the judge is; empty bins are left out.

    error: the expected calibration error, the mean of |predicted - agreed| over bins of width 0.1,
    weighted by their counts. slope: for a judge that scores single responses, the log-odds of
    people's agreement that each further point between two scores adds. It is fitted to these very
    pairs, so the error says only how far the fitted curve is from them. None for a pairwise judge,
    whose own probabilities are measured.
    """

    bins: tuple[CalibrationBin, ...]
    error: float
    pairs: int
    slope: float | None = None


def position_bias(judgements: Iterable[Judgement]) -> PositionBias | None:
    """The bias in judgements of two responses; None if no such judgement has a verdict."""
    verdicts = [j for j in judgements if len(j.candidate_ids) == 2 and j.score is not None]
    scores = [j.score for j in verdicts if j.score is not None]
    orders = [order for order in both_orders(verdicts).values() if None not in order]
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
    """The calibration of a judge that scores single responses.

    None if no pair that people ordered has two scores.
    """
    # score of the reply that people prefer less that of the other
    gaps = np.array(
        [
            (score - other) if rank < other_rank else (other - score)
            for item in items
            for (rank, score), (other_rank, other) in combinations(scored_replies(item), 2)
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
    """The calibration of a pairwise judge: its mean probability over both orders of a pair.

    ranks: those by people, by candidate id. The response that the judge finds likelier is the
    predicted one. None if no pair that people ordered was judged in both orders.
    """
    verdicts = {j.candidate_ids: j.score for j in judgements if len(j.candidate_ids) == 2}
    predictions = []
    for (one, other), score in verdicts.items():
        back = verdicts.get((other, one))
        if one < other and score is not None and back is not None and ranks[one] != ranks[other]:
            chance = (score + 1 - back) / 2
            right = float(ranks[one] < ranks[other])
            predictions.append((chance, right) if chance >= 0.5 else (1 - chance, 1 - right))
    return calibration([(c, 0.5 if c == 0.5 else right) for c, right in predictions])


def calibration(
    predictions: Sequence[tuple[float, float]], *, slope: float | None = None
) -> Calibration | None:
    """The calibration of predictions; None if there are none.

    predictions: (probability, outcome); an outcome is 1 if the prediction came true, 0 if not, 0.5
    for neither.
    """
    of_bin: dict[int, list[tuple[float, float]]] = {}
    for chance, right in predictions:
        of_bin.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, right))
    bins = []
    for place, members in sorted(of_bin.items()):
        chances, rights = zip(*members, strict=True)
        means = sum(chances) / len(members), sum(rights) / len(members)
        bins.append(CalibrationBin(place / BINS, (place + 1) / BINS, len(members), *means))
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
    intervals: dict[str, Interval] = {}
    for measure in sums[0] if sums else ():
        parts, wholes = zip(*(of_group[measure] for of_group in sums), strict=True)
        intervals[measure] = ratio_interval(parts, wholes, seed=seed)
    return intervals


def _sums(measures: Agreement) -> dict[str, tuple[float, float]]:
    """Each measure as a part and its whole."""
    pairs = measures.pairs
    decided, scored = pairs.agree + pairs.disagree, pairs.total - pairs.unscored
    means = {
        "best_precision": (measures.best_precision, measures.best_count),
        "exact_match": (measures.exact_match, measures.ordered),
        "spearman": (measures.spearman, measures.correlated),
        "kendall": (measures.kendall, measures.correlated),
        "scored": (measures.scored, measures.replies),
    }
    return {
        "accuracy": (pairs.agree, decided),
        "accuracy_ties_half": (pairs.agree + pairs.tied / 2, scored),
        "tie_rate": (pairs.tied, scored),
        **{name: ((mean or 0.0) * count, count) for name, (mean, count) in means.items()},
    }


@dataclass(frozen=True)
class JudgeEvaluation:
    """A judge measured against human rankings.

    parse_rate: the share of judgements with a score. agreement: the five measures of
    arXiv:2401.10020, Table 4; `agreement.pairs` has the pairwise accuracies and the tie rate.
    intervals: 95 % intervals of the measures of agreement, see `agreement_intervals`. histogram:
    the number of judgements of each score, rounded to one decimal. self_agreement: the share of
    pairs of judgements of one reply that give the same score (rounded to one decimal), not
    corrected for chance; None if each reply was judged once. position: only of a pairwise judge.
    calibration: of the judge's certainty. items: ranks and scores of each row, in the order of the
    rows. A share of nothing is None.
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
        """The 95 % interval of `agreement.pairs.accuracy`."""
        return self.intervals["accuracy"]

    def metrics(self) -> dict[str, float]:
        """All measures by name, without those that are None."""
        agreed, pairs, position = self.agreement, self.agreement.pairs, self.position
        measures = {
            "accuracy": pairs.accuracy,
            "accuracy_ties_half": pairs.accuracy_ties_half,
            "tie_rate": pairs.tie_rate,
            "best_precision": agreed.best_precision,
            "best_count": agreed.best_count,
            "exact_match": agreed.exact_match,
            "spearman": agreed.spearman,
            "kendall": agreed.kendall,
            "uncorrelated": agreed.uncorrelated,
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
    """Let a model judge replies that people ranked, and measure how far it agrees with them.

    model: as for the trainer; it stays on its device and is not changed. ranked: a dataset of
    RankedReplies or other ranked rows (see `data.ranked.ranked_row`): a list or a file. Of a file
    of Open Assistant trees all ranked first replies are taken. reward: the judge's prompt; default
    the library's. comparison: in place of reward, a prompt that shows two replies; every two
    replies of a row are compared once in each order. judging: default temperature 0.7, top-p 0.9
    (arXiv:2401.10020, 3.1.3). num_judgements: of each reply; their mean is its score. tokenizer,
    chat_template, eos_id: as for the trainer. The same seed gives the same judgements. Each of
    several processes that calls this judges everything; `judge_ranked` shares the work.

    Raises DataError if a row is no ranking, ConfigError and JudgeError if the prompt cannot be
    used.
    """
    if reward is not None and comparison is not None:
        raise ConfigError("a judge has reward (it scores) or comparison (it compares), not both.")
    prompt = comparison or reward or DEFAULT_REWARD_CONFIG
    judge = make_judge(prompt, judging=judging, num_judgements=num_judgements)
    rows = read_ranked(ranked)  # before the model, which takes longer to load
    opening = Opening(tokenizer, chat_template, eos_id, seed, engine or LocalEngine(), quiet)
    ctx = open_context(model, opening)
    check_judge(prompt, ctx)
    groups = _groups(ctx, rows)
    judgements = _judge_groups(ctx, groups, judge)
    top_score = top_score_of(prompt)
    return _evaluation(judge, rows, groups, judgements, top_score=top_score, seed=seed)


def judge_ranked(
    ctx: Context,
    ranked: Sequence[RankedReplies],
    judge: Judge,
    *,
    top_score: float | None = None,
) -> JudgeEvaluation:
    """Measure a judge on ranked replies within a trainer's context.

    Each of several processes judges a part and gets the whole result. top_score: the highest score
    that the judge can give, see `agreement.agreement`. Ids of judgements:
    <stage>/<row>/0/<reply>/j<k>.
    """
    groups = _groups(ctx, ranked)
    mine = _judge_groups(ctx, ctx.runtime.share(groups), judge, is_share=True)
    judgements = ctx.runtime.gather(mine)
    return _evaluation(judge, ranked, groups, judgements, top_score=top_score, seed=ctx.seed)


def read_ranked(dataset: Any) -> list[RankedReplies]:
    """All rows of a ranked dataset; of a file of Open Assistant trees, all ranked first replies.

    Raises DataError if it is no dataset of rankings or has no row.
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


def _groups(ctx: Context, ranked: Sequence[RankedReplies]) -> list[Asked]:
    """Each row as a prompt and its candidates."""
    named = [replace(item, id=f"{ctx.stage}/{row}") for row, item in enumerate(ranked)]
    return [as_candidates(item, ctx.tokens) for item in named]


def _judge_groups(
    ctx: Context, groups: Sequence[Asked], judge: Judge, *, is_share: bool = False
) -> list[Judgement]:
    prompts = [prompt for prompt, _ in groups]
    candidates_PG = [candidates for _, candidates in groups]
    total = sum(len(judge.judgement_ids(candidates)) for candidates in candidates_PG)
    judgements: list[Judgement] = []
    label = f"{ctx.stage}: judging"
    with ctx.runtime.progress(total, label, "judgement", is_share=is_share) as bar:
        judgements += bar.counting(judge.judge(ctx, prompts, candidates_PG))
    return judgements


def _evaluation(
    judge: Judge,
    ranked: Sequence[RankedReplies],
    groups: Sequence[Asked],
    judgements: Sequence[Judgement],
    *,
    top_score: float | None,
    seed: int,
) -> JudgeEvaluation:
    """All measures of a judge. groups: of the rows of `ranked`, in their order."""
    every_candidate = [candidate for _, candidates in groups for candidate in candidates]
    scores = judge.scores_of_all([candidates for _, candidates in groups], judgements)
    items = tuple(
        RankedScores(item.group, item.ranks, tuple(scores[c.id] for c in candidates))
        for item, (_, candidates) in zip(ranked, groups, strict=True)
    )
    known = [j.score for j in judgements if j.score is not None]
    ranks = {
        candidate.id: rank
        for item, (_, candidates) in zip(ranked, groups, strict=True)
        for candidate, rank in zip(candidates, item.ranks, strict=True)
    }
    position = position_bias(judgements)
    return JudgeEvaluation(
        parse_rate=len(known) / len(judgements) if judgements else None,
        agreement=agreement(items, top_score=top_score),
        intervals=agreement_intervals(items, top_score=top_score, seed=seed),
        histogram=dict(sorted(Counter(round(score, 1) for score in known).items())),
        self_agreement=judge_metrics(every_candidate, judgements).get("judge/self_agreement"),
        position=position,
        calibration=calibration_of_scores(items)
        if position is None
        else calibration_of_verdicts(judgements, ranks),
        items=items,
        judgements=tuple(sorted(judgements, key=lambda j: id_order(j.id))),
    )
