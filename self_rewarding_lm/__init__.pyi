"""The public names, for editors. Written by `python -m tests.support.public_names`."""

from self_rewarding_lm.checks import Check, ChecksConfig
from self_rewarding_lm.config import ComparisonConfig, FinetuneConfig, MarkedRubric, OptimConfig, PAPER_REWARD_CONFIG, RewardConfig, SamplingConfig, SelfInstruct, TEN_POINT_REWARD_CONFIG, from_stage
from self_rewarding_lm.data.datasets import create_mock_dataset
from self_rewarding_lm.data.hub import from_hub
from self_rewarding_lm.data.oasst import OpenAssistant, open_assistant
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.errors import Interrupted, JudgeError, PairingError, SelfRewardingError
from self_rewarding_lm.evaluation.anchor import JudgeAnchor
from self_rewarding_lm.evaluation.head_to_head import Comparison, compare
from self_rewarding_lm.evaluation.held_out import HeldOutReward, VerifierAccuracy, WinRateOverLast
from self_rewarding_lm.evaluation.judge_quality import JudgeEvaluation, evaluate_judge
from self_rewarding_lm.evaluation.responses import measure_responses
from self_rewarding_lm.evaluation.verifying import reasoning_task
from self_rewarding_lm.generation.candidates import generate
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.certainty import CertaintyJudge
from self_rewarding_lm.judges.consistency import ConsistencyConfig
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
from self_rewarding_lm.judges.implicit import ImplicitJudge
from self_rewarding_lm.judges.reward_model import RewardModelJudge
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.judges.shuffled import ShuffledJudge
from self_rewarding_lm.judges.votes import VoteJudge
from self_rewarding_lm.models.loading import load_causal_lm
from self_rewarding_lm.recipes.paper import create_default_paper_config, paper_recipe
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.yaml_nodes import read_yaml
from self_rewarding_lm.records import Advantage, Candidate, Demonstration, Judgement, MetaJudgement, PreferencePair, Prompt, RankedReplies
from self_rewarding_lm.report.card import push_to_hub
from self_rewarding_lm.report.page import write_report
from self_rewarding_lm.runs.callbacks import Callback
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.weights import import_checkpoint
from self_rewarding_lm.stages.contrastive import Contrast, ContrastiveDPOConfig
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.grpo import SelfRewardGRPOConfig
from self_rewarding_lm.stages.meta_rewarding import MetaJudgingConfig, MetaRewardDPOConfig
from self_rewarding_lm.stages.pairing import PairingConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.stages.stepwise import StepComparisonConfig, StepwiseDPOConfig
from self_rewarding_lm.stages.temporal import TemporalDPOConfig
from self_rewarding_lm.stats import wilson_interval
from self_rewarding_lm.trainer import SPINTrainer, SelfRewardingTrainer
from self_rewarding_lm.training.loss_config import LossConfig
from self_rewarding_lm.training.losses import PairBatch, reads
from self_rewarding_lm.training.reference import EMAReference, MixedReference

__version__: str
__all__ = [
    "Advantage",
    "BuildEFTConfig",
    "CallableTokenizer",
    "Callback",
    "Candidate",
    "CertaintyJudge",
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
    "Judge",
    "JudgeAnchor",
    "JudgeError",
    "JudgeEvaluation",
    "Judgement",
    "LocalEngine",
    "LossConfig",
    "MarkedRubric",
    "MetaJudgement",
    "MetaJudgingConfig",
    "MetaRewardDPOConfig",
    "MixedReference",
    "ModuleJudge",
    "OpenAssistant",
    "OptimConfig",
    "PAPER_REWARD_CONFIG",
    "PairBatch",
    "PairingConfig",
    "PairingError",
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
    "SelfRewardGRPOConfig",
    "SelfRewardSFTConfig",
    "SelfRewardingError",
    "SelfRewardingTrainer",
    "ServerEngine",
    "ServerJudge",
    "ShuffledJudge",
    "StepComparisonConfig",
    "StepwiseDPOConfig",
    "TEN_POINT_REWARD_CONFIG",
    "TemporalDPOConfig",
    "VerifierAccuracy",
    "VoteJudge",
    "WinRateOverLast",
    "compare",
    "create_default_paper_config",
    "create_mock_dataset",
    "evaluate_judge",
    "from_hub",
    "from_stage",
    "generate",
    "import_checkpoint",
    "load_causal_lm",
    "measure_responses",
    "open_assistant",
    "paper_recipe",
    "push_to_hub",
    "read_recipe",
    "read_yaml",
    "reads",
    "reasoning_task",
    "wilson_interval",
    "write_report",
]
