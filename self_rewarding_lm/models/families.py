"""Which file takes a model: Hugging Face, x-transformers, or a plain module."""

from typing import Any

from torch import nn

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.hugging_face import HuggingFaceModel
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.plain import PlainModel
from self_rewarding_lm.models.x_transformers import XTransformersModel, unwrapped
from self_rewarding_lm.runs.pretrained import is_hugging_face


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
