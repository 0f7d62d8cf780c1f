"""Judges of what names one: a prompt for a model, a function, a module, an object."""

from typing import Any

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.functions import judge_of
from self_rewarding_lm.judges.self_judge import (
    PairwiseJudge,
    SelfJudge,
    check_comparison,
    check_judge_prompt,
)
from self_rewarding_lm.models.interface import TokenModel


def make_judge(
    judge: Any,
    *,
    judging: SamplingConfig | None = None,
    num_judgements: int = 1,
    model: TokenModel | None = None,
) -> Judge:
    """A judge of what names one.

    A RewardConfig or ComparisonConfig: a model is asked, `model` or the context's own; judging
    and num_judgements are for these. Else a Judge, a text function in TRL's form or a reward
    module. Raises ConfigError for settings that do not go together.
    """
    if num_judgements < 1:
        raise ConfigError(f"num_judgements must be 1 or more; got {num_judgements}.")
    if isinstance(judge, RewardConfig):
        return SelfJudge(judge, judging or SamplingConfig(), num_judgements, model=model)
    if num_judgements > 1:
        raise ConfigError(
            "num_judgements is for a reward prompt; a comparison is asked once in each order, and "
            f"other judges decide themselves. Leave it out; got {num_judgements}."
        )
    if isinstance(judge, ComparisonConfig):
        return PairwiseJudge(judge, judging, model=model)
    if not hasattr(judge, "judge") and not callable(judge):
        raise ConfigError(
            "a judge is a RewardConfig, a ComparisonConfig, an object with judge(ctx, prompts, "
            f"candidates), a text function or a reward module; got {type(judge).__name__}."
        )
    return judge_of(judge)


def check_judge(judge: Any, ctx: Context) -> None:
    """Raise where a prompt for judging cannot be used with a context's model and tokenizer."""
    if isinstance(judge, RewardConfig):
        check_judge_prompt(judge, ctx.tokens, ctx.model.max_len)
    elif isinstance(judge, ComparisonConfig):
        check_comparison(judge, ctx.tokens, ctx.model.max_len)


def top_score_of(reward: Any) -> float | None:
    """The highest score that a reward prompt allows; None where it sets no limit, and of others."""
    if not isinstance(reward, RewardConfig):
        return None
    if reward.allowed_scores is not None:
        return float(max(reward.allowed_scores))
    return None if reward.score_range is None else float(reward.score_range[1])
