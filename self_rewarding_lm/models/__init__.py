"""Any causal token-level transformer behind one interface, a file for each family.

A `TokenModel` gives logits and, if it can, a cache of keys and values. Knows nothing of prompts as
text, sampling, judges or losses. Begin with `interface.py` (what a model must do), then
`families.py` (which file takes a model) and `plain.py`, the simplest family.
"""

from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan, Session, TokenModel
from self_rewarding_lm.models.loading import load_causal_lm

__all__ = [
    "Plan",
    "Session",
    "TokenModel",
    "adapt",
    "load_causal_lm",
]
