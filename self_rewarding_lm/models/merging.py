"""An adapter merged into its model's weights: a folder that is read without peft.

Weights that several layers share (head and embeddings of a tied model) are first given to each of
them, since an adapter may change one alone. What comes out is compared: with noise in the adapter
before anything is trained, and at the end as it is read back from the folder.
"""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import device_of
from self_rewarding_lm.runs.pretrained import read_pretrained, save_pretrained
from self_rewarding_lm.runtime import random_numbers_kept

NOISE = 0.1
"""The deviation of what is added to each number of an adapter that is tried."""


ROWS, ROW = 8, 4
"""Rows that are compared, and tokens of each; the tokens are spread over the vocabulary."""


EXACT, ROUNDED = 1e-3, 1e-1
"""By what share of their norm logits may differ, in wide types and in narrow ones."""


class MergedAdapter:
    """What is written of a model with an adapter: a whole model that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def save(self, folder: Path) -> None:
        """Write it. Raises StoreError if what is read back gives other logits than the adapter."""
        whole = merged(self.model)
        save_pretrained(whole, folder)
        kind = type(whole)
        del whole
        read = read_pretrained(kind, folder).to(device_of(self.model))
        distance = _distance(self.model, read)
        if not distance <= bound_of(self.model):
            raise StoreError(
                f"the merged model that was read back from {folder} gives other logits than the "
                f"adapter ({distance:.1%} of their norm apart), so it is not kept. The adapter "
                "itself is in its stage's folder; leave merge_adapter out where it was set."
            )


def merged(model: nn.Module) -> nn.Module:
    """A copy of a model with its adapter merged into the weights; ConfigError if peft cannot.

    Head and embeddings that were tied are so again if both came out the same.
    """
    return _merge(_copied(model))


def check_merge(model: nn.Module) -> None:
    """Raise ConfigError if a model's adapter cannot be merged, whatever it will have learnt.

    A copy is tried with noise in the adapter, since a new one adds nothing yet.
    """
    copy = _copied(model)
    with random_numbers_kept(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in copy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    ids = _probes(copy)
    wanted = _logits(copy, ids)
    distance = _apart(wanted, _logits(_merge(copy), ids))
    if not distance <= bound_of(model):
        raise ConfigError(
            "merged into the weights, this adapter gives other logits than beside the model "
            f"({distance:.0%} of their norm apart, with noise in the adapter). {_REMEDY}"
        )


_REMEDY = (
    "Leave merge_adapter out (the adapter is saved all the same), or change the adapter's settings."
)


def _is_of_peft(part: nn.Module) -> bool:
    return type(part).__module__.startswith("peft.")


def _copied(model: nn.Module) -> Any:
    """A copy of a model with an adapter, in which no weight belongs to two layers.

    Layers with a tied adapter hold views of the other's weights, which cannot be copied and are
    not needed again.
    """
    views: dict[int, Any] = {}
    for part in model.modules():
        ties = getattr(part, "kwargs", None) or {}
        for view in (ties.get("tied_adapter") or {}).values():
            views[id(view)] = view.detach()
    copy: Any = deepcopy(model, views)
    seen: set[int] = set()
    for name, parameter in list(copy.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            layer, _, its_name = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(copy.get_submodule(layer), its_name, own)
        seen.add(id(parameter))
    return copy


def _merge(copy: Any) -> nn.Module:
    """The model within a copy with an adapter, which is merged into its weights.

    Raises ConfigError if peft cannot merge it.
    """
    was_tied = getattr(copy.get_base_model().config, "tie_word_embeddings", False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # untied already
            whole = copy.merge_and_unload()
    except Exception as error:  # each kind of adapter has its own
        raise ConfigError(f"peft cannot merge this adapter: {error!s:.300} {_REMEDY}") from error
    left = {type(part).__name__ for part in whole.modules() if _is_of_peft(part)}
    if left:
        raise ConfigError(
            f"peft cannot merge this adapter: parts of it stay in the model ({', '.join(left)}). "
            f"{_REMEDY}"
        )
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    if was_tied and head is not None:
        is_tied = torch.equal(head.weight, embeddings.weight)
        for config in (whole.config, whole.config.get_text_config()):
            config.tie_word_embeddings = is_tied
        if is_tied:
            head.weight = embeddings.weight
    return whole


def _distance(one: nn.Module, other: nn.Module) -> float:
    ids = _probes(one)
    return _apart(_logits(one, ids), _logits(other, ids))


def _apart(one: Float[Tensor, "r t v"], other: Float[Tensor, "r t v"]) -> float:
    """How far logits are apart, as a share of their norm."""
    return float((one - other).norm() / one.norm())


def bound_of(model: nn.Module) -> float:
    """By what share of their norm logits of the merged model may differ from those of this one."""
    is_narrow = any(p.dtype.itemsize < 4 for p in model.parameters())
    is_rounded = is_narrow or torch.get_float32_matmul_precision() != "highest"  # TF32 and its like
    return ROUNDED if is_rounded else EXACT


def _probes(model: Any) -> Int[Tensor, "r t"]:
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(ROWS * ROW, device=device_of(model)) * vocab // (ROWS * ROW)
    return ids.view(ROWS, ROW)


def _logits(model: nn.Module, ids: Int[Tensor, "r t"]) -> Float[Tensor, "r t v"]:
    with inferring(model):
        return model(input_ids=ids, use_cache=False).logits.double()
