"""Train a language model on rewards that it gives itself (arXiv:2401.10020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_rewarding_lm.adapters import load_causal_lm
    from self_rewarding_lm.anchor import JudgeAnchor
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
    from self_rewarding_lm.head_to_head import Comparison, compare
    from self_rewarding_lm.held_out import HeldOutReward, VerifierAccuracy, WinRateOverLast
    from self_rewarding_lm.judges import SelfJudge
    from self_rewarding_lm.loss_settings import LossConfig
    from self_rewarding_lm.losses import PairBatch, reads
    from self_rewarding_lm.oasst import OpenAssistant, open_assistant
    from self_rewarding_lm.quality import measure_responses
    from self_rewarding_lm.recipes import create_default_paper_config, paper_recipe
    from self_rewarding_lm.records import (
        Candidate,
        Demonstration,
        Judgement,
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
        SelfPlayConfig,
        SelfRewardDPOConfig,
        SelfRewardSFTConfig,
        SFTConfig,
    )
    from self_rewarding_lm.trainer import SelfRewardingTrainer
    from self_rewarding_lm.verifying import reasoning_task
    from self_rewarding_lm.weights import import_checkpoint

__version__ = "0.1.0"

__all__ = [
    "PAPER_REWARD_CONFIG",
    "BuildEFTConfig",
    "Candidate",
    "Check",
    "ChecksConfig",
    "Comparison",
    "ComparisonConfig",
    "DPOConfig",
    "Demonstration",
    "ExternalRewardDPOConfig",
    "FinetuneConfig",
    "HeldOutReward",
    "Interrupted",
    "JudgeAnchor",
    "JudgeEvaluation",
    "Judgement",
    "LocalEngine",
    "LossConfig",
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
    "VerifierAccuracy",
    "WinRateOverLast",
    "compare",
    "create_default_paper_config",
    "create_mock_dataset",
    "evaluate_judge",
    "from_stage",
    "generate",
    "import_checkpoint",
    "load_causal_lm",
    "measure_responses",
    "open_assistant",
    "paper_recipe",
    "reads",
    "reasoning_task",
]

_HOMES = {
    "adapters": ("load_causal_lm",),
    "anchor": ("JudgeAnchor",),
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
    "head_to_head": ("Comparison", "compare"),
    "held_out": ("HeldOutReward", "VerifierAccuracy", "WinRateOverLast"),
    "judges": ("SelfJudge",),
    "loss_settings": ("LossConfig",),
    "losses": ("PairBatch", "reads"),
    "oasst": ("OpenAssistant", "open_assistant"),
    "quality": ("measure_responses",),
    "recipes": ("create_default_paper_config", "paper_recipe"),
    "records": (
        "Candidate",
        "Demonstration",
        "Judgement",
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
        "SFTConfig",
        "SelfPlayConfig",
        "SelfRewardDPOConfig",
        "SelfRewardSFTConfig",
    ),
    "trainer": ("SelfRewardingTrainer",),
    "verifying": ("reasoning_task",),
    "weights": ("import_checkpoint",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
