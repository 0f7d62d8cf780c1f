"""Settings as JSON values, by which a run that goes on knows whether they are still the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

from self_rewarding_lm.config import Config, FromStage
from self_rewarding_lm.moved import without_module
from self_rewarding_lm.records import to_json
from self_rewarding_lm.runs.stage_files import LIBRARY

FREE_SETTINGS = (
    *("micro_batch_tokens", "micro_batch_size", "checkpoint_every"),
    *("save_state_every", "save_state_minutes", "checks", "min_parse_rate"),
)
"""Settings that may differ when a run goes on: results are the same up to rounding and dropout."""


NEW_RULES = ("unless_few_prompts",)
"""Rules that 0.1.0 did not have and that its runs go on without, whatever is set."""


ADDED_SETTINGS = ("marks", "candidates_from", "judge_all", "stop_fn", *NEW_RULES)
"""Settings that 0.1.0 did not have: left out while they are UNSET, so that its runs go on."""


UNSET = (None, False)


def fingerprint_of(value: Any) -> Any:
    """A setting as a JSON value that is the same in the next process.

    Files are named by their content's hash, datasets by type and length, functions and classes by
    their qualified name, modules by their class. Names of the library's own objects leave out the
    module, so that a run goes on when a later version has them in another file.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Config):
        fields = {n: getattr(value, n) for n in type(value).model_fields if n not in FREE_SETTINGS}
        given = {n: v for n, v in fields.items() if n not in ADDED_SETTINGS or v not in UNSET}
        return {name: fingerprint_of(setting) for name, setting in given.items()}
    if isinstance(value, str | Path):
        return _fingerprint_of_text(value)
    if isinstance(value, list | tuple) and len(value) <= 64:
        return [fingerprint_of(item) for item in value]
    if isinstance(value, dict):
        return {str(key): fingerprint_of(item) for key, item in value.items()}
    if isinstance(value, FromStage):
        return f"from_stage({value.stage})"
    if hasattr(type(value), "kind"):  # a record
        content = json.dumps(to_json(value), sort_keys=True).encode()
        return f"{type(value).__name__} sha256:{hashlib.sha256(content).hexdigest()[:16]}"
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return _qualified(getattr(value, "__module__", "?"), name)
    kind = _qualified(type(value).__module__, type(value).__qualname__)
    try:
        return f"{kind}[{len(value)}]"
    except TypeError:  # no length
        return kind


def as_named_now(value: Any) -> Any:
    """Settings that version 0.1.0 wrote, with the library's own objects named as they are now."""
    if isinstance(value, dict):
        return {key: as_named_now(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_named_now(item) for item in value]
    return without_module(value) if isinstance(value, str) else value


def _qualified(module: str | None, name: str) -> str:
    """An object's name after its module, or after the library's name for one of its own."""
    is_ours = str(module).partition(".")[0] == LIBRARY
    return f"{LIBRARY if is_ours else module}.{name}"


def _fingerprint_of_text(value: str | Path) -> str:
    """The text itself; of a text that names a file, the file's name and digest."""
    try:
        if "\n" in str(value) or not Path(value).is_file():
            return str(value)
    except OSError:  # too long for a file's name
        return str(value)
    with Path(value).open("rb") as file:
        return f"{Path(value).name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
