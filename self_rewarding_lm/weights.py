"""Weights on disk: safetensors files, written by rename. The only file that imports safetensors.

What a folder of weights holds beside them (a Hugging Face model's config, its tokenizer, an
adapter's config) is the model's own business.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from self_rewarding_lm.errors import StoreError

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
FOLDER_FILES = (
    *(MODEL_FILE, "model.tmp", ADAPTER_FILE, "adapter_config.json"),
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer*.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
"""What a folder of weights may hold that this library, transformers or peft wrote."""


@runtime_checkable
class Savable(Protocol):
    """What can be written to a folder of weights and read back from its file."""

    def save(self, folder: Path) -> None: ...

    def load(self, file: Path) -> None: ...


def save_folder(model: Savable, folder: Path, beside: Callable[[Path], None] | None = None) -> None:
    """Write a model's folder; the weights file comes last, so its presence means all is there.

    beside: writes what else belongs there, such as a tokenizer.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.save(draft)
    if beside is not None:
        beside(draft)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(draft.iterdir(), key=lambda f: f.name in (MODEL_FILE, ADAPTER_FILE)):
        file.replace(folder / file.name)
    draft.rmdir()


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder: a whole model's or an adapter's."""
    found = (folder / name for name in (MODEL_FILE, ADAPTER_FILE))
    return next((path for path in found if path.exists()), None)


def write_weights(module: nn.Module, path: Path) -> None:
    """A module's weights as safetensors, by rename; tied and non-contiguous tensors included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    save_model(module, str(draft), metadata={"format": "pt"})
    draft.replace(path)


def read_weights(module: nn.Module, path: Path) -> None:
    """Load weights into a module, in place; StoreError where they do not fit."""
    try:
        load_model(module, str(path), device="cpu")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"the weights in {path} cannot be loaded into this model: {error}. They belong to "
            "another model, or the file is damaged."
        ) from error


def remove_weights(folder: Path) -> None:
    """Delete a folder of weights, unless other files are in it."""
    shutil.rmtree(folder.with_name(f"{folder.name}.tmp"), ignore_errors=True)
    for pattern in FOLDER_FILES:
        for file in folder.glob(pattern):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def weights_hash(module: nn.Module) -> str:
    """A digest of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
