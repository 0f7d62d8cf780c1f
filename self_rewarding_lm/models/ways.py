"""Which ways generation and training go with a model, and why, in words."""

from self_rewarding_lm.models.batching import packs
from self_rewarding_lm.models.interface import TokenModel


def generation_way(model: TokenModel) -> str:
    """How a model is decoded."""
    refused = getattr(model, "refused", {})
    if getattr(model, "attends", False):
        return "over our keys and values: prompts are shared, rows join and leave at any token"
    if getattr(model, "caches", False):
        why = refused.get("attends", "it has a cache of its own")
        return f"with the model's own cache, a batch after the other ({why})"
    why = refused.get("caches", "its forward takes no positions and cache (docs/adapters.md)")
    return f"without a cache, a whole forward a token ({why})"


def training_way(model: TokenModel) -> str:
    """How rows go through a model in training, and where logits are made."""
    refused = getattr(model, "refused", {})
    if model.training is None:
        why = refused.get("training", "the model gives logits alone")
        return f"padded rows, all logits at once ({why})"
    if packs(model):
        return "rows packed without padding, logits a piece at a time"
    why = refused.get("packs") or refused.get("attends", "its attention cannot use ours")
    return f"padded rows, logits a piece at a time ({why})"
