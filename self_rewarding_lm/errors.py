"""The errors that a user of the library can meet.

Each is also a standard Python type, so that code that knows nothing of this library can catch it.
A message says what was expected, what came and what to do.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
    """An argument of a public function has the wrong type.

    words: those of beartype, which are made shorter: what was wanted, and what came.
    """

    def __init__(self, words: str) -> None:
        found = _VIOLATION.match(words)
        if found is None:
            super().__init__(words)
            return
        owner, argument, came, wanted = found.groups()
        owner = owner.removeprefix("self_rewarding_lm.").removesuffix(".__init__")
        wanted = re.sub(r"<class ['\"]([\w.]+)['\"]>", r"\1", wanted)
        wanted = re.sub(r"\b[a-z_]\w*\.(?=\w)", "", wanted)  # names without their modules
        super().__init__(
            f"{owner.rpartition('.')[2]}: {argument} must be {wanted}; got {came[:200]}."
        )


_VIOLATION = re.compile(
    r"(?:\w+ )?(\S+)\(\) parameter (\w+)=(.*?) violates type hint (.+?), (?:as|not) ", re.DOTALL
)


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


ELSEWHERE = {
    "accelerate_kwargs": "accelerate",
    "adapter": "peft",
    "base_model": "model",
    "checkpoints_folder": "out",
    "dataset": "train_dataset",
    "dtype": "torch_dtype",
    "finetune_configs": "stages",
    "judge_prompt": "reward_prompts",
    "lora": "peft",
    "lora_config": "peft",
    "lr": "learning_rate",
    "max_length": "max_seq_len",
    "max_steps": "num_train_steps",
    "max_tokens": "max_new_tokens",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "out_dir": "out",
    "output": "out",
    "output_dir": "out",
    "peft_config": "peft",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "self_reward_prompt_config": "reward_prompts",
    "template": "chat_template",
    "trackers": "report_to",
}
"""What other libraries, or other places of this one, call a setting -> its name here."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a clause, `; did you mean ...?`, or `.` if no known name is like a wrong one."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    if (other := ELSEWHERE.get(str(name))) in known:
        nearest = [other]
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


_AT_THE_COMMAND = ContextVar("at_the_command", default=False)


@contextmanager
def at_the_command() -> Iterator[None]:
    """Within it errors speak of flags and of keys of recipes, not of Python's arguments."""
    token = _AT_THE_COMMAND.set(True)
    try:
        yield
    finally:
        _AT_THE_COMMAND.reset(token)


def said(python: str, command: str) -> str:
    """The words for one who calls Python, or for one who stands at the command line."""
    return command if _AT_THE_COMMAND.get() else python


def setting(name: str, value: object) -> str:
    """A setting as it is written where the user stands: name='value', or `name: value`."""
    in_yaml = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    return said(f"{name}={value!r}", f"`{name}: {in_yaml}`")


def other_folder() -> str:
    """Words for another folder of a run."""
    return said("another checkpoints_folder", "another folder (--out, or `out` of the recipe)")


def give_tokenizer() -> str:
    """What to do where a tokenizer is missing."""
    return said(
        "Give tokenizer=, which may be two functions: CallableTokenizer(encode, decode).",
        "Name one: `tokenizer` of the recipe (--set tokenizer=FOLDER), or --tokenizer.",
    )


def an_adapter() -> str:
    """The setting that puts an adapter on a model."""
    return said("peft_config", "`peft` (--lora-rank)")


def mixed_precision(kind: str) -> str:
    """The setting of mixed precision, "bf16" or "fp16"."""
    return said(
        f'accelerate_kwargs={{"mixed_precision": "{kind}"}}',
        f"`accelerate: {{mixed_precision: {kind}}}`",
    )
