"""One view of any causal token-level transformer: the TokenModel protocol, and a file a kind."""

from typing import Any

from torch import nn

from self_rewarding_lm.adapters.base import Cache, TokenModel
from self_rewarding_lm.adapters.plain import PlainModel
from self_rewarding_lm.adapters.policy import Policy
from self_rewarding_lm.adapters.x_transformers import XTransformersModel, unwrapped
from self_rewarding_lm.errors import AdapterError

__all__ = ["Cache", "Policy", "TokenModel", "adapt"]


def adapt(model: Any) -> TokenModel:
    """The TokenModel of a module, tried out on a few tokens.

    Raises AdapterError where the output is no logits of shape (b, t, v) or where a token's logits
    depend on later tokens.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    transformer = unwrapped(model)
    return PlainModel(model) if transformer is None else XTransformersModel(model, transformer)
