"""How well a judge agrees with people, on replies that people have ranked.

Human replies are given to a judge as candidates, as if the model had sampled them. What agreement
means is in `agreement`; where rows come from is in `datasets` and `ranked`.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.adapters import adapt
from self_rewarding_lm.adapters.loading import Loading, end_ids_of, open_model
from self_rewarding_lm.agreement import Agreement, RankedScores, agreement
from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    ComparisonConfig,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import FromStage, Rows
from self_rewarding_lm.engine import Engine, LocalEngine
from self_rewarding_lm.errors import ConfigError, DataError, typed
from self_rewarding_lm.judge_quality import (
    Calibration,
    PositionBias,
    agreement_intervals,
    calibration_of_scores,
    calibration_of_verdicts,
    position_bias,
)
from self_rewarding_lm.judges import Judge, judged_scores
from self_rewarding_lm.making_judges import check_judge, make_judge, top_score_of
from self_rewarding_lm.oasst import open_assistant
from self_rewarding_lm.quality import Interval
from self_rewarding_lm.ranked import ranked_row
from self_rewarding_lm.records import Candidate, Judgement, Prompt, RankedReplies
from self_rewarding_lm.rows import prompt_of
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.stored import id_order
from self_rewarding_lm.tally import judge_metrics
from self_rewarding_lm.tokens import Tokenizer, Tokens

Asked = tuple[Prompt, list[Candidate]]
"""A prompt and the replies to it."""


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
    ctx = open_context(
        model,
        tokenizer,
        chat_template=chat_template,
        eos_id=eos_id,
        seed=seed,
        engine=engine or LocalEngine(),
        quiet=quiet,
    )
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


def as_candidates(ranked: RankedReplies, tokens: Tokens, *, where: str | None = None) -> Asked:
    """A ranked row as the records that judges read; its id is <stage>/<row>.

    The prompt is <stage>/<row>/0 and the replies <stage>/<row>/0/<reply>, in the order of the row.
    Nobody sampled them: `finished` is None and `max_new_tokens` 0. where: names the row in errors.
    """
    where = where or ranked.id
    found = prompt_of(ranked, where, tokens)
    row = int(ranked.id.rsplit("/", 1)[1])
    prompt = Prompt(f"{ranked.id}/0", row, found.ids, found.text, messages=found.messages)
    return prompt, [
        Candidate(
            id=f"{prompt.id}/{place}",
            prompt_id=prompt.id,
            ids=tokens.response(ranked.prompt, reply, f"{where}: reply {place}"),
            text=reply,
            finished=None,
            max_new_tokens=0,
        )
        for place, reply in enumerate(ranked.replies)
    ]


def open_context(
    model: nn.Module | str | Path,
    tokenizer: Tokenizer | None,
    *,
    chat_template: str | None,
    eos_id: int | None,
    seed: int,
    engine: Engine,
    quiet: bool,
    stage: str = "evaluate",
) -> Context:
    """What a judge may reach where there is no trainer. stage: ids of its records begin so."""
    runtime = _runtime(quiet)
    module, own = open_model(model, Loading())
    if module is not model:  # it was loaded here
        module.to(runtime.device)
    token_model = adapt(module)
    tokens = Tokens(
        tokenizer or own,
        eos_id=eos_id,
        vocab=token_model.vocab,
        chat_template=chat_template,
        end_ids=end_ids_of(module) if eos_id is None else (),
    )
    return Context(
        stage=stage,
        seed=seed,
        model=token_model,
        policy=module,
        engine=engine,
        tokens=tokens,
        runtime=runtime,
        rewards={},
        adapt=adapt,
    )


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
    total = getattr(judge, "num_judgements", 1) * sum(len(candidates) for _, candidates in asked)
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
    scores = judged_scores(judge, everyone, judgements)
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


def _runtime(quiet: bool) -> Runtime:
    """A runtime of its own; how much a trainer around it logs stays as it was."""
    logger = logging.getLogger("self_rewarding_lm")
    level = logger.level
    runtime = Runtime({}, quiet=quiet)
    logger.setLevel(level)
    return runtime
