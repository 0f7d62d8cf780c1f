"""A fixed set of replies ranked by people, judged after every stage by the stage's weights.

In the loop a model is trained on its own scores, and these can rise while it judges worse. What
people ranked does not move: it shows which of the two happened.
"""

import logging
from dataclasses import replace
from typing import Any

from self_rewarding_lm.config import RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import typed
from self_rewarding_lm.evaluation.judge_quality import judge_ranked, read_ranked
from self_rewarding_lm.judges.make import check_judge, make_judge, top_score_of
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stats import Interval

logger = logging.getLogger(__name__)


WATCHED = "anchor/accuracy_ties_half"


OWN = "judge/score_mean"


class JudgeAnchor:
    """A callback: how well each stage's weights judge a fixed human-ranked set.

    ranked: as for `evaluate_judge`; the same for the whole run, and in no stage's data. judge: a
    RewardConfig or ComparisonConfig with which the model is asked, default the trainer's first
    reward prompt. judging: default temperature 0.7, top-p 0.9; num_judgements of each reply are
    averaged. The noise of its sampling is the same after every stage.

    Its measures are `anchor/<name>` in the stage's metrics.jsonl, in `anchor` of its done.json and
    with the trackers. Where the mean score that the loop gave itself rose since the last stage
    that scored, while the anchor's pairwise accuracy (ties as a half) fell, it warns: that is when
    to stop (docs/evaluation.md). Stages that were done before it was given are not measured.
    """

    @typed
    def __init__(
        self,
        ranked: Any,
        judge: Any = None,
        *,
        judging: SamplingConfig | None = None,
        num_judgements: int = 1,
    ) -> None:
        self.rows = read_ranked(ranked)
        self.judge, self.judging, self.num_judgements = judge, judging, num_judgements

    def check(self, ctx: Context) -> None:
        """Raise where the judge's prompt cannot be used."""
        judge = self._named(ctx)
        make_judge(judge, judging=self.judging, num_judgements=self.num_judgements)
        check_judge(judge, ctx)

    def on_stage_trained(self, ctx: Context, out: StageDir) -> None:
        """Measure, write down and compare with the stages before."""
        named = self._named(ctx)
        judge = make_judge(named, judging=self.judging, num_judgements=self.num_judgements)
        own = replace(ctx, stage="anchor")  # by which ids, and so the noise, are the same
        found = judge_ranked(own, self.rows, judge, top_score=top_score_of(named))
        metrics = {f"anchor/{name}": value for name, value in found.metrics().items()}
        step = out.summary.get("steps", 0)
        out.log({"step": step, **metrics})
        out.summary["anchor"] = metrics
        logger.info(
            "%s: judges %d human-ranked rows with pairwise accuracy %s (ties as a half; 95 %% %s)",
            ctx.stage,
            len(self.rows),
            _shown(metrics.get(WATCHED)),
            _shown_interval(found.intervals[WATCHED.removeprefix("anchor/")]),
        )
        if ctx.runtime.is_main:
            _warn_of_decay(ctx, out)

    def _named(self, ctx: Context) -> Any:
        return self.judge if self.judge is not None else _first(ctx)


def _first(ctx: Context) -> RewardConfig:
    return next(iter(ctx.rewards.values()))


def _warn_of_decay(ctx: Context, out: StageDir) -> None:
    """Say where the loop is content with itself and people are not."""
    now = _standing(out.summary)
    if ctx.run is None or None in now:
        return
    names = ctx.run.stages
    for stage in reversed(names[: names.index(ctx.stage)]):
        before = _standing(ctx.run.summary(stage))
        if None in before:
            continue
        (own, anchor), (own_before, anchor_before) = now, before
        if own > own_before and anchor < anchor_before:
            logger.warning(
                "%s: the loop's own mean score rose from %.4g (stage %s) to %.4g, while its "
                "judge's agreement with people fell from %.3f to %.3f (pairwise accuracy on the "
                "anchor, ties as a half). The scores are no longer a sign of better responses: "
                "stop here, or go back to stage %s. How much of it may be chance is told in "
                "docs/evaluation.md.",
                *(ctx.stage, own_before, stage, own, anchor_before, anchor, stage),
            )
        return


def _standing(summary: Any) -> tuple[Any, Any]:
    """The loop's own mean score of a stage, and the anchor's accuracy behind it; or None."""
    return summary.get("metrics", {}).get(OWN), summary.get("anchor", {}).get(WATCHED)


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _shown_interval(found: Interval) -> str:
    return "unknown" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"
