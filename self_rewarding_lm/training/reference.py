"""The reference of a preference loss: log-probs that are stored, or weights that follow the policy.

A stored reference is asked once, before training, with dropout off, and its answers are kept
beside the pairs: no second copy of the weights, no drift. A live reference (EMA, TR-DPO) holds a
second copy of the trained weights that follows them.
"""

import logging
import math
from array import array
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from self_rewarding_lm.checks import not_finite
from self_rewarding_lm.config import Config
from self_rewarding_lm.context import Context
from self_rewarding_lm.models.batching import grouped
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.sharding import spread, whole

PAIRS_AT_ONCE = 4096  # that are in memory together, and put into forwards by length


@dataclass(frozen=True)
class PairSums:
    """A pair's summed reference log-probs."""

    chosen: float
    rejected: float


class StoredReference:
    """Log-probs of pairs under the present weights, computed where they are not on disk yet.

    round: pairs that are trained in several rounds have a reference in each. weights: others than
    the present ones, as `ctx.weights` names them; they are the reference of all rounds.
    """

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
        self.weights = weights
        self.label = f"r{round}" if weights is None else weights.replace("/", "_")

    def sums(self, pairs: Sequence[PreferencePair]) -> Sequence[PairSums]:
        """The summed log-probs of each pair, in the order of `pairs`.

        Raises TrainingError where they are not finite.
        """
        chosen, rejected = array("d"), array("d")
        for found in self.tokens(pairs):
            chosen.append(sum(found.chosen))
            rejected.append(sum(found.rejected))
        found = zip(chosen, rejected, strict=True)
        bad = [i for i, both in enumerate(found) if not math.isfinite(sum(both))]
        if bad:
            raise not_finite(
                f"stage {self.ctx.stage!r}, before step 1",
                "reference log-probs are not finite",
                [pairs[i].id for i in bad],
                "The reference's weights give them no finite probability: they are "
                "damaged, too large for their type, or have logits of -inf. Begin with earlier "
                f"weights (init_from), and delete reference.jsonl in {self.out.path} before.",
            )
        return Picked(range(len(chosen)), change=lambda i: PairSums(chosen[i], rejected[i]))

    def tokens(self, pairs: Sequence[PreferencePair]) -> Sequence[ReferenceLogprobs]:
        """The log-probs of each pair token by token, read from disk when they are asked for."""
        known = Groups(self.out.known(ReferenceLogprobs))
        names = [f"{pair.id}/{self.label}" for pair in pairs]
        mine = self.ctx.runtime.share([*range(len(names))])
        if all(name in known for name in names):
            mine = []
        bar = self.ctx.runtime.progress(len(mine), "reference log-probs", "pair")
        others = self.ctx.weights(self.weights) if mine and self.weights else nullcontext()
        with bar, others:
            for start in range(0, len(mine), PAIRS_AT_ONCE):
                some = mine[start : start + PAIRS_AT_ONCE]
                for count in self._stored([(names[i], pairs[i]) for i in some], known):
                    bar.update(count)
        self.out.merge(ReferenceLogprobs)
        return Groups(self.out.known(ReferenceLogprobs)).in_order(names)

    def _stored(
        self, named: list[tuple[str, PreferencePair]], known: Container[str]
    ) -> Iterator[int]:
        """Compute and store what is not known; how many pairs came with each forward.

        Pairs go through the model in the same groups whatever is known, so that the log-probs of a
        reference that was stopped are bit for bit those of one that was not.
        """
        policy = self.ctx.runtime.unwrapped(self.ctx.policy)  # siblings have other groups
        sequences = [_sequences(pair) for _, pair in named]
        rows = [[(*prompt, *response) for prompt, response in pair] for pair in sequences]
        for group in grouped(self.ctx.model, rows, token_budget=self.token_budget):
            if any(named[i][0] not in known for i in group):
                together = [sequence for i in group for sequence in sequences[i]]
                found = iter(response_logprobs(policy, together))
                made = [ReferenceLogprobs(named[i][0], next(found), next(found)) for i in group]
                self.out.append(record for record in made if record.id not in known)
                self.ctx.runtime.stopping.heed()
            yield len(group)


def _sequences(pair: PreferencePair) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]


logger = logging.getLogger(__name__)


REFERENCE = "reference/"


class EMAReference(Config):
    """The reference is a moving average of the policy: decay * ref + (1 - decay) * policy.

    It begins as the stage's first weights. With decay 1 it stays there.
    """

    decay: float = Field(default=0.99, ge=0, le=1)
    """What the reference keeps of itself; ours: it forgets half of the start in 69 updates."""
    every: int = Field(default=1, ge=1)
    """Optimiser steps between two updates."""

    @property
    def shares(self) -> tuple[float, float]:
        """Of the reference and of the policy in an update."""
        return self.decay, 1 - self.decay


class MixedReference(Config):
    """TR-DPO (arXiv:2404.09656): ref <- alpha * policy + (1 - alpha) * ref every so many steps.

    It begins as the stage's first weights. alpha = 1 is the paper's hard update.
    """

    alpha: float = Field(default=0.6, ge=0, le=1)
    """The policy's share. Default: TRL's (`ref_model_mixup_alpha`)."""
    every: int = Field(default=512, ge=1)
    """tau, optimiser steps between two updates. Default: TRL's (`ref_model_sync_steps`)."""

    @property
    def shares(self) -> tuple[float, float]:
        """Of the reference and of the policy in an update."""
        return 1 - self.alpha, self.alpha


Moving = EMAReference | MixedReference


class LiveReference:
    """A moving reference's weights: a copy of those that are trained, in float32 at least, since
    small updates are lost in narrower types. What is not trained it shares with the policy.

    steps: optimiser steps that it has followed.
    """

    def __init__(self, settings: Moving) -> None:
        self.settings = settings
        self.weights: dict[str, Tensor] = {}
        self.steps = 0

    def begin(self, module: nn.Module) -> None:
        """Copy a module's weights, unless there is a copy from an earlier round."""
        if not self.weights:
            for name, parameter in _trained(module):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.weights[name] = parameter.detach().to(wide, copy=True)
            size = sum(t.numel() * t.itemsize for t in self.weights.values()) / 2**30
            logger.info("a reference that moves: a second copy of %.2f GiB of weights", size)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The reference's weights in the module; no gradients, no dropout."""
        _reshard(module)
        with torch.no_grad(), evaluating(module):
            kept = [(p, _exchange(p, self.weights[name])) for name, p in _trained(module)]
            try:
                yield
            finally:
                _reshard(module)
                for parameter, before in kept:
                    _exchange(parameter, before)

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Called behind each optimiser step."""
        self.steps += 1
        if self.steps % self.settings.every == 0:
            own, new = self.settings.shares
            for name, parameter in _trained(module):
                weights = self.weights[name]
                weights.mul_(own).add_(parameter.detach().to(weights.dtype), alpha=new)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The weights, whole and on the CPU, by names with a prefix. keep: as optimizer_state."""
        found = {f"{REFERENCE}{name}": whole(tensor) for name, tensor in self.weights.items()}
        return {name: tensor.cpu() for name, tensor in found.items()} if keep else {}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` gave."""
        self.steps = steps
        for name, own in self.weights.items():
            given = tensors[f"{REFERENCE}{name}"]
            own.copy_(spread(given, own) if isinstance(own, DTensor) else given)


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _exchange(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Give a parameter other numbers; those that it had."""
    tensor = tensor.to(parameter.dtype)
    if isinstance(parameter, DTensor):  # FSDP gathers from the storage that a share had at first
        before = parameter.detach().clone()
        parameter.detach().copy_(tensor)
        return before
    before, parameter.data = parameter.data, tensor
    return before


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):  # after a forward without a backward the root is whole
        module.reshard()
