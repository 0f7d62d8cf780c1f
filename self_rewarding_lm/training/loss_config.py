"""Choosing losses of pairs: by name or as a function, with parameters, several of them summed.

A loss's settings are the parameters of its function. Knows nothing of the arithmetic.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_type_hints

from pydantic import Field, create_model
from torch import Tensor

from self_rewarding_lm.config import Config
from self_rewarding_lm.errors import ConfigError, did_you_mean
from self_rewarding_lm.training.losses import PAIR_LOSSES, PairBatch, PairLoss, Reads, reads_of

NO_DEFAULT = inspect.Parameter.empty


class LossConfig(Config):
    """A loss of a preference stage: `LossConfig("dpo", weight=0.5, label_smoothing=0.1)`.

    name: a key of `losses.PAIR_LOSSES`, or a function (PairBatch, *, parameters) -> (b,) tensor.
    parameters: what the function takes by name; without a beta here the stage's beta is used.
    Raises ConfigError for an unknown name, an unknown parameter or a value out of bounds.
    """

    name: Any
    """A name of docs/losses.md, or a function."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Factor of this loss in the sum."""
    parameters: dict[str, Any] = Field(default={})
    """Parameters of the loss function, by name."""

    def __init__(self, name: Any, /, weight: float = 1.0, **parameters: Any) -> None:
        checked = _checked_parameters(_function_of(name), parameters)
        super().__init__(name=name, weight=weight, parameters=checked)

    @property
    def function(self) -> PairLoss:
        return _function_of(self.name)

    @property
    def label(self) -> str:
        """The loss's name among metrics."""
        return _label(self.function)

    def with_beta(self, beta: float | None) -> "LossConfig":
        """This loss with a beta, if it takes one and has none; None: its function's default."""
        defaults = _parameter_defaults(self.function)
        value = defaults.get("beta", NO_DEFAULT) if beta is None else beta
        if "beta" in self.parameters or "beta" not in defaults or value is NO_DEFAULT:
            return self
        return LossConfig(self.name, self.weight, **{**self.parameters, "beta": value})

    def of(self, batch: PairBatch, *, label_smoothing: Tensor | None = None) -> Tensor:
        """The loss of each pair, (b,), without the weight.

        label_smoothing: (b,), how likely the two sides of each pair are the wrong way round; the
        loss of the swapped pair has that share. Raises ConfigError if the function returns another
        shape.
        """
        values = self._checked_values(batch)
        if label_smoothing is None or not reads_of(self.function).compares:
            return values
        return values + label_smoothing * (self._checked_values(batch.swapped()) - values)

    def _checked_values(self, batch: PairBatch) -> Tensor:
        values, shape = self.function(batch, **self.parameters), batch.chosen.logprobs.shape
        if not isinstance(values, Tensor) or values.shape != shape:
            came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"loss {self.label!r} must return a tensor with one number per pair, here of shape "
                f"{tuple(shape)}; got {came}."
            )
        return values


def losses_in(loss: Any, nll_weight: float = 0.0) -> tuple[LossConfig, ...]:
    """The losses that a stage's `loss` names; the chosen response's NLL, if it has a weight, last.

    loss: a name, a function, a LossConfig, a mapping {"name": ..., "weight": ..., parameters}, or
    several of these. Raises ConfigError for anything else, and for an NLL that is asked for twice.
    """
    losses = [_loss_config(value) for value in (loss if isinstance(loss, list | tuple) else [loss])]
    if not losses:
        raise ConfigError("loss is an empty list; give at least one, such as 'dpo'")
    if nll_weight:
        if any(loss.name == "nll" for loss in losses):
            raise ConfigError("nll_weight adds the loss 'nll', and loss has it too; give one")
        losses.append(LossConfig("nll", weight=nll_weight))
    return tuple(losses)


def read_by(losses: Sequence[LossConfig]) -> Reads:
    """The union of what several losses read."""
    reads = [reads_of(loss.function) for loss in losses]
    return Reads(
        reference=any(r.reference for r in reads),
        tokens=any(r.tokens for r in reads),
        compares=any(r.compares for r in reads),
    )


def _loss_config(value: Any) -> LossConfig:
    if isinstance(value, LossConfig):
        return value
    if isinstance(value, Mapping):
        if "name" not in value:
            raise ConfigError(f"a loss that is a mapping needs 'name'; got {', '.join(value)}")
        return LossConfig(value["name"], **{k: v for k, v in value.items() if k != "name"})
    return LossConfig(value)


def _function_of(name: Any) -> PairLoss:
    """The loss of that name, or the function itself. Raises ConfigError for anything else."""
    function: Any = PAIR_LOSSES.get(name) if isinstance(name, str) else name
    if callable(function):
        return function  # type: ignore[return-value]
    raise ConfigError(
        f"{name!r} is not a loss{did_you_mean(name, PAIR_LOSSES)} There are: "
        f"{', '.join(PAIR_LOSSES)}; or give a function (PairBatch, its parameters by name) -> a "
        "number per pair."
    )


def _label(function: PairLoss) -> str:
    names = {known: name for name, known in PAIR_LOSSES.items()}
    return names.get(function) or getattr(function, "__name__", type(function).__name__)


@cache
def _parameter_defaults(function: PairLoss) -> dict[str, Any]:
    """The default of each parameter that a loss takes by name; NO_DEFAULT if it has none."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        _batch, *parameters = inspect.signature(function).parameters.values()
    except ValueError:  # no parameter at all, or a signature that Python cannot tell
        raise ConfigError(
            f"loss {_label(function)!r} must be a function (PairBatch, its parameters by name)."
        ) from None
    return {p.name: p.default for p in parameters if p.kind in kinds}


@cache
def _settings_class(function: PairLoss) -> type[Config]:
    """A loss's parameters as settings, with the bounds of its annotations."""
    try:
        types = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that cannot be resolved, or a callable object
        types = {}
    fields: dict[str, Any] = {}
    for name, default in _parameter_defaults(function).items():
        if name == "beta":  # the stage has one
            default = None
        fields[name] = (types.get(name, Any), ... if default is NO_DEFAULT else default)
    return create_model(f"loss {_label(function)!r}", __base__=Config, **fields)


def _checked_parameters(function: PairLoss, parameters: Mapping[str, Any]) -> dict[str, Any]:
    settings = _settings_class(function)(**parameters)
    return {name: getattr(settings, name) for name in parameters}
