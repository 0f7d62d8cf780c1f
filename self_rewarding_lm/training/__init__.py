"""Pairs become weights: losses, the reference and the one training loop.

Knows nothing of how pairs were made: it takes rows or pairs of token ids and an objective. Begin
with `losses.py` (the formulas), then `objectives.py` (a batch becomes a loss), `reference.py` and
`fit.py` (the loop).
"""

from self_rewarding_lm.training.loss_config import LossConfig
from self_rewarding_lm.training.losses import PairBatch, reads
from self_rewarding_lm.training.objectives import (
    Objective,
    PreferenceObjective,
    SupervisedObjective,
)
from self_rewarding_lm.training.policy_gradient import PolicyGradientObjective

__all__ = [
    "LossConfig",
    "Objective",
    "PairBatch",
    "PolicyGradientObjective",
    "PreferenceObjective",
    "SupervisedObjective",
    "reads",
]
