"""References that move with the policy: a second copy of the trained weights, and how it follows.

Knows parameters alone; what is asked of the reference, and when, is in objectives and fit.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from self_rewarding_lm.adapters.inference import evaluating
from self_rewarding_lm.closed import Config
from self_rewarding_lm.sharding import spread, whole

logger = logging.getLogger(__name__)

REFERENCE = "reference/"


class EMAReference(Config):
    """The reference is a moving average of the policy: decay * ref + (1 - decay) * policy.

    It begins as the stage's first weights. With decay 1 it stays there.
    """

    decay: float = Field(default=0.99, ge=0, le=1)
    """What the reference keeps of itself; ours: it forgets half of the start in 69 updates."""
    every: int = Field(default=1, ge=1)
    """Optimiser steps between two updates."""

    @property
    def shares(self) -> tuple[float, float]:
        """Of the reference and of the policy in an update."""
        return self.decay, 1 - self.decay


class MixedReference(Config):
    """TR-DPO (arXiv:2404.09656): ref <- alpha * policy + (1 - alpha) * ref every so many steps.

    It begins as the stage's first weights. alpha = 1 is the paper's hard update.
    """

    alpha: float = Field(default=0.6, ge=0, le=1)
    """The policy's share. Default: TRL's (`ref_model_mixup_alpha`)."""
    every: int = Field(default=512, ge=1)
    """tau, optimiser steps between two updates. Default: TRL's (`ref_model_sync_steps`)."""

    @property
    def shares(self) -> tuple[float, float]:
        """Of the reference and of the policy in an update."""
        return 1 - self.alpha, self.alpha


Moving = EMAReference | MixedReference


class LiveReference:
    """A moving reference's weights: a copy of those that are trained, in float32 at least, since
    small updates are lost in narrower types. What is not trained it shares with the policy.

    steps: optimiser steps that it has followed.
    """

    def __init__(self, settings: Moving) -> None:
        self.settings = settings
        self.weights: dict[str, Tensor] = {}
        self.steps = 0

    def begin(self, module: nn.Module) -> None:
        """Copy a module's weights, unless there is a copy from an earlier round."""
        if not self.weights:
            for name, parameter in _trained(module):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.weights[name] = parameter.detach().to(wide, copy=True)
            size = sum(t.numel() * t.itemsize for t in self.weights.values()) / 2**30
            logger.info("a reference that moves: a second copy of %.2f GiB of weights", size)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The reference's weights in the module; no gradients, no dropout."""
        _reshard(module)
        with torch.no_grad(), evaluating(module):
            kept = [(p, _exchange(p, self.weights[name])) for name, p in _trained(module)]
            try:
                yield
            finally:
                _reshard(module)
                for parameter, before in kept:
                    _exchange(parameter, before)

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Called behind each optimiser step."""
        self.steps += 1
        if self.steps % self.settings.every == 0:
            own, new = self.settings.shares
            for name, parameter in _trained(module):
                weights = self.weights[name]
                weights.mul_(own).add_(parameter.detach().to(weights.dtype), alpha=new)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The weights, whole and on the CPU, by names with a prefix. keep: as optimizer_state."""
        found = {f"{REFERENCE}{name}": whole(tensor) for name, tensor in self.weights.items()}
        return {name: tensor.cpu() for name, tensor in found.items()} if keep else {}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` gave."""
        self.steps = steps
        for name, own in self.weights.items():
            given = tensors[f"{REFERENCE}{name}"]
            own.copy_(spread(given, own) if isinstance(own, DTensor) else given)


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _exchange(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Give a parameter other numbers; those that it had."""
    tensor = tensor.to(parameter.dtype)
    if isinstance(parameter, DTensor):  # FSDP gathers from the storage that a share had at first
        before = parameter.detach().clone()
        parameter.detach().copy_(tensor)
        return before
    before, parameter.data = parameter.data, tensor
    return before


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):  # after a forward without a backward the root is whole
        module.reshard()
