"""New instructions from a model: the few-shot prompt, reading what it wrote, filters.

Self-Instruct (arXiv:2212.10560) as arXiv:2401.10020 uses it (sections 2 and 3.1.3, appendix A.5):
a model is shown a numbered list of instructions and goes on with it. What is left out of what it
writes has a reason, which is counted. Knows nothing of models, tokens, settings or files.
"""

from self_rewarding_lm.instruct.few_shot import Example, FewShot, few_shot_prompt
from self_rewarding_lm.instruct.filters import (
    DEFAULT_KEYWORDS,
    FilterCounts,
    InstructionPool,
    instruction_problem,
    rouge_l,
)
from self_rewarding_lm.instruct.reading import parse_instructions

__all__ = [
    "DEFAULT_KEYWORDS",
    "Example",
    "FewShot",
    "FilterCounts",
    "InstructionPool",
    "few_shot_prompt",
    "instruction_problem",
    "parse_instructions",
    "rouge_l",
]
