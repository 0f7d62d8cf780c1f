"""The choice of losses of pairs: by name or as a function, with parameters, several summed.

Knows the signatures of losses, which are their settings, and nothing of their arithmetic.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_type_hints

from pydantic import Field, create_model
from torch import Tensor

from self_rewarding_lm.config import Config
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.training.losses import PAIR_LOSSES, PairBatch, PairLoss, Reads, reads_of

EMPTY = inspect.Parameter.empty


class LossConfig(Config):
    """A loss of pairs: `LossConfig("dpo", weight=0.5, label_smoothing=0.1)`.

    name: a key of `losses.PAIR_LOSSES`, or a function (PairBatch, *, parameters) -> (b,) tensor.
    parameters: what the function takes by name; beta is the stage's where it is not given here.
    Raises ConfigError for a name, a parameter or a value that there is not.
    """

    name: Any
    """A name of docs/losses.md, or a function."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """By which its numbers are multiplied in the sum."""
    parameters: dict[str, Any] = Field(default={})
    """The function's own, by name."""

    def __init__(self, name: Any, /, weight: float = 1.0, **parameters: Any) -> None:
        checked = _checked(_function(name), parameters)
        super().__init__(name=name, weight=weight, parameters=checked)

    @property
    def function(self) -> PairLoss:
        return _function(self.name)

    @property
    def label(self) -> str:
        """The loss's name among metrics."""
        return _label(self.function)

    def with_beta(self, beta: float | None) -> "LossConfig":
        """The same, with a beta where it takes one and has none; None: the function's default."""
        value = _defaults(self.function).get("beta", EMPTY)
        value = value if beta is None else beta
        if "beta" in self.parameters or "beta" not in _defaults(self.function) or value is EMPTY:
            return self
        return LossConfig(self.name, self.weight, **{**self.parameters, "beta": value})

    def of(self, batch: PairBatch, *, label_smoothing: Tensor | None = None) -> Tensor:
        """A number per pair, without the weight.

        label_smoothing: for each pair how likely its two sides are the wrong way round; the loss
        of the swapped pair has that share. Raises ConfigError where a function returns another
        shape.
        """
        found = self._of(batch)
        if label_smoothing is None or not reads_of(self.function).compares:
            return found
        return found + label_smoothing * (self._of(batch.swapped()) - found)

    def _of(self, batch: PairBatch) -> Tensor:
        found, wanted = self.function(batch, **self.parameters), batch.chosen.logprobs.shape
        if not isinstance(found, Tensor) or found.shape != wanted:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"loss {self.label!r} must return a tensor with one number per pair, here of shape "
                f"{tuple(wanted)}; got {came}."
            )
        return found


def losses_in(loss: Any, nll_weight: float = 0.0) -> tuple[LossConfig, ...]:
    """A stage's `loss` as a list, with the NLL of the chosen response where that has a weight.

    loss: a name, a function, a LossConfig, a mapping {"name": ..., "weight": ..., parameters}, or
    several of these. Raises ConfigError for anything else, and for an NLL that is asked for twice.
    """
    several = loss if isinstance(loss, list | tuple) else [loss]
    found = [_loss(one) for one in several]
    if not found:
        raise ConfigError("loss is an empty list; give at least one, such as 'dpo'")
    if nll_weight:
        if any(one.name == "nll" for one in found):
            raise ConfigError("nll_weight adds the loss 'nll', and loss has it too; give one")
        found.append(LossConfig("nll", weight=nll_weight))
    return tuple(found)


def read_by(losses: Sequence[LossConfig]) -> Reads:
    """What one or another of some losses reads."""
    found = [reads_of(one.function) for one in losses]
    reference, tokens = any(r.reference for r in found), any(r.tokens for r in found)
    return Reads(reference, tokens, any(r.compares for r in found))


def _loss(value: Any) -> LossConfig:
    if isinstance(value, LossConfig):
        return value
    if isinstance(value, Mapping):
        if "name" not in value:
            raise ConfigError(f"a loss that is a mapping needs 'name'; got {', '.join(value)}")
        return LossConfig(value["name"], **{k: v for k, v in value.items() if k != "name"})
    return LossConfig(value)


def _function(name: Any) -> PairLoss:
    found: Any = PAIR_LOSSES.get(name) if isinstance(name, str) else name
    if callable(found):
        return found  # type: ignore[return-value]
    near = difflib.get_close_matches(str(name), PAIR_LOSSES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"{name!r} is no loss; {hint}There are: {', '.join(PAIR_LOSSES)}; or give a function "
        "(PairBatch, its parameters by name) -> a number per pair."
    )


def _label(function: PairLoss) -> str:
    names = {found: name for name, found in PAIR_LOSSES.items()}
    return names.get(function) or getattr(function, "__name__", type(function).__name__)


@cache
def _defaults(function: PairLoss) -> dict[str, Any]:
    """What a loss takes by name, with its defaults; EMPTY where there is none."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        _, *others = inspect.signature(function).parameters.values()
    except ValueError:  # no parameter at all, or none that Python can tell
        raise ConfigError(
            f"loss {_label(function)!r} must be a function (PairBatch, its parameters by name)."
        ) from None
    return {other.name: other.default for other in others if other.kind in kinds}


@cache
def _settings(function: PairLoss) -> type[Config]:
    """The parameters of a loss as settings, bounded as its annotations say."""
    try:
        types = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # of names that are not there, or an object that is called
        types = {}
    fields: dict[str, Any] = {
        name: (types.get(name, Any), None if name == "beta" else ... if value is EMPTY else value)
        for name, value in _defaults(function).items()
    }
    return create_model(f"loss {_label(function)!r}", __base__=Config, **fields)


def _checked(function: PairLoss, parameters: Mapping[str, Any]) -> dict[str, Any]:
    made = _settings(function)(**parameters)
    return {name: getattr(made, name) for name in parameters}
