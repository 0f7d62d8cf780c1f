"""Batched decoding over a TokenModel. Token ids in, token ids out.

Knows nothing of text, prompts, stages or files. Rows of similar length are decoded together, rows
with the same beginning share its first forward, and a row that has ended costs no further forward.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.adapters.base import Cache, device_of, evaluating
from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.sampling import penalise_repetition, sample_next, uniforms


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen and when a row ends.

    is_stop: whether a row's new ids end it though no end token came.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    filter_fn: Callable[[Tensor], Tensor] | None = None
    end_ids: tuple[int, ...] = ()
    is_stop: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """ids to go on from; key: of the noise, see sampling.uniforms."""

    ids: tuple[int, ...]
    key: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """New ids, the end token included. finished: None where nothing is known that ends a row."""

    ids: tuple[int, ...]
    finished: bool | None


@runtime_checkable
class Engine(Protocol):
    """What generates. Results come in any order, each with its request's index."""

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]: ...


class LocalEngine:
    """Decodes in this process, with the weights that are being trained.

    max_rows: rows that are decoded at once. max_prefill_tokens: prompt tokens, padding included,
    that go through the model at once; both bound the memory.
    """

    def __init__(self, *, max_rows: int = 128, max_prefill_tokens: int = 32_768) -> None:
        self.max_rows = max_rows
        self.max_prefill_tokens = max_prefill_tokens

    def generate(
        self, model: TokenModel, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        model.refresh()
        for batch in self._batches(requests):
            with torch.no_grad(), evaluating(model.module):
                finished = _Batch(model, [requests[i] for i in batch], decoding).run()
            yield from zip(batch, finished, strict=True)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests of similar length, those with the same ids side by side."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (len(requests[i].ids), requests[i].max_new_tokens, requests[i].ids),
        )
        batch: list[int] = []
        distinct: set[tuple[int, ...]] = set()
        for i in order:
            ids = requests[i].ids
            prefill = (len(distinct) + (ids not in distinct)) * len(ids)
            if batch and (len(batch) == self.max_rows or prefill > self.max_prefill_tokens):
                yield batch
                batch, distinct = [], set()
            batch.append(i)
            distinct.add(ids)
        if batch:
            yield batch


class _Batch:
    """Rows that are decoded together, one token a step."""

    def __init__(self, model: TokenModel, requests: list[Request], decoding: Decoding) -> None:
        self.model, self.requests, self.decoding = model, requests, decoding
        self.device = device_of(model.module)
        self.new: list[list[int]] = [[] for _ in requests]
        self.finished: list[bool | None] = [None] * len(requests)
        self.limits = np.array([r.max_new_tokens for r in requests])
        keys = np.array([r.key for r in requests], dtype=np.int64)
        self.noise = torch.from_numpy(uniforms(keys, int(self.limits.max()))).to(self.device)
        self.seen = _seen(requests, model.vocab) if decoding.repetition_penalty != 1.0 else None

    def run(self) -> list[Completion]:
        alive = torch.arange(len(self.requests), device=self.device)
        logits, cache = self._start()
        for step in range(self.noise.shape[1]):
            tokens = self._choose(logits, alive, step)
            going = self._take(tokens.tolist(), alive.tolist(), step)
            if not going:
                break
            if len(going) < len(alive):
                rows = torch.tensor(going, device=self.device)
                cache.select(rows)
                alive, tokens = alive[rows], tokens[rows]
            logits = cache.extend(tokens)
        return [Completion(tuple(n), f) for n, f in zip(self.new, self.finished, strict=True)]

    def _start(self) -> tuple[Tensor, Cache]:
        """The first logits, each distinct prompt computed once."""
        place: dict[tuple[int, ...], int] = {}
        which = [place.setdefault(r.ids, len(place)) for r in self.requests]
        logits, cache = self.model.start(list(place))
        if len(place) < len(which):
            rows = torch.tensor(which, device=self.device)
            cache.select(rows)
            logits = logits[rows]
        return logits, cache

    def _choose(self, logits: Tensor, alive: Tensor, step: int) -> Tensor:
        d = self.decoding
        if self.seen is not None:
            self.seen = self.seen.to(self.device)
            logits = penalise_repetition(logits, self.seen[alive], d.repetition_penalty)
        if d.end_ids and step < d.min_new_tokens:
            logits = logits.clone()
            logits[:, list(d.end_ids)] = -torch.inf
        if d.filter_fn is not None:
            logits = _filtered(d.filter_fn, logits)
        tokens = sample_next(
            logits,
            self.noise[alive, step],
            temperature=d.temperature,
            top_k=d.top_k,
            top_p=d.top_p,
            min_p=d.min_p,
        )
        if self.seen is not None:
            self.seen[alive, tokens] = True
        return tokens

    def _take(self, tokens: list[int], alive: list[int], step: int) -> list[int]:
        """Append a token to each row; the places of the rows that go on."""
        d, going = self.decoding, []
        can_end = bool(d.end_ids) or d.is_stop is not None
        for place, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            if token >= self.model.vocab:
                raise AdapterError(
                    "the model's logits are not finite, or filter_fn left no token: nothing can be "
                    "sampled. Has training diverged?"
                )
            new = self.new[row]
            new.append(token)
            if token in d.end_ids or (d.is_stop is not None and d.is_stop(new)):
                self.finished[row] = True
            elif step + 1 >= self.limits[row]:
                self.finished[row] = False if can_end else None
            else:
                going.append(place)
        return going


def _seen(requests: list[Request], vocab: int) -> Tensor:
    seen = torch.zeros(len(requests), vocab, dtype=torch.bool)
    for row, request in enumerate(requests):
        seen[row, list(request.ids)] = True
    return seen


def _filtered(filter_fn: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    out = filter_fn(logits.clone())
    if not isinstance(out, Tensor) or out.shape != logits.shape:
        came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise AdapterError(
            f"filter_fn must return logits of the shape it is given, {tuple(logits.shape)}; "
            f"got {came}."
        )
    return out
