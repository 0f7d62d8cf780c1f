"""A module's weights away from its devices for a while, so that another process can have them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def off_device(module: nn.Module) -> Iterator[None]:
    """Within, parameters and buffers are in the machine's memory; afterwards they are back.

    They stay the same objects, so that optimisers and ties hold. What is computed with the module
    meanwhile is computed on the CPU.
    """
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    homes = [(tensor, tensor.device) for tensor in held if tensor.device.type != "cpu"]
    for tensor, _ in homes:
        tensor.data = tensor.data.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for tensor, device in homes:
            tensor.data = tensor.data.to(device)
