"""Causal LMs of transformers, with their key-value cache, and with a LoRA adapter of peft.

Nothing here imports transformers before such a model is there.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.base import (
    Cache,
    cache_agrees,
    check_causal,
    copied,
    device_of,
    limit_of,
    logits_of,
    probe_vocab,
)
from self_rewarding_lm.adapters.plain import RecomputedRows
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.weights import ADAPTER_FILE, MODEL_FILE, read_weights, write_weights

logger = logging.getLogger(__name__)

ONE_FILE = "1000GB"


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, or one with an adapter of peft."""
    return all(hasattr(module, name) for name in ("config", "generate", "save_pretrained"))


def has_adapter(module: nn.Module) -> bool:
    """Whether a module is a model with an adapter of peft."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


class HuggingFaceModel:
    """Rows are padded on the right for training, on the left for cached decoding."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base: nn.Module = module.get_base_model() if has_adapter(module) else module  # type: ignore[operator]
        config: Any = self.base.config
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_len = limit_of(self.base) or getattr(self.config, "max_position_embeddings", None)
        self.takes = set(signature(self.base.forward).parameters)
        self.vocab = probe_vocab(module)
        check_causal(self)
        self.caches = True  # `start` shall cache while it is tried
        self.caches = cache_agrees(self)
        if not self.caches:
            logger.warning(
                "%s cannot be decoded with a cache here (the cached logits differ, or it has "
                "none): each token costs a whole forward.",
                type(self.base).__name__,
            )

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self.module(input_ids=ids, use_cache=False), *ids.shape)

    def refresh(self) -> None:
        """The cache's layout does not depend on the weights."""

    def start(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        if not self.caches:
            recomputed = RecomputedRows(self, rows)
            return recomputed.last_logits(), recomputed
        cache = PaddedRows(self, rows)
        return cache.logits, cache

    def state(self) -> dict[str, Tensor]:
        if not has_adapter(self.module):
            return copied(self.module.state_dict())
        return copied({name: p for name, p in self.module.named_parameters() if p.requires_grad})

    def save(self, folder: Path) -> None:
        save_pretrained(self.module, folder)

    def load(self, file: Path) -> None:
        load_pretrained(self.module, file)


class PaddedRows:
    """Left-padded rows, their mask and transformers' cache."""

    def __init__(self, model: HuggingFaceModel, rows: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        self.model = model
        device = device_of(model.module)
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
        starts = torch.tensor([longest - len(row) for row in rows], device=device)
        self.mask = (torch.arange(longest, device=device) >= starts[:, None]).long()
        self.cache = DynamicCache(config=model.config)
        self.logits = self._forward(ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0))

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        positions = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def select(self, rows: Int[Tensor, " n"]) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        known = {"position_ids": positions, "logits_to_keep": 1}
        optional: dict[str, Any] = {k: v for k, v in known.items() if k in self.model.takes}
        output = self.model.module(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **optional,
        )
        # a model that leaves the cache empty is found out by its trial, however small its logits
        assert self.cache.get_seq_length() == self.mask.shape[1], "the cache was not filled"
        return output.logits[:, -1]


def save_pretrained(module: nn.Module, folder: Path) -> None:
    """Write a folder that `from_pretrained` of transformers, or of peft, reads."""
    if has_adapter(module):
        module.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # a card without content
        return
    with _generation_config_valid(module), _without_progress_bars():
        module.save_pretrained(str(folder), max_shard_size=ONE_FILE)  # type: ignore[operator]
    if not (folder / MODEL_FILE).exists():  # a model class with a form of files of its own
        write_weights(module, folder / MODEL_FILE)


def load_pretrained(module: nn.Module, file: Path) -> None:
    """Load weights, or an adapter's, that `save_pretrained` wrote, in place.

    Raises StoreError where they do not fit.
    """
    if (file.name == ADAPTER_FILE) != has_adapter(module):
        raise StoreError(
            f"{file} holds {'an adapter' if file.name == ADAPTER_FILE else 'a whole model'}, and "
            f"the model is {'one with' if has_adapter(module) else 'one without'} an adapter. "
            "Load what belongs to it."
        )
    if not has_adapter(module):
        _load_whole(module, file)
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        state = load_peft_weights(str(file.parent), device="cpu")
        result = set_peft_model_state_dict(module, state)
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"the adapter in {file} cannot be loaded: {error}") from error
    if result.unexpected_keys:
        raise StoreError(
            f"the adapter in {file} belongs to another model or another peft_config; not known "
            f"here: {', '.join(result.unexpected_keys[:3])}."
        )


def _load_whole(module: nn.Module, file: Path) -> None:
    """Some kinds have other names on disk than in memory; transformers translates those."""
    try:
        read_weights(module, file)
    except StoreError as refusal:
        config = file.parent / "config.json"
        translated = _translated(module, file.parent) if config.exists() else None
        if translated is None:
            raise
        try:
            module.load_state_dict(translated)
        except RuntimeError:
            raise refusal from None


def _translated(module: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """A folder's weights by their names in memory; None where some are missing or left over."""
    dtype = next(module.parameters()).dtype
    with _without_progress_bars():
        read, report = type(module).from_pretrained(  # type: ignore[attr-defined]
            str(folder), dtype=dtype, output_loading_info=True
        )
    wrong = any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return None if wrong else read.state_dict()


@contextmanager
def _generation_config_valid(module: nn.Module) -> Iterator[None]:
    """transformers refuses to save a model whose generation config contradicts itself.

    Several published ones do (a temperature, and do_sample=False). What is saved then samples.
    """
    given: Any = getattr(module, "generation_config", None)
    try:
        if given is not None:
            given.validate(strict=True)
    except ValueError:
        module.generation_config = copy(given)  # type: ignore[assignment]
        module.generation_config.do_sample = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        if given is not None:
            module.generation_config = given


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as their_logging

    shown = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            their_logging.enable_progress_bar()
