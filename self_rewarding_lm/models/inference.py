"""How forwards without gradients run: the module's mode, and products in narrow types.

A CPU without instructions for bfloat16 multiplies bfloat16 matrices several times slower than
float32 ones. On such a CPU a linear layer's weights are widened piece by piece while they are used,
and attention is computed and kept in float32. There is no second copy of the weights, and sums are
more exact.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from self_rewarding_lm.errors import mixed_precision

WIDENED_AT_ONCE = 4_194_304  # numbers: 16 MiB in float32


NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


WORTH = 5_000_000
"""Numbers in a model's matrices from which on products in bfloat16 are worth it where a CPU has
instructions for them; below, what comes beside the products takes most of the time."""


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Put each submodule back into training or evaluation mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and back afterwards."""
    with modes_kept(module):
        module.eval()
        yield


@contextmanager
def inferring(module: nn.Module) -> Iterator[None]:
    """Run forwards without gradients and dropout, with the products this machine is fastest at."""
    slow = any(is_slow(p.dtype, p.device) for p in module.parameters())
    with torch.no_grad(), evaluating(module), WideProducts() if slow else nullcontext():
        yield


@cache
def _has_products(dtype: torch.dtype) -> bool | None:
    """Whether this CPU has instructions for products of a narrow type; None if unknown.

    Only x86 CPUs tell.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    if dtype not in NATIVE or capabilities.get("architecture") != "x86_64":
        return None
    return any(capabilities.get(name) for name in NATIVE[dtype])


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a type are faster in float32."""
    return device.type == "cpu" and _has_products(dtype) is False


def products_unused(kind: str, dtype: torch.dtype, numbers: int, *, mixed: bool) -> str | None:
    """Words if a run would be faster with this CPU's products in bfloat16; None if not.

    kind: of the device. dtype, numbers: of the model's matrices. mixed: whether the run is in mixed
    precision.
    """
    is_exact = kind == "cpu" and dtype == torch.float32 and not mixed
    if not is_exact or numbers < WORTH or not _has_products(torch.bfloat16):
        return None
    return (
        "This CPU has instructions for products in bfloat16 that are not used: "
        f"{mixed_precision('bf16')} trains and generates faster, with weights in float32 "
        "(docs/training.md)."
    )


def products_unused_by(module: nn.Module, device: torch.device, *, mixed: bool) -> str | None:
    """As `products_unused`, of a module's own matrices."""
    matrices = [p for p in module.parameters() if p.ndim >= 2 and p.dtype == torch.float32]
    numbers = sum(matrix.numel() for matrix in matrices)
    return products_unused(device.type, torch.float32, numbers, mixed=mixed)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which products of a tensor are computed."""
    return torch.float32 if is_slow(tensor.dtype, tensor.device) else tensor.dtype


class WideProducts(TorchFunctionMode):
    """Within it, linear layers with narrow weights compute their products in float32."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_narrow(args[1]):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_narrow(weight: Tensor) -> bool:
    is_matrix = weight.ndim == 2 and weight.numel() > 0
    return is_matrix and is_slow(weight.dtype, weight.device)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (..., d) and weight (v, d) in float32, a few rows of the weight at a time."""
    rows = max(1, WIDENED_AT_ONCE // weight.shape[1])
    wide, parts = x.float(), []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            wide_bias = None if bias is None else bias[part].float()
            parts.append(F.linear(wide, weight[part].float(), wide_bias).to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
