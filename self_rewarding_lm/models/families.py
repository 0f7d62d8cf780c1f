"""The families of models, a row each, and which of them a module belongs to."""

from typing import Any, Protocol

from torch import nn

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.compiled import uncompiled
from self_rewarding_lm.models.hugging_face import HuggingFaceModel
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.plain import PlainModel
from self_rewarding_lm.models.x_transformers import XTransformersModel


class Family(Protocol):
    """The class of a family: it says which modules it is for, and makes a TokenModel of one."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether a module is of this family."""
        ...

    def __call__(self, module: nn.Module) -> TokenModel: ...


FAMILIES: tuple[Family, ...] = (HuggingFaceModel, XTransformersModel, PlainModel)
"""The first that accepts a module adapts it; the last accepts every module."""


def adapt(model: Any) -> TokenModel:
    """The TokenModel of a module, tried out on a few tokens; compiled modules are run as they are.

    Raises AdapterError if the output is no logits of shape (b, t, v) or if a token's logits depend
    on later tokens.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    module = uncompiled(model)
    family = next(family for family in FAMILIES if family.accepts(module))
    return family(module)
