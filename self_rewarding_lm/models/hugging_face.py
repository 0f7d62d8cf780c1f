"""Causal LMs of transformers, alone or with a LoRA adapter of peft.

If the model's class allows it, its attention layers use our keys and values, through transformers'
AttentionInterface; if not, transformers' growing cache. Nothing here imports transformers before
there is such a model.
"""

import logging
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.attention import KeyValues
from self_rewarding_lm.models.batching import pad_left
from self_rewarding_lm.models.interface import (
    Cache,
    Plan,
    Session,
    Training,
    copied,
    device_of,
    limit_of,
    logits_of,
    not_checkpointed,
)
from self_rewarding_lm.models.logprobs import Head
from self_rewarding_lm.models.packing import Packing
from self_rewarding_lm.models.plain import recomputing
from self_rewarding_lm.models.sessions import AttendingSession, BatchSession
from self_rewarding_lm.models.trial import (
    check_causal,
    head_agrees,
    probe_vocab,
    session_error,
    tried,
)
from self_rewarding_lm.runs.pretrained import (
    has_adapter,
    is_hugging_face,
    load_pretrained,
    save_pretrained,
)

logger = logging.getLogger(__name__)


ATTENTION = "self_rewarding_lm"
"""The name under which transformers knows our attention function."""


ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
"""The kinds of layers (`layer_types`) that keep nothing but keys and values."""


WITHOUT_EFFECT = {"position_ids", "cache_position"}
"""Tensors that a model passes on to its attention, which no longer needs them."""


COPIES = 3
"""How many times transformers' cache, which grows by copying, holds keys and values at most."""


class HuggingFaceModel:
    """A causal LM of transformers.

    Rows that are not packed are padded on the right for training, on the left for transformers' own
    cache. attends: whether it is decoded over our keys and values. caches: whether with any cache.
    """

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether a module is a causal LM of transformers, alone or within peft's wrapper."""
        return is_hugging_face(module)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base: nn.Module = module.get_base_model() if has_adapter(module) else module  # type: ignore[operator]
        config: Any = self.base.config
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_len = limit_of(self.base) or getattr(self.config, "max_position_embeddings", None)
        self.takes = set(signature(self.base.forward).parameters)
        self.vocab = probe_vocab(module)
        self.bytes_per_token = 0
        self.training: Training | None = None
        check_causal(self)
        may_cache = not _recurs(self.base, self.config)
        # `session` reads `attends` and `caches`, also while a trial finds out whether they are true
        self.attends = may_cache and self._may_attend()
        self.attends = self.attends and session_error(self) <= 1
        self.caches = may_cache
        self.caches = self.attends or (may_cache and session_error(self) <= 1)
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
        self.training = self._training()

    def _may_attend(self) -> bool:
        """Whether rows may be packed: no row changes another's positions, and they can be given.

        The frequencies of some rotary embeddings depend on the longest row of a forward.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(r for r in rope.values() if isinstance(r, dict))]
        depends = any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
        return not depends and {"position_ids", "logits_to_keep"} <= self.takes

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
        with self._attending_here():
            output = self.module(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if cache.wanted is None else cache.wanted,
                key_values=cache,
            )
        self._check_all(len(cache.layers))
        self.bytes_per_token = cache.bytes_per_token
        return output.logits

    def _hidden(self, ids: Tensor, packing: Packing | None) -> Tensor:
        backbone = self.base.base_model
        if packing is None:
            return backbone(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        with self._attending_here():
            output = backbone(  # type: ignore[operator]
                input_ids=ids, position_ids=packing.positions, use_cache=False, key_values=packing
            )
        self._check_all(len(packing.layers))
        return output.last_hidden_state

    def _head(self) -> Head:
        project: Any = self.base.get_output_embeddings()  # type: ignore[operator]
        is_linear = type(project) is nn.Linear
        return Head(
            project,
            project.weight if is_linear else None,
            project.bias if is_linear else None,
            scale=getattr(self.config, "logit_scale", None)
            or 1 / (getattr(self.config, "logits_scaling", None) or 1),
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )

    def _training(self) -> Training | None:
        """Hidden states and head apart, if the class has both and nothing between them."""
        project = getattr(self.base, "get_output_embeddings", lambda: None)()
        if project is None or getattr(self.base, "base_model", self.base) is self.base:
            return None
        if not head_agrees(self, project, self._head()):
            return None
        return tried(self, Training(self._hidden, self._head, packs=self.attends))

    @contextmanager
    def _attending_here(self) -> Iterator[None]:
        """Within it, the model's attention layers call our `attend`."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        before = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def _check_all(self, layers: int) -> None:
        if layers != self.config.num_hidden_layers:
            raise AdapterError("not every layer's attention is ours to compute")

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        module: Any = self.module
        if not getattr(self.base, "supports_gradient_checkpointing", False):
            raise not_checkpointed(self.base)
        packs = self.training is not None and self.training.packs

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            """Around the first computation and the second, which comes after the forward's end."""
            return nullcontext(), self._attending_here() if packs else nullcontext()

        new = hasattr(module, "activation_checkpointing_enable")  # its old name is deprecated
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        settings = {"use_reentrant": False, "context_fn": contexts}
        getattr(module, f"{name}_enable")(settings)
        try:
            yield
        finally:
            getattr(module, f"{name}_disable")()

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

    def __init__(
        self, module: nn.Module, config: Any, takes: Set[str], rows: Sequence[Sequence[int]]
    ) -> None:
        from transformers import DynamicCache

        self.module, self.takes = module, takes
        device = device_of(module)
        ids, starts = pad_left(rows, device)
        self.mask = (torch.arange(ids.shape[1], device=device) >= starts[:, None]).long()  # (r, t)
        self.cache = DynamicCache(config=config)
        self.logits = self._forward(ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0))

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        positions = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def select(self, rows: Int[Tensor, " n"]) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def copy(self) -> Cache:
        other = copy(self)
        other.cache = deepcopy(self.cache)
        return other

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the layers that keep all tokens; others have states of one size."""
        kept = [
            t
            for layer in self.cache.layers
            for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(t, Tensor) and t.ndim == 4
        ]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in kept)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        optional = {name: value for name, value in optional.items() if name in self.takes}
        output = self.module(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **optional,
        )
        # a model that leaves the cache empty fails its trial by this, however small its logits are
        assert self.cache.get_seq_length() == self.mask.shape[1], "the cache was not filled"
        return output.logits[:, -1]


def _recurs(base: nn.Module, config: Any) -> bool:
    """Whether layers keep a state that padding or neighbours in a packed row would change.

    The model says so itself. A trial with new weights might miss it, and results would be wrong
    after training.
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
    key_values: KeyValues | Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that a model of transformers calls in our sessions and trainings.

    query (b, h, n, d), key (b, g, n, d), value (b, g, n, e) to (b, n, h, e). Raises AdapterError
    for attention that is more than scaled, causal and sliding. What `others` may change besides is
    left to the trial.
    """
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), int(module.layer_idx)  # type: ignore[arg-type]
    slides = kinds[layer] != "full_attention" if kinds else False
    unknown = {k for k, v in others.items() if isinstance(v, Tensor)} - WITHOUT_EFFECT
    if softcap is not None or (slides and sliding_window is None) or unknown:
        raise AdapterError("this kind of attention is not known here")
    out = key_values.attend(
        layer, query, key, value, scale=scaling, window=sliding_window, dropout=dropout
    )
    return out.transpose(1, 2), None  # (b, n, h, e)
