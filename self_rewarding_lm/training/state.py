"""The state of optimisers as named tensors and plain values, from which training can go on.

Tensors are whole, so that any number of processes can go on from them: under FSDP all processes
must take part. Random numbers are no part of it: those of a step are a function of the seed and
the step.
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
"""Prefixes of names of tensors."""


Words = dict[str, Any]
"""What is no tensor, as JSON."""


_PLAIN = (bool, int, float, str, type(None))


def optimizer_state(
    module: nn.Module, optimizers: Sequence[Any], *, keep: bool = True
) -> tuple[dict[str, Tensor], Words] | None:
    """The state of all optimisers, named by parameter: tensors on the CPU, and plain values.

    None if an optimiser keeps other things than tensors and plain values, which cannot be stored.
    keep: False on processes that only take part in gathering the tensors.
    """
    names = _parameter_names(module)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for place, parameter, state in _states(optimizers):
        for key, value in state.items():
            name = f"{OPTIMIZER}{place}/{names[id(parameter)]}/{key}"
            if isinstance(value, DTensor) and value.shape != parameter.shape:
                return None
            if isinstance(value, Tensor):
                gathered = whole(value).detach()
                if keep:
                    tensors[name] = gathered.cpu()
            elif isinstance(value, _PLAIN):
                numbers[name] = value
            else:
                return None
    groups = [[_plain_values(group) for group in o.param_groups] for o in optimizers]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizers(
    module: nn.Module, optimizers: Sequence[Any], tensors: Mapping[str, Tensor], words: Words
) -> None:
    """Give fresh optimisers of the same kinds the state that `optimizer_state` took.

    Raises StoreError if it is the state of other parameters.
    """
    names = _parameter_names(module)
    states: dict[str, dict[str, Any]] = {}  # by optimiser and parameter
    for name, value in {**tensors, **words["numbers"]}.items():
        if name.startswith(OPTIMIZER):
            owner, _, key = name.rpartition("/")
            states.setdefault(owner, {})[key] = value
    for place, (optimizer, groups) in enumerate(zip(optimizers, words["groups"], strict=True)):
        for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
            group.update(saved_group)
            for parameter in group["params"]:
                state = states.pop(f"{OPTIMIZER}{place}/{names[id(parameter)]}", None)
                if state is not None:
                    optimizer.state[parameter] = {
                        key: _on_device(value, parameter, key, group)
                        for key, value in state.items()
                    }
    if states:
        raise StoreError(
            f"the training state on disk is of other parameters ({next(iter(states))} ...) than "
            "the model has. Delete state.safetensors to train the stage again from its start."
        )


@dataclass
class RoundState:
    """What the rounds of one training hand to each other.

    rounds: over all of which the learning rate's schedule is spread. optimizer_states: of each
    optimiser the settings of its groups and the state of each parameter. live: a moving reference.
    saved_at: when the state of training was last saved, by time.monotonic. unseeded: whether it was
    said which noise is no row's own.
    """

    rounds: int = 1
    optimizer_states: list[tuple[list[Words], list[Mapping[str, Any]]]] = field(
        default_factory=list
    )
    live: LiveReference | None = None
    saved_at: float = field(default_factory=time.monotonic)
    unseeded: bool = False

    def take_from(self, optimizers: Sequence[Any]) -> None:
        """Keep the states of optimisers, without their parameters."""
        self.optimizer_states = [
            (
                [_plain_values(group) for group in optimizer.param_groups],
                [state for _, _, state in _states([optimizer])],
            )
            for optimizer in optimizers
        ]

    def give_to(self, optimizers: Sequence[Any]) -> None:
        """Give the kept states to fresh optimisers of the same parameters, or of their shards."""
        for optimizer, (groups, states) in zip(optimizers, self.optimizer_states, strict=False):
            for group, kept_group in zip(optimizer.param_groups, groups, strict=True):
                group.update(kept_group)
            for (_, parameter, _), state in zip(_states([optimizer]), states, strict=True):
                if state:
                    optimizer.state[parameter] = state


def _states(optimizers: Sequence[Any]) -> Iterator[tuple[int, nn.Parameter, Mapping[str, Any]]]:
    """Each parameter, with its optimiser's number and what that keeps of it."""
    for place, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield place, parameter, optimizer.state.get(parameter, {})


def _parameter_names(module: nn.Module) -> dict[int, str]:
    """Names by id of the parameter."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _plain_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's numbers and names; all that optimisers change in it is among them."""
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, _PLAIN)}


def _on_device(value: Any, parameter: nn.Parameter, key: str, group: Mapping[str, Any]) -> Any:
    """A value of a parameter's state, placed as the optimiser itself would place it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value
    if value.shape == parameter.shape and isinstance(parameter, DTensor):
        return spread(value, parameter)
    return value.to(parameter.device)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a prefix before each name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
