"""Weights that leave no path of a model silent, so that a trial sees all of it."""

import torch
from torch import nn


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Draw each weight anew, always the same numbers: none is zero, and all paths are loud.

    Matrices have the size at which a layer's output is as large as its input, and a half more; a
    vector (of a norm, a gate, a bias) is moved from what it was. The global random state stays.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        noise = noise.to(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
