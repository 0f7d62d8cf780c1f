"""Train a language model on rewards that it gives itself (arXiv:2401.10020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_rewarding_lm.checks import Check, ChecksConfig
    from self_rewarding_lm.config import (
        PAPER_REWARD_CONFIG,
        TEN_POINT_REWARD_CONFIG,
        ComparisonConfig,
        FinetuneConfig,
        OptimConfig,
        RewardConfig,
        SamplingConfig,
        SelfInstruct,
        from_stage,
    )
    from self_rewarding_lm.data.datasets import create_mock_dataset
    from self_rewarding_lm.data.oasst import OpenAssistant, open_assistant
    from self_rewarding_lm.errors import Interrupted, SelfRewardingError
    from self_rewarding_lm.evaluation.anchor import JudgeAnchor
    from self_rewarding_lm.evaluation.head_to_head import Comparison, compare
    from self_rewarding_lm.evaluation.held_out import (
        HeldOutReward,
        VerifierAccuracy,
        WinRateOverLast,
    )
    from self_rewarding_lm.evaluation.judge_quality import JudgeEvaluation, evaluate_judge
    from self_rewarding_lm.evaluation.responses import measure_responses
    from self_rewarding_lm.evaluation.verifying import reasoning_task
    from self_rewarding_lm.generation.candidates import generate
    from self_rewarding_lm.generation.local import LocalEngine
    from self_rewarding_lm.generation.server.engine import ServerEngine
    from self_rewarding_lm.judges.consistency import ConsistencyConfig
    from self_rewarding_lm.judges.ensemble import EnsembleJudge
    from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
    from self_rewarding_lm.judges.implicit import ImplicitJudge
    from self_rewarding_lm.judges.reward_model import RewardModelJudge
    from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
    from self_rewarding_lm.judges.server import ServerJudge
    from self_rewarding_lm.judges.votes import VoteJudge
    from self_rewarding_lm.models.loading import load_causal_lm
    from self_rewarding_lm.recipes.paper import create_default_paper_config, paper_recipe
    from self_rewarding_lm.records import (
        Candidate,
        Demonstration,
        Judgement,
        MetaJudgement,
        PreferencePair,
        Prompt,
        RankedReplies,
    )
    from self_rewarding_lm.report.card import push_to_hub
    from self_rewarding_lm.report.page import write_report
    from self_rewarding_lm.runs.run import Run
    from self_rewarding_lm.runs.weights import import_checkpoint
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
    from self_rewarding_lm.trainer import SelfRewardingTrainer, SPINTrainer
    from self_rewarding_lm.training.loss_config import LossConfig
    from self_rewarding_lm.training.losses import PairBatch, reads
    from self_rewarding_lm.training.reference import EMAReference, MixedReference

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
    "checks": ("Check", "ChecksConfig"),
    "config": (
        "ComparisonConfig",
        "FinetuneConfig",
        "OptimConfig",
        "PAPER_REWARD_CONFIG",
        "RewardConfig",
        "SamplingConfig",
        "SelfInstruct",
        "TEN_POINT_REWARD_CONFIG",
        "from_stage",
    ),
    "data.datasets": ("create_mock_dataset",),
    "data.oasst": ("OpenAssistant", "open_assistant"),
    "errors": ("Interrupted", "SelfRewardingError"),
    "evaluation.anchor": ("JudgeAnchor",),
    "evaluation.head_to_head": ("Comparison", "compare"),
    "evaluation.held_out": ("HeldOutReward", "VerifierAccuracy", "WinRateOverLast"),
    "evaluation.judge_quality": ("JudgeEvaluation", "evaluate_judge"),
    "evaluation.responses": ("measure_responses",),
    "evaluation.verifying": ("reasoning_task",),
    "generation.candidates": ("generate",),
    "generation.local": ("LocalEngine",),
    "generation.server.engine": ("ServerEngine",),
    "judges.consistency": ("ConsistencyConfig",),
    "judges.ensemble": ("EnsembleJudge",),
    "judges.functions": ("FunctionJudge", "ModuleJudge"),
    "judges.implicit": ("ImplicitJudge",),
    "judges.reward_model": ("RewardModelJudge",),
    "judges.self_judge": ("PairwiseJudge", "SelfJudge"),
    "judges.server": ("ServerJudge",),
    "judges.votes": ("VoteJudge",),
    "models.loading": ("load_causal_lm",),
    "recipes.paper": ("create_default_paper_config", "paper_recipe"),
    "records": (
        "Candidate",
        "Demonstration",
        "Judgement",
        "MetaJudgement",
        "PreferencePair",
        "Prompt",
        "RankedReplies",
    ),
    "report.card": ("push_to_hub",),
    "report.page": ("write_report",),
    "runs.run": ("Run",),
    "runs.weights": ("import_checkpoint",),
    "stages.contrastive": ("Contrast", "ContrastiveDPOConfig"),
    "stages.dpo": ("DPOConfig",),
    "stages.eft": ("BuildEFTConfig",),
    "stages.external": ("ExternalRewardDPOConfig",),
    "stages.meta_rewarding": ("MetaJudgingConfig", "MetaRewardDPOConfig"),
    "stages.pairing": ("PairingConfig",),
    "stages.self_reward": ("SelfRewardDPOConfig",),
    "stages.self_reward_sft": ("SelfRewardSFTConfig",),
    "stages.sft": ("SFTConfig",),
    "stages.spin": ("SelfPlayConfig",),
    "stages.temporal": ("TemporalDPOConfig",),
    "trainer": ("SPINTrainer", "SelfRewardingTrainer"),
    "training.loss_config": ("LossConfig",),
    "training.losses": ("PairBatch", "reads"),
    "training.reference": ("EMAReference", "MixedReference"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
