"""The module that accelerate prepares: it holds the model and gives log-probs, not logits."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from self_rewarding_lm.models.batching import by_side, packs, pad_rows
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.models.logprobs import (
    Measure,
    label_logprobs,
    label_measures,
    token_logprobs,
    token_measures,
)
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.models.packing import Packing

logger = logging.getLogger(__name__)


FAR = 1_000_000_000
"""A length beyond every border."""


class Policy(nn.Module):
    """forward(ids) -> the log-prob of each token.

    Every forward with gradients goes through it, so that distributed wrappers see all of them.
    """

    def __init__(self, model: TokenModel) -> None:
        super().__init__()
        self.model = model.module
        self.token_model = model
        self._narrow: Callable[[Any], Tensor | None] | None = None

    @contextmanager
    def head_narrowed(self, narrow: Callable[[Any], Tensor | None]) -> Iterator[None]:
        """Within, the head multiplies by the copy of its matrix that there is.

        narrow: gives the copy of a layer's matrix in the type in which it is multiplied now; None
        if there is none.
        """
        before, self._narrow = self._narrow, narrow
        try:
            yield
        finally:
            self._narrow = before

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"] | None = None,
        targets: Bool[Tensor, "b t"] | None = None,
        noise: RowNoise | None = None,
        measure: Measure | None = None,
    ) -> Float[Tensor, "b t"]:
        """log p(ids[:, i] | ids[:, :i]) at column i, 0.0 at column 0.

        lengths: of right-padded rows; if None all are full. targets: where log-probs are wanted, by
        default everywhere; elsewhere they are 0.0, or what they are if that costs nothing. ids may
        be on the CPU. noise: of dropout, which the forward is within; it has the rows' keys.
        measure: of the whole distribution p(. | ids[:, :i]), in place of the log-prob and without
        gradients.
        """
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1])
        side = partial(self.token_model.side, padded=not packs(self.token_model))
        groups = by_side(lengths.tolist(), side)
        if side(1) == side(FAR):  # any rows go together
            return self._together(ids, lengths, targets, noise, measure)

        # rows that must not be in one forward have one each; under FSDP all processes make as many
        parts, keys = [], [] if noise is None else noise.keys
        for group in groups + [[0]] * (self._most(len(groups)) - len(groups)):
            longest = int(lengths[group].max())
            of_group = None if targets is None else targets[group, :longest]
            if noise is not None:
                noise.begin([keys[row] for row in group])
            of_rows = ids[group, :longest], lengths[group], of_group, noise, measure
            logprobs = self._together(*of_rows)
            parts.append(F.pad(logprobs, (0, ids.shape[1] - longest)))
        rows = torch.tensor([row for group in groups for row in group])
        idle = sum(part.sum() * 0.0 for part in parts[len(groups) :])
        joined = torch.cat(parts[: len(groups)])
        return joined[rows.argsort().to(joined.device)] + idle

    def _most(self, count: int) -> int:
        """The largest count of all processes, if they have to keep step."""
        if not isinstance(self, FSDPModule):
            return count
        most = torch.tensor(count, device=device_of(self.model))
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def _together(
        self,
        ids: Tensor,
        lengths: Tensor,
        targets: Tensor | None,
        noise: RowNoise | None,
        measure: Measure | None,
    ) -> Tensor:
        """`forward` for rows that may be in one forward of the model."""
        model = self.token_model
        device = device_of(self.model)
        training = model.training
        if noise is not None and not packs(model):
            longest = ids.shape[1]
            places = [(row, row * longest, n) for row, n in enumerate(lengths.tolist())]
            noise.lay_out(len(ids), longest, places, padded=True)
        if training is None:
            logits = model.logits(ids.to(device))
            if measure is not None:
                return token_measures(logits, measure)
            return token_logprobs(logits, ids.to(device))

        # 1. hidden states of all tokens, and where that of each token of a row is
        if training.packs:
            # without noise of its own, dropout is that of version 0.1.0, whose draws go on
            is_first = noise is None and self.training and bool(rates_at_work(self))
            settings = {"width": training.width, "noise": noise, "with_whole": is_first}
            packing = Packing(ids.cpu(), lengths.cpu(), device, **settings)
            hidden = training.hidden(packing.ids, packing)
            where = packing.where  # (b, t)
        else:
            hidden = training.hidden(ids.to(device), None)
            where = torch.arange(ids.numel(), device=device).view_as(ids)  # (b, t)
        hidden = rearrange(hidden, "b t d -> (b t) d")

        # 2. rows and columns whose log-probs are wanted
        wanted = torch.ones_like(ids, dtype=torch.bool) if targets is None else targets
        wanted = wanted.cpu() & (torch.arange(ids.shape[1]) < lengths.cpu()[:, None])  # (b, t)
        wanted[:, 0] = False
        rows, columns = wanted.nonzero(as_tuple=True)  # (n,) each
        weight = 1.0
        if not len(rows):  # a gradient of zeros all the same: other processes wait for it
            rows = columns = torch.zeros(1, dtype=torch.long)
            weight = 0.0

        # 3. each of them from the hidden state of the token before
        labels = ids[rows.to(ids.device), columns.to(ids.device)].to(device)  # (n,)
        rows, columns = rows.to(device), columns.to(device)
        before = where[rows, (columns - 1).clamp(min=0)]
        head, vocab = training.head(), model.vocab
        if head.weight is not None and self._narrow is not None:
            copy = self._narrow(head.project)
            head = head if copy is None else replace(head, weight=copy)
        if measure is None:
            logprobs = label_logprobs(hidden[before], labels, head, vocab=vocab)
        else:
            logprobs = label_measures(hidden[before], head, measure, vocab=vocab)
        return logprobs.new_zeros(ids.shape).index_put((rows, columns), logprobs * weight)


_DROPOUT_LAYERS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


_DROPOUT = ("dropout", "pdrop")
"""Words in names of rates of dropout, by which units are left out."""


_NO_UNITS = ("layer", "token", "rank", "module")
"""Words beside them in names of rates by which something larger is left out."""


_CHANCE = (*_DROPOUT, "layerdrop", "layer_drop", "droppath", "drop_path", "drop_prob")
"""Words in names of all numbers by which something is left out by chance."""


_JITTER = "jitter"
"""In names of numbers of routers that choose experts by chance in training."""


@dataclass(frozen=True)
class _Rate:
    """A number, or several, that a module or its configuration holds under a name."""

    holder: Any
    name: str
    value: Any

    def set(self, rate: float) -> None:
        """Set a number to the rate, each of several numbers too."""
        value: Any = rate
        if isinstance(self.value, dict):
            value = dict.fromkeys(self.value, rate)
        elif isinstance(self.value, list | tuple):
            value = type(self.value)([rate] * len(self.value))
        setattr(self.holder, self.name, value)

    def restore(self) -> None:
        setattr(self.holder, self.name, self.value)


@contextmanager
def dropout_set(
    module: nn.Module, rate: float, *, adapters: bool = True, warns: bool = True
) -> Iterator[Callable[[], None]]:
    """Set every dropout rate of a module to `rate`, and restore them afterwards.

    Gives a function that puts the module into training mode. At 0 all other noise is off too: no
    layers and tokens are left out, and routers with jitter stay in evaluation mode, for their
    numbers may count there as well (PhiMoE). adapters: whether rates of adapters (LoRA) are set as
    well. warns: whether a rate above 0 that has no effect is logged.
    """
    routers = [
        part
        for part in module.modules()
        if rate == 0 and any(_JITTER in name for name in vars(part))
    ]

    def train() -> None:
        module.train()
        for router in routers:
            router.training = False

    rates = [r for r in _rates(module, adapters) if rate == 0 or _leaves_out_units(r.name)]
    if not rates and rate > 0 and warns:
        logger.warning("dropout=%s has no effect: the model has no dropout layers.", rate)
    try:
        for found in rates:
            found.set(rate)
        yield train
    finally:
        for found in rates:
            found.restore()


def rates_at_work(module: nn.Module) -> dict[str, bool]:
    """Names of a module's rates above 0, each with whether it leaves out units."""
    rates = [rate for rate in _rates(module, adapters=True) if _is_positive(rate.value)]
    return {rate.name: _leaves_out_units(rate.name) for rate in rates}


def _is_positive(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_is_positive, value.values() if isinstance(value, dict) else value))
    return value > 0


def _leaves_out_units(name: str) -> bool:
    return name == "p" or (_has(name, _DROPOUT) and not _has(name, _NO_UNITS))


def _has(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def _rates(module: nn.Module, adapters: bool) -> Iterator[_Rate]:
    """The numbers of a module that may be rates; some classes read them in their configuration."""
    holders: dict[int, Any] = {}
    for part in module.modules() if adapters else without_adapters(module):
        holders[id(part)] = part
        holders[id(getattr(part, "config", None))] = getattr(part, "config", None)
    for holder in holders.values():
        for name, value in getattr(holder, "__dict__", {}).items():
            is_named = isinstance(holder, _DROPOUT_LAYERS) if name == "p" else _has(name, _CHANCE)
            if is_named and _is_rate(value):
                yield _Rate(holder, name, value)


def without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """A module and what it holds, without the layers that peft puts around its own."""
    if not hasattr(module, "base_layer"):
        yield module
    for name, part in module.named_children():
        if not hasattr(module, "base_layer") or name == "base_layer":
            yield from without_adapters(part)


def _is_rate(value: Any) -> bool:
    """Whether a value is a number or several, as each layer or adapter may have one."""
    if isinstance(value, dict | list | tuple):
        numbers = value.values() if isinstance(value, dict) else value
        return bool(value) and all(map(_is_rate, numbers))
    return isinstance(value, int | float) and not isinstance(value, bool)


@torch.no_grad()
def response_logprobs(
    policy: nn.Module,
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    measure: Measure | None = None,
) -> list[tuple[float, ...]]:
    """The log-prob of each response token of (prompt, response) sequences, without dropout.

    measure: of the distribution at each of them, in place of its log-prob.
    """
    ids, lengths = pad_rows([(*prompt, *response) for prompt, response in sequences])
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    targets = torch.arange(ids.shape[1]) >= starts[:, None]  # (b, t)
    with evaluating(policy):
        logprobs = policy(ids, lengths, targets, measure=measure).cpu()
    return [
        tuple(row[len(prompt) : length].tolist())
        for row, (prompt, _), length in zip(logprobs, sequences, lengths.tolist(), strict=True)
    ]
