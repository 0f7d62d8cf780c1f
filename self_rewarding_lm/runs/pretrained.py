"""Folders that `from_pretrained` of transformers, or of peft, reads: written and read here."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE, MODEL_FILE
from self_rewarding_lm.runs.weights import read_weights, write_weights

ONE_FILE = "1000GB"


GENERATION = "generation_config.json"


def has_adapter(module: nn.Module) -> bool:
    """Whether a module is a model with an adapter of peft."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def save_pretrained(module: nn.Module, folder: Path) -> None:
    """Write a folder that `from_pretrained` of transformers, or of peft, reads."""
    if has_adapter(module):
        module.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # a card without content
        base: Any = module.get_base_model()  # type: ignore[operator]
        if getattr(base, "generation_config", None) is not None:
            with _generation_config_valid(base):
                base.generation_config.save_pretrained(str(folder))
        return
    with _generation_config_valid(module), _without_progress_bars():
        module.save_pretrained(str(folder), max_shard_size=ONE_FILE)  # type: ignore[operator]
    if not (folder / MODEL_FILE).exists():  # some model classes write files of another form
        write_weights(module, folder / MODEL_FILE)


def name_ends(folder: Path, end_ids: Sequence[int], pad_id: int | None, vocab: int) -> None:
    """Have a folder's generation config name the tokens at which responses end.

    Those that it names already stay, after them, and so does the rest. pad_id: taken if the config
    names none of the model's `vocab` tokens. Without a generation config nothing is done.
    """
    path = folder / GENERATION
    if not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    known = config.get("eos_token_id")
    known = [] if known is None else known if isinstance(known, list) else [known]
    config.pop("_from_model_config", None)  # generate would ask the model instead
    if not set(end_ids) <= set(known):
        config["eos_token_id"] = list(dict.fromkeys((*end_ids, *known)))
    if config.get("pad_token_id") not in range(vocab):
        config["pad_token_id"] = pad_id if pad_id in range(vocab) else None
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def name_eos(folder: Path, token: str) -> None:
    """Have a folder's tokenizer name a token as its end token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            config = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps({**config, "eos_token": token}, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def load_pretrained(module: nn.Module, file: Path) -> None:
    """Load weights, or an adapter's, that `save_pretrained` wrote, in place.

    Raises StoreError if they do not fit.
    """
    if (file.name == ADAPTER_FILE) != has_adapter(module):
        raise StoreError(
            f"{file} holds {'an adapter' if file.name == ADAPTER_FILE else 'a whole model'}, and "
            f"the model is {'one with' if has_adapter(module) else 'one without'} an adapter. "
            "Load what belongs to it."
        )
    if not has_adapter(module):
        _load_whole(module, file)
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        state = load_peft_weights(str(file.parent), device="cpu")
        result = set_peft_model_state_dict(module, state)
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"the adapter in {file} cannot be loaded: {error}") from error
    if result.unexpected_keys:
        raise StoreError(
            f"the adapter in {file} belongs to another model, or to another adapter; not known "
            f"here: {', '.join(result.unexpected_keys[:3])}."
        )


def read_pretrained(kind: type[nn.Module], folder: Path) -> nn.Module:
    """A model of a class of transformers from a folder, in the types that it was saved in."""
    with _without_progress_bars():
        return kind.from_pretrained(str(folder), dtype="auto")  # type: ignore[attr-defined]


def _load_whole(module: nn.Module, file: Path) -> None:
    """Load weights; some kinds have other names on disk than in memory, which are translated."""
    try:
        read_weights(module, file)
    except StoreError as refusal:
        config = file.parent / "config.json"
        translated = _translated(module, file.parent) if config.exists() else None
        if translated is None:
            raise
        try:
            module.load_state_dict(translated)
        except RuntimeError:
            raise refusal from None


def _translated(module: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """A folder's weights by their names in memory; None if some are missing or left over."""
    dtype = next(module.parameters()).dtype
    with _without_progress_bars():
        read, report = type(module).from_pretrained(  # type: ignore[attr-defined]
            str(folder), dtype=dtype, output_loading_info=True
        )
    wrong = any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return None if wrong else read.state_dict()


@contextmanager
def _generation_config_valid(module: nn.Module) -> Iterator[None]:
    """Within, the module's generation config is one that transformers agrees to save.

    Several published models have one that contradicts itself (a temperature, and do_sample=False)
    and is refused; do_sample=True is saved in its place.
    """
    config: Any = getattr(module, "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError:
        module.generation_config = copy(config)  # type: ignore[assignment]
        module.generation_config.do_sample = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        if config is not None:
            module.generation_config = config


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as their_logging

    was_enabled = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            their_logging.enable_progress_bar()


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, or one with an adapter of peft."""
    return all(hasattr(module, name) for name in ("config", "generate", "save_pretrained"))


def load_into(module: nn.Module, file: Path) -> None:
    """Load a file of weights into a module of any kind, in place; StoreError if they do not fit."""
    (load_pretrained if is_hugging_face(module) else read_weights)(module, file)
