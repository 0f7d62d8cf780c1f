"""A module without what torch.compile made of it."""

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


INNER = "_orig_mod"
"""Where torch.compile's wrapper holds the module."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself: torch.compile's wrappers around it, its parts and forwards are taken off.

    The parts are changed in place, so a module that was compiled by `module.compile()` is no longer
    compiled; the weights are the same. Here rows have ever other lengths and hooks come and go,
    for each of which compiled code is made anew, or is wrong.
    """
    was_compiled = INNER in module._modules
    module = _inner(module)
    for part in module.modules():
        for name, child in part.named_children():
            if INNER in child._modules:
                part._modules[name], was_compiled = _inner(child), True
        if getattr(part, "_compiled_call_impl", None) is not None:
            part._compiled_call_impl, was_compiled = None, True
        forward: Any = vars(part).get("forward")
        original = getattr(forward, "_torchdynamo_orig_callable", None)
        if original is not None:
            del part.forward  # its class has the original, unless the part had one of its own
            if getattr(original, "__func__", None) is not type(part).forward:
                part.forward = original
            was_compiled = True
        vars(part).pop("_is_torch_compile", None)  # a mark of torch's
    if was_compiled:
        logger.warning(
            "the %s is compiled (torch.compile): its own module is run, without the compiled code, "
            "which would be compiled again for each length of rows. Its weights are the same.",
            type(module).__name__,
        )
    return module


def _inner(module: Any) -> nn.Module:
    while INNER in module._modules:  # hasattr would look through wrappers of other kinds, too
        module = module._modules[INNER]
    return module
