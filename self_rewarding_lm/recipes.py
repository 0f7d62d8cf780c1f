"""Lists of stages that belong together."""

from typing import Any

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.errors import ConfigError, typed
from self_rewarding_lm.stages import SelfRewardDPOConfig, SFTConfig


@typed
def create_default_paper_config(
    *,
    train_sft_dataset: Any,
    self_reward_prompt_dataset: Any,
    valid_sft_dataset: Any = None,
    num_generated_preference_pairs: tuple[int, ...] = (3964, 6942),
    early_stopper_eval_module: Any = None,
    dpo_num_train_steps: int | None = None,
    sft_config: dict[str, Any] = {},  # noqa: B006 - read only
    self_reward_config: dict[str, Any] = {},  # noqa: B006 - read only
) -> list[FinetuneConfig]:
    """M0 -> SFT -> M1 -> self-reward DPO -> M2 -> self-reward DPO -> M3 (arXiv:2401.10020).

    self_reward_prompt_dataset: one dataset for all rounds, or a tuple with one a round.
    num_generated_preference_pairs: a number a round; 3,964 and 6,942 are the paper's (3.1.3).
    dpo_num_train_steps: optimiser steps a round; default: one epoch. sft_config and
    self_reward_config: further settings of SFTConfig and SelfRewardDPOConfig.
    """
    rounds = len(num_generated_preference_pairs)
    prompts = self_reward_prompt_dataset
    if not isinstance(prompts, tuple):
        prompts = (prompts,) * rounds
    if len(prompts) != rounds:
        raise ConfigError(
            "self_reward_prompt_dataset as a tuple is one dataset a round: "
            f"num_generated_preference_pairs has {rounds} rounds, the tuple {len(prompts)}."
        )
    common = {
        "num_train_steps": dpo_num_train_steps,
        "early_stopper_eval_module": early_stopper_eval_module,
    }
    return [
        SFTConfig(
            **{
                "train_dataset": train_sft_dataset,
                "valid_dataset": valid_sft_dataset,
                **sft_config,
            }
        ),
        *(
            SelfRewardDPOConfig(
                **{
                    "prompt_dataset": dataset,
                    "num_generated_preference_pairs": count,
                    **common,
                    **self_reward_config,
                }
            )
            for dataset, count in zip(prompts, num_generated_preference_pairs, strict=True)
        ),
    ]
