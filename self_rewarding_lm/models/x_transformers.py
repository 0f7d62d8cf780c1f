"""Models of x-transformers: a TransformerWrapper, alone or in an AutoregressiveWrapper.

If our attention knows all its parts (`x_parts.py`), its layers use our keys and values, by hooks on
their own; if not, x-transformers' growing cache.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.attend import Attend

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.attention import KeyValues
from self_rewarding_lm.models.batching import pad_left
from self_rewarding_lm.models.drawn import draw_weights
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
    REFUSED,
    beyond_rounding,
    check_causal,
    probe_vocab,
    session_error,
    tried,
)
from self_rewarding_lm.models.x_parts import unknown_part
from self_rewarding_lm.runs.stage_files import MODEL_FILE
from self_rewarding_lm.runs.weights import read_weights, write_weights

logger = logging.getLogger(__name__)


COPIES = 3
"""How many times keys and values are held at most: x-transformers makes its cache longer by copying
it, and rows are copied out of the cache of their prompts."""


class XTransformersModel:
    """A TransformerWrapper of x-transformers.

    Rows that are not packed are padded on the right for training, on the left for x-transformers'
    own cache. attends: whether it is decoded over our keys and values. caches: whether with any.
    refused: why a fast way is not gone, by its name (attends, caches, training, packs).
    """

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether a module is a TransformerWrapper, or an AutoregressiveWrapper around one."""
        return isinstance(_unwrapped(module), TransformerWrapper)

    def __init__(self, module: nn.Module, *, is_copy: bool = False) -> None:
        self.module = module
        transformer: Any = _unwrapped(module)
        self.transformer: TransformerWrapper = transformer
        self.max_len = limit_of(transformer)
        self.vocab = probe_vocab(transformer)
        self.bytes_per_token = 0
        self.training: Training | None = None
        if not transformer.attn_layers.causal:
            raise AdapterError("the model is not causal: build it with Decoder, not Encoder.")
        check_causal(self)
        self.refused: dict[str, str] = {}
        self._warned = is_copy
        self._may_cache = bool(transformer.can_cache_kv)
        if not is_copy and unknown_part(transformer) is not None:
            self._try_with_drawn_weights()
        self.refresh()

    def _try_with_drawn_weights(self) -> None:
        """Try a model whose parts are not known on a copy, in which no path is silent."""
        transformer = deepcopy(self.transformer)
        draw_weights(transformer)
        self._may_cache = XTransformersModel(transformer, is_copy=True).caches

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return logits_of(self.transformer(ids), *ids.shape)

    def side(self, length: int, *, padded: bool = True) -> int:
        return 0

    def checkpointing(self) -> AbstractContextManager[None]:
        raise not_checkpointed(self.module)

    def state(self) -> dict[str, Tensor]:
        return copied(self.module.state_dict())

    def save(self, folder: Path) -> None:
        write_weights(self.module, folder / MODEL_FILE)

    def load(self, file: Path) -> None:
        read_weights(self.module, file)

    def session(self, plan: Plan) -> Session:
        device = device_of(self.module)
        if self.attends and plan.max_rows <= self.transformer.max_seq_len:  # a step's packed row
            most = self.transformer.max_seq_len
            return AttendingSession(self._attending, plan, device, max_packed=most)
        if not self.caches:
            return recomputing(self, plan)
        return BatchSession(self.start, max_rows=plan.max_rows, device=device)

    def _attending(self, ids: Tensor, positions: Tensor, cache: KeyValues) -> Tensor:
        with attending(self.transformer, cache):
            logits = self.transformer(ids, pos=positions)
        self.bytes_per_token = cache.bytes_per_token
        return logits if cache.wanted is None else logits[:, cache.wanted]

    def _hidden(self, ids: Tensor, packing: Packing | None) -> Tensor:
        if packing is None:
            return self.transformer(ids, return_embeddings=True)
        with attending(self.transformer, packing):
            return self.transformer(ids, pos=packing.positions, return_embeddings=True)

    def _head(self) -> Head:
        project: Any = self.transformer.to_logits
        if type(project) is nn.Linear:
            return Head(project, project.weight, project.bias)
        scale = getattr(self.transformer, "tie_embedding_scale", None)
        if scale is None:
            return Head(project)
        embedding: Any = self.transformer.token_emb
        weight = embedding.emb.weight  # `to_logits` is a function that applies the scale, too
        return Head(partial(F.linear, weight=weight), weight, scale=float(scale))

    def start(self, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "r v"], Cache]:
        cache = KeyValueRows(self.transformer, rows)
        self.bytes_per_token = COPIES * cache.bytes_per_token
        return cache.logits, cache

    def refresh(self) -> None:
        """Try whether cached decoding and packed rows give the right logits with these weights.

        A branch that starts at zero hides what a cache gets wrong until it is trained.
        """
        # `session` reads `attends` and `caches`, also while a trial finds out whether they are true
        self.refused = {}
        self.attends, self.caches = True, False
        reason = unknown_part(self.transformer)
        reason = reason or beyond_rounding("our attention", session_error(self))
        self.attends = reason is None
        if reason is not None:
            self.refused["attends"] = reason
        self.caches = self._may_cache
        self.caches = self.attends or (self.caches and session_error(self) <= 1)
        if not self.caches:
            self.refused["caches"] = "there is no cache, or its logits are others"
        width = self.transformer.max_seq_len
        training = Training(self._hidden, self._head, self.attends, width)
        self.training = tried(self, training, REFUSED if self.attends else 1.0)
        if self.training is None:
            self.refused["training"] = "hidden states and head apart give other logits"
        elif self.attends and not self.training.packs:
            self.refused["packs"] = "rows without padding give other logits"
        if self.attends or self._warned:
            return
        self._warned = True
        if self.caches:
            logger.warning(
                "this x-transformers model is decoded with its own cache, which is copied at each "
                "token (its attention or positions cannot use ours: %s): prompts share nothing, "
                "and a batch ends before the next one begins.",
                self.refused["attends"],
            )
        else:
            logger.warning(
                "this x-transformers model cannot be decoded with a cache (its options do not "
                "allow it, or the cached logits differ): each token costs a whole forward."
            )


def _unwrapped(module: nn.Module) -> nn.Module:
    """A module without the AutoregressiveWrapper around it."""
    return module.net if isinstance(module, AutoregressiveWrapper) else module


@contextmanager
def attending(transformer: TransformerWrapper, cache: KeyValues | Packing) -> Iterator[None]:
    """Within it, x-transformers' layers attend over our keys and values, by hooks on their own.

    The hook before shows the layer's attention a single token, so that it costs nothing; the hook
    after returns ours instead. Within it a forward raises AdapterError for attention that is more
    than causal and scaled: masks, biases, memories, and keys from other layers.
    """
    parts = [part for part in transformer.attn_layers.modules() if isinstance(part, Attend)]
    layers = count()  # by the order of calls: layers with the same weights have keys of their own
    # of the layers whose own attention runs: our output (b, h, n, e), and their mode
    ours: dict[nn.Module, tuple[Tensor, bool]] = {}

    def before(part: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        q, k, v = args
        others = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
        if others or not part.causal or kwargs.get("causal") is False or q.shape[2] != k.shape[2]:
            raise AdapterError("this kind of attention is not known here")
        dropout = part.dropout if part.training else 0.0
        out = cache.attend(next(layers), q, k, v, scale=part.scale, dropout=dropout)
        ours[part] = out, part.training
        part.eval()  # what it makes of a single token is not used, so it draws nothing
        return tuple(t[:, :, :1] for t in args), kwargs

    def after(part: nn.Module, args: tuple, output: tuple) -> tuple:
        out, mode = ours.pop(part)
        part.train(mode)
        return out, output[1]

    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    handles += [part.register_forward_hook(after) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class KeyValueRows:
    """Left-padded rows and their keys and values; x-transformers appends to these by copying."""

    def __init__(self, module: TransformerWrapper, rows: Sequence[Sequence[int]]) -> None:
        self.module = module
        ids, self.starts = pad_left(rows, device_of(module))
        self.state: Any = None
        self.logits = self._forward(ids)

    @property
    def bytes_per_token(self) -> int:
        kept = [t for layer in self.state.attn_intermediates for t in layer.cached_kv]
        return sum(t.shape[1] * t.shape[-1] * t.element_size() for t in kept)

    def extend(self, tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        return self._forward(tokens[:, None])

    def select(self, rows: Int[Tensor, " n"]) -> None:
        trim = int(self.starts[rows].min())  # columns of padding in all rows that are kept
        self.starts = self.starts[rows] - trim
        layers = [
            # (b, h, t, d)
            replace(layer, cached_kv=tuple(t[rows][..., trim:, :] for t in layer.cached_kv))
            for layer in self.state.attn_intermediates
        ]
        self.state = replace(
            self.state, attn_intermediates=layers, cache_length=self.state.cache_length - trim
        )

    def copy(self) -> Cache:
        return copy(self)

    def _forward(self, ids: Tensor) -> Tensor:
        logits, state = self.module(
            ids,
            return_intermediates=True,
            seq_start_pos=self.starts,
            cache=self.state,
            input_not_include_cache=True,
        )
        # only what the next step reads is kept: the rest holds every layer's hidden states
        layers = [
            replace(
                layer,
                qk_similarities=None,
                pre_softmax_attn=None,
                post_softmax_attn=None,
                values=None,
            )
            for layer in state.attn_intermediates
        ]
        self.state = type(state)(attn_intermediates=layers, cache_length=state.cache_length)
        return logits[:, -1]
