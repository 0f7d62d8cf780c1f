"""The rows of one session, from the first request to the last.

A fixed number of rows is in flight; the place of one that has ended is given to the next at once,
as far as the model's session can join rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from self_rewarding_lm.checks import not_finite
from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.sampling import penalise_repetition, sample_next, uniforms
from self_rewarding_lm.generation.schedule import Group
from self_rewarding_lm.models.interface import Plan, Session, TokenModel, device_of
from self_rewarding_lm.records import Ids

AHEAD = 256
"""Tokens of prompts that are computed before there is room for their rows: a forward of few tokens
costs nearly as much as one of many."""


@dataclass(eq=False, slots=True)
class _Row:
    """A request on its way. noise: its uniform numbers, one a token."""

    index: int
    limit: int
    noise: np.ndarray
    new: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Ready:
    """A prompt that is held by the session. members: the requests that have no row yet."""

    number: int
    ids: Ids
    members: deque[int]
    logits: Tensor


class Flight:
    """Requests that are worked with one session; its memory goes with it."""

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
        self.ready: deque[_Ready] = deque()
        self.rows: list[_Row] = []
        self.logits: Tensor | None = None
        self.seen: Tensor | None = None
        self.session: Session | None = None

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.ready or self.waiting)

    def until_some_end(self) -> list[tuple[int, Completion]]:
        """Go on until rows have ended; these. Their places are free then."""
        session = self.session = self.session or self.model.session(self.plan)
        while True:
            self._admit(session)
            tokens = self._choose()
            ended = self._take(tokens.tolist())
            order = _closed_up(len(self.rows), ended.keys())
            done = [(self.rows[i].index, completion) for i, completion in ended.items()]
            if ended:
                session.select(order)
                self.rows = [self.rows[i] for i in order]
                kept = torch.tensor(order, device=self.device, dtype=torch.long)
                tokens = tokens[kept]
                self.seen = None if self.seen is None else self.seen[kept]
            self.logits = session.extend(tokens) if self.rows else None
            if ended:
                return done

    def _admit(self, session: Session) -> None:
        """Give free places to the next requests, those of one prompt one after the other."""
        if self.rows and not session.joins:
            return
        room, numbers, done = self.plan.max_rows - len(self.rows), [], []
        logits = [] if self.logits is None else [self.logits]
        while room and (self.ready or self.waiting):
            if not self.ready:
                if numbers and not session.joins:
                    break
                self._prefill(session, room)
            prompt = self.ready[0]
            count = min(room, len(prompt.members))
            numbers += [prompt.number] * count
            logits.append(prompt.logits.expand(count, -1))
            self._begin([prompt.members.popleft() for _ in range(count)], prompt.ids)
            room -= count
            if not prompt.members:
                done.append(self.ready.popleft().number)
        if numbers:
            session.add(numbers)
            session.release(done)
            self.logits = torch.cat(logits)

    def _prefill(self, session: Session, room: int) -> None:
        """The next prompts, as many as go through the model together."""
        some: list[Group] = []
        copies = longest = 0
        while self.waiting and len(some) < session.room():
            longest = max(longest, len(self.waiting[0].ids))
            tokens = (len(some) + 1) * longest
            if session.joins:
                enough = copies >= room and tokens > AHEAD
            else:  # what is left over would be a batch of its own
                enough = copies + len(self.waiting[0].members) > room
            if some and (enough or tokens > self.max_prefill_tokens):
                break
            some.append(self.waiting.popleft())
            copies += len(some[-1].members)
        first = session.held
        logits = session.prefill([group.ids for group in some])
        for i, group in enumerate(some):
            self.ready.append(_Ready(first + i, group.ids, deque(group.members), logits[i : i + 1]))

    def _begin(self, members: Sequence[int], ids: Ids) -> None:
        for i in members:
            limit = self.requests[i].max_new_tokens
            noise = uniforms(np.array([self.requests[i].key], dtype=np.int64), limit)[0]
            self.rows.append(_Row(i, limit, noise))
        if self.decoding.repetition_penalty != 1.0:
            new = torch.zeros(len(members), self.model.vocab, dtype=torch.bool, device=self.device)
            new[:, list(ids)] = True
            self.seen = new if self.seen is None else torch.cat([self.seen, new])

    def _choose(self) -> Tensor:
        d, logits = self.decoding, self.logits
        assert logits is not None
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, d.repetition_penalty)
        early = [i for i, row in enumerate(self.rows) if len(row.new) < d.min_new_tokens]
        if d.end_ids and early:
            logits = logits.clone()
            logits[torch.tensor(early)[:, None], list(d.end_ids)] = -torch.inf
        if d.filter_fn is not None:
            logits = _filtered(d.filter_fn, logits)
        noise = np.array([row.noise[len(row.new)] for row in self.rows])
        tokens = sample_next(
            logits,
            torch.from_numpy(noise).to(self.device),
            temperature=d.temperature,
            top_k=d.top_k,
            top_p=d.top_p,
            min_p=d.min_p,
        )
        if self.seen is not None:
            there = tokens.clamp(max=self.model.vocab - 1)  # a row may have no token, see _take
            self.seen[torch.arange(len(tokens), device=self.device), there] = True
        return tokens

    def _take(self, tokens: list[int]) -> dict[int, Completion]:
        """Append a token to each row; the places of those that end by it."""
        d, ended = self.decoding, {}
        can_end = bool(d.end_ids) or d.is_stop is not None
        if max(tokens) >= self.model.vocab:
            self._nothing_to_sample(tokens)
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            row.new.append(token)
            if token in d.end_ids or (d.is_stop is not None and d.is_stop(row.new)):
                ended[place] = Completion(tuple(row.new), True)
            elif len(row.new) >= row.limit:
                ended[place] = Completion(tuple(row.new), False if can_end else None)
        return ended

    def _nothing_to_sample(self, tokens: list[int]) -> None:
        """Raise where rows have no token: the model's logits are not finite, or a filter's are."""
        assert self.logits is not None
        places = [place for place, token in enumerate(tokens) if token >= self.model.vocab]
        names = [self.requests[self.rows[place].index].name for place in places]
        own = self.logits[places]
        if self.decoding.filter_fn is not None and own.amax(dim=-1).isfinite().all():
            raise AdapterError(
                f"filter_fn left no token to sample for {names[0]}: its logits have no finite "
                "maximum. It must leave one token at least, and no NaN."
            )
        seen = "NaN" if own.isnan().any() else "no finite maximum"
        raise not_finite(
            f"generating, {len(self.rows[places[0]].new)} tokens behind the prompt",
            f"the model's logits have {seen}, so nothing can be sampled",
            names,
            "Records of a stage begin with its name; those that were finished are on disk. The "
            "weights have diverged or are damaged, or their type is too narrow: go back to "
            "earlier weights (init_from, or the stage before with a lower optim.learning_rate), "
            "or load the model in float32 or bfloat16.",
        )


def _closed_up(count: int, ended: Collection[int]) -> list[int]:
    """The places that go on; those at the end take the places before them that are free."""
    going = [i for i in range(count) if i not in ended]
    tail = [i for i in going if i >= len(going)]
    return [i if i not in ended else tail.pop() for i in range(len(going))]


def _filtered(filter_fn: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    out = filter_fn(logits.clone())
    if not isinstance(out, Tensor) or out.shape != logits.shape:
        came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise AdapterError(
            f"filter_fn must return logits of the shape it is given, {tuple(logits.shape)}; "
            f"got {came}."
        )
    return out
