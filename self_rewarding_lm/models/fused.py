"""Linear layers with a LoRA (arXiv:2106.09685) in one function, for training in mixed precision.

`torch.autocast` casts what such a layer reads once for the base and once for the adapter, and the
layers that read the same tensor do so again; the adapter's part is then scaled and added by passes
over the whole output. Here a tensor is cast and kept once for all layers that read it, and a
product adds the adapter's part as it is made.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_rewarding_lm.models.narrow import NarrowMatrices
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.runtime import Runtime


class FusedAdapters:
    """The layers of a module that peft has put a LoRA around. copies: of their frozen matrices."""

    def __init__(self, module: nn.Module, copies: NarrowMatrices) -> None:
        self.copies = copies
        self.layers: list[Any] = [part for part in module.modules() if _is_lora(part)]
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, these layers compute in one function wherever that gives what peft's own would.

        A copy of the module that is made meanwhile has peft's own forwards.
        """

        def forward(layer: Any, x: Tensor, *args: Any, **others: Any) -> Tensor:
            base = self.copies.narrow(layer.base_layer)
            adapter = None if base is None or args or others else _only_adapter(layer)
            if base is None or adapter is None:
                return type(layer).forward(layer, x, *args, **others)
            bias = layer.base_layer.bias
            return _Adapted.apply(
                x,
                self._cast(x, base.dtype),
                base,
                None if bias is None else bias.to(base.dtype),
                layer.lora_A[adapter].weight.to(base.dtype),
                layer.lora_B[adapter].weight.to(base.dtype),
                layer.scaling[adapter],
            )

        with ExitStack() as stack:
            for layer in self.layers:
                layer.forward = MethodType(forward, layer)
                stack.callback(layer.__dict__.pop, "forward")
            stack.callback(setattr, self, "_last", None)
            yield

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in another type, which layers that read it one after the other share."""
        version = 0 if x.is_inference() else x._version
        if self._last is not None and self._last[0]() is x and self._last[1] == version:
            return self._last[2]
        narrow = x.detach().to(dtype)
        self._last = weakref.ref(x), version, narrow
        return narrow


@contextmanager
def cast_once(module: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Within, mixed precision casts the matrices that are not trained once for all forwards.

    That is the head's too, by which a policy multiplies without its layer. What linear layers with
    a LoRA read is cast once for all that read it. Under FSDP each forward casts all of it, as
    weights are whole within it alone.
    """
    with ExitStack() as stack:
        if not runtime.shards:
            with runtime.accelerator.autocast():
                copies = NarrowMatrices(module, trains=True)
                stack.enter_context(copies.used())
            stack.enter_context(FusedAdapters(module, copies).used())
            policy = runtime.unwrapped(module)
            if isinstance(policy, Policy):
                stack.enter_context(policy.head_narrowed(copies.narrow))
        yield


class _Adapted(torch.autograd.Function):
    """x W' + b + scale x A' B', of x that is cast already."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        narrow: Tensor,
        base: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            within = F.linear(narrow, down)  # (*n, r)
            out = F.linear(narrow, base, bias)  # (*n, o)
            out.view(-1, len(base)).addmm_(within.flatten(0, -2), up.t(), alpha=scale)
        ctx.save_for_backward(narrow, base, down, up, within)
        ctx.scale, ctx.dtype = scale, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        narrow, base, down, up, within = ctx.saved_tensors
        above = gradients[0].flatten(0, -2)  # (n, o)
        of_within = torch.mm(above, up).mul_(ctx.scale)  # (n, r)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(above, base).to(ctx.dtype)  # a wider type than theirs sums both parts
            of_x = of_x.add_(torch.mm(of_within, down)).view_as(narrow)
        of_bias = above.sum(0) if ctx.needs_input_grad[3] else None
        of_down = torch.mm(of_within.t(), narrow.flatten(0, -2))
        of_up = torch.mm(above.t(), within.flatten(0, -2)).mul_(ctx.scale)
        return of_x, None, None, of_bias, of_down, of_up, None


def _is_lora(part: nn.Module) -> bool:
    """Whether a part is peft's plain LoRA around a plain linear layer, with its class's forward."""
    kind = f"{type(part).__module__}.{type(part).__name__}"
    if kind != "peft.tuners.lora.layer.Linear" or "forward" in part.__dict__:
        return False
    return type(part.base_layer) is nn.Linear


def _only_adapter(layer: Any) -> str | None:
    """The adapter that a layer adds to its base; None if it does anything else.

    That is several adapters, none, one that is merged, DoRA and other variants, biases of adapters,
    or dropout.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    parts = layer.lora_A[names[0]], layer.lora_B[names[0]]
    dropout = layer.lora_dropout[names[0]]
    drops = dropout.training and getattr(dropout, "p", 0.0) != 0
    is_plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
    return names[0] if is_plain and not drops else None
