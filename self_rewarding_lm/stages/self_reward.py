"""Self-rewarding DPO: the model answers and judges itself (arXiv:2401.10020, sections 2.2, 2.3)."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from self_rewarding_lm.config import Object, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges import Judge, SelfJudge, check_judge_prompt
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig


class SelfRewardDPOConfig(SampledPreferenceConfig):
    """N candidates a prompt, several judgements each, best against worst by their mean, DPO.

    Defaults of arXiv:2401.10020, 3.1.3: N = 4, temperature 0.7, top-p 0.9, 3 judgements,
    beta 0.1, learning rate 1e-6 -> 1e-7, batch 16.
    """

    folder_name: ClassVar[str] = "self_reward"

    num_sampled_reward_responses: int = Field(default=3, ge=1)
    """Judgements of each candidate; their mean is its score."""
    judging: SamplingConfig = SamplingConfig()
    self_reward_config_keyname: str = "default"
    """Which of the trainer's reward prompts."""
    rewarding_model: Object = None
    """A module that judges in place of the policy (with the same tokens), or a Judge."""

    def build_judge(self, ctx: Context) -> Judge:
        if self.judge is not None or hasattr(self.rewarding_model, "judge"):
            return self.judge or self.rewarding_model
        return SelfJudge(
            self._reward(ctx),
            self.judging,
            self.num_sampled_reward_responses,
            name="self" if self.rewarding_model is None else type(self.rewarding_model).__name__,
            model=None if self.rewarding_model is None else ctx.adapt(self.rewarding_model),
        )

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.judge is not None or hasattr(self.rewarding_model, "judge"):
            return
        model = ctx.model
        if self.rewarding_model is not None:
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
        check_judge_prompt(self._reward(ctx), ctx.tokens, model.max_len)

    def _reward(self, ctx: Context) -> RewardConfig:
        reward = ctx.rewards.get(self.self_reward_config_keyname)
        if reward is None:
            raise ConfigError(
                f"{ctx.stage}: self_reward_config_keyname {self.self_reward_config_keyname!r} is "
                f"none of the trainer's reward prompts: {', '.join(map(repr, ctx.rewards))}."
            )
        return reward
