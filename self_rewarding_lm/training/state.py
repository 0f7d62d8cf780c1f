"""What an optimiser knows, as tensors and words that any number of processes can go on from.

Tensors are whole: under FSDP all processes must take part. Random numbers are no part of it: those
of a step are a function of the seed and the step.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.sharding import spread, whole
from self_rewarding_lm.training.reference import LiveReference

WEIGHTS, OPTIMIZER = "weights/", "optimizer/"


Words = dict[str, Any]


_PLAIN = (bool, int, float, str, type(None))


def optimizer_state(
    module: nn.Module, optimizers: Sequence[Any], *, keep: bool = True
) -> tuple[dict[str, Tensor], Words] | None:
    """The state of all optimisers on the CPU, by the parameters' names; None where it holds other
    things than tensors and numbers, which nobody knows how to store.

    keep: False on processes that only take part.
    """
    names = _names(module)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for place, parameter, held in _held(optimizers):
        for key, value in held.items():
            name = f"{OPTIMIZER}{place}/{names[id(parameter)]}/{key}"
            if isinstance(value, DTensor) and value.shape != parameter.shape:
                return None
            if isinstance(value, Tensor):
                found = whole(value).detach()
                if keep:
                    tensors[name] = found.cpu()
            elif isinstance(value, _PLAIN):
                numbers[name] = value
            else:
                return None
    groups = [[_plain(group) for group in optimizer.param_groups] for optimizer in optimizers]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizers(
    module: nn.Module, optimizers: Sequence[Any], tensors: Mapping[str, Tensor], words: Words
) -> None:
    """Give fresh optimisers of the same kind the state that `optimizer_state` took."""
    names = _names(module)
    found: dict[str, dict[str, Any]] = {}
    for name, value in {**tensors, **words["numbers"]}.items():
        if name.startswith(OPTIMIZER):
            owner, _, key = name.rpartition("/")
            found.setdefault(owner, {})[key] = value
    for place, (optimizer, groups) in enumerate(zip(optimizers, words["groups"], strict=True)):
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
            for parameter in group["params"]:
                held = found.pop(f"{OPTIMIZER}{place}/{names[id(parameter)]}", None)
                if held is not None:
                    optimizer.state[parameter] = {
                        key: _placed(value, parameter, key, group) for key, value in held.items()
                    }
    if found:
        raise StoreError(
            f"the training state on disk is of other parameters ({next(iter(found))} ...) than the "
            "model has. Delete state.safetensors to train the stage again from its start."
        )


@dataclass
class Kept:
    """What the rounds of a stage hand on: optimisers' states, a live reference, and when the state
    of training was saved last. The learning rate's schedule spans all `rounds`."""

    rounds: int = 1
    states: list[tuple[list[Words], list[Mapping[str, Any]]]] = field(default_factory=list)
    live: LiveReference | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def take(self, optimizers: Sequence[Any]) -> None:
        """Keep the states of optimisers, and nothing of the parameters."""
        self.states = [
            ([_plain(g) for g in one.param_groups], [held for _, _, held in _held([one])])
            for one in optimizers
        ]

    def hand_on(self, optimizers: Sequence[Any]) -> None:
        """Give them to fresh optimisers of the same parameters, or of their shares."""
        for optimizer, (groups, states) in zip(optimizers, self.states, strict=False):
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
            for (_, parameter, _), held in zip(_held([optimizer]), states, strict=True):
                if held:
                    optimizer.state[parameter] = held


def _held(optimizers: Sequence[Any]) -> Iterator[tuple[int, nn.Parameter, Mapping[str, Any]]]:
    for place, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield place, parameter, optimizer.state.get(parameter, {})


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """What optimisers change in their groups are numbers; the rest are settings."""
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, _PLAIN)}


def _placed(value: Any, parameter: nn.Parameter, key: str, group: Mapping[str, Any]) -> Any:
    """Where the optimiser would have made it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value
    if value.shape == parameter.shape and isinstance(parameter, DTensor):
        return spread(value, parameter)
    return value.to(parameter.device)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each name with a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
