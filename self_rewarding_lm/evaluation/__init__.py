"""Did it help: agreement of judges with people, win rates, rewards on held-out prompts.

Knows nothing of training and of how a run is resumed; what it measures it also returns as records.
Begin with `judge_quality.py` (is a judge any good) and `head_to_head.py` (is one model better than
another).
"""

from self_rewarding_lm.evaluation.anchor import JudgeAnchor
from self_rewarding_lm.evaluation.head_to_head import compare
from self_rewarding_lm.evaluation.held_out import HeldOutReward, VerifierAccuracy, WinRateOverLast
from self_rewarding_lm.evaluation.judge_quality import evaluate_judge

__all__ = [
    "HeldOutReward",
    "JudgeAnchor",
    "VerifierAccuracy",
    "WinRateOverLast",
    "compare",
    "evaluate_judge",
]
