"""What kind of layers a model has, read off its modules.

Known are decoder layers of attention and a feed-forward part, gated or plain, all alike; of others
nothing is guessed. Works on modules without memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from self_rewarding_lm.planning.memory import Block

TRIED = 8  # numbers that an activation function is tried on


class NotKnownError(Exception):
    """The layers are none of the known kind; the words say why."""


def layers_of(module: nn.Module, count: int) -> nn.ModuleList:
    """A model's decoder layers. Raises NotKnownError where there is no list of `count` layers."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise NotKnownError(f"the {type(module).__name__} has no list of {count} layers")


def block_of(layers: nn.ModuleList, config: Any) -> Block:
    """The kind of all of the layers. Raises NotKnownError where they are not of the known kind."""
    sizes = {(type(layer), sum(p.numel() for p in layer.parameters())) for layer in layers}
    if len(sizes) != 1:
        raise NotKnownError("its layers are not all alike")
    layer = layers[0]
    inside = [(width, "attn" in name or "attention" in name) for name, width in linears(layer)]
    attention = [width for width, attends in inside if attends]
    feeding = [width for width, attends in inside if not attends]
    if len(attention) < 2 or len(feeding) not in (2, 3):
        raise NotKnownError(
            f"a layer has {len(attention)} linear parts in its attention and {len(feeding)} "
            "beside it; known are two or more, and two (plain) or three (gated)"
        )
    heads = int(config.num_attention_heads)
    rms, norms, head_norms = _norms(layer, config.hidden_size)
    return Block(
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        inner=feeding[-1],
        gated=_is_gated(layer, feeding),
        attention_inputs=len(attention) - 1,
        inner_inputs=len(feeding) - 1,
        activation_kept=_kept_by(_activation(layer)),
        rms_norms=rms,
        norms=norms,
        head_norms=head_norms,
        dropouts=_dropouts(layer),
        attention_dropout=_attention_dropout(layer),
    )


def linears(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and input widths of the linear parts of a module."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield name, part.in_features
        elif type(part).__name__ == "Conv1D":  # transformers' linear layer with weights turned
            yield name, int(part.weight.shape[0])  # type: ignore[union-attr,arg-type]


def _is_gated(layer: nn.Module, feeding: list[int]) -> bool:
    """Three linear parts, or two of which the first gives both halves at once."""
    if len(feeding) == 3:
        return True
    for name, part in layer.named_modules():
        if isinstance(part, nn.Linear) and "attn" not in name and part.in_features == feeding[0]:
            return part.out_features == 2 * feeding[1]
    return False


def _norms(layer: nn.Module, hidden: int) -> tuple[int, int, int]:
    """Norms of the hidden state in their own words (RMS), by one kernel, and norms of heads."""
    rms = fused = heads = 0
    for part in layer.modules():
        weight = getattr(part, "weight", None)
        if "Norm" not in type(part).__name__ or not isinstance(weight, Tensor):
            continue
        if weight.numel() != hidden:
            heads += 1
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            fused += 1
        else:
            rms += 1
    return rms, fused, heads


def _dropouts(layer: nn.Module) -> int:
    """Dropout layers of the hidden state."""
    found = [name for name, part in layer.named_modules() if isinstance(part, nn.Dropout)]
    return sum("attn_dropout" not in name and "attention_dropout" not in name for name in found)


def _attention_dropout(layer: nn.Module) -> bool:
    """Whether the attention has a dropout of its own."""
    names = ("attn_dropout", "attention_dropout")
    return any(hasattr(part, name) for part in layer.modules() for name in names)


def _activation(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation function of the feed-forward part."""
    for part in layer.modules():
        for name in ("act_fn", "act", "activation_fn", "activation"):
            found: Any = getattr(part, name, None)
            if callable(found):
                return found  # type: ignore[no-any-return]
    raise NotKnownError("its activation function was not found")


def _kept_by(activation: Callable[[Tensor], Tensor]) -> int:
    """Tensors as large as its input that autograd keeps for an activation and what takes its
    result: 2 for silu and gelu (input, result), 1 for relu, more where it is made of many steps."""
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == TRIED:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.device("cpu"), torch.enable_grad():
        x, other = torch.ones(TRIED, requires_grad=True), torch.ones(TRIED, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = activation(x) * other  # noqa: F841 - the graph keeps the tensors alive
    return len(kept - {other.untyped_storage().data_ptr()})
