"""Causal LMs of transformers, alone or with a LoRA adapter of peft.

If the model's class allows it, its attention layers use our keys and values, through transformers'
AttentionInterface; if not, transformers' growing cache. Nothing here imports transformers before
there is such a model.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, replace
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
    SHARE_OF_FREE,
    Cache,
    Plan,
    Session,
    Training,
    copied,
    device_of,
    free_bytes,
    limit_of,
    logits_of,
    not_checkpointed,
)
from self_rewarding_lm.models.logprobs import Head
from self_rewarding_lm.models.packing import Packing
from self_rewarding_lm.models.plain import recomputing
from self_rewarding_lm.models.rotary import RotaryBorders
from self_rewarding_lm.models.rows_apart import RowsApart
from self_rewarding_lm.models.sessions import AttendingSession, BatchSession
from self_rewarding_lm.models.trial import (
    REFUSED,
    beyond_rounding,
    check_causal,
    head_agrees,
    padding_error,
    probe_vocab,
    session_error,
    tried,
)
from self_rewarding_lm.models.twin import least_border, plain_type, same_parts, twin_of
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


WITHIN_BORDERS = 3
"""Tokens of a trial's row that crosses no border of a twin."""


COPIES = 3
"""How many times transformers' cache, which grows by copying, holds keys and values at most."""


@dataclass(frozen=True)
class Ways:
    """Which ways models of a class and configuration may go besides their own forward.

    attends: over our keys and values. caches: over any. caches_short: over any, as long as rows are
    shorter than windows, chunks and other borders. pads: whether rows of different lengths may
    be padded. apart: hidden states and head. packs: rows without padding. refused: why a way is
    not gone, in words.
    """

    attends: bool
    caches: bool
    caches_short: bool
    pads: bool
    apart: bool
    packs: bool
    refused: Mapping[str, str]


class HuggingFaceModel:
    """A causal LM of transformers.

    Rows that are not packed are padded on the right for training, on the left for transformers' own
    cache. Which fast ways it may go is found out on a small twin of its class, or if there is none
    on its own weights in float32. attends: whether it is decoded over our keys and values. caches:
    whether with any cache. refused: why a fast way is not gone, by its name (attends, caches, pads,
    training, packs).
    """

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether a module is a causal LM of transformers, alone or within peft's wrapper."""
        return is_hugging_face(module)

    def __init__(self, module: nn.Module, *, is_tried: bool = False) -> None:
        """is_tried: whether this is a twin or a copy, which is only to be tried."""
        self.module = module
        self.base: nn.Module = module.get_base_model() if has_adapter(module) else module  # type: ignore[operator]
        config: Any = self.base.config
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_len = limit_of(self.base) or limit_of(self.base, self.config)
        self.takes = set(signature(self.base.forward).parameters)
        self.vocab = probe_vocab(module)
        self.bytes_per_token = 0
        self.borders = RotaryBorders(self.config)
        self.training: Training | None = None
        self.attends = self.caches = self.caches_short = False
        self.cache_limit = math.inf
        self.pads = True
        self.refused: dict[str, str] = {}
        check_causal(self)
        if is_tried:
            self._try()
        else:
            self._go(_ways_of_twin(self.base) or _ways_in_float32(self))
            self._warn()

    def _try(self) -> None:
        """Try each way on these weights."""
        # `session` reads `attends` and `caches`, also while a trial finds out whether they are true
        recurs = _recurs(self.base, self.config)
        self.pads = padding_error(self, self.borders.first) <= 1
        if not self.pads:
            self.refused["pads"] = "padded rows get other logits than each alone"
        self.attends = True
        reason = "layers keep a state besides keys and values" if recurs else None
        if reason is None and not {"position_ids", "logits_to_keep"} <= self.takes:
            reason = "its forward takes no position_ids or no logits_to_keep"
        if reason is None and not session_error(self, self.borders.first) <= 1:
            reason = "its attention is more than ours, or does not ask the AttentionInterface"
        self.attends = reason is None
        if reason is not None:
            self.refused["attends"] = reason
        self.caches = not recurs
        if self.attends and self.borders.first == math.inf:
            pass
        elif recurs or session_error(self) > 1:
            self.caches_short = not recurs and session_error(self, WITHIN_BORDERS) <= 1
            self.caches = False
            self.refused["caches"] = "it has no cache, or logits with one are others"
        self.training = self._training(packs=self.attends, bound=1.0, is_unknown=True)
        if self.training is None:
            self.refused["training"] = "hidden states and head cannot be taken apart"
        elif self.attends and not self.training.packs:
            self.refused["packs"] = "rows without padding get other logits"

    @property
    def ways(self) -> Ways:
        """What `_try` has found out."""
        training = self.training
        packs = training is not None and training.packs
        caches = self.caches, self.caches or self.caches_short
        found = self.attends, *caches, self.pads, training is not None, packs
        return Ways(*found, refused=dict(self.refused))

    def _go(self, ways: Ways) -> None:
        """Go these ways, unless the logits of these weights say that one is wrong."""
        self.refused = dict(ways.refused)
        self.attends, self.caches, self.pads = ways.attends, ways.caches_short, ways.pads
        if not ways.caches:
            self.cache_limit = least_border(self.config)
        if self.attends:
            error = session_error(self, self.borders.first)
            self._refuse("attends", beyond_rounding("our attention", error))
            self.attends = "attends" not in self.refused
        if self.caches and not self.attends:
            error = session_error(self, self.cache_limit - 2)
            self._refuse("caches", beyond_rounding("transformers' own cache", error))
            self.caches = not math.isinf(error) and error <= REFUSED
        if ways.apart:
            packs = ways.packs and self.attends
            self.training = self._training(packs=packs, bound=REFUSED, is_unknown=False)
            if self.training is None:
                self._refuse("training", "hidden states and head apart give other logits")
            elif packs and not self.training.packs:
                self._refuse("packs", "rows without padding give other logits with these weights")

    def _refuse(self, way: str, reason: str | None) -> None:
        if reason is not None:
            self.refused[way] = reason

    def _warn(self) -> None:
        """Say once which fast way of decoding is not gone, and why."""
        name = type(self.base).__name__
        if not self.caches:
            logger.warning(
                "%s cannot be decoded with a cache here (%s): each token costs a whole forward.",
                name,
                self.refused["caches"],
            )
            return
        if self.cache_limit < math.inf:
            logger.warning(
                "%s: in rows of %d tokens or more each token costs a whole forward, because its "
                "cache takes no rows of different lengths beyond that.",
                name,
                self.cache_limit,
            )
        if not self.attends:
            logger.warning(
                "%s is decoded with transformers' own cache, as its attention cannot use ours "
                "(%s): prompts share nothing, and a batch ends before the next one begins.",
                name,
                self.refused["attends"],
            )
        if not self.pads and self.training is not None and not self.training.packs:
            logger.warning(
                "%s is trained on rows of one length at a time: padding changes its logits.",
                name,
            )

    def side(self, length: int, *, padded: bool = True) -> int:
        return length if padded and not self.pads else self.borders.side(length)

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self.module(input_ids=ids, use_cache=False), *ids.shape)

    def refresh(self) -> None:
        """The cache's layout does not depend on the weights."""

    def session(self, plan: Plan) -> Session:
        device = device_of(self.module)
        side = self.borders.side(plan.longest + plan.max_new)
        if self.attends and side == self.borders.side(1):  # keys of no row ever change
            return AttendingSession(self._attending, plan, device)
        if not self.caches or plan.longest + plan.max_new >= self.cache_limit:
            return recomputing(self, plan)
        is_alike = self.borders.side(1) == side
        start = self.start if is_alike else self._start_apart
        return BatchSession(start, max_rows=plan.max_rows, device=device)

    def start(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        cache = PaddedRows(self.module, self.config, self.takes, rows)
        self.bytes_per_token = COPIES * cache.bytes_per_token
        return cache.logits, cache

    def _start_apart(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        cache = RowsApart(self.start, self.borders.side, rows)
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

    def _training(self, *, packs: bool, bound: float, is_unknown: bool) -> Training | None:
        """Hidden states and head apart, if the class has both and nothing between them.

        is_unknown: whether that is still to be found out with loud hidden states.
        """
        project = getattr(self.base, "get_output_embeddings", lambda: None)()
        if project is None or getattr(self.base, "base_model", self.base) is self.base:
            return None
        if is_unknown and not head_agrees(self, project, self._head()):
            return None
        training = Training(self._hidden, self._head, packs=packs)
        return tried(self, training, bound, self.borders.first)

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


KNOWN_WAYS: dict[tuple[type, str], tuple[nn.Module, Ways]] = {}
"""The twins that were tried, on the meta device, and what was found out on them."""


def _ways_of_twin(base: nn.Module) -> Ways | None:
    """What a small twin of a model finds out; None if there is none, or it has other parts."""
    config: Any = base.config
    key = plain_type(base), config.to_json_string(use_diff=False)
    if key not in KNOWN_WAYS:
        twin = twin_of(base)
        if twin is None:
            return None
        ways = HuggingFaceModel(twin, is_tried=True).ways
        if not ways.caches:  # rows that are padded on the left overflow in float64
            wide = HuggingFaceModel(twin.float(), is_tried=True).ways
            refused = {way: why for way, why in ways.refused.items() if way != "caches"}
            refused |= {way: why for way, why in wide.refused.items() if way == "caches"}
            found = {"caches": wide.caches, "caches_short": wide.caches_short}
            ways = replace(ways, **found, refused=refused)
        KNOWN_WAYS[key] = twin.to("meta"), ways
    twin, ways = KNOWN_WAYS[key]
    strange = same_parts(base, twin)
    if strange is not None:
        logger.info("%s is tried on its own weights: %s.", type(base).__name__, strange)
        return None
    return ways


def _ways_in_float32(model: HuggingFaceModel) -> Ways:
    """What is found out on a model's own weights, in float32 if a copy of them can be made."""
    module = model.module
    if any(parameter.dtype.itemsize < 4 for parameter in module.parameters()):
        needed = 4 * sum(parameter.numel() for parameter in module.parameters())
        try:
            if needed < SHARE_OF_FREE * free_bytes(device_of(module)):
                return HuggingFaceModel(deepcopy(module).float(), is_tried=True).ways
        except Exception as error:  # whatever it is: such weights have one type only
            logger.debug("no copy of %s in float32: %r", type(module).__name__, error)
    return HuggingFaceModel(module, is_tried=True).ways


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
