"""Datasets of the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from self_rewarding_lm.data.files import SUFFIXES_IN_WORDS
from self_rewarding_lm.errors import ConfigError, DataError, typed
from self_rewarding_lm.runs.installed import install


@typed
def from_hub(
    hub: str,
    *,
    split: str = "train",
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Any:
    """A dataset of the Hugging Face hub, loaded by the package `datasets` (and kept in its cache).

    hub: its name, owner/name, or a folder that `datasets` can load. split: the part of it, such as
    "train" or "train[:1000]". subset: its configuration, if it has several. columns: names that a
    row has here -> those that the dataset has, such as {"prompt": "question", "completion":
    "answer"}; the others are left out. None: all as they are.

    Raises ConfigError without the package `datasets`, DataError if the dataset cannot be loaded or
    has no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{hub!r} is a dataset of the hub, which needs the package datasets: {install('data')}"
        ) from error
    try:
        rows: Any = load_dataset(hub, subset, split=split)
    except Exception as error:  # of any of its parts: the network, a file, a name
        words = str(error).partition("\n")[0][:300]
        raise DataError(
            f"the dataset {hub!r}, split {split!r}, could not be loaded: {type(error).__name__}: "
            f"{words}. Give the name of a dataset on https://huggingface.co/datasets that can be "
            "reached or is already in the cache (HF_HOME). Without a network, give the rows as a "
            f"{SUFFIXES_IN_WORDS} file."
        ) from error
    if columns is None:
        return rows
    if missing := sorted({*columns.values()} - {*rows.column_names}):
        raise DataError(
            f"the dataset {hub!r} has no column {missing[0]!r}; it has: "
            f"{', '.join(rows.column_names)}."
        )
    if len({*columns.values()}) < len(columns):
        raise DataError(f"columns name one of {hub!r} twice: {dict(columns)}. Name each once.")
    named = {theirs: ours for ours, theirs in columns.items()}
    return rows.select_columns(list(named)).rename_columns(named)
