"""What a recipe names for a Hugging Face model: a tokenizer, and the settings of an adapter."""

from collections.abc import Sequence
from typing import Any

from self_rewarding_lm.adapters.loading import gguf_of, require
from self_rewarding_lm.errors import ConfigError


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a name on the hub or a GGUF file.

    Raises ConfigError where there is none.
    """
    require("transformers", "a tokenizer by name")
    from transformers import AutoTokenizer

    name, gguf = gguf_of(source)
    try:
        return AutoTokenizer.from_pretrained(name, **gguf)
    except Exception as error:  # of transformers, tokenizers or gguf, each with its own
        raise ConfigError(
            f"no tokenizer could be loaded from {source!r}: {error} A tokenizer is given as a "
            "folder that save_pretrained wrote, a name on the hub or a .gguf file."
        ) from error


def lora_config(
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
) -> Any:
    """peft's LoraConfig for a causal LM; the arguments are peft's."""
    require("peft", "a LoRA adapter")
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
