"""Matrices that are cast once for many forwards in mixed precision.

`torch.autocast` casts a frozen matrix anew in each forward, and a trained one whenever it is
entered again: for a step of decoding, whose products are small, that costs nearly as much as the
rest. The copies that are kept here are those that it would make, so the results are the same.

An adapter stays beside its base, for the numbers of a narrow type are far apart: merged into
bfloat16, an adapter that adds a thousandth to each weight leaves most of them as they were. So it
is merged into a layer's copy only if SURVIVES of what it adds is still there after rounding.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_rewarding_lm.models.inference import evaluating, is_slow
from self_rewarding_lm.models.interface import SHARE_OF_FREE, device_of, free_bytes
from self_rewarding_lm.models.policy import without_adapters
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


SURVIVES = 0.95
"""What must be left of an adapter if it is merged: 1 less the norm of what rounding takes from it,
as a share of its own."""


COLUMNS = 16
"""Of a matrix, evenly spread; only if SURVIVES is left on them the whole is merged and measured."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A narrow copy of a layer's matrix, and the state of all that it was made of.

    added, lost: of the layer's adapter, squares of the norms of what it adds and of what a merge
    takes from that. is_merged: whether it is in the copy.
    """

    narrow: Tensor
    state: tuple
    added: float = 0.0
    lost: float = 0.0
    is_merged: bool = False


class NarrowMatrices:
    """Copies of a module's matrices in the type in which `torch.autocast` multiplies.

    Linear layers in float32 have one, those of an adapter left out. The copies follow the weights:
    what was changed or replaced is copied anew, by the next `prepare`. trains: the forwards are
    trained on, so only matrices that are frozen have a copy, and no adapter is merged.
    """

    def __init__(self, module: nn.Module, *, trains: bool = False) -> None:
        self.module, self.device, self.trains = module, device_of(module), trains
        self.layers: list[Any] = [
            part
            for part in without_adapters(module)
            if _is_linear(part) and not (trains and part.weight.requires_grad)
        ]
        self._adapted: dict[int, Any] = {  # by layer: what peft puts around it
            id(part.base_layer): part
            for part in module.modules()
            if not trains and hasattr(part, "merged_adapters") and hasattr(part, "base_layer")
        }
        self._of_adapter = {
            layer: [p for name, p in part.named_parameters() if not name.startswith("base_layer")]
            for layer, part in self._adapted.items()
        }
        self._copies: dict[int, _Copy] = {}  # by layer
        self._told = ""

    def prepare(self) -> None:
        """Make the copies that are missing, if `torch.autocast` is on and memory has room."""
        dtype = self._dtype()
        if dtype is None or not (self._copies or self._has_room(dtype)):
            return
        states = [self._state(layer, dtype) for layer in self.layers]
        copies = [self._copies.get(id(layer)) for layer in self.layers]
        stale = [
            (layer, state)
            for layer, state, copy in zip(self.layers, states, copies, strict=True)
            if copy is None or copy.state != state
        ]
        if not stale:
            return
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.no_grad(),
            evaluating(self.module),
        ):
            for layer, state in stale:
                copy = _copied(layer, self._adapted.get(id(layer)), dtype, state)
                self._copies[id(layer)] = copy
        if self._adapted:
            self._tell(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(copy.narrow.nbytes for copy in self._copies.values())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, linear layers multiply by the copies wherever `torch.autocast` would cast."""
        self.prepare()
        with ExitStack() as stack:
            if self._dtype() is not None and self._copies:
                for layer in self.layers:
                    self._use(stack, layer, self._copies[id(layer)])
            yield

    def narrow(self, layer: Any) -> Tensor | None:
        """A layer's copy, if `torch.autocast` would cast its present matrix to it now.

        None for a matrix that is trained on.
        """
        copy, kind = self._copies.get(id(layer)), self.device.type
        if copy is None or copy.is_merged or not torch.is_autocast_enabled(kind):
            return None
        if self.trains and layer.weight.requires_grad:
            return None
        is_present = copy.state == self._state(layer, torch.get_autocast_dtype(kind))
        return copy.narrow if is_present else None

    def _use(self, stack: ExitStack, layer: Any, copy: _Copy) -> None:
        """Have a layer's forwards use its copy until the stack is closed."""
        kind, wide, narrow = self.device.type, layer.weight, copy.narrow
        made_of, held = numbers_of(wide), list[Tensor]()  # what the copy stands for in a forward

        def put(layer: Any, _: Any) -> None:
            is_other = layer.weight is not wide or numbers_of(wide) != made_of
            if self.trains and (is_other or wide.requires_grad):
                return  # a callback has put other weights in, or has them trained
            casts = torch.is_autocast_enabled(kind)
            casts = casts and torch.get_autocast_dtype(kind) == narrow.dtype
            if casts or copy.is_merged:
                held.append(layer.weight)
                layer._parameters["weight"] = narrow if casts else narrow.to(wide.dtype)

        def restore(layer: Any, *_: Any) -> None:
            if held:
                layer._parameters["weight"] = held.pop()

        stack.callback(layer.register_forward_pre_hook(put).remove)
        stack.callback(layer.register_forward_hook(restore, always_call=True).remove)
        if copy.is_merged:
            adapted = self._adapted[id(layer)]
            adapted.merged_adapters.extend(adapted.active_adapters)
            stack.callback(adapted.merged_adapters.clear)

    def _dtype(self) -> torch.dtype | None:
        """The narrow type of products now; None without one, or where it is slow."""
        if not torch.is_autocast_enabled(self.device.type):
            return None
        dtype = torch.get_autocast_dtype(self.device.type)
        return None if dtype.itemsize >= 4 or is_slow(dtype, self.device) else dtype

    def _has_room(self, dtype: torch.dtype) -> bool:
        needed = dtype.itemsize * sum(layer.weight.numel() for layer in self.layers)
        return needed <= SHARE_OF_FREE * free_bytes(self.device)

    def _state(self, layer: Any, dtype: torch.dtype) -> tuple:
        """What a copy depends on: the weights, and which of the adapters are in use."""
        adapted = self._adapted.get(id(layer))
        tensors, uses = [layer.weight], ()
        if adapted is not None:
            tensors += self._of_adapter[id(layer)]
            uses = (adapted.disable_adapters, adapted.merged, *adapted.active_adapters)
        return (dtype, *uses, *((id(t), *numbers_of(t)) for t in tensors))

    def _tell(self, dtype: torch.dtype) -> None:
        """Log, if it is news, whether the adapter was merged, and how much of it survives that."""
        copies = [self._copies[id(layer)] for layer in self.layers if id(layer) in self._adapted]
        parts = []
        for is_merged, words in ((True, "merged into"), (False, "kept apart from")):
            some = [copy for copy in copies if copy.is_merged == is_merged]
            if some:
                share = _survives(sum(c.added for c in some), sum(c.lost for c in some))
                would = "survives" if is_merged else "would survive a merge"
                parts.append(
                    f"{words} {amount(len(some), 'layer')} ({max(share, 0):.0%} of it {would})"
                )
        said = (
            f"{len(self._copies)} matrices are cast to {str(dtype).removeprefix('torch.')} once "
            f"({self.nbytes / 2**20:,.0f} MiB); the adapter is {' and '.join(parts)}"
        )
        if said != self._told:
            logger.info("sampling: %s", said)
            self._told = said


def numbers_of(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor's numbers do: where they are, and how often they were written."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _is_linear(part: nn.Module) -> bool:
    """Whether a part multiplies by one matrix in float32, and does nothing else with it."""
    is_known = type(part) is nn.Linear or type(part).__name__ == "Conv1D"  # of transformers
    weight = getattr(part, "weight", None) if is_known else None
    return isinstance(weight, Tensor) and weight.dtype == torch.float32 and not weight.is_meta


def _copied(layer: Any, adapted: Any, dtype: torch.dtype, state: tuple) -> _Copy:
    """The copy of a layer's matrix. adapted: what an adapter puts around it; None without one."""
    narrow = layer.weight.detach().to(dtype)
    if adapted is None or adapted.merged or adapted.disable_adapters:
        return _Copy(narrow, state)
    # 1. on a few columns
    added, lost = _rounded(*_columns(layer, adapted), dtype)
    if _survives(added, lost) < SURVIVES:
        return _Copy(narrow, state, added, lost)
    # 2. on all of them
    whole = _merged(layer, adapted)
    if whole is None:
        return _Copy(narrow, state, added, lost)
    added, lost = _rounded(layer.weight, whole, dtype)
    if _survives(added, lost) < SURVIVES:
        return _Copy(narrow, state, added, lost)
    return _Copy(whole.to(dtype), state, added, lost, is_merged=True)


def _rounded(alone: Tensor, whole: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Squares of the norms of what an adapter adds, and of what rounding takes from it."""
    added = whole - alone
    left = whole.to(dtype).to(whole.dtype) - alone.to(dtype).to(whole.dtype)
    return float(added.square().sum()), float((added - left).square().sum())


def _survives(added: float, lost: float) -> float:
    return 1 - math.sqrt(lost / added) if added else 1.0


def _columns(layer: Any, adapted: Any) -> tuple[Tensor, Tensor]:
    """A few columns of a layer's matrix, alone and with its adapter: (c, out) each.

    They are what the layer makes of rows with a single 1, less what it makes of zeros.
    """
    width = layer.weight.shape[0 if type(layer).__name__ == "Conv1D" else 1]
    count = min(COLUMNS, width)
    places = torch.arange(count, device=layer.weight.device) * width // count
    rows = F.one_hot(places, width).to(layer.weight.dtype)  # (c, in)
    rows = torch.cat([torch.zeros_like(rows[:1]), rows])  # (1 + c, in)
    alone, whole = layer(rows), adapted(rows)  # (1 + c, out)
    return alone[1:] - alone[:1], whole[1:] - whole[:1]


def _merged(layer: Any, adapted: Any) -> Tensor | None:
    """A layer's matrix with its adapter merged; None if that is not all that the adapter does."""
    kept = dict(layer._parameters)
    copies = {name: nn.Parameter(p.clone(), False) for name, p in kept.items() if p is not None}
    layer._parameters.update(copies)
    try:
        adapted.merge()
        others = [name for name in copies if name != "weight"]
        is_all = all(torch.equal(layer._parameters[name], kept[name]) for name in others)
        return layer.weight.detach() if adapted.merged and is_all else None
    except Exception as error:  # each kind of adapter has its own
        logger.debug("an adapter is kept apart: %r", error)
        return None
    finally:
        layer._parameters.update(kept)
        adapted.merged_adapters.clear()
