"""The reference of a preference loss: log-probs that are stored, or weights that follow the policy.

A stored reference is asked once, before training, with dropout off, and its answers are kept
beside the pairs: no second copy of the weights, no drift. A live reference (EMA, TR-DPO) is a
second copy of the trained weights, which follows them.
"""

import logging
import math
from array import array
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from self_rewarding_lm.checks import not_finite
from self_rewarding_lm.config import Config
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import TrainingError
from self_rewarding_lm.models.batching import grouped
from self_rewarding_lm.models.fused import cast_once
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Ids, PreferencePair, ReferenceLogprobs
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.runtime import MemoryUsedUpError, give_back_memory, memory_told
from self_rewarding_lm.sharding import spread, whole

logger = logging.getLogger(__name__)


PAIRS_AT_ONCE = 4096  # that are in memory together, and put into forwards by length


SMALLER = (
    "Lower optim.micro_batch_tokens (now {:,}) or optim.micro_batch_size, set "
    "optim.gradient_checkpointing, or cut long rows with max_seq_len. The first two may change "
    "when the run goes on."
)
"""What to do when memory does not suffice for forwards of rows to train on."""


REFERENCE = "reference/"
"""Prefix of the names of a live reference's tensors."""


@dataclass(frozen=True)
class PairSums:
    """A pair's reference log-probs, each summed over its response."""

    chosen: float
    rejected: float


@runtime_checkable
class Row(Protocol):
    """What log-probs are asked of: a record with an id."""

    @property
    def id(self) -> str: ...


RowType = TypeVar("RowType", bound=Row)
Logprobs = TypeVar("Logprobs")


class StoredLogprobs(Generic[RowType, Logprobs]):
    """Log-probs of rows under fixed weights, computed once and kept in the stage's folder.

    A subclass says which responses a row has, and what record their log-probs become. weights: a
    name that `ctx.weights` knows; those are the reference of all rounds. If None, the present
    weights are it, and each `round` of a stage has a reference of its own. token_budget: tokens of
    a forward.
    """

    record_type: ClassVar[type[Any]]
    noun: ClassVar[str]
    """The word for a row."""

    def __init__(
        self,
        ctx: Context,
        out: StageDir,
        *,
        token_budget: int,
        round: int = 0,
        weights: str | None = None,
    ) -> None:
        self.ctx, self.out = ctx, out
        self.token_budget = token_budget
        self.was_halved = False
        self.weights = weights
        self.label = f"r{round}" if weights is None else weights.replace("/", "_")

    def responses(self, row: RowType) -> Sequence[tuple[Ids, Ids]]:
        """The (prompt, response) of each response of a row."""
        raise NotImplementedError

    def record(self, record_id: str, logprobs: Sequence[tuple[float, ...]]) -> Logprobs:
        """The record of a row's log-probs: of each response a number for each token."""
        raise NotImplementedError

    def tokens(self, rows: Sequence[RowType]) -> Sequence[Logprobs]:
        """The log-probs of each row token by token, read from disk when they are asked for.

        Raises TrainingError if one that is computed now is not finite; none such is stored.
        """
        # 1. see which are on disk
        known = Groups(self.out.known(self.record_type))
        ids = [f"{row.id}/{self.label}" for row in rows]
        is_complete = all(record_id in known for record_id in ids)
        mine = [] if is_complete else self.ctx.runtime.share([*range(len(ids))])
        # 2. compute the missing ones of this process's share, with the reference's weights
        label = "reference log-probs"
        bar = self.ctx.runtime.progress(len(mine), label, self.noun, is_share=True)
        weights = self.ctx.weights(self.weights) if mine and self.weights else nullcontext()
        casting = cast_once(self.ctx.policy, self.ctx.runtime) if mine else nullcontext()
        bad, failures = list[str](), list[str]()
        try:
            with bar, weights, casting:
                for start in range(0, len(mine), PAIRS_AT_ONCE):
                    block = [(ids[i], rows[i]) for i in mine[start : start + PAIRS_AT_ONCE]]
                    for count in self._compute(block, known, bad):
                        bar.update(count)
                    if bad:
                        break
        except MemoryUsedUpError as error:
            failures.append(str(error))
        # 3. stop on all processes if memory was used up, or one got a number that is not finite
        for words in self.ctx.runtime.gather(failures):
            raise MemoryUsedUpError(words)
        bad = self.ctx.runtime.gather(bad)
        if bad:
            raise self.not_finite(
                bad, "Nothing of them was stored: start again, and the reference is asked again."
            )
        # 4. join the shares of all processes
        self.out.merge(self.record_type)
        return Groups(self.out.known(self.record_type)).in_order(ids)

    def _asked(
        self, policy: nn.Module, sequences: Sequence[tuple[Ids, Ids]], *, may_fail: bool
    ) -> Iterator[tuple[float, ...]] | None:
        """Log-probs of sequences; None if they may fail and memory was used up, said once."""
        try:
            with memory_told("asking the reference", SMALLER.format(self.token_budget)):
                return iter(response_logprobs(policy, sequences))
        except MemoryUsedUpError as error:
            if not may_fail:
                raise
            words = str(error).partition(". Lower ")[0]
        give_back_memory(after_error=True)
        if not self.was_halved:
            self.was_halved = True
            logger.warning("%s: %s. Tried again with half at once.", self.ctx.stage, words)
        return None

    def not_finite(self, row_ids: Sequence[str], advice: str) -> TrainingError:
        which = "its present weights" if self.weights is None else f"the weights {self.weights!r}"
        return not_finite(
            f"stage {self.ctx.stage!r}, before step 1",
            f"reference log-probs are not finite, from a forward of the reference ({which})",
            row_ids,
            f"{advice} If it happens again, these weights give the {self.noun}s no finite "
            "probability: they are damaged, too large for their type, or have logits of -inf; take "
            "another reference, or begin with earlier weights (init_from).",
        )

    def _compute(
        self, block: list[tuple[str, RowType]], known: Container[str], bad: list[str]
    ) -> Iterator[int]:
        """Compute and store what is not known; yields how many rows each forward has finished.

        block: (record id, row). bad: gets the ids of rows whose log-probs are not finite, and
        then nothing more is computed. Rows go through the model in the same groups whatever is
        known, so that the log-probs of an interrupted reference are bit for bit those of another.
        """
        policy = self.ctx.runtime.unwrapped(self.ctx.policy)  # siblings have other groups
        responses = [self.responses(row) for _, row in block]
        rows = [[(*prompt, *response) for prompt, response in of_row] for of_row in responses]
        groups = deque(grouped(self.ctx.model, rows, token_budget=self.token_budget))
        while groups:
            group = groups.popleft()
            if any(block[i][0] not in known for i in group):
                self.ctx.round.check_weights()
                sequences = [sequence for i in group for sequence in responses[i]]
                logprobs = self._asked(policy, sequences, may_fail=len(group) > 1)
                if logprobs is None:  # memory was used up: half of the group at once
                    half = len(group) // 2
                    groups.extendleft([group[half:], group[:half]])
                    continue
                of_rows = [[next(logprobs) for _ in responses[i]] for i in group]
                finite = [math.isfinite(sum(map(sum, of_row))) for of_row in of_rows]
                self.out.append(
                    self.record(block[i][0], of_row)
                    for i, of_row, is_finite in zip(group, of_rows, finite, strict=True)
                    if is_finite and block[i][0] not in known
                )
                bad += [block[i][1].id for i, ok in zip(group, finite, strict=True) if not ok]
                if bad:
                    return
                self.ctx.runtime.stopping.heed()
            yield len(group)


class StoredReference(StoredLogprobs[PreferencePair, ReferenceLogprobs]):
    """The stored log-probs of both responses of pairs."""

    record_type = ReferenceLogprobs
    noun = "pair"

    def responses(self, row: PreferencePair) -> Sequence[tuple[Ids, Ids]]:
        return [(row.prompt_ids, row.chosen_ids), (row.prompt_ids, row.rejected_ids)]

    def record(self, record_id: str, logprobs: Sequence[tuple[float, ...]]) -> ReferenceLogprobs:
        return ReferenceLogprobs(record_id, *logprobs)

    def sums(self, pairs: Sequence[PreferencePair]) -> Sequence[PairSums]:
        """The summed log-probs of each pair, in the order of `pairs`.

        Raises TrainingError if they are not finite, which version 0.1.0 stored.
        """
        chosen, rejected = array("d"), array("d")
        for logprobs in self.tokens(pairs):
            chosen.append(sum(logprobs.chosen))
            rejected.append(sum(logprobs.rejected))
        both = enumerate(zip(chosen, rejected, strict=True))
        bad = [i for i, sums in both if not math.isfinite(sum(sums))]
        if bad:
            raise self.not_finite(
                [pairs[i].id for i in bad],
                f"They are in reference.jsonl in {self.out.path}; delete it, and the reference is "
                "asked again.",
            )
        return Picked(range(len(chosen)), change=lambda i: PairSums(chosen[i], rejected[i]))


class EMAReference(Config):
    """The reference is a moving average of the policy: decay * ref + (1 - decay) * policy.

    It begins as the stage's first weights. With decay 1 it never changes.
    """

    decay: float = Field(default=0.99, ge=0, le=1)
    """The reference's share in an update. Default (ours): half of the start is left after 69
    updates."""
    every: int = Field(default=1, ge=1)
    """Optimiser steps between two updates."""

    @property
    def shares(self) -> tuple[float, float]:
        """The reference's and the policy's share in an update."""
        return self.decay, 1 - self.decay


class MixedReference(Config):
    """A reference that moves every few steps: ref <- alpha * policy + (1 - alpha) * ref.

    This is TR-DPO (arXiv:2404.09656).

    It begins as the stage's first weights. alpha = 1 is the paper's hard update.
    """

    alpha: float = Field(default=0.6, ge=0, le=1)
    """The policy's share in an update. Default: TRL's (`ref_model_mixup_alpha`)."""
    every: int = Field(default=512, ge=1)
    """tau, optimiser steps between two updates. Default: TRL's (`ref_model_sync_steps`)."""

    @property
    def shares(self) -> tuple[float, float]:
        """The reference's and the policy's share in an update."""
        return 1 - self.alpha, self.alpha


MovingReference = EMAReference | MixedReference
"""How a live reference follows the policy."""


class LiveReference:
    """The weights of a moving reference: a copy of those that are trained.

    The copy is float32 at least, since small updates are lost in narrower types. Weights that are
    not trained are the policy's own. steps: optimiser steps that it has followed.
    """

    def __init__(self, settings: MovingReference) -> None:
        self.settings = settings
        self.weights: dict[str, Tensor] = {}
        self.steps = 0

    def begin(self, module: nn.Module) -> None:
        """Copy a module's trained weights, unless an earlier round has done so."""
        if not self.weights:
            for name, parameter in _trained_parameters(module):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.weights[name] = parameter.detach().to(wide, copy=True)
            size = sum(t.numel() * t.itemsize for t in self.weights.values()) / 2**30
            logger.info("a moving reference: a second copy of %.2f GiB of weights", size)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Within, the module has the reference's weights, no gradients and no dropout."""
        _reshard(module)
        with torch.no_grad(), evaluating(module):
            policy_weights = [
                (parameter, _exchange_data(parameter, self.weights[name]))
                for name, parameter in _trained_parameters(module)
            ]
            try:
                yield
            finally:
                _reshard(module)
                for parameter, tensor in policy_weights:
                    _exchange_data(parameter, tensor)

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Count an optimiser step, and move the reference towards the module if it is time."""
        self.steps += 1
        if self.steps % self.settings.every == 0:
            reference_share, policy_share = self.settings.shares
            for name, parameter in _trained_parameters(module):
                weights = self.weights[name]
                policy = parameter.detach().to(weights.dtype)
                weights.mul_(reference_share).add_(policy, alpha=policy_share)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The weights, whole and on the CPU, with a prefix before each name.

        keep: False on processes that only take part in gathering them.
        """
        tensors = {f"{REFERENCE}{name}": whole(tensor) for name, tensor in self.weights.items()}
        return {name: tensor.cpu() for name, tensor in tensors.items()} if keep else {}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` returned, after `steps` optimiser steps."""
        self.steps = steps
        for name, weights in self.weights.items():
            saved = tensors[f"{REFERENCE}{name}"]
            weights.copy_(spread(saved, weights) if isinstance(weights, DTensor) else saved)


def _trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _exchange_data(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Put other numbers into a parameter; returns those it had."""
    tensor = tensor.to(parameter.dtype)
    if isinstance(parameter, DTensor):  # FSDP gathers from the storage that a shard had at first
        before = parameter.detach().clone()
        parameter.detach().copy_(tensor)
        return before
    before, parameter.data = parameter.data, tensor
    return before


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):  # after a forward without a backward the root is whole
        module.reshard()
