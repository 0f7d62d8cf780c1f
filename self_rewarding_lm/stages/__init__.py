"""The stages: one file a kind, each its configuration (what the user writes) and its run."""

from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.meta import MetaRewardDPOConfig
from self_rewarding_lm.stages.positive import SelfRewardSFTConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig

__all__ = [
    "BuildEFTConfig",
    "DPOConfig",
    "ExternalRewardDPOConfig",
    "MetaRewardDPOConfig",
    "SFTConfig",
    "SelfPlayConfig",
    "SelfRewardDPOConfig",
    "SelfRewardSFTConfig",
]
