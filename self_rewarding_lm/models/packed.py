"""Matrices in the layout in which a CPU multiplies by them, made once for many forwards.

oneDNN and MKL bring a matrix into a layout of their own before they multiply by it. For the few
rows of a decoding step that takes a fifth to a half of the product's time. The products are the
same but for the order of their sums.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_rewarding_lm.models.inference import WORTH, is_slow
from self_rewarding_lm.models.interface import SHARE_OF_FREE, device_of, free_bytes
from self_rewarding_lm.models.narrow import numbers_of

Product = Callable[[Tensor], Tensor]


class PackedMatrices:
    """Copies of the matrices of a module's linear layers, and products by them.

    On a CPU, of a module with WORTH numbers or more, where memory has room for the copies. They
    follow the weights: what was changed is copied anew, by the next `prepare`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.device = module, device_of(module)
        parts = module.modules() if self.device.type == "cpu" else ()
        self.layers = [part for part in parts if type(part) is nn.Linear]
        self._products: dict[int, tuple[tuple, Product]] = {}  # by layer: of what, and how

    def prepare(self, rows: int | None = None) -> None:
        """Make the copies that are missing. rows: of a product, as MKL packs for their number
        alone; if None, or for one row, nothing in float32 is packed.
        """
        if torch.is_autocast_enabled("cpu"):
            return  # products are in another type than the weights
        some = [layer for layer in self.layers if _packs(layer.weight, rows)]
        if sum(layer.weight.numel() for layer in some) < WORTH or not self._has_room(some):
            return
        with torch.no_grad():
            for layer in some:
                made_of = rows, layer.weight.dtype, numbers_of(layer.weight)
                if self._products.get(id(layer), ((), None))[0] != made_of:
                    self._products[id(layer)] = made_of, PACKS[layer.weight.dtype](layer, rows)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, forwards without gradients multiply by the copies of what has not changed."""
        with ExitStack() as stack:
            for layer in self.layers:
                made_of, product = self._products.get(id(layer), ((), None))
                present = layer.weight.dtype, numbers_of(layer.weight)
                if product is not None and made_of[1:] == present and "forward" not in vars(layer):
                    vars(layer)["forward"] = partial(_forward, layer, product)
                    stack.callback(vars(layer).pop, "forward")
            yield

    def _has_room(self, layers: list[nn.Linear]) -> bool:
        missing = [layer.weight.nbytes for layer in layers if id(layer) not in self._products]
        return sum(missing) <= SHARE_OF_FREE * free_bytes(self.device)


def _forward(layer: nn.Linear, product: Product, x: Tensor) -> Tensor:
    is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if is_plain and x.dtype == layer.weight.dtype:
        return product(x)
    return F.linear(x, layer.weight, layer.bias)


def _by_onednn(layer: nn.Linear, rows: int | None) -> Product:
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(layer.weight.detach(), rows)
    return lambda x: ops._linear_pointwise(x, packed, layer.bias, "none", [], "")


def _by_mkl(layer: nn.Linear, rows: int | None) -> Product:
    """MKL's layout is for a number of rows; others get an ordinary product."""
    ops, weight = torch.ops.mkl, layer.weight.detach()
    packed = ops._mkl_reorder_linear_weight(weight, rows)
    return lambda x: ops._mkl_linear(x, packed, weight, layer.bias, rows)


PACKS: dict[torch.dtype, Callable[[nn.Linear, int | None], Product]] = {
    torch.bfloat16: _by_onednn,
    torch.float32: _by_mkl,
}
"""How matrices of a type are packed."""


def _packs(weight: Tensor, rows: int | None) -> bool:
    """Whether a matrix can be packed for so many rows."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.numel():
        return False
    has_gain = weight.dtype == torch.bfloat16 or (rows or 0) > 1  # MKL's for one row has none
    return (
        weight.dtype in PACKS
        and has_gain
        and _works(weight.dtype)
        and not is_slow(weight.dtype, weight.device)
    )


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch packs a type, and multiplies right by what it packed.

    The operations are those that its own compiler uses, without a promise that they stay.
    """
    layer = nn.Linear(48, 32, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
    x = torch.linspace(-1, 1, 8 * 48).view(8, 48).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(1, -1, 32 * 48).view(32, 48))
    try:
        with torch.no_grad():
            return torch.allclose(PACKS[dtype](layer, 8)(x), layer(x))
    except Exception:  # whatever a build lacks
        return False
