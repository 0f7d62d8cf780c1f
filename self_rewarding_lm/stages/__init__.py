"""The stages of a recipe: a file for each, its settings and its work.

A stage reads its data, makes pairs if it has none, and hands them to the training loop. Knows
nothing of recipes as files, reports or the command. Begin with `base.py` (what a stage is),
`sft.py` (the shortest), then `sampled.py` and `pair_maker.py` (prompts to pairs).
"""

from self_rewarding_lm.stages.contrastive import Contrast, ContrastiveDPOConfig
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.meta_rewarding import MetaJudgingConfig, MetaRewardDPOConfig
from self_rewarding_lm.stages.pairing import PairingConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.stages.temporal import TemporalDPOConfig

__all__ = [
    "BuildEFTConfig",
    "Contrast",
    "ContrastiveDPOConfig",
    "DPOConfig",
    "ExternalRewardDPOConfig",
    "MetaJudgingConfig",
    "MetaRewardDPOConfig",
    "PairingConfig",
    "SFTConfig",
    "SelfPlayConfig",
    "SelfRewardDPOConfig",
    "SelfRewardSFTConfig",
    "TemporalDPOConfig",
]
