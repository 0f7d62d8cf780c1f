"""Meta-Rewarding: the model answers, judges, and judges its judgements (arXiv:2407.19594).

Pairs of responses train it to answer, pairs of judgements to judge, in one DPO.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges import MIN_ANSWER_TOKENS, SelfJudge
from self_rewarding_lm.judging import compile_meta_template
from self_rewarding_lm.lines import Joined
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.rehearsal import short
from self_rewarding_lm.rollout import decoding_of
from self_rewarding_lm.rubrics import META_JUDGE_PROMPT
from self_rewarding_lm.serving import Need, served
from self_rewarding_lm.stages.judge_pairs import JudgePairMaker, meta_asker
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.stored import Groups

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)


class MetaJudgingConfig(ComparisonConfig):
    """How the model compares two of its judgements; each two are shown in both orders."""

    prompt_template: str = META_JUDGE_PROMPT
    """jinja2 text with {{ judge_prompt }} (what the judge was asked, with the rubric, the request
    and the response in it), {{ judgement_a }} and {{ judgement_b }}."""
    sampling: SamplingConfig = SAMPLING
    """How comparisons are sampled; as judgements are."""


class MetaRewardDPOConfig(SelfRewardDPOConfig):
    """Self-rewarding DPO that trains the judge too (arXiv:2407.19594).

    Of each prompt the response whose judgements differ most is taken, its judgements are compared
    by the same model as a meta-judge, and the best and the worst become a pair whose prompt is the
    judge prompt. Wins count by the place in which they are rarer in the whole stage. Defaults of
    the paper: 7 responses, 11 judgements each, temperature 0.8, top-p 0.95, beta 0.1, learning
    rate 5e-6 (its last value, a tenth, is ours). docs/meta_rewarding.md has the rest.
    """

    folder_name: ClassVar[str] = "meta_reward"
    default_learning_rates: ClassVar[tuple[float, float]] = (5e-6, 5e-7)

    num_candidate_responses: int = Field(default=7, ge=2)
    """K of the paper."""
    num_sampled_reward_responses: int = Field(default=11, ge=1)
    """N of the paper: judgements of each candidate; their mean is its score."""
    generation: SamplingConfig = SAMPLING
    """How responses are sampled: the paper's temperature 0.8 and top-p 0.95."""
    judging: SamplingConfig = SAMPLING
    """How judgements are sampled: as responses are."""
    train_judge: bool = True
    """Whether judgements are compared and trained on. The paper: in its first two iterations of
    four; one stage is one iteration."""
    meta_judging: MetaJudgingConfig = MetaJudgingConfig()
    """How two judgements are compared."""
    max_judgements_compared: int | None = Field(default=None, ge=2)
    """Of a response's judgements so many are compared, the first that differ. Each two are compared
    twice, so 11 take 110 comparisons a prompt. None: all."""
    max_judgement_length: int | None = Field(default=None, ge=1)
    """Characters of a chosen judgement at most; a longer one drops its pair. The paper: 1,100 in
    the first, 1,000 in the second iteration."""
    drop_equal_scores: bool = False
    """Drop pairs of judgements that give the same score, as NeMo-Aligner's implementation does."""
    judge_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of judge pairs among all pairs of the stage at most; those of the first prompts stay.
    None: no limit (the paper names none)."""

    @model_validator(mode="after")
    def _judges_itself(self) -> "MetaRewardDPOConfig":
        if not self.train_judge:
            return self
        foreign = ("judge", "rewarding_model", "comparison")
        given = [name for name in foreign if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: train_judge compares what the trained model itself wrote "
                "as a judge with a reward prompt; leave it out, or set train_judge=False"
            )
        if len(self.reward_names()) > 1 or self.num_sampled_reward_responses < 2:
            raise ValueError(
                "train_judge compares judgements of one candidate by one reward prompt: give one "
                "self_reward_config_keyname and num_sampled_reward_responses of 2 or more, or set "
                "train_judge=False"
            )
        if self.rounds > 1:
            raise ValueError(
                "rounds: positions are weighted over a whole stage; with train_judge give one "
                "stage for each round"
            )
        return self

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if not self.train_judge:
            return
        (name,) = self.reward_names()
        reward = self._rewards(ctx)[name]
        if reward.score_mode != "sampled" or reward.forced_ending:
            raise ConfigError(
                f"{ctx.stage}: train_judge trains on judgements as the model wrote them, and the "
                f"reward prompt {name!r} has score_mode={reward.score_mode!r} and forced_ending="
                f"{reward.forced_ending!r}, whose scores are not (all) in the texts. Use "
                "score_mode='sampled' without forced_ending, or set train_judge=False."
            )
        how, judge = self.meta_judging, self.build_judge(ctx)
        assert isinstance(judge, SelfJudge)
        render = compile_meta_template(how.prompt_template, auto_dedent=how.auto_dedent)
        empty = render(judge.render("", ""), "", "")
        meta_asker(how).check(empty, ctx.tokens, ctx.model.max_len)

    def needs(self, ctx: Context) -> list[Need]:
        found, how = super().needs(ctx), self.meta_judging
        if self.train_judge:
            counts = how.score_mode == "expected" or bool(how.forced_ending)
            found.append((decoding_of(how.sampling, ctx.tokens), counts))
        return found

    def trained(
        self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]
    ) -> Sequence[PreferencePair]:
        if not self.train_judge:
            return super().trained(ctx, out, pairs)
        own = [pair.id for pair in pairs]  # merging judge pairs with them closes their file
        with served(ctx, self.needs(ctx)):
            judge = JudgePairMaker(self, ctx, out).make_beside(len(own))
        made = Groups(out.known(PreferencePair))
        return Joined(super().trained(ctx, out, made.in_order(own)), made.in_order(judge))

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        if not self.train_judge:
            super().rehearse(ctx, out)
            return
        _, _, (pair,) = self.answered(JudgePairMaker, ctx, out)
        self.try_pair(ctx, out, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)

    def shortened(self, changes: dict[str, Any]) -> SampledPreferenceConfig:
        sampling = short(self.meta_judging.sampling, MIN_ANSWER_TOKENS)
        fewer = self.meta_judging.model_copy(update={"sampling": sampling})
        return super().shortened({**changes, "meta_judging": fewer})
