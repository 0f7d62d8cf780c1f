"""Self-rewarding DPO: the model answers and judges itself (arXiv:2401.10020, sections 2.2, 2.3)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from self_rewarding_lm.config import ComparisonConfig, Object, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context, Need
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.judges.asking import MIN_ANSWER_TOKENS
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.self_judge import (
    PairwiseJudge,
    SelfJudge,
    SeveralJudges,
    check_comparison,
    check_judge_prompt,
)
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.stages.ranges import Range
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.stages.work import Asking, Counting, combined

DEFAULT = "default"
"""The name of the reward prompt that a stage uses unless it names others."""


OTHER = "another model judges: its memory and time are not in this plan"
"""The note in a plan if `rewarding_model` judges."""


class SelfRewardDPOConfig(SampledPreferenceConfig):
    """A round of self-rewarding: the model answers, judges its own responses and is trained by DPO.

    Of N candidates for each prompt, the one with the highest mean score is chosen and the one with
    the lowest is rejected. Defaults of arXiv:2401.10020, 3.1.3: N = 4, temperature 0.7, top-p 0.9,
    3 judgements, beta 0.1, learning rate 1e-6 -> 1e-7, batch 16.
    """

    folder_name: ClassVar[str] = "self_reward"
    hub_tag: ClassVar[str | None] = "self-rewarding"

    num_sampled_reward_responses: int = Field(default=3, ge=1)
    """Judgements of each candidate; their mean is its score. One if nothing is sampled
    (forced_ending="at_once"), one in each order with `comparison`."""
    judging: SamplingConfig = SamplingConfig()
    """How judgements are sampled; default: as responses, as in the paper (3.1.3)."""
    self_reward_config_keyname: str | tuple[str, ...] = DEFAULT
    """Which of the trainer's reward prompts is used. With several each judges every candidate, and
    the mean of their scores is the candidate's; so they should have the same scale."""
    comparison: ComparisonConfig | None = None
    """In place of reward prompts: the judge is shown two candidates and says which is better, for
    every two in both orders. A candidate's score is the mean of 1 (won), 0.5 (tied), 0 (lost)."""
    rewarding_model: Object = None
    """Another judge than the policy: a module with the same tokens, ServerJudge(url=..., model=...)
    for a model on a server, or any Judge."""

    @model_validator(mode="after")
    def _prompts_named(self) -> "SelfRewardDPOConfig":
        names = self.reward_names()
        if not names or len(set(names)) < len(names):
            raise ValueError(
                "self_reward_config_keyname must be a reward prompt's name, or several different "
                f"ones; got {names}"
            )
        return self

    def given_judge(self) -> Any:
        """The user's judge object; None if a model judges with this stage's reward prompts."""
        if self.unshuffled_judge is not None:
            return self.unshuffled_judge
        return self.rewarding_model if hasattr(self.rewarding_model, "judge") else None

    def build_judge(self, ctx: Context) -> Judge:
        judge = self.given_judge()
        if self.unshuffled_judge is None and isinstance(judge, ServerJudge):
            return self._server_judge(ctx, judge)
        if judge is not None:
            return make_judge(judge)
        name = "self" if self.rewarding_model is None else type(self.rewarding_model).__name__
        model = None if self.rewarding_model is None else ctx.adapt(self.rewarding_model)
        if self.comparison is not None:
            return PairwiseJudge(self.comparison, self.judging, name=name, model=model)
        return self._scoring_judge(ctx, name, partial(SelfJudge, model=model))

    def _server_judge(self, ctx: Context, server: ServerJudge) -> Judge:
        """The judge that asks a server with this stage's comparison or reward prompts."""
        if self.comparison is not None:
            return server.comparing(self.comparison, self.judging)
        return self._scoring_judge(ctx, server.name, server.scoring)

    def _scoring_judge(self, ctx: Context, name: str, make: Callable[..., SelfJudge]) -> Judge:
        """The judge that scores with each of the stage's reward prompts.

        make: makes the judge of one reward prompt. The judgements of a candidate are numbered
        through all reward prompts.
        """
        judges: list[SelfJudge] = []
        for key, reward in self._rewards(ctx).items():
            judges.append(
                make(
                    reward,
                    self.judging,
                    self.num_sampled_reward_responses,
                    name=name if key == DEFAULT else f"{name}:{key}",
                    first=sum(judge.num_judgements for judge in judges),
                )
            )
        return judges[0] if len(judges) == 1 else SeveralJudges(judges)

    def needs(self, ctx: Context) -> list[Need]:
        needs = super().needs(ctx)
        if self.given_judge() is None and self.rewarding_model is None:
            forms = self._rewards(ctx).values() if self.comparison is None else [self.comparison]
            probabilities = any(f.score_mode == "expected" or f.forced_ending for f in forms)
            needs.append((decoding_of(self.judging, ctx.tokens), probabilities))
        return needs

    def shortened(self, changes: dict[str, Any]) -> SampledPreferenceConfig:
        judging_changes = {
            "judging": self.judging.shortened(MIN_ANSWER_TOKENS),
            "num_sampled_reward_responses": 1,
        }
        return super().shortened({**changes, **judging_changes})

    def score_scale(self, ctx: Context) -> tuple[float, float] | None:
        if self.given_judge() is not None:
            return None
        if self.comparison is not None:
            return 0.0, 1.0
        reward = next(iter(self._rewards(ctx).values()))
        numbers = reward.allowed_scores or reward.score_range
        return None if numbers is None else (float(min(numbers)), float(max(numbers)))

    def judging_work(
        self, counting: Counting, candidates: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        if self.unshuffled_judge is not None:
            return super().judging_work(counting, candidates, prompt)
        # 1. how often each candidate is judged, and how many responses a question shows
        forms, times, responses = [], self.num_sampled_reward_responses, 1
        if self.comparison is None:
            forms = [counting.rewards.get(name) for name in self.reward_names()]
        else:  # each candidate is shown first with each of the others
            forms, times, responses = [self.comparison], self.num_candidate_responses - 1, 2
        # 2. the tokens that a question shows, beside the reward prompt
        new, longest = candidates.new, candidates.longest
        tokens = prompt + new.times(responses)
        longest = None if longest is None else longest + responses * (new.most or 0)
        judgements = combined(
            [
                counting.judgements(f, self.judging, candidates, times, tokens, longest)
                for f in forms
            ]
        )
        here = self.rewarding_model is None
        return replace(judgements, here=here), () if here else (OTHER,)

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if isinstance(self.rewarding_model, ServerJudge) and self.unshuffled_judge is None:
            self._server_judge(ctx, self.rewarding_model)
        if self.given_judge() is not None:
            return
        limit = self._judging_model(ctx).max_len
        if self.comparison is not None:
            check_comparison(self.comparison, ctx.tokens, limit)
            return
        for reward in self._rewards(ctx).values():
            check_judge_prompt(reward, ctx.tokens, limit)

    def _judging_model(self, ctx: Context) -> TokenModel:
        """The model that judges. Raises ConfigError if it is no module or has other tokens."""
        if self.rewarding_model is None:
            return ctx.model
        if not isinstance(self.rewarding_model, nn.Module):
            raise ConfigError(
                f"{ctx.stage}: rewarding_model must be a torch module or a Judge; got "
                f"{type(self.rewarding_model).__name__}. For a function use "
                "ExternalRewardDPOConfig(reward_model=...)."
            )
        model = ctx.adapt(self.rewarding_model)
        if model.vocab != ctx.model.vocab:
            raise ConfigError(
                f"{ctx.stage}: rewarding_model reads the policy's tokens, so it must have its "
                f"vocabulary of {ctx.model.vocab}; it has {model.vocab}. For a judge with its "
                "own tokenizer give an object with a judge method."
            )
        return model

    def reward_names(self) -> tuple[str, ...]:
        """The names of the stage's reward prompts."""
        name = self.self_reward_config_keyname
        return (name,) if isinstance(name, str) else name

    def _rewards(self, ctx: Context) -> dict[str, RewardConfig]:
        """The stage's reward prompts by name."""
        return ctx.rewards_named(self.reward_names())
