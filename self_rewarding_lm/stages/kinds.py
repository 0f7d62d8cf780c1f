"""The stages of the library, a row for each. What lists stages reads these rows: recipe files, the
settings file, the reference pages, the public names.

To add a stage write its file and its row.
"""

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.stages.contrastive import ContrastiveDPOConfig
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.grpo import SelfRewardGRPOConfig
from self_rewarding_lm.stages.meta_rewarding import MetaRewardDPOConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.stages.stepwise import StepwiseDPOConfig
from self_rewarding_lm.stages.temporal import TemporalDPOConfig

STAGES: tuple[type[FinetuneConfig], ...] = (
    SFTConfig,
    BuildEFTConfig,
    SelfRewardDPOConfig,
    SelfRewardSFTConfig,
    SelfRewardGRPOConfig,
    MetaRewardDPOConfig,
    ExternalRewardDPOConfig,
    ContrastiveDPOConfig,
    DPOConfig,
    SelfPlayConfig,
    TemporalDPOConfig,
    StepwiseDPOConfig,
)
"""In a recipe a stage has the name that its class calls `folder_name`."""
