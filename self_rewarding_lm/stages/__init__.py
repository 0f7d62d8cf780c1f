"""The stages of a recipe: a file for each, its settings and its work.

A stage reads its data, makes pairs if it has none, and hands them to the training loop. Knows
nothing of recipes as files, reports or the command. Begin with `base.py` (what a stage is),
`sft.py` (the shortest), then `sampled.py` and `pair_maker.py` (prompts to pairs); `kinds.py` has a
row for each stage.
"""

from self_rewarding_lm.stages.contrastive import Contrast
from self_rewarding_lm.stages.kinds import STAGES
from self_rewarding_lm.stages.meta_rewarding import MetaJudgingConfig
from self_rewarding_lm.stages.pairing import PairingConfig
from self_rewarding_lm.stages.stepwise import StepComparisonConfig

__all__ = ["STAGES", "Contrast", "MetaJudgingConfig", "PairingConfig", "StepComparisonConfig"]
__all__ += [stage.__name__ for stage in STAGES]
globals().update({stage.__name__: stage for stage in STAGES})
