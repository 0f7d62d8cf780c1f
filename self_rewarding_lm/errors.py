"""The errors that a user of the library can meet.

Each is also a standard Python type, so that code that knows nothing of this library can catch it.
A message says what was expected, what came and what to do.
"""

import difflib
from collections.abc import Iterable

from beartype import BeartypeConf, beartype


class SelfRewardingError(Exception):
    """The root of all errors that this library raises on purpose."""


class ConfigError(SelfRewardingError, ValueError):
    """A setting is unknown, out of its range, or does not go with another.

    path: names and places that lead from a stage to its setting, by which a recipe's line is found;
    () if the error is of no single setting.
    """

    def __init__(self, message: str, *, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class ArgumentTypeError(SelfRewardingError, TypeError):
    """An argument of a public function has the wrong type."""


class DataError(SelfRewardingError, ValueError):
    """A row of a dataset, or a dataset as a whole, cannot be used."""


class TokenizerError(SelfRewardingError, ValueError):
    """A tokenizer gave something that are no token ids, or ids that the model does not know."""


class AdapterError(SelfRewardingError, TypeError):
    """A model does not behave like a causal token-level transformer."""


class StoreError(SelfRewardingError, RuntimeError):
    """A folder on disk cannot be used: foreign files, damaged records, missing weights."""


class RunMismatchError(StoreError):
    """A run directory holds a started stage with another configuration."""


class JudgeError(SelfRewardingError, RuntimeError):
    """A judge cannot be read, or a reward function gave something that is no score."""


class PairingError(SelfRewardingError, RuntimeError):
    """No preference pair could be made."""


class NoPairError(PairingError):
    """There is no pair at all to train on."""


class TrainingError(SelfRewardingError, RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


class RehearsalError(SelfRewardingError, RuntimeError):
    """A stage failed before the run began, by an error of something that it was given."""


class ServerError(SelfRewardingError, RuntimeError):
    """An inference server does not start, refuses all requests or answers none."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; all that was done is on disk, and the run can go on."""


typed = beartype(conf=BeartypeConf(violation_type=ArgumentTypeError, is_pep484_tower=True))
"""Checks the types of a public function's arguments; a wrong one is an ArgumentTypeError."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Words that propose the known name most like a wrong one; "" if none is like it."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""
