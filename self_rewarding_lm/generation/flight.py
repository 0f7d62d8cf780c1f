"""The sequences of one session, from the first request to the last.

A sequence is waiting until a row is free and its prompt is computed, running while its row gets a
token at each step, and finished when an end token, a stop text or its limit is reached. A step is
schedule, sample, postprocess, run: waiting sequences take the free rows, each running sequence gets
a token, those that it finishes leave their rows, and the others' tokens go through the model. A
free row is taken at the next step, as far as the model's session can join rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from self_rewarding_lm.checks import not_finite
from self_rewarding_lm.errors import AdapterError, SelfRewardingError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.sampling import penalise_repetition, sample_next, uniforms
from self_rewarding_lm.generation.schedule import Group
from self_rewarding_lm.models.interface import Plan, Session, TokenModel, device_of
from self_rewarding_lm.models.logprobs import next_logprobs
from self_rewarding_lm.records import Ids
from self_rewarding_lm.text import amount

AHEAD = 256
"""Tokens of prompts that are computed before there is room for their rows: a forward of few tokens
costs nearly as much as one of many."""


@dataclass(eq=False, slots=True)
class _Sequence:
    """A running sequence. request: its index; noise: its uniform numbers, one for each token."""

    request: int
    max_new_tokens: int
    noise: np.ndarray
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def completed(self, finished: bool | None) -> Completion:
        logprobs = tuple(self.logprobs) if self.logprobs else None
        return Completion(tuple(self.new_ids), finished, logprobs=logprobs)


@dataclass(eq=False, slots=True)
class _Prefilled:
    """A prompt that the session holds, by its number there.

    waiting: its requests that have no row yet. logits (1, v): of the first new token.
    """

    number: int
    ids: Ids
    waiting: deque[int]
    logits: Tensor


class Flight:
    """Requests that are worked with one session, whose memory goes when they are done.

    waiting: prompts that are still to be computed, with their requests. prefilled: prompts that are
    computed and have requests without a row. running: one sequence a row of the session. logits
    (r, v): of each running sequence's next token. occurred (r, v): which tokens are in its prompt
    or response, None if repetition is not penalised.
    """

    def __init__(
        self,
        model: TokenModel,
        plan: Plan,
        groups: Sequence[Group],
        requests: Sequence[Request],
        decoding: Decoding,
        max_prefill_tokens: int,
    ) -> None:
        self.model, self.plan, self.requests, self.decoding = model, plan, requests, decoding
        self.max_prefill_tokens = max_prefill_tokens
        self.device = device_of(model.module)
        self.waiting = deque(groups)
        self.prefilled: deque[_Prefilled] = deque()
        self.running: list[_Sequence] = []
        self.logits: Tensor | None = None
        self.occurred: Tensor | None = None

    @cached_property
    def session(self) -> Session:
        return self.model.session(self.plan)

    @property
    def is_done(self) -> bool:
        return not (self.running or self.prefilled or self.waiting)

    def until_some_finish(self) -> list[tuple[int, Completion]]:
        """Take steps until sequences are finished: their requests' indices and completions."""
        while True:
            finished = self.step()
            if finished:
                return finished

    def step(self) -> list[tuple[int, Completion]]:
        """Give each running sequence a token; the sequences that are finished by it."""
        self._schedule()
        tokens = self._sample()
        if self.decoding.logprobs:
            self._note_logprobs(tokens)
        finished, tokens = self._postprocess(tokens)
        self.logits = self.session.extend(tokens) if self.running else None
        return finished

    # 1. schedule

    def _schedule(self) -> None:
        """Give the free rows to waiting sequences, those of one prompt one after the other."""
        if self.running and not self.session.joins:
            return
        free = self.plan.max_rows - len(self.running)
        added: list[int] = []  # for each new row the number of its prompt
        released: list[int] = []
        logits = [] if self.logits is None else [self.logits]
        while free and (self.prefilled or self.waiting):
            if not self.prefilled:
                if added and not self.session.joins:
                    break
                self._prefill(free)
            prompt = self.prefilled[0]
            count = min(free, len(prompt.waiting))
            self._start([prompt.waiting.popleft() for _ in range(count)], prompt.ids)
            added += [prompt.number] * count
            logits.append(prompt.logits.expand(count, -1))  # (count, v)
            free -= count
            if not prompt.waiting:
                released.append(self.prefilled.popleft().number)
        if added:
            self.session.add(added)
            self.session.release(released)
            self.logits = torch.cat(logits)  # (r, v)

    def _prefill(self, free: int) -> None:
        """Compute the next prompts, as many as go through the model together."""
        session = self.session
        groups: list[Group] = []
        rows = longest = 0
        while self.waiting and len(groups) < session.room():
            longest = max(longest, len(self.waiting[0].ids))
            tokens = (len(groups) + 1) * longest
            if session.joins:
                enough = rows >= free and tokens > AHEAD
            else:  # what is left over would be a batch of its own
                enough = rows + len(self.waiting[0].members) > free
            if groups and (enough or tokens > self.max_prefill_tokens):
                break
            groups.append(self.waiting.popleft())
            rows += len(groups[-1].members)
        first = session.held
        logits = session.prefill([group.ids for group in groups])  # (n, v)
        for i, group in enumerate(groups):
            waiting = deque(group.members)
            self.prefilled.append(_Prefilled(first + i, group.ids, waiting, logits[i : i + 1]))

    def _start(self, requests: Sequence[int], ids: Ids) -> None:
        """Requests with the prompt `ids` become running sequences."""
        for request in requests:
            limit = self.requests[request].max_new_tokens
            key = np.array([self.requests[request].key], dtype=np.int64)
            self.running.append(_Sequence(request, limit, uniforms(key, limit)[0]))
        if self.decoding.repetition_penalty != 1.0:
            shape = len(requests), self.model.vocab
            in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            in_prompt[:, list(ids)] = True
            parts = [in_prompt] if self.occurred is None else [self.occurred, in_prompt]
            self.occurred = torch.cat(parts)  # (r, v)

    # 2. sample

    def _sample(self) -> Tensor:
        """A token for each running sequence (r,); the vocabulary's size if it has none."""
        decoding, logits = self.decoding, self.logits
        assert logits is not None
        if self.occurred is not None:
            logits = penalise_repetition(logits, self.occurred, decoding.repetition_penalty)
        may_not_end = [
            row
            for row, sequence in enumerate(self.running)
            if len(sequence.new_ids) < decoding.min_new_tokens
        ]
        if decoding.end_ids and may_not_end:
            logits = logits.clone()
            logits[torch.tensor(may_not_end)[:, None], list(decoding.end_ids)] = -torch.inf
        if decoding.filter_fn is not None:
            logits = _filtered(decoding.filter_fn, logits)
        noise = np.array([sequence.noise[len(sequence.new_ids)] for sequence in self.running])
        tokens = sample_next(
            logits,
            torch.from_numpy(noise).to(self.device),
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            min_p=decoding.min_p,
        )
        if self.occurred is not None:
            known = tokens.clamp(max=self.model.vocab - 1)  # without one `_postprocess` raises
            self.occurred[torch.arange(len(tokens), device=self.device), known] = True
        return tokens

    def _note_logprobs(self, tokens: Tensor) -> None:
        """Give each running sequence the log-prob of its token, as the model alone has it."""
        assert self.logits is not None
        known = tokens.clamp(max=self.model.vocab - 1)  # without one `_postprocess` raises
        chosen = next_logprobs(self.logits, known).tolist()
        for sequence, logprob in zip(self.running, chosen, strict=True):
            sequence.logprobs.append(logprob)

    # 3. postprocess

    def _postprocess(self, tokens: Tensor) -> tuple[list[tuple[int, Completion]], Tensor]:
        """Append the tokens; take the sequences that are finished out of the session.

        What is finished, and the tokens of the sequences that go on, in their new rows.
        """
        completions = self._completions(tokens.tolist())
        if not completions:
            return [], tokens
        finished = [(self.running[row].request, done) for row, done in completions.items()]
        rows = _rows_closed_up(len(self.running), completions.keys())
        self.session.select(rows)
        self.running = [self.running[row] for row in rows]
        kept = torch.tensor(rows, device=self.device, dtype=torch.long)
        self.occurred = None if self.occurred is None else self.occurred[kept]
        return finished, tokens[kept]

    def _completions(self, tokens: list[int]) -> dict[int, Completion]:
        """Append a token to each sequence; the completions of those that end by it, by row."""
        decoding = self.decoding
        can_end = bool(decoding.end_ids) or decoding.is_stop is not None
        if max(tokens) >= self.model.vocab:
            raise self._nothing_to_sample(tokens)
        completions = {}
        for row, (sequence, token) in enumerate(zip(self.running, tokens, strict=True)):
            new_ids = sequence.new_ids
            new_ids.append(token)
            if token in decoding.end_ids or (
                decoding.is_stop is not None and decoding.is_stop(new_ids)
            ):
                completions[row] = sequence.completed(True)
            elif len(new_ids) >= sequence.max_new_tokens:
                completions[row] = sequence.completed(False if can_end else None)
        return completions

    def _nothing_to_sample(self, tokens: list[int]) -> SelfRewardingError:
        """The error of rows without a token: the model's logits are not finite, or a filter's."""
        assert self.logits is not None
        rows = [row for row, token in enumerate(tokens) if token >= self.model.vocab]
        names = [self.requests[self.running[row].request].name for row in rows]
        logits = self.logits[rows]  # before the filter
        if self.decoding.filter_fn is not None and logits.amax(dim=-1).isfinite().all():
            return AdapterError(
                f"filter_fn left no token to sample for {names[0]}: its logits have no finite "
                "maximum. It must leave one token at least, and no NaN."
            )
        what = "NaN" if logits.isnan().any() else "no finite maximum"
        new = amount(len(self.running[rows[0]].new_ids), "token")
        return not_finite(
            f"generating, {new} after the prompt",
            f"the model's logits have {what}, so nothing can be sampled",
            names,
            "Records of a stage begin with its name; those that were finished are on disk. The "
            "weights have diverged or are damaged, or their type is too narrow: go back to "
            "earlier weights (init_from, or the stage before with a lower optim.learning_rate), "
            "or load the model in float32 or bfloat16.",
        )


def _rows_closed_up(count: int, finished: Collection[int]) -> list[int]:
    """The rows that go on, the last ones in the places of those before them that are finished."""
    going = [row for row in range(count) if row not in finished]
    last = [row for row in going if row >= len(going)]
    return [row if row not in finished else last.pop() for row in range(len(going))]


def _filtered(filter_fn: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    filtered = filter_fn(logits.clone())
    if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
        is_tensor = isinstance(filtered, Tensor)
        came = tuple(filtered.shape) if is_tensor else type(filtered).__name__
        raise AdapterError(
            f"filter_fn must return logits of the shape it is given, {tuple(logits.shape)}; "
            f"got {came}."
        )
    return filtered
