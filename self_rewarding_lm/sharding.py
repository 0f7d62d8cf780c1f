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
        """Gives the twin. Within, the module has no weights; afterwards it has the trained ones."""
        self._free()
        yield self.twin  # after an error the others may be anywhere: nothing waits for them then
        self._gather()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within `training()`: the module has the weights of now, and may be given others."""
        self._gather()
        yield
        self._scatter()
        self._free()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, DTensor]]:
        """Each parameter of the module and the twin's share of it."""
        assert isinstance(self.twin, FSDPModule)
        self.twin.reshard()  # after a forward without a backward its own parameters are still whole
        for parameter, share in zip(self.module.parameters(), self.twin.parameters(), strict=True):
            detached = share.detach()
            assert isinstance(detached, DTensor)
            yield parameter, detached

    def _gather(self) -> None:
        for parameter, share in self._pairs():
            parameter.data = share.full_tensor().clone()  # of its own storage, not padded

    def _scatter(self) -> None:
        for parameter, share in self._pairs():
            share.to_local().copy_(spread(parameter.data, share).to_local())

    def _free(self) -> None:
        for parameter, _ in self._pairs():
            parameter.data = parameter.data.new_empty(0)


def units(module: nn.Module) -> list[nn.Module]:
    """The parts that are gathered at once: the layers, which are the members of lists of modules.

    If layers are lists themselves (x-transformers), the parts of a layer. Parts without matrices
    stay with the whole.
    """
    layers: list[nn.Module] = []

    def collect(part: nn.Module) -> None:
        for child in part.children():
            if isinstance(part, nn.ModuleList) and not isinstance(child, nn.ModuleList):
                if any(p.ndim > 1 for p in child.parameters()):
                    layers.append(child)
            else:
                collect(child)

    collect(module)
    return layers


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes; all processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: DTensor) -> DTensor:
    """A tensor that all processes hold in full, spread over them as `like` is."""
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
