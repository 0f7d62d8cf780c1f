"""Train a language model on rewards that it gives itself (arXiv:2401.10020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_rewarding_lm.adapters import load_causal_lm
    from self_rewarding_lm.checks import Check, ChecksConfig
    from self_rewarding_lm.comparing import PairwiseJudge
    from self_rewarding_lm.config import (
        PAPER_REWARD_CONFIG,
        ComparisonConfig,
        FinetuneConfig,
        OptimConfig,
        RewardConfig,
        SamplingConfig,
        SelfInstruct,
    )
    from self_rewarding_lm.datasets import create_mock_dataset, from_stage
    from self_rewarding_lm.engine import LocalEngine
    from self_rewarding_lm.errors import Interrupted, SelfRewardingError
    from self_rewarding_lm.evaluate import JudgeEvaluation, evaluate_judge
    from self_rewarding_lm.judges import SelfJudge
    from self_rewarding_lm.loss_settings import LossConfig
    from self_rewarding_lm.losses import PairBatch, reads
    from self_rewarding_lm.oasst import OpenAssistant, open_assistant
    from self_rewarding_lm.recipes import create_default_paper_config, paper_recipe
    from self_rewarding_lm.records import (
        Candidate,
        Demonstration,
        Judgement,
        MetaJudgement,
        PreferencePair,
        Prompt,
        RankedReplies,
    )
    from self_rewarding_lm.rollout import generate
    from self_rewarding_lm.run import Run
    from self_rewarding_lm.server.engine import ServerEngine
    from self_rewarding_lm.server_judge import ServerJudge
    from self_rewarding_lm.spin_trainer import SPINTrainer
    from self_rewarding_lm.stages import (
        BuildEFTConfig,
        DPOConfig,
        ExternalRewardDPOConfig,
        MetaRewardDPOConfig,
        SelfPlayConfig,
        SelfRewardDPOConfig,
        SelfRewardSFTConfig,
        SFTConfig,
    )
    from self_rewarding_lm.stages.meta import MetaJudgingConfig
    from self_rewarding_lm.trainer import SelfRewardingTrainer
    from self_rewarding_lm.weights import import_checkpoint

__version__ = "0.1.0"

__all__ = [
    "PAPER_REWARD_CONFIG",
    "BuildEFTConfig",
    "Candidate",
    "Check",
    "ChecksConfig",
    "ComparisonConfig",
    "DPOConfig",
    "Demonstration",
    "ExternalRewardDPOConfig",
    "FinetuneConfig",
    "Interrupted",
    "JudgeEvaluation",
    "Judgement",
    "LocalEngine",
    "LossConfig",
    "MetaJudgement",
    "MetaJudgingConfig",
    "MetaRewardDPOConfig",
    "OpenAssistant",
    "OptimConfig",
    "PairBatch",
    "PairwiseJudge",
    "PreferencePair",
    "Prompt",
    "RankedReplies",
    "RewardConfig",
    "Run",
    "SFTConfig",
    "SPINTrainer",
    "SamplingConfig",
    "SelfInstruct",
    "SelfJudge",
    "SelfPlayConfig",
    "SelfRewardDPOConfig",
    "SelfRewardSFTConfig",
    "SelfRewardingError",
    "SelfRewardingTrainer",
    "ServerEngine",
    "ServerJudge",
    "create_default_paper_config",
    "create_mock_dataset",
    "evaluate_judge",
    "from_stage",
    "generate",
    "import_checkpoint",
    "load_causal_lm",
    "open_assistant",
    "paper_recipe",
    "reads",
]

_HOMES = {
    "adapters": ("load_causal_lm",),
    "checks": ("Check", "ChecksConfig"),
    "comparing": ("PairwiseJudge",),
    "config": (
        "ComparisonConfig",
        "FinetuneConfig",
        "OptimConfig",
        "PAPER_REWARD_CONFIG",
        "RewardConfig",
        "SamplingConfig",
        "SelfInstruct",
    ),
    "datasets": ("create_mock_dataset", "from_stage"),
    "engine": ("LocalEngine",),
    "errors": ("Interrupted", "SelfRewardingError"),
    "evaluate": ("JudgeEvaluation", "evaluate_judge"),
    "judges": ("SelfJudge",),
    "loss_settings": ("LossConfig",),
    "losses": ("PairBatch", "reads"),
    "oasst": ("OpenAssistant", "open_assistant"),
    "recipes": ("create_default_paper_config", "paper_recipe"),
    "records": (
        "Candidate",
        "Demonstration",
        "Judgement",
        "MetaJudgement",
        "PreferencePair",
        "Prompt",
        "RankedReplies",
    ),
    "rollout": ("generate",),
    "run": ("Run",),
    "server": ("ServerEngine",),
    "server_judge": ("ServerJudge",),
    "spin_trainer": ("SPINTrainer",),
    "stages": (
        "BuildEFTConfig",
        "DPOConfig",
        "ExternalRewardDPOConfig",
        "MetaRewardDPOConfig",
        "SFTConfig",
        "SelfPlayConfig",
        "SelfRewardDPOConfig",
        "SelfRewardSFTConfig",
    ),
    "stages.meta": ("MetaJudgingConfig",),
    "trainer": ("SelfRewardingTrainer",),
    "weights": ("import_checkpoint",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
