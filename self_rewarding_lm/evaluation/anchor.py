"""After every stage its weights judge a fixed set of replies that people ranked.

In the loop a model is trained on its own scores, and these can rise while it judges worse. The
ranking by people does not move, so it shows which of the two happened.
"""

import logging
from dataclasses import replace
from typing import Any

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import typed
from self_rewarding_lm.evaluation.judge_quality import judge_ranked, read_ranked
from self_rewarding_lm.judges.make import check_judge, make_judge, top_score_of
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stats import Interval
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


WATCHED = "anchor/accuracy_ties_half"
"""The measure of the anchor whose fall is warned of, if OWN rises meanwhile."""


OWN = "judge/score_mean"
"""The mean score that the loop gave to its own responses."""


class JudgeAnchor:
    """A callback that measures how well each stage's weights judge a fixed human-ranked set.

    ranked: as for `evaluate_judge`; the same for the whole run, and in no stage's data. judge: a
    RewardConfig or ComparisonConfig with which the model is asked; default the trainer's first
    reward prompt. judging: default temperature 0.7, top-p 0.9. num_judgements: of each reply; their
    mean is its score. The noise of the sampling is the same after every stage.

    The measures are `anchor/<name>` in the stage's metrics.jsonl and in the trackers, and stand in
    `anchor` of its done.json. It warns if the mean score that the loop gave itself rose since the
    last stage that scored while the anchor's pairwise accuracy (ties as a half) fell: that is when
    to stop (docs/evaluation.md). Stages that were done before the callback was given are not
    measured.
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
        """Raise an error if the judge's prompt cannot be used."""
        judge = self._judge_or_default(ctx)
        asked = make_judge(judge, judging=self.judging, num_judgements=self.num_judgements)
        asked.check_outside_stages()
        check_judge(judge, ctx)

    def on_stage_trained(self, ctx: Context, out: StageDir) -> None:
        """Measure the stage's weights, log the measures, and warn if the judge got worse."""
        prompt = self._judge_or_default(ctx)
        judge = make_judge(prompt, judging=self.judging, num_judgements=self.num_judgements)
        alike = replace(ctx, stage="anchor")  # ids, and so the noise, are the same in every stage
        evaluation = judge_ranked(alike, self.rows, judge, top_score=top_score_of(prompt))
        metrics = {f"anchor/{name}": value for name, value in evaluation.metrics().items()}
        step = out.summary.get("steps", 0)
        out.log({"step": step, **metrics})
        out.summary["anchor"] = metrics
        logger.info(
            "%s: judges %s with pairwise accuracy %s (ties as a half; 95 %% %s)",
            ctx.stage,
            amount(len(self.rows), "human-ranked row"),
            _decimals(metrics.get(WATCHED)),
            _decimals_of(evaluation.intervals[WATCHED.removeprefix("anchor/")]),
        )
        if ctx.runtime.is_main:
            _warn_of_decay(ctx, out)

    def _judge_or_default(self, ctx: Context) -> Any:
        return next(iter(ctx.rewards.values())) if self.judge is None else self.judge


def _warn_of_decay(ctx: Context, out: StageDir) -> None:
    """Warn if the loop's own score rose while its judge's agreement with people fell."""
    now = _scores(out.summary)
    if ctx.run is None or None in now:
        return
    names = ctx.run.stages
    for stage in reversed(names[: names.index(ctx.stage)]):
        before = _scores(ctx.run.summary(stage))
        if None in before:
            continue
        (own, anchor), (own_before, anchor_before) = now, before
        if own > own_before and anchor < anchor_before:
            logger.warning(
                "%s: the loop's own mean score rose from %.4g (stage %s) to %.4g, while its "
                "judge's agreement with people fell from %.3f to %.3f (pairwise accuracy on the "
                "anchor, ties as a half). The scores are no longer a sign of better responses: "
                "stop here, or go back to stage %s. docs/evaluation.md says how much of it may be "
                "chance.",
                *(ctx.stage, own_before, stage, own, anchor_before, anchor, stage),
            )
        return


def _scores(summary: Any) -> tuple[Any, Any]:
    """The loop's own mean score in a stage and the anchor's accuracy after it; None if unknown."""
    return summary.get("metrics", {}).get(OWN), summary.get("anchor", {}).get(WATCHED)


def _decimals(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _decimals_of(interval: Interval) -> str:
    return "unknown" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
