"""The judge that a value stands for: a prompt for a model, a function, a module, an object."""

from inspect import signature
from typing import Any

from torch import nn

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges.base import Judge, WrappedJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
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
    """The judge that `judge` stands for.

    A RewardConfig or ComparisonConfig: a model is asked with it, `model` or the context's own;
    judging and num_judgements are for these. A Judge: itself. Any other object with a method
    `judge`: the same with the defaults of `Judge`. A function with a parameter `completions` is a
    text function in TRL's form; any other callable is a reward module of ids. Raises ConfigError
    for anything else and for settings that do not go together.
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
    if hasattr(judge, "judge"):
        return judge if isinstance(judge, Judge) else WrappedJudge(judge)
    if not isinstance(judge, nn.Module) and "completions" in signature(judge).parameters:
        return FunctionJudge(judge)
    return ModuleJudge(judge)  # type: ignore[arg-type]


def check_judge(judge: Any, ctx: Context) -> None:
    """Raise an error if a judge prompt cannot be used with a context's model and tokenizer."""
    if isinstance(judge, RewardConfig):
        check_judge_prompt(judge, ctx.tokens, ctx.model.max_len)
    elif isinstance(judge, ComparisonConfig):
        check_comparison(judge, ctx.tokens, ctx.model.max_len)


def top_score_of(reward: Any) -> float | None:
    """The highest score that a reward prompt allows; None without a limit or for other judges."""
    if not isinstance(reward, RewardConfig):
        return None
    if reward.allowed_scores:
        return float(max(reward.allowed_scores))
    return None if reward.score_range is None else float(reward.score_range[1])
