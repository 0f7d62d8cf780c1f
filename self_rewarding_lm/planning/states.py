"""What optimisers keep: the optimiser itself takes a step on weights without memory."""

import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.optimizers import make_optimizers

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
BLOCK = 256
"""Numbers in 8 bit that share a scale in float32 (arXiv:2110.02861)."""
LEAST_EIGHT_BIT = 4096
"""Smaller tensors keep their states in float32 (bitsandbytes' min_8bit_size)."""


def state_bytes(module: nn.Module, optim: OptimConfig, vocab: int) -> int | None:
    """Bytes of an optimiser's state for the trained weights of a module on the meta device.

    None where that is not known: of a function whose optimiser takes no step there. Raises
    ConfigError where the optimiser cannot train the module.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if optim.optimizer in EIGHT_BIT:
        return _eight_bit(module)
    if optim.optimizer == "adafactor":  # a number of each row and of each column
        return sum(p.itemsize * (sum(p.shape[-2:]) if p.ndim > 1 else p.numel()) for p in trained)
    try:
        made = make_optimizers(module, optim.completed(1e-6, 1e-7, 1), vocab)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in made:
            optimizer.step()
    except SelfRewardingError:
        raise
    except Exception:  # of a user's function, or of kernels that there are not for this device
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
    return sum(
        value.numel() * value.itemsize
        for optimizer in made
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim  # steps are counted in scalars
    )


def _eight_bit(module: nn.Module) -> int:
    """Two states of a byte a number with their scales; of embeddings and small tensors float32."""
    embeddings = {id(p.weight) for p in module.modules() if isinstance(p, nn.Embedding)}
    found = 0.0
    for parameter in module.parameters():
        if parameter.requires_grad:
            wide = id(parameter) in embeddings or parameter.numel() < LEAST_EIGHT_BIT
            found += 2 * parameter.numel() * (4 if wide else 1 + 4 / BLOCK)
    return round(found)
