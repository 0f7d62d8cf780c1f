"""Sequence classifiers of transformers, which reward models are, by name."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.adapters.loading import dtype_of, require, tokenizer_of
from self_rewarding_lm.errors import ConfigError

ENDLESS = 1_000_000
"""From here on a tokenizer's model_max_length says that it knows of no limit."""


def load_classifier(
    source: nn.Module | str | Path, *, torch_dtype: str | torch.dtype = "auto"
) -> tuple[nn.Module, Any]:
    """A sequence classifier and its tokenizer, from a folder or a name on the hub.

    A module is taken as it is, without a tokenizer; None too where none is beside the model.
    Raises ConfigError for what cannot be found or read.
    """
    if isinstance(source, nn.Module):
        return source, None
    require("transformers", "a reward model by name")
    from transformers import AutoModelForSequenceClassification

    name = str(source)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype_of(torch_dtype)
        )
    except Exception as error:  # of transformers or safetensors, each with its own
        raise ConfigError(
            f"no sequence-classification model could be loaded from {name!r}. A reward model is "
            "given as a module, a folder that save_pretrained wrote, or a name on the hub. What "
            f"was wrong here: {type(error).__name__}: {error!s:.500}"
        ) from error
    return model, tokenizer_of([name], {})


def longest_input(model: nn.Module, tokenizer: Any) -> int | None:
    """Tokens that a model of transformers takes at most, as it or its tokenizer says."""
    config: Any = getattr(model, "config", None)
    said = [getattr(config, "max_position_embeddings", None)]
    said.append(getattr(tokenizer, "model_max_length", None))
    known = [int(n) for n in said if n is not None and 0 < n < ENDLESS]
    return min(known) if known else None
