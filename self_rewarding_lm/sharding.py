"""What processes share: gradients, which are summed once a step, and under FSDP2 the weights too.

Each process may hold the whole model. It has then nothing to do with the others until it has
worked through its rows of a step, so they may have different numbers of micro-batches, and
different weights without a gradient.

Or weights, gradients and optimiser state are spread over all processes (FSDP2). Whole weights
generate, judge and are saved; they are in the user's module. To train, a twin of the module holds
this process's share of each parameter, and the whole weights are freed; afterwards they are
gathered again. So nothing but the training loop knows of shares, and no collective is called while
processes generate at their own pace.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves

BUCKET_BYTES = 2**25
"""Of gradients that are sent together: many small messages are slow, and a bucket is a copy."""


def on_any_process(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is True on any process."""
    numbers = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.bool().tolist()


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Make each parameter's gradient the sum of those of all processes.

    Where a process has none it counts as zeros. A parameter that has none on any process stays
    without one, so that the optimiser leaves it alone, as it would in one process.
    """
    has_gradient = on_any_process([p.grad is not None for p in parameters], device)
    gradients: list[Tensor] = []
    for parameter, has in zip(parameters, has_gradient, strict=True):
        if has:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        is_large = len(bucket) == 1 and bucket[0].is_contiguous()  # summed in place, not copied
        flat = bucket[0].view(-1) if is_large else torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def send_from_main(tensors: Sequence[Tensor]) -> None:
    """Give the tensors on all processes the numbers that they have on the main one."""
    for tensor in tensors:
        whole = tensor.contiguous()
        if whole.numel():
            dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
        if whole is not tensor:
            tensor.copy_(whole)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, of about BUCKET_BYTES together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(g.nbytes for g in bucket) + gradient.nbytes
        if bucket and (gradient.dtype != bucket[0].dtype or size > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


class Sharded:
    """A module's sharded twin, to be used within `training()`.

    twin: the module to train, its parameters DTensors; each layer is gathered for its own forward
    and backward alone.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self._is_last = False  # the backward at hand, of a step
        self._used: dict[str, bool] = {}
        self._forwards: dict[str, int] = {}  # of each unit, whose backward is still to come
        world = dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        tensors = chain(module.parameters(), module.buffers())
        aliases = {id(t): t for t in tensors}  # the twin's; its parameters until they are sharded
        self.twin: nn.Module = copy.deepcopy(module, aliases)
        parts = [*units(self.twin), self.twin]
        for part in parts:
            fully_shard(part, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in self.twin.parameters())
        for name, part in self.twin.named_modules():
            if part in parts:
                part.register_forward_pre_hook(partial(self._watch, name), with_kwargs=True)

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

    def expect_backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Before the backward of `loss`. is_last: of a step, in which gradients are reduced.

        A reduction has the gradients of all weights of a unit that a process has used. Processes
        may have used different ones, so those that are missing are made, of zeros.
        """
        assert isinstance(self.twin, FSDPModule)
        self.twin.set_requires_gradient_sync(is_last)
        self._is_last, self._used = is_last, {}
        engine = torch.autograd.Variable._execution_engine
        loss.register_hook(lambda _: engine.queue_callback(self._end_backward))

    def drop_unused(self) -> None:
        """After the last backward: no gradient for weights that no process has used."""
        named = dict(self.twin.named_parameters())
        used = on_any_process([self._used.get(name, False) for name in named], self.device)
        for parameter, is_used in zip(named.values(), used, strict=True):
            if not is_used:
                parameter.grad = None

    def _watch(self, name: str, unit: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a unit's forward: look at its gradients when those of its inputs are known.

        FSDP reduces them next. If the unit has several forwards, its weights have their gradients
        when the last of them is through.
        """
        is_recomputed = torch._C._current_graph_task_id() != -1  # within a backward
        values = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        values = [value for value in values if value.requires_grad]
        if is_recomputed or not values:
            return
        self._forwards[name] = self._forwards.get(name, 0) + 1
        waiting = [name]

        def through(_: Tensor) -> None:
            self._forwards[name] -= len(waiting)
            waiting.clear()
            if self._forwards[name] == 0:
                self._complete(name, unit)

        for value in values:
            value.register_hook(through)

    def _end_backward(self) -> None:
        """Units without a gradient of their inputs are reduced after a backward."""
        self._complete("", self.twin)
        self._forwards.clear()

    def _complete(self, prefix: str, part: nn.Module) -> None:
        """Make the missing gradients of weights that are whole now, and note which were there."""
        if not self._is_last:
            return
        for name, parameter in part.named_parameters(prefix):
            if not isinstance(parameter, DTensor) and name not in self._used:
                self._used[name] = parameter.grad is not None
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

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
