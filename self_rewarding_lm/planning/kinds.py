"""In what kinds of stages that sample differ, as far as a plan counts it: a function a difference.

Each has the rule of most kinds, and beside it those of the kinds that have another one.
"""

from functools import singledispatch
from typing import Any

from self_rewarding_lm.stages import (
    ContrastiveDPOConfig,
    MetaRewardDPOConfig,
    SelfRewardSFTConfig,
    TemporalDPOConfig,
)
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig

COMPARING = "comparing judgements is not counted, nor are their pairs; see docs/meta_rewarding.md"


@singledispatch
def answering(stage: SampledPreferenceConfig) -> int:
    """Models that answer each prompt."""
    return 1


@answering.register
def _(stage: TemporalDPOConfig) -> int:
    return 1 + (stage.rejected_from is not None) + stage.chosen_from_next


@singledispatch
def trainings(stage: SampledPreferenceConfig) -> int:
    """Trainings of a round; the pairs of those before the last are trained on alone."""
    return 1


@trainings.register
def _(stage: TemporalDPOConfig) -> int:
    return 1 + stage.chosen_from_next


@singledispatch
def beside_prompts(stage: SampledPreferenceConfig) -> list[str]:
    """Texts of which each candidate's prompt has one beside it; empty where there are none."""
    return []


@beside_prompts.register
def _(stage: ContrastiveDPOConfig) -> list[str]:
    return [text for c in stage.pairs() for text in (c.positive, c.negative)]


@singledispatch
def is_judged(stage: SampledPreferenceConfig) -> bool:
    """Whether anybody scores the candidates."""
    return True


@is_judged.register
def _(stage: ContrastiveDPOConfig) -> bool:
    return stage.is_judged


@singledispatch
def sides(stage: SampledPreferenceConfig) -> int:
    """Responses of a row that is trained on."""
    return 2


@sides.register
def _(stage: SelfRewardSFTConfig) -> int:
    return 1


@singledispatch
def made_of_prompt(stage: SampledPreferenceConfig) -> int:
    """Rows to train on that a prompt gives at most."""
    return stage.pairing.pairs_per_prompt


@made_of_prompt.register
def _(stage: SelfRewardSFTConfig) -> int:
    return stage.num_candidate_responses


@singledispatch
def mixed_in(stage: SampledPreferenceConfig) -> Any:
    """The dataset whose rows are trained on beside the sampled ones."""
    return None


@mixed_in.register
def _(stage: SelfRewardSFTConfig) -> Any:
    return stage.train_dataset


@singledispatch
def not_counted(stage: SampledPreferenceConfig) -> tuple[str, ...]:
    """Words on what a plan leaves out."""
    return ()


@not_counted.register
def _(stage: MetaRewardDPOConfig) -> tuple[str, ...]:
    return (COMPARING,) if stage.train_judge else ()
