"""Train a language model on rewards that it gives itself (arXiv:2401.10020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_rewarding_lm.adapters import load_causal_lm
    from self_rewarding_lm.anchor import JudgeAnchor
    from self_rewarding_lm.card import push_to_hub
    from self_rewarding_lm.checks import Check, ChecksConfig
    from self_rewarding_lm.comparing import PairwiseJudge
    from self_rewarding_lm.config import (
        PAPER_REWARD_CONFIG,
        TEN_POINT_REWARD_CONFIG,
        ComparisonConfig,
        FinetuneConfig,
        OptimConfig,
        RewardConfig,
        SamplingConfig,
        SelfInstruct,
    )
    from self_rewarding_lm.consistency import ConsistencyConfig
    from self_rewarding_lm.contrasts import Contrast
    from self_rewarding_lm.datasets import create_mock_dataset, from_stage
    from self_rewarding_lm.engine import LocalEngine
    from self_rewarding_lm.ensemble import EnsembleJudge
    from self_rewarding_lm.errors import Interrupted, SelfRewardingError
    from self_rewarding_lm.evaluate import JudgeEvaluation, evaluate_judge
    from self_rewarding_lm.head_to_head import Comparison, compare
    from self_rewarding_lm.held_out import HeldOutReward, VerifierAccuracy, WinRateOverLast
    from self_rewarding_lm.implicit import ImplicitJudge
    from self_rewarding_lm.judges import FunctionJudge, ModuleJudge, SelfJudge
    from self_rewarding_lm.live_reference import EMAReference, MixedReference
    from self_rewarding_lm.loss_settings import LossConfig
    from self_rewarding_lm.losses import PairBatch, reads
    from self_rewarding_lm.oasst import OpenAssistant, open_assistant
    from self_rewarding_lm.pair_settings import PairingConfig
    from self_rewarding_lm.quality import measure_responses
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
    from self_rewarding_lm.report import write_report
    from self_rewarding_lm.reward_model import RewardModelJudge
    from self_rewarding_lm.rollout import generate
    from self_rewarding_lm.run import Run
    from self_rewarding_lm.server.engine import ServerEngine
    from self_rewarding_lm.server_judge import ServerJudge
    from self_rewarding_lm.spin_trainer import SPINTrainer
    from self_rewarding_lm.stages import (
        BuildEFTConfig,
        ContrastiveDPOConfig,
        DPOConfig,
        ExternalRewardDPOConfig,
        MetaRewardDPOConfig,
        SelfPlayConfig,
        SelfRewardDPOConfig,
        SelfRewardSFTConfig,
        SFTConfig,
        TemporalDPOConfig,
    )
    from self_rewarding_lm.stages.meta import MetaJudgingConfig
    from self_rewarding_lm.trainer import SelfRewardingTrainer
    from self_rewarding_lm.verifying import reasoning_task
    from self_rewarding_lm.votes import VoteJudge
    from self_rewarding_lm.weights import import_checkpoint

__version__ = "0.1.0"

__all__ = [
    "PAPER_REWARD_CONFIG",
    "TEN_POINT_REWARD_CONFIG",
    "BuildEFTConfig",
    "Candidate",
    "Check",
    "ChecksConfig",
    "Comparison",
    "ComparisonConfig",
    "ConsistencyConfig",
    "Contrast",
    "ContrastiveDPOConfig",
    "DPOConfig",
    "Demonstration",
    "EMAReference",
    "EnsembleJudge",
    "ExternalRewardDPOConfig",
    "FinetuneConfig",
    "FunctionJudge",
    "HeldOutReward",
    "ImplicitJudge",
    "Interrupted",
    "JudgeAnchor",
    "JudgeEvaluation",
    "Judgement",
    "LocalEngine",
    "LossConfig",
    "MetaJudgement",
    "MetaJudgingConfig",
    "MetaRewardDPOConfig",
    "MixedReference",
    "ModuleJudge",
    "OpenAssistant",
    "OptimConfig",
    "PairBatch",
    "PairingConfig",
    "PairwiseJudge",
    "PreferencePair",
    "Prompt",
    "RankedReplies",
    "RewardConfig",
    "RewardModelJudge",
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
    "TemporalDPOConfig",
    "VerifierAccuracy",
    "VoteJudge",
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
    "push_to_hub",
    "reads",
    "reasoning_task",
    "write_report",
]

_HOMES = {
    "adapters": ("load_causal_lm",),
    "anchor": ("JudgeAnchor",),
    "card": ("push_to_hub",),
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
        "TEN_POINT_REWARD_CONFIG",
    ),
    "consistency": ("ConsistencyConfig",),
    "contrasts": ("Contrast",),
    "datasets": ("create_mock_dataset", "from_stage"),
    "engine": ("LocalEngine",),
    "ensemble": ("EnsembleJudge",),
    "errors": ("Interrupted", "SelfRewardingError"),
    "evaluate": ("JudgeEvaluation", "evaluate_judge"),
    "head_to_head": ("Comparison", "compare"),
    "held_out": ("HeldOutReward", "VerifierAccuracy", "WinRateOverLast"),
    "implicit": ("ImplicitJudge",),
    "judges": ("FunctionJudge", "ModuleJudge", "SelfJudge"),
    "live_reference": ("EMAReference", "MixedReference"),
    "loss_settings": ("LossConfig",),
    "losses": ("PairBatch", "reads"),
    "oasst": ("OpenAssistant", "open_assistant"),
    "pair_settings": ("PairingConfig",),
    "quality": ("measure_responses",),
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
    "report": ("write_report",),
    "reward_model": ("RewardModelJudge",),
    "rollout": ("generate",),
    "run": ("Run",),
    "server": ("ServerEngine",),
    "server_judge": ("ServerJudge",),
    "spin_trainer": ("SPINTrainer",),
    "stages": (
        "BuildEFTConfig",
        "ContrastiveDPOConfig",
        "DPOConfig",
        "ExternalRewardDPOConfig",
        "MetaRewardDPOConfig",
        "SFTConfig",
        "SelfPlayConfig",
        "SelfRewardDPOConfig",
        "SelfRewardSFTConfig",
        "TemporalDPOConfig",
    ),
    "stages.meta": ("MetaJudgingConfig",),
    "trainer": ("SelfRewardingTrainer",),
    "verifying": ("reasoning_task",),
    "votes": ("VoteJudge",),
    "weights": ("import_checkpoint",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
