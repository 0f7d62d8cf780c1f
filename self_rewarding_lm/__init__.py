"""Train a language model on rewards that it gives itself (arXiv:2401.10020).

Public names are imported when they are asked for, so that importing the package costs nothing. The
kinds of stages and judges are public by their rows in `stages/kinds.py` and `judges/kinds.py`, all
others by NAMES. `__init__.pyi` says the same to editors; `python -m tests.support.public_names`
writes it.
"""

import sys
from importlib import import_module
from typing import Any

from self_rewarding_lm.moved import MovedModules

__version__ = "0.2.0"

NAMES = {
    "checks": "Check ChecksConfig",
    "config": (
        "ComparisonConfig FinetuneConfig MarkedRubric OptimConfig PAPER_REWARD_CONFIG "
        "RewardConfig SamplingConfig SelfInstruct TEN_POINT_REWARD_CONFIG from_stage"
    ),
    "data.datasets": "create_mock_dataset",
    "data.hub": "from_hub",
    "data.oasst": "OpenAssistant open_assistant",
    "data.tokenizers": "CallableTokenizer",
    "errors": "Interrupted JudgeError PairingError SelfRewardingError",
    "evaluation.anchor": "JudgeAnchor",
    "evaluation.head_to_head": "Comparison compare",
    "evaluation.held_out": "HeldOutReward VerifierAccuracy WinRateOverLast",
    "evaluation.judge_quality": "JudgeEvaluation evaluate_judge",
    "evaluation.responses": "measure_responses",
    "evaluation.verifying": "reasoning_task",
    "generation.candidates": "generate",
    "generation.local": "LocalEngine",
    "generation.server.engine": "ServerEngine",
    "judges.base": "Judge",
    "judges.consistency": "ConsistencyConfig",
    "models.loading": "load_causal_lm",
    "recipes.paper": "create_default_paper_config paper_recipe",
    "recipes.reader": "read_recipe",
    "recipes.yaml_nodes": "read_yaml",
    "records": (
        "Advantage Candidate Demonstration Judgement MetaJudgement PreferencePair Prompt "
        "RankedReplies"
    ),
    "report.card": "push_to_hub",
    "report.page": "write_report",
    "runs.callbacks": "Callback",
    "runs.run": "Run",
    "runs.weights": "import_checkpoint",
    "stages.contrastive": "Contrast",
    "stages.meta_rewarding": "MetaJudgingConfig",
    "stages.pairing": "PairingConfig",
    "stages.stepwise": "StepComparisonConfig",
    "stats": "wilson_interval",
    "trainer": "SPINTrainer SelfRewardingTrainer",
    "training.loss_config": "LossConfig",
    "training.losses": "PairBatch reads",
    "training.reference": "EMAReference MixedReference",
}
"""File -> public names that it defines."""

KINDS = {"stages.kinds": "STAGES", "judges.kinds": "JUDGES"}
"""File -> its rows: classes that are public by being there."""

sys.meta_path.append(MovedModules())


def kinds() -> dict[str, Any]:
    """The classes of all rows by their name."""
    rows = (getattr(import_module(f"{__name__}.{file}"), rows) for file, rows in KINDS.items())
    return {kind.__name__: kind for kinds in rows for kind in kinds}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*" ".join(NAMES.values()).split(), *kinds()})
    for file, names in NAMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{file}"), name)
    if name[:1].isupper() and name in (found := kinds()):  # a class; others need no heavy imports
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
