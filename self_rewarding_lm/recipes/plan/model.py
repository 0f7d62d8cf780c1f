"""A model's sizes without its weights: its configuration, and its modules on torch's meta device.

Numbers of parameters are exact, as the modules are there in full and only their memory is not. The
layers that are known are decoder layers of attention and a feed-forward part, gated or plain, all
alike; of others nothing is guessed.
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

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.interface import limit_of
from self_rewarding_lm.models.loading import dtype_of, gguf_of, require, with_adapter
from self_rewarding_lm.recipes.plan.memory import Adapter, Block

TRIED = 8  # numbers that an activation function is tried on


FOUR_BIT_BYTES = 0.516
"""Of a weight in nf4 with doubly quantised scales: 4 bit, and a scale of 8 bit for each 64."""


class NotKnownError(Exception):
    """The layers are none of the known kind; the words say why."""


@dataclass(frozen=True)
class ModelShape:
    """What a plan knows of a model.

    module: the model on the meta device. parameters, trainable: exact. weight_bytes: of all
    weights; gradient_bytes: of gradients of the trained ones; saved_bytes: of a stage's folder of
    weights. products: weights of linear layers, the head among them, with which a token is
    multiplied. block: a layer, None where `reason` says why it is not known. head_trained: whether
    the last linear layer is. max_len: None where the model names no limit.
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
    """The shape of a model that is given as a recipe gives it.

    source: a folder, a hub name or a .gguf file, of which the configuration alone is read; a
    module; or a function that makes one, called on the meta device. torch_dtype: of a model by
    name, default float32. Raises ConfigError for what is no model, or cannot be made so.
    """
    with _quietly():
        if isinstance(source, str):
            module, saved = _named(source, torch_dtype)
        else:
            module, saved = _made(source), None
        if peft_config is not None and saved is not None:
            raise ConfigError("the model has an adapter already; leave peft out.")
        counted = _Counted(module, four_bit)
        peft_config = peft_config or saved
        if peft_config is None:
            return counted.shape(module)
        with torch.device("meta"):
            adapted = with_adapter(module, peft_config)
    return counted.shape(adapted, peft_config)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without words of transformers on what is made here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _made(source: Any) -> nn.Module:
    if isinstance(source, nn.Module):
        return _without_memory(source)
    name = getattr(source, "__qualname__", repr(source))
    try:
        with torch.device("meta"):
            made = source()
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(
            f"the model that {name}() makes cannot be looked at, as it cannot be made without "
            f"memory (on torch's meta device): {type(error).__name__}: {error!s:.300}. Give a "
            "folder with the model's config.json or a hub name."
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name}() must make a torch module; got {type(made).__name__}.")
    return made


def _without_memory(module: nn.Module) -> nn.Module:
    """The same on the meta device; the module itself stays as it is."""
    tensors = [*module.parameters(), *module.buffers()]
    twins: dict[int, Any] = {}
    for tensor in tensors:
        twin = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_weight else twin
    return copy.deepcopy(module, twins)


def _named(source: str, torch_dtype: Any) -> tuple[nn.Module, Any]:
    """A causal LM of transformers without memory, and the adapter that its folder has."""
    require("transformers", "a model by name")
    from transformers import AutoConfig, AutoModelForCausalLM

    path, adapter = Path(source), None
    name, gguf = gguf_of(source)
    try:
        if (path / "adapter_config.json").exists():
            require("peft", "a model with an adapter")
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(source)
            adapter.inference_mode = False
            name = adapter.base_model_name_or_path or source
        config = AutoConfig.from_pretrained(name, **gguf)
        dtype = dtype_of(torch_dtype)
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype), adapter
    except ConfigError:
        raise
    except Exception as error:  # of transformers, the hub or gguf, each with its own
        raise ConfigError(
            f"no configuration of a causal LM could be read from {source!r}. A plan needs a folder "
            "with a config.json, a name on the hub or a .gguf file; weights need not be there. "
            f"What was wrong here: {type(error).__name__}: {error!s:.300}"
        ) from error


class _Counted:
    """A module, counted before an adapter is put on it, which changes it in place."""

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
        self.rest_bytes = 4 if four_bit else None  # what is not quantised is float32 then
        self.layers, self.block, self.reason = 0, None, None
        self._look(module)

    def _look(self, module: nn.Module) -> None:
        try:
            if not hasattr(self.config, "num_hidden_layers"):
                raise NotKnownError(f"a {self.name} is no model of transformers")
            self.layers = int(self.config.num_hidden_layers)
            self.block = block_of(layers_of(module, self.layers), self.config)
        except NotKnownError as error:
            self.reason = str(error)

    def shape(self, module: nn.Module, peft_config: Any = None) -> ModelShape:
        """The shape of the module as it is now."""
        parameters = list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        weight_bytes = sum(map(self._bytes, parameters))
        gradients = sum(p.numel() * p.itemsize for p in trained)
        return ModelShape(
            name=self.name,
            module=module,
            dtype=self.dtype,
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in trained),
            weight_bytes=weight_bytes,
            gradient_bytes=gradients,
            saved_bytes=weight_bytes if peft_config is None else gradients,
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
        """0 where neither a head nor a configuration tells it."""
        named = getattr(self.config, "vocab_size", None) or 0
        return int(named if self.head is None else self.head.shape[0])

    @property
    def products(self) -> int:
        own = 0 if self.head is None else self.head.numel()
        return own + sum(w.numel() for w in self.weights.values() if w is not self.head)

    def _bytes(self, parameter: Tensor) -> int:
        if id(parameter) in self.quantised:
            return round(parameter.numel() * FOUR_BIT_BYTES)
        own = self.rest_bytes if id(parameter) in self.parameters else None
        return parameter.numel() * (own or parameter.itemsize)


def _head_of(module: nn.Module) -> Tensor | None:
    """The weights of the last linear layer, as a model of transformers names it."""
    found = getattr(module, "get_output_embeddings", lambda: None)()
    return getattr(found, "weight", None)


def _linear_weights(module: nn.Module) -> dict[int, Tensor]:
    parts = dict(module.named_modules())
    found = [parts[name].weight for name, _ in linears(module)]
    return {id(weight): weight for weight in found if isinstance(weight, Tensor)}


def linears(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and input widths of the linear parts of a module."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield name, part.in_features
        elif type(part).__name__ == "Conv1D":  # transformers' linear layer with weights turned
            yield name, int(part.weight.shape[0])  # type: ignore[union-attr,arg-type]


def _adapter(module: nn.Module, peft_config: Any) -> Adapter:
    added = [p for name, p in module.named_parameters() if "lora_" in name]
    return Adapter(
        rank=int(getattr(peft_config, "r", 0) or 0),
        itemsize=added[0].itemsize if added else 4,
        dropout=bool(getattr(peft_config, "lora_dropout", 0.0)),
    )


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
