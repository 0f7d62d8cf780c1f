"""Training with weights, gradients and optimiser state spread over all processes (FSDP2).

Whole weights generate, judge and are saved; they are in the user's module. To train, a twin of the
module holds this process's share of each parameter, and the whole weights are freed; afterwards
they are gathered again. So nothing but the training loop knows of shares, and no collective is
called while processes generate at their own pace.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Sharded:
    """A module's sharded twin, to be used within `training()`.

    twin: the module to train, its parameters DTensors; each layer is gathered for its own forward
    and backward alone.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        world = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        aliases = {id(p): p for p in module.parameters()}  # the twin's parameters, until sharded
        self.twin: nn.Module = copy.deepcopy(module, aliases)
        for unit in units(self.twin):
            fully_shard(unit, mesh=mesh)
        fully_shard(self.twin, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in self.twin.parameters())

    @contextmanager
    def training(self) -> Iterator[nn.Module]:
        """The twin; the module's own weights are gone within, and the trained ones afterwards."""
        self._free()
        yield self.twin  # after an error the others may be anywhere: nothing waits for them then
        self._gather()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within `training()`: the module has the present weights, and may be given others."""
        self._gather()
        yield
        self._scatter()
        self._free()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, DTensor]]:
        assert isinstance(self.twin, FSDPModule)
        self.twin.reshard()  # after a forward without a backward its own parameters are still whole
        for own, share in zip(self.module.parameters(), self.twin.parameters(), strict=True):
            detached = share.detach()
            assert isinstance(detached, DTensor)
            yield own, detached

    def _gather(self) -> None:
        for own, share in self._pairs():
            own.data = share.full_tensor().clone()  # of its own storage, not padded

    def _scatter(self) -> None:
        for own, share in self._pairs():
            share.to_local().copy_(spread(own.data, share).to_local())

    def _free(self) -> None:
        for own, _ in self._pairs():
            own.data = own.data.new_empty(0)


def units(module: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the layers, which are the members of lists of modules.

    The parts of a layer where layers are lists themselves (x-transformers). Parts without matrices
    stay with the whole.
    """
    found: list[nn.Module] = []

    def collect(part: nn.Module) -> None:
        for child in part.children():
            if isinstance(part, nn.ModuleList) and not isinstance(child, nn.ModuleList):
                if any(p.ndim > 1 for p in child.parameters()):
                    found.append(child)
            else:
                collect(child)

    collect(module)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, as all of it; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: DTensor) -> DTensor:
    """A tensor that all processes hold in full, spread over them as another one is."""
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
