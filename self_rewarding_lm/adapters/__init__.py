"""One view of any causal token-level transformer: the TokenModel protocol, and a file a kind."""

from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.adapters.base import TokenModel
from self_rewarding_lm.adapters.hugging_face import HuggingFaceModel, is_hugging_face
from self_rewarding_lm.adapters.key_values import KeyValues
from self_rewarding_lm.adapters.loading import load_causal_lm
from self_rewarding_lm.adapters.plain import PlainModel
from self_rewarding_lm.adapters.policy import Policy
from self_rewarding_lm.adapters.pretrained import load_pretrained
from self_rewarding_lm.adapters.sessions import Cache, Plan, Session
from self_rewarding_lm.adapters.x_transformers import XTransformersModel, unwrapped
from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.weights import read_weights

__all__ = [
    "Cache",
    "KeyValues",
    "Plan",
    "Policy",
    "Session",
    "TokenModel",
    "adapt",
    "load_causal_lm",
    "load_into",
]


def adapt(model: Any) -> TokenModel:
    """The TokenModel of a module, tried out on a few tokens.

    Raises AdapterError where the output is no logits of shape (b, t, v) or where a token's logits
    depend on later tokens.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if is_hugging_face(model):
        return HuggingFaceModel(model)
    transformer = unwrapped(model)
    return PlainModel(model) if transformer is None else XTransformersModel(model, transformer)


def load_into(module: nn.Module, file: Path) -> None:
    """Load a file of weights into a module of any kind, in place; StoreError if they do not fit."""
    (load_pretrained if is_hugging_face(module) else read_weights)(module, file)
