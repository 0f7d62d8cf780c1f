"""Causal LMs of transformers, decoded with a cache, and with a LoRA adapter of peft.

Their attention layers turn to our keys and values where the model's class lets them (through
transformers' AttentionInterface), and else use transformers' own growing cache. Nothing here
imports transformers before such a model is there.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from inspect import signature
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.attending import AttendingSession
from self_rewarding_lm.adapters.base import (
    cache_agrees,
    check_causal,
    copied,
    device_of,
    limit_of,
    logits_of,
    probe_vocab,
)
from self_rewarding_lm.adapters.key_values import KeyValues
from self_rewarding_lm.adapters.padded import PaddedRows
from self_rewarding_lm.adapters.plain import recomputing
from self_rewarding_lm.adapters.sessions import BatchSession, Cache, Plan, Session
from self_rewarding_lm.errors import AdapterError, StoreError
from self_rewarding_lm.weights import ADAPTER_FILE, MODEL_FILE, read_weights, write_weights

logger = logging.getLogger(__name__)

ONE_FILE = "1000GB"
ATTENTION = "self_rewarding_lm"
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
WITHOUT_EFFECT = {"position_ids", "cache_position"}
"""Tensors that a model passes through to its attention, which needs them no more."""
COPIES = 3
"""Times that keys and values are held at most by transformers' cache, which grows by copying."""


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
        self.bytes_per_token = 0
        check_causal(self)
        recurs = _recurs(self.base, self.config)
        self.attends = not recurs and self._may_attend()  # `session` shall attend while it is tried
        self.attends = self.attends and cache_agrees(self)
        self.caches = not recurs
        self.caches = self.attends or (self.caches and cache_agrees(self))
        if not self.caches:
            logger.warning(
                "%s cannot be decoded with a cache here (the cached logits differ, or it has "
                "none): each token costs a whole forward.",
                type(self.base).__name__,
            )
        elif not self.attends:
            logger.warning(
                "%s is decoded with transformers' own cache, as its attention cannot use ours: "
                "prompts share nothing, and a batch ends before the next one begins.",
                type(self.base).__name__,
            )

    def _may_attend(self) -> bool:
        """Whether positions of other rows are without effect, and the model takes what is passed.

        The frequencies of some rotary embeddings follow the longest row of a forward.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(r for r in rope.values() if isinstance(r, dict))]
        follows = any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
        return not follows and {"position_ids", "logits_to_keep"} <= self.takes

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self.module(input_ids=ids, use_cache=False), *ids.shape)

    def refresh(self) -> None:
        """The cache's layout does not depend on the weights."""

    def session(self, plan: Plan) -> Session:
        device = device_of(self.module)
        if self.attends:
            return AttendingSession(self._attending, plan, device)
        if not self.caches:
            return recomputing(self, plan)
        return BatchSession(self.start, max_rows=plan.max_rows, device=device)

    def start(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        cache = PaddedRows(self.module, self.config, self.takes, rows)
        self.bytes_per_token = COPIES * cache.bytes_per_token
        return cache.logits, cache

    def _attending(self, ids: Tensor, positions: Tensor, cache: KeyValues) -> Tensor:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        before = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION
        try:
            output = self.module(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if cache.wanted is None else cache.wanted,
                key_values=cache,
            )
        finally:
            self.config._attn_implementation = before
        if len(cache.layers) != self.config.num_hidden_layers:
            raise AdapterError("not every layer's attention is ours to compute")
        self.bytes_per_token = cache.bytes_per_token
        return output.logits

    def state(self) -> dict[str, Tensor]:
        if not has_adapter(self.module):
            return copied(self.module.state_dict())
        return copied({name: p for name, p in self.module.named_parameters() if p.requires_grad})

    def save(self, folder: Path) -> None:
        save_pretrained(self.module, folder)

    def load(self, file: Path) -> None:
        load_pretrained(self.module, file)


def _recurs(base: nn.Module, config: Any) -> bool:
    """Whether layers keep a state that padding and neighbours in a packed row would change.

    Known by what the model says of itself: with weights that were just drawn the trial may not see
    it, and after training it would be wrong.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return bool(getattr(base, "_is_stateful", False)) or not set(kinds) <= ATTENTIONS


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    key_values: KeyValues,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that a model of transformers calls in our sessions.

    (1, h, n, d) and (1, g, n, d) to (1, n, h, d). Raises AdapterError for kinds of attention that
    are more than scaled, causal and sliding; what else `others` say is found out by the trial.
    """
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), int(module.layer_idx)  # type: ignore[arg-type]
    slides = kinds[layer] != "full_attention" if kinds else False
    unknown = {k for k, v in others.items() if isinstance(v, Tensor)} - WITHOUT_EFFECT
    if softcap is not None or (slides and sliding_window is None) or unknown:
        raise AdapterError("this kind of attention is not known here")
    out = key_values.attend(layer, query, key, value, scale=scaling, window=sliding_window)
    return out.transpose(1, 2), None


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
