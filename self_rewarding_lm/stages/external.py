"""DPO on the model's own responses, ranked by a reward model, a function or a judge object."""

from typing import Any, ClassVar

from pydantic import Field

from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError, give_tokenizer
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig


class ExternalRewardDPOConfig(SampledPreferenceConfig):
    """DPO on the model's own responses, scored by a reward model or function you give.

    All else is as in SelfRewardDPOConfig.

    reward_model: a module or function ids (b, t) of prompt and response -> (b,), (b, 1) or
    (b, classes) (the expected class counts); a text function f(prompts, completions, **columns)
    -> list of float or None; or a Judge.
    """

    folder_name: ClassVar[str] = "external_reward"

    reward_model: Object
    """A module or function of ids, a function of texts, or a Judge."""
    min_parse_rate: float = Field(default=0.0, ge=0, le=1)
    """Least share of responses with a score, checked from the 64th on. Default 0: a reward function
    may return None on purpose."""

    def given_judge(self) -> Any:
        given = self.unshuffled_judge
        return self.reward_model if given is None else given

    def build_judge(self, ctx: Context) -> Judge:
        return make_judge(self.given_judge())

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if not callable(self.reward_model) and not hasattr(self.reward_model, "judge"):
            raise ConfigError(
                f"{ctx.stage}: reward_model must be a module, a function or a Judge; got "
                f"{type(self.reward_model).__name__}."
            )
        if isinstance(self.build_judge(ctx), FunctionJudge) and ctx.tokens.tokenizer is None:
            raise ConfigError(
                f"{ctx.stage}: reward_model reads texts, which need a tokenizer. {give_tokenizer()}"
            )
