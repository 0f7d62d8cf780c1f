"""Reads the sizes of a model without loading its weights.

Input: the model's configuration, or a function that builds it. The modules are built on torch's
meta device, without memory for their weights, so the numbers of parameters are exact. Decoder
layers are understood if all of them are alike and consist of attention and a feed-forward part,
gated or plain. For any other layer the plan reports unknown numbers.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models.gguf import GgufOpener
from self_rewarding_lm.models.interface import limit_of
from self_rewarding_lm.models.loading import dtype_of, is_gguf, require, what_is_wrong, with_adapter
from self_rewarding_lm.recipes.plan.memory import Adapter, Block
from self_rewarding_lm.text import amount

TRIED = 8  # numbers in the input with which an activation function is tried


FOUR_BIT_BYTES = 0.516
"""Bytes of a weight in nf4 with doubly quantised scales: 4 bit, and an 8-bit scale for each 64."""


class NotKnownError(Exception):
    """The layers are of a kind that this file does not understand; the message says why."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that a plan computes with.

    module: the model on the meta device.
    parameters, trainable: numbers of weights, exact.
    weight_bytes: bytes of all weights.
    gradient_bytes: bytes of the gradients of the trained weights.
    saved_bytes: bytes of the folder of weights that a stage saves.
    products: numbers of weights in linear layers, including the head; each token is multiplied
        with all of them.
    max_len: tokens of the longest sequence, None if the model sets no limit.
    head_trained: whether the last linear layer is trained.
    block: a decoder layer, None if it is not understood; `reason` then says why.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    saved_bytes: int
    layers: int
    products: int
    vocab: int
    max_len: int | None
    head_trained: bool
    block: Block | None = None
    reason: str | None = None
    adapter: Adapter | None = None


def read_shape(
    source: nn.Module | str | Callable[[], Any],
    *,
    torch_dtype: str | torch.dtype | None = None,
    four_bit: bool = False,
    peft_config: Any = None,
) -> ModelShape:
    """Read the shape of a model from any form in which a recipe may name it.

    source: a folder, a hub name or a .gguf file, of which only the configuration is read; a
    module; or a function that builds a module, called on the meta device. torch_dtype: type of the
    weights of a model given by name; default float32. four_bit: whether linear layers but the head
    are quantised to 4 bit. peft_config: the adapter to add, None for none.
    Raises ConfigError if the source is no model or cannot be built without memory.
    """
    with _quietly():
        if isinstance(source, str):
            module, saved_adapter = _build_by_name(source, torch_dtype)
        else:
            module, saved_adapter = _build(source), None
        if peft_config is not None and saved_adapter is not None:
            raise ConfigError("the model has an adapter already; leave peft out.")
        base = _BaseModel(module, four_bit)
        peft_config = peft_config or saved_adapter
        if peft_config is None:
            return base.shape(module)
        with torch.device("meta"):
            adapted = with_adapter(module, peft_config)
    return base.shape(adapted, peft_config)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the warnings that transformers gives while a model is built."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _build(source: Any) -> nn.Module:
    """A module on the meta device: a copy of `source`, or what `source()` returns."""
    if isinstance(source, nn.Module):
        return _without_memory(source)
    name = getattr(source, "__qualname__", repr(source))
    try:
        with torch.device("meta"):
            module = source()
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(
            f"the model that {name}() makes cannot be looked at, as it cannot be made without "
            f"memory (on torch's meta device): {type(error).__name__}: {error!s:.300}. Give a "
            "folder with the model's config.json or a hub name."
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}() must make a torch module; got {type(module).__name__}.")
    return module


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device; the module itself does not change."""
    meta_tensors: dict[int, Any] = {}  # deepcopy takes these instead of copying the tensors
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        meta_tensors[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(module, meta_tensors)


def _build_by_name(source: str, torch_dtype: Any) -> tuple[nn.Module, Any]:
    """A causal LM of transformers on the meta device, and its folder's adapter, None for none."""
    require("transformers", "a model by name")
    from transformers import AutoConfig, AutoModelForCausalLM

    name, adapter = source, None
    try:
        if (Path(source) / "adapter_config.json").exists():
            require("peft", "a model with an adapter")
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(source)
            adapter.inference_mode = False
            name = adapter.base_model_name_or_path or source
        if is_gguf(name):
            config = GgufOpener().config(Path(name))
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        dtype = dtype_of(torch_dtype)
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            ), adapter
    except (ConfigError, StoreError):
        raise
    except Exception as error:  # transformers, the hub and gguf raise errors of many types
        raise ConfigError(
            f"no configuration of a causal LM could be read from {source!r}. A plan needs a folder "
            "with a config.json, a name on the hub or a .gguf file; weights need not be there. "
            f"What was wrong here: {what_is_wrong(error)}"
        ) from error


class _BaseModel:
    """The sizes of a model before an adapter is added, which would change the model in place."""

    def __init__(self, module: nn.Module, four_bit: bool) -> None:
        self.name = type(module).__name__
        self.parameters = {id(p): p for p in module.parameters()}
        self.dtype = next(
            (p.dtype for p in self.parameters.values() if p.is_floating_point()), torch.float32
        )
        config: Any = getattr(module, "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_len = limit_of(module)
        self.head = _head_of(module)
        self.weights = _linear_weights(module)
        self.quantised = {i for i in self.weights if four_bit and self.weights[i] is not self.head}
        self.unquantised_itemsize = 4 if four_bit else None  # the other weights become float32
        self.layers, self.block, self.reason = 0, None, None
        self._read_layers(module)

    def _read_layers(self, module: nn.Module) -> None:
        """Set `layers` and `block`, or `reason` if the layers are not understood."""
        try:
            if not hasattr(self.config, "num_hidden_layers"):
                raise NotKnownError(f"a {self.name} is no model of transformers")
            self.layers = int(self.config.num_hidden_layers)
            self.block = block_of(layers_of(module, self.layers), self.config)
        except NotKnownError as error:
            self.reason = str(error)

    def shape(self, module: nn.Module, peft_config: Any = None) -> ModelShape:
        """The shape of `module`: this model, or this model with the adapter of `peft_config`."""
        parameters = list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        weight_bytes = sum(map(self._bytes, parameters))
        gradient_bytes = sum(p.numel() * p.itemsize for p in trained)
        return ModelShape(
            name=self.name,
            module=module,
            dtype=self.dtype,
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in trained),
            weight_bytes=weight_bytes,
            gradient_bytes=gradient_bytes,
            saved_bytes=weight_bytes if peft_config is None else gradient_bytes,
            layers=self.layers,
            products=self.products,
            vocab=self.vocab,
            max_len=self.max_len,
            head_trained=self.head is not None and self.head.requires_grad,
            block=self.block,
            reason=self.reason,
            adapter=None if peft_config is None else _adapter(module, peft_config),
        )

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary; 0 if neither the head nor the configuration says it."""
        configured = getattr(self.config, "vocab_size", None) or 0
        return int(configured if self.head is None else self.head.shape[0])

    @property
    def products(self) -> int:
        """Numbers of weights in linear layers, the head counted once."""
        in_head = 0 if self.head is None else self.head.numel()
        return in_head + sum(w.numel() for w in self.weights.values() if w is not self.head)

    def _bytes(self, parameter: Tensor) -> int:
        """Bytes of a weight of this model or of an adapter."""
        if id(parameter) in self.quantised:
            return round(parameter.numel() * FOUR_BIT_BYTES)
        itemsize = self.unquantised_itemsize if id(parameter) in self.parameters else None
        return parameter.numel() * (itemsize or parameter.itemsize)


def _head_of(module: nn.Module) -> Tensor | None:
    """The weights of the last linear layer (vocab, hidden), None if the model names none."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(head, "weight", None)


def _linear_weights(module: nn.Module) -> dict[int, Tensor]:
    """The weights of all linear layers, by their id()."""
    parts = dict(module.named_modules())
    weights = [parts[name].weight for name, _ in linears(module)]
    return {id(weight): weight for weight in weights if isinstance(weight, Tensor)}


def linears(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The name and the input width of each linear layer inside a module."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield name, part.in_features
        elif type(part).__name__ == "Conv1D":  # transformers' linear layer, weights transposed
            yield name, int(part.weight.shape[0])  # type: ignore[union-attr,arg-type]


def _adapter(module: nn.Module, peft_config: Any) -> Adapter:
    """The sizes of the adapter that was added to a module."""
    lora_weights = [p for name, p in module.named_parameters() if "lora_" in name]
    return Adapter(
        rank=int(getattr(peft_config, "r", 0) or 0),
        itemsize=lora_weights[0].itemsize if lora_weights else 4,
        dropout=bool(getattr(peft_config, "lora_dropout", 0.0)),
    )


def layers_of(module: nn.Module, count: int) -> nn.ModuleList:
    """A model's decoder layers. Raises NotKnownError if it has no list of `count` layers."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise NotKnownError(f"the {type(module).__name__} has no list of {amount(count, 'layer')}")


def block_of(layers: nn.ModuleList, config: Any) -> Block:
    """The sizes that all of the layers share.

    Raises NotKnownError if the layers differ or have other parts than attention and a feed-forward
    part.
    """
    sizes = {(type(layer), sum(p.numel() for p in layer.parameters())) for layer in layers}
    if len(sizes) != 1:
        raise NotKnownError("its layers are not all alike")
    layer = layers[0]
    widths = [(width, "attn" in name or "attention" in name) for name, width in linears(layer)]
    attention = [width for width, in_attention in widths if in_attention]
    feed_forward = [width for width, in_attention in widths if not in_attention]
    if len(attention) < 2 or len(feed_forward) not in (2, 3):
        raise NotKnownError(
            f"a layer has {amount(len(attention), 'linear part')} in its attention and "
            f"{len(feed_forward)} beside it; known are two or more, and two (plain) or three "
            "(gated)"
        )
    heads = int(config.num_attention_heads)
    rms, norms, head_norms = _norms(layer, config.hidden_size)
    return Block(
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        inner=feed_forward[-1],
        gated=_is_gated(layer, feed_forward),
        attention_inputs=len(attention) - 1,
        inner_inputs=len(feed_forward) - 1,
        activation_kept=_tensors_kept(_activation(layer)),
        rms_norms=rms,
        norms=norms,
        head_norms=head_norms,
        dropouts=_dropouts(layer),
    )


def _is_gated(layer: nn.Module, widths: list[int]) -> bool:
    """Whether the feed-forward part is gated.

    It is if it has three linear layers, or two of which the first computes both branches at once.
    widths: the input widths of its linear layers.
    """
    if len(widths) == 3:
        return True
    for name, part in layer.named_modules():
        if isinstance(part, nn.Linear) and "attn" not in name and part.in_features == widths[0]:
            return part.out_features == 2 * widths[1]
    return False


def _norms(layer: nn.Module, hidden: int) -> tuple[int, int, int]:
    """How many norms a layer has: of the hidden state in Python (RMS norms), of the hidden state
    by one kernel of torch, and of the heads of queries or keys."""
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
    """How many dropout layers act on the hidden state."""
    names = [name for name, part in layer.named_modules() if isinstance(part, nn.Dropout)]
    return sum("attn_dropout" not in name and "attention_dropout" not in name for name in names)


def _activation(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation function of the feed-forward part. Raises NotKnownError if there is none."""
    for part in layer.modules():
        for name in ("act_fn", "act", "activation_fn", "activation"):
            activation: Any = getattr(part, name, None)
            if callable(activation):
                return activation  # type: ignore[no-any-return]
    raise NotKnownError("its activation function was not found")


def _tensors_kept(activation: Callable[[Tensor], Tensor]) -> int:
    """How many tensors of its input's size autograd keeps for an activation function and the
    product that reads its result.

    2 for silu and gelu (input, result), 1 for relu, more if the function computes in many steps.
    The function is tried on a small tensor.
    """
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == TRIED:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.device("cpu"), torch.enable_grad():
        x, branch = torch.ones(TRIED, requires_grad=True), torch.ones(TRIED, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = activation(x) * branch  # noqa: F841 - the graph keeps the tensors alive
    return len(kept - {branch.untyped_storage().data_ptr()})
