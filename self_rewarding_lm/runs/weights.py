"""Weights on disk: safetensors files, written by rename. The only file that imports safetensors.

What a folder of weights holds beside them (a Hugging Face model's config, its tokenizer, an
adapter's config) is the model's own business.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from self_rewarding_lm.errors import StoreError, typed
from self_rewarding_lm.runs.atomic import (
    delist,
    digest_of,
    flush,
    ledger,
    settle,
    system_errors,
    writing,
)
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE, MODEL_FILE
from self_rewarding_lm.text import amount

Tensors = Mapping[str, Tensor]
"""By name."""


COMPILED = "_orig_mod."
"""Before the names of a compiled module's weights."""


CARD = "README.md"


TRAINED = "trained.json"  # how many steps made weights that a stage keeps for itself


LISTED = (MODEL_FILE, ADAPTER_FILE, CARD, TRAINED)
"""Files whose digests the ledger of the folder around them takes."""


FOLDER_FILES = (
    *(MODEL_FILE, ADAPTER_FILE, TRAINED, "adapter_config.json"),
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer*.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
"""What a folder of weights may hold that this library, transformers or peft wrote."""


@runtime_checkable
class Writable(Protocol):
    """What can be written to a folder of weights."""

    def save(self, folder: Path) -> None: ...


@runtime_checkable
class Savable(Writable, Protocol):
    """What can be read back from its file, too."""

    def load(self, file: Path) -> None: ...


def save_folder(
    model: Writable,
    folder: Path,
    beside: Callable[[Path], None] | None = None,
    *,
    listed: bool = False,
) -> None:
    """Write a model's folder; the weights file comes last, so its presence means all is there.

    beside: writes what else belongs there, such as a tokenizer. listed: the digests of the weights
    and of the card go into the ledger of the folder around. Raises StoreError if the system cannot
    write.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with system_errors(folder):
            draft.mkdir(parents=True)
            _reporting(lambda: model.save(draft))
            if beside is not None:
                beside(draft)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(draft.iterdir(), key=_is_weights):
                listed_in = folder.parent if listed and file.name in LISTED else None
                settle(file, folder / file.name, listed_in=listed_in)
            draft.rmdir()
            flush(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_weights(file: Path) -> bool:
    return file.name in (MODEL_FILE, ADAPTER_FILE)


def write_weights(module: nn.Module, path: Path) -> None:
    """A module's weights as safetensors, by rename; tied and non-contiguous tensors included."""
    with system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as draft:
        _reporting(lambda: save_model(module, str(draft), metadata={"format": "pt"}))


def read_weights(module: nn.Module, path: Path) -> None:
    """Load weights into a module, in place; StoreError if they do not fit."""
    try:
        if _is_of_compiled(path):
            _read_uncompiled(module, path)
        else:
            load_model(module, str(path), device="cpu")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"the weights in {path} cannot be loaded into this model: {error}. They belong to "
            "another model, or the file is damaged."
        ) from error


def _is_of_compiled(path: Path) -> bool:
    with safe_open(str(path), framework="pt") as file:
        return any(COMPILED in name for name in file.keys())  # noqa: SIM118


def _read_uncompiled(module: nn.Module, path: Path) -> None:
    """Load the weights of a compiled module, as 0.1.0 wrote them, into the module itself."""
    held = {name.replace(COMPILED, ""): tensor for name, tensor in load_file(str(path)).items()}
    ours = module.state_dict(keep_vars=True)
    known = {tensor.data_ptr() for name, tensor in ours.items() if name in held}
    tied = {name: ours[name] for name in ours.keys() - held.keys()}
    tied = {name: tensor for name, tensor in tied.items() if tensor.data_ptr() in known}
    module.load_state_dict({**{name: t.detach() for name, t in tied.items()}, **held})


def write_tensors(tensors: Tensors, words: str, path: Path) -> None:
    """Write tensors and a text that belongs to them into one file, with a digest of both."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "words": words, "digest": _digest(on_cpu, words)}
    with writing(path) as draft:
        _reporting(lambda: save_file(on_cpu, str(draft), metadata=metadata))


def read_tensors(path: Path) -> tuple[Tensors, str]:
    """What `write_tensors` wrote; StoreError if the file was changed since."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}. {_ANEW}") from error
    words = metadata.get("words", "")
    if metadata.get("digest") != _digest(tensors, words):
        raise StoreError(f"{path} was changed or damaged after it was written. {_ANEW}")
    return tensors, words


def read_words(path: Path) -> str:
    """The text of `write_tensors` alone, without a look at the digest."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("words", "")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}. {_ANEW}") from error


_ANEW = "Delete it to train its stage again from the stage's start."


def _reporting(write: Callable[[], None]) -> None:
    """Write; safetensors' own error of the system becomes Python's."""
    try:
        write()
    except SafetensorError as error:  # of the system, in words of its own
        raise OSError(str(error)) from error


def _digest(tensors: Tensors, words: str) -> str:
    digest = hashlib.sha256(words.encode())
    _add_tensors(digest, tensors)
    return digest.hexdigest()


def remove_weights(folder: Path) -> None:
    """Delete a folder of weights; files that are not ours stay, such as a card that was changed."""
    card = folder / CARD
    if card.exists() and digest_of(card) in ledger(folder.parent).get(f"{folder.name}/{CARD}", []):
        card.unlink()
    delist(folder.parent, [f"{folder.name}/{name}" for name in LISTED])
    shutil.rmtree(folder.with_name(f"{folder.name}.tmp"), ignore_errors=True)
    for pattern in FOLDER_FILES:
        for file in folder.glob(pattern):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def weights_hash(module: nn.Module) -> str:
    """A digest of all parameters and buffers, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    _add_tensors(digest, module.state_dict())
    return digest.hexdigest()[:16]


def _add_tensors(digest: Any, tensors: Mapping[str, Any]) -> None:
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())


@typed
def import_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a `.pt` checkpoint of self-rewarding-lm-pytorch into a model of its shape, in place.

    It holds the state dict itself or, as that library's `save` writes it, a dict with it under
    `model`. Only tensors are read (`weights_only=True`): no pickled object is ever made. Raises
    StoreError if the file holds other objects, is damaged, or does not fit the model.
    """
    try:
        held = torch.load(str(path), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise StoreError(
            f"{path} cannot be imported: it is no checkpoint, or holds other Python objects than "
            "tensors, which could run code when they are loaded. Save the state dict alone where "
            "you trust the file: torch.save(model.state_dict(), path)."
        ) from error
    except (OSError, RuntimeError, ValueError, LookupError, EOFError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {error}") from error
    held = held.get("model", held) if isinstance(held, Mapping) else held
    if isinstance(held, Mapping):
        held = {str(name).replace(COMPILED, ""): value for name, value in held.items()}
    is_state = isinstance(held, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()
    )
    if not is_state:
        raise StoreError(
            f"{path} holds no state dict, which names tensors, neither as it is nor under 'model'."
        )
    states = (model.state_dict(), held)
    ours, theirs = ({k: tuple(v.shape) for k, v in state.items()} for state in states)
    if wrong := sorted(dict(ours.items() ^ theirs.items())):
        name = wrong[0]
        raise StoreError(
            f"the weights in {path} do not fit this model; they differ in "
            f"{amount(len(wrong), 'tensor')}, first {name}: {theirs.get(name, 'missing')} there, "
            f"{ours.get(name, 'missing')} in the model."
        )
    model.load_state_dict(held)
