"""A small twin of a model of transformers: its class, with a configuration made small.

What a class computes is found out on its twin: in float64, with weights that leave no path silent,
and with windows, chunks and borders of scaling so short that a trial's rows cross them. So neither
the weights of the model nor its type decide which ways it may go. That holds as long as the model
is built of the twin's parts, see `same_parts`.
"""

import logging
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.models.drawn import draw_weights

logger = logging.getLogger(__name__)


VOCAB = 96
"""Words of a twin; the last quarter is for the ids that its configuration names."""


LONGEST = 64
"""Tokens of a twin's longest row."""


MOST_WEIGHTS = 30_000_000
"""Of a twin: a larger one would take seconds. Ours."""


SHORT = {"window": 5, "chunk": 8, "floor_scale": 8, "original_max_position": 16, "block_size": 4}
"""Of settings with these words in their names what a twin has, if it is less."""


PLAIN = {
    "_attn_implementation_internal": None,
    "_experts_implementation_internal": "eager",
    "quantization_config": None,
}
"""Settings of how a class computes: a twin computes in the plainest way."""


WIDTHS = re.compile(r"intermediate|inner|ffn|d_ff|dim_ff|mlp|expert_dim")
EXPERTS = re.compile(r"experts$|num_experts|experts_per_layer")
COUNT = re.compile(r"layer|pattern|^num_")
"""In names of settings that are no lengths, though they name windows or chunks."""


ID = re.compile(r"_(token_id|token_index|token_ids)$|^image_token|^pad_idx$")
QUIET = ("transformers.", "peft.", "torch.", "accelerate.")
"""Modules whose hooks do not change what a model computes: they watch, or move tensors."""


def twin_of(module: nn.Module) -> nn.Module | None:
    """A small model of the module's class; None if there is none.

    The global random state stays as it is.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    for slims, keeps_layers in ((True, False), (False, False), (False, True)):
        small = deepcopy(config)
        try:
            _shrink(small, slims=slims, keeps_layers=keeps_layers)
            twin = _built(plain_type(module), small)
            with torch.no_grad():
                twin(torch.tensor([[1, 2, 3]]), use_cache=False)
            return twin
        except Exception as error:  # whatever it is: there is no twin
            logger.debug("no twin of %s: %r", type(module).__name__, error)
    return None


def same_parts(module: nn.Module, twin: nn.Module) -> str | None:
    """What a model has that its twin has not, in words; None if it is built of the twin's parts.

    Compared are the types of all parts, by their place, and forwards and hooks of one's own. What
    an adapter of peft is put around counts as what it was before.
    """
    known = {(place, kind) for place, kind, _ in _parts(twin)}
    for place, kind, part in _parts(module):
        if (place, kind) not in known:
            return f"{place or 'the model'} is a {kind.__name__}"
        if "forward" in vars(part):
            return f"{place or 'the model'} has a forward of its own"
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not (getattr(hook, "__module__", None) or "").startswith(QUIET) for hook in hooks):
            return f"{place or 'the model'} has hooks"
    return None


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what FSDP makes of it."""
    kinds = (kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))
    return next(kinds)


def _parts(module: nn.Module, place: str = "") -> Iterator[tuple[str, type, nn.Module]]:
    """Each part with its place, in which numbers of layers are left out, and its type."""
    inner = module
    while type(inner).__module__.startswith("peft."):
        inner = getattr(inner, "base_layer", None) or getattr(inner, "original_module", module)
        if inner is module:
            break
    yield place, plain_type(inner), inner
    for name, part in inner.named_children():
        yield from _parts(part, f"{place}.{re.sub(r'[0-9]+', '#', name)}".lstrip("."))


def _built(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model on the CPU in float64, with weights that are drawn."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(deepcopy(config)).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"it has {count} weights")
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            torch.set_default_dtype(torch.float32)
            module = kind(config).eval()
        finally:
            torch.set_default_dtype(before)
    module = module.double()
    draw_weights(module)
    return module


def _shrink(config: Any, *, slims: bool, keeps_layers: bool) -> None:
    """Make a configuration small in place, with all that it names.

    slims: whether hidden states may be narrower than all heads together, if a head's width is
    given. keeps_layers: whether there are as many layers as before.
    """
    for part in vars(config).values():
        if hasattr(part, "to_dict") and hasattr(part, "attribute_map"):
            _shrink(part, slims=slims, keeps_layers=keeps_layers)
    sizes = dict(vars(config))
    for name, plain in PLAIN.items():
        if name in sizes:
            setattr(config, name, plain)

    # 1. fewer layers, but of all kinds
    names = config.attribute_map
    of_layers = names.get("num_hidden_layers", "num_hidden_layers")
    layers = sizes.get(of_layers)
    if isinstance(layers, int) and not keeps_layers:
        lists = {n: v for n, v in sizes.items() if isinstance(v, list) and len(v) == layers}
        kinds = [values for values in lists.values() if not _are_places(values)]
        kept = max([2, *map(_first_of_each, kinds)])
        if kept < layers:
            setattr(config, of_layers, kept)
            for name, values in lists.items():
                places = [n for n in values if n < kept] if _are_places(values) else values[:kept]
                setattr(config, name, places)

    # 2. fewer heads, as wide as they are, and what is as wide as all of them
    of_heads = names.get("num_attention_heads", "num_attention_heads")
    of_hidden = names.get("hidden_size", "hidden_size")
    heads, hidden = sizes.get(of_heads), sizes.get(of_hidden)
    groups = sizes.get("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(hidden, int) and isinstance(groups, int):
        few = min(groups, 2) * min(max(heads // max(groups, 1), 1), 2)
        if few < heads and heads % few == 0 and hidden % heads == 0:
            slim = slims and isinstance(sizes.get("head_dim"), int)
            narrow = 64 if slim else hidden // heads * few
            for name, value in sizes.items():
                if value == hidden and isinstance(value, int) and "vocab" not in name:
                    setattr(config, name, narrow)
                elif name == of_heads or ("heads" in name and value == heads):
                    setattr(config, name, few)
                elif "heads" in name and value == groups:
                    setattr(config, name, min(groups, 2))

    # 3. less of all else
    for name, value in sizes.items():
        if isinstance(value, dict):
            setattr(config, name, _shortened(value))
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif "vocab" in name and value > VOCAB:
            setattr(config, name, VOCAB)
        elif ID.search(name) and value >= VOCAB:
            setattr(config, name, VOCAB - 1 - value % (VOCAB // 4))
        elif EXPERTS.search(name) and value > 16:
            setattr(config, name, 16)
        elif WIDTHS.search(name) and value > 64 and value != hidden:
            setattr(config, name, 64)
        elif name in ("max_position_embeddings", "n_positions") and value > LONGEST:
            setattr(config, name, LONGEST)
        elif _short(name, value) != value:
            setattr(config, name, _short(name, value))


def _are_places(values: list) -> bool:
    """Whether a list names layers, instead of saying something of each."""
    return all(type(value) is int for value in values) and len({*values}) == len(values)


def _first_of_each(values: list) -> int:
    """How many values of a list there must be for each kind of them to be among them."""
    kinds = [repr(value) for value in values]
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def _shortened(settings: dict) -> dict:
    """Settings, such as those of rotary embeddings, with short borders."""
    return {
        name: _shortened(value) if isinstance(value, dict) else _short(name, value)
        for name, value in settings.items()
    }


def least_border(config: Any) -> float:
    """The shortest of the windows, chunks and borders of a configuration; infinity if it has none.

    Rows that are no longer are attended to without any of them.
    """
    borders = [math.inf]
    settings = [*vars(config).items()]
    while settings:
        name, value = settings.pop()
        if isinstance(value, dict):
            settings += value.items()
        elif _shortest(name, value) is not None:
            borders.append(value)
    return min(borders)


def _short(name: Any, value: Any) -> Any:
    """A setting that is a length, made short; any other as it is."""
    length = _shortest(name, value)
    return value if length is None else min(length, value)


def _shortest(name: Any, value: Any) -> int | None:
    """To what a setting may be shortened; None if it is no length of windows, chunks or borders."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(name, str) or not is_number or value <= 0 or COUNT.search(name):
        return None
    return next((length for word, length in SHORT.items() if word in name), None)
