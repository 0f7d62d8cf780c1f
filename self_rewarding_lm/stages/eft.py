"""Evaluation data: replies that people ranked become examples of judging (arXiv:2401.10020, 2.1).

Makes demonstrations and trains nothing; a later SFT stage takes them with `from_stage`.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from self_rewarding_lm.comparing import check_comparison
from self_rewarding_lm.config import (
    ComparisonConfig,
    FinetuneConfig,
    Object,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import OnBadRow
from self_rewarding_lm.evaluate import as_candidates
from self_rewarding_lm.judges import MIN_ANSWER_TOKENS, check_judge_prompt
from self_rewarding_lm.ranked import ranked_row
from self_rewarding_lm.records import RankedReplies
from self_rewarding_lm.rehearsal import short
from self_rewarding_lm.stages.base import check_rows, read_once
from self_rewarding_lm.stages.eft_comparisons import ComparisonBuilder
from self_rewarding_lm.stages.eft_replies import ReplyBuilder
from self_rewarding_lm.stages.targets import Accept, score_targets
from self_rewarding_lm.store import StageDir


class BuildEFTConfig(FinetuneConfig):
    """Judge prompts with the answers that a judge should give, made of human-ranked replies.

    "judgements" is the paper's way (3.1.1): the current weights, there the SFT baseline, judge
    every reply; judgements whose scores are in the order of the human ranking are kept, and of
    scores that come too often a part is discarded. The target is the judge's text as it wrote it;
    the score is the one it states (`RewardConfig.as_written`).
    "ranks" asks no model and is for models that cannot judge yet: the target is the reward
    template alone with a score made of the rank, see `scores_of_ranks`.
    Of each reply there is one demonstration at most.
    "comparisons" is rejection sampling against known-better replies (Self-Taught Evaluators,
    arXiv:2408.02666, 3): any two that people ranked differently are compared, in one order; the
    first judgement with the right verdict is kept, and A and B are balanced. One demonstration a
    pair at most.

    Trains nothing.
    """

    folder_name: ClassVar[str] = "eft"

    ranked_dataset: Object
    """Replies ranked by people, at least two a row, see `ranked.ranked_row`; pairs of an earlier
    stage too."""
    method: Literal["judgements", "ranks", "comparisons"] = "judgements"
    """Whether the model's own judgements are taken, scores are made of the ranks, or two replies
    are compared."""
    num_judgements: int | None = Field(default=None, ge=1)
    """Attempts, of which the first that agrees is taken. "judgements": judgement k of every reply
    of a row makes one order; default 3, what the paper draws to score (3.1.3), for it does not say
    how many it drew here. "comparisons": of each pair; default 15 (arXiv:2408.02666, 3.3)."""
    judging: SamplingConfig = SamplingConfig()
    """How judgements are sampled."""
    self_reward_config_keyname: str = "default"
    """Which of the trainer's reward prompts; "comparisons" asks by none of them."""
    comparison: ComparisonConfig | None = None
    """How two replies are shown and the verdict is said, for "comparisons". None: the library's
    own way."""
    accept: Accept = "instruction"
    """"instruction": an attempt counts where all replies of the row have a score and all that
    people ordered are in that order. "reply": each reply by itself, where it stands rightly to all
    others that have a score. A tie is no agreement. The paper asks that the order of the scores
    agrees with the human ranking, and does not say what a tie is."""
    max_score_share: float | None = Field(default=0.5, gt=0, le=1)
    """No score has more than this share of what is kept; with n different scores never under 1/n.
    The paper discards a part of the commonest score without saying how much; 0.5 is ours. With
    "comparisons" of the two verdicts: 0.5 keeps as many A as B."""
    max_per_score: int | None = Field(default=None, ge=1)
    """No score is kept more often than this."""
    min_kept: int = Field(default=1, ge=0)
    """Fewer demonstrations are an error that says what to try; 0 goes on without any."""
    on_bad_row: OnBadRow = "raise"
    """A row that is no ranking: an error that names it; or "skip", it is left out and counted."""

    def check(self, ctx: Context) -> None:
        if self.method == "comparisons":
            check_comparison(self.written_comparison(), ctx.tokens, ctx.model.max_len)
        else:
            check_judge_prompt(self._reward(ctx), ctx.tokens, ctx.model.max_len)
        if self.method == "ranks":
            score_targets(self._reward(ctx), ctx.stage)
        rows = ctx.rows["ranked_dataset"]
        check_rows(rows, self.on_bad_row, lambda row, where: self.check_row(row, where, ctx))

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        """Raise DataError or TokenizerError where a row is no ranking."""
        ranked_replies(row, where, f"{ctx.stage}/0", ctx)

    def run(self, ctx: Context, out: StageDir) -> None:
        rows = ctx.rows["ranked_dataset"]

        def make(row: int, record_id: str) -> RankedReplies:
            return ranked_replies(rows.read(row), rows.where(row), record_id, ctx)

        ranked = read_once(
            ctx, out, rows, RankedReplies, ctx.stage, make, on_bad_row=self.on_bad_row
        )
        if self.method == "comparisons":
            ComparisonBuilder(self, ctx, out, ranked).build()
        else:
            ReplyBuilder(self, ctx, out, ranked, self._reward(ctx)).build()

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        fewer = {
            "judging": short(self.judging, MIN_ANSWER_TOKENS),
            "num_judgements": 1,
            "min_kept": 0,
        }
        self.model_copy(update=fewer).run(ctx, out)

    @property
    def attempts(self) -> int:
        """Judgements of a reply, or of a pair."""
        return self.num_judgements or (15 if self.method == "comparisons" else 3)

    def written_comparison(self) -> ComparisonConfig:
        """How two replies are compared, for judgements whose text is what is wanted."""
        written = {"score_mode": "sampled", "forced_ending": False}
        return (self.comparison or ComparisonConfig()).model_copy(update=written)

    def reward_names(self) -> tuple[str, ...]:
        return () if self.method == "comparisons" else (self.self_reward_config_keyname,)

    def _reward(self, ctx: Context) -> RewardConfig:
        name = self.self_reward_config_keyname
        return ctx.rewards_named((name,))[name].as_written()


def ranked_replies(row: Any, where: str, record_id: str, ctx: Context) -> RankedReplies:
    """A row as it is stored; DataError or TokenizerError where it cannot be used."""
    item = replace(ranked_row(row, where), id=record_id)
    as_candidates(item, ctx.tokens, where=where)
    return item
