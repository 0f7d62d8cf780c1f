"""Train a language model on rewards that it gives itself (arXiv:2401.10020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_rewarding_lm.config import (
        PAPER_REWARD_CONFIG,
        FinetuneConfig,
        OptimConfig,
        RewardConfig,
        SamplingConfig,
    )
    from self_rewarding_lm.datasets import create_mock_dataset, from_stage
    from self_rewarding_lm.engine import LocalEngine
    from self_rewarding_lm.errors import SelfRewardingError
    from self_rewarding_lm.judges import SelfJudge
    from self_rewarding_lm.recipes import create_default_paper_config
    from self_rewarding_lm.records import Candidate, Judgement, PreferencePair, Prompt
    from self_rewarding_lm.rollout import generate
    from self_rewarding_lm.run import Run
    from self_rewarding_lm.spin_trainer import SPINTrainer
    from self_rewarding_lm.stages import (
        DPOConfig,
        ExternalRewardDPOConfig,
        SelfPlayConfig,
        SelfRewardDPOConfig,
        SFTConfig,
    )
    from self_rewarding_lm.trainer import SelfRewardingTrainer

__version__ = "0.1.0"

__all__ = [
    "PAPER_REWARD_CONFIG",
    "Candidate",
    "DPOConfig",
    "ExternalRewardDPOConfig",
    "FinetuneConfig",
    "Judgement",
    "LocalEngine",
    "OptimConfig",
    "PreferencePair",
    "Prompt",
    "RewardConfig",
    "Run",
    "SFTConfig",
    "SPINTrainer",
    "SamplingConfig",
    "SelfJudge",
    "SelfPlayConfig",
    "SelfRewardDPOConfig",
    "SelfRewardingError",
    "SelfRewardingTrainer",
    "create_default_paper_config",
    "create_mock_dataset",
    "from_stage",
    "generate",
]

_HOMES = {
    "config": (
        "PAPER_REWARD_CONFIG",
        "FinetuneConfig",
        "OptimConfig",
        "RewardConfig",
        "SamplingConfig",
    ),
    "datasets": ("create_mock_dataset", "from_stage"),
    "engine": ("LocalEngine",),
    "errors": ("SelfRewardingError",),
    "judges": ("SelfJudge",),
    "recipes": ("create_default_paper_config",),
    "records": ("Candidate", "Judgement", "PreferencePair", "Prompt"),
    "rollout": ("generate",),
    "run": ("Run",),
    "stages": (
        "DPOConfig",
        "ExternalRewardDPOConfig",
        "SFTConfig",
        "SelfPlayConfig",
        "SelfRewardDPOConfig",
    ),
    "spin_trainer": ("SPINTrainer",),
    "trainer": ("SelfRewardingTrainer",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
