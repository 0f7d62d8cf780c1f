"""GGUF files: read once, and kept as folders of transformers, from which they open in a second."""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.runs.atomic import digest_of
from self_rewarding_lm.runs.cache import CACHE_VARIABLE, Cache
from self_rewarding_lm.runs.pretrained import read_pretrained, save_pretrained
from self_rewarding_lm.runtime import random_numbers_kept

logger = logging.getLogger(__name__)


FORMAT = 1
"""Of what is kept: another number if this file makes something else of the same GGUF file."""


READERS = ("transformers", "tokenizers", "gguf")
"""Packages that read GGUF files: what one version made is not taken by another."""


MARKS = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")
"""What says in a model's configuration that its weights are quantised."""


class GgufOpener:
    """Opens GGUF files and keeps what it made of them, for as long as one thing is opened.

    cache_folder: as the root of `Cache`. What is kept is found by the file's content (SHA-256), the
    type of the weights and the versions of the packages that read it, and is kept only if it is
    read back as the very same. If nothing can be kept, files are read each time.
    """

    def __init__(self, cache_folder: str | Path | None = None) -> None:
        self.cache = Cache(cache_folder)
        self._digests: dict[Path, str] = {}

    def model(self, file: Path, options: dict[str, Any]) -> nn.Module:
        """The causal LM. options: of `from_pretrained`, `dtype` among them."""
        from transformers import AutoModelForCausalLM

        name = self._name(file, str(options["dtype"]).removeprefix("torch."))
        folder, module = self.cache.find(name), None
        if folder is None:
            module = _unpacked(file, options["dtype"])
            size = sum(weight.nbytes for weight in module.state_dict().values())
            folder = self._keep(file, name, partial(_write_model, module), size)
        if folder is not None:
            logger.info(
                "%s is opened from %s, a copy of %.0f MB. You may delete that folder; %s names "
                "another place for such folders.",
                *(file.name, folder, (self.cache.size(folder) or 0) / 1e6, CACHE_VARIABLE),
            )
        if folder is not None and (module is None or options.get("device_map") is not None):
            module = _from(folder, AutoModelForCausalLM, file, **options)
        assert module is not None
        module.name_or_path = str(file)  # type: ignore[assignment]
        module.config._name_or_path = str(file.parent)  # type: ignore[union-attr]
        return module

    def tokenizer(self, file: Path) -> Any:
        """The tokenizer, with its chat template."""
        from transformers import AutoTokenizer

        tokenizer = self._read(file, "tokenizer", AutoTokenizer, _write_tokenizer)
        tokenizer.name_or_path = str(file.parent)
        return tokenizer

    def config(self, file: Path) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return self._read(file, "config", AutoConfig, _write_config)

    def _read(self, file: Path, kind: str, reader: Any, write: Callable[[Any, Path], None]) -> Any:
        """What `reader` gives for a file, or for the folder that `write` made of the same."""
        name = self._name(file, kind)
        folder = self.cache.find(name)
        if folder is not None:
            return _from(folder, reader, file)
        read = reader.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        self._keep(file, name, partial(write, read), size=0)
        return read

    def _keep(self, file: Path, name: str, write: Callable[[Path], None], size: int) -> Path | None:
        def write_if_same(folder: Path) -> None:
            if digest_of(file) != self._digests[file]:
                raise ValueError(f"{file} was changed while it was read")
            write(folder)

        return self.cache.keep(name, write_if_same, size)

    def _name(self, file: Path, kind: str) -> str:
        if file not in self._digests:
            self._digests[file] = digest_of(file)
        versions = [f"{package} {version(package)}" for package in READERS]
        key = json.dumps([FORMAT, self._digests[file], *versions])
        return f"gguf-{hashlib.sha256(key.encode()).hexdigest()[:32]}-{kind}"


def _from(folder: Path, reader: Any, file: Path, **options: Any) -> Any:
    """What `reader` reads from a folder that was made of a file; StoreError if it cannot."""
    try:
        return reader.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # of transformers or safetensors, each with its own
        raise StoreError(
            f"the converted copy of {file} in {folder} cannot be opened now "
            f"({type(error).__name__}: {error!s:.300}). If that folder is damaged, delete it; it "
            "will be made again."
        ) from error


def _unpacked(file: Path, dtype: torch.dtype | str) -> nn.Module:
    """The model of a GGUF file, without the marks of quantisation: its weights are plain."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False
    )
    for name in MARKS:
        if hasattr(model.config, name):
            delattr(model.config, name)
    with random_numbers_kept():  # the weights that it begins with are random
        plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _write_model(module: nn.Module, folder: Path) -> None:
    save_pretrained(module, folder)
    _check_same(_facts_of(module), _facts_of(read_pretrained(type(module), folder)))


def _facts_of(module: Any) -> dict[str, Any]:
    """All that makes a model: its settings, weights and buffers, also those that are not saved."""
    tensors = module.state_dict() | dict(module.named_buffers())
    configs = [module.config.to_diff_dict(), module.generation_config.to_diff_dict()]
    return {"configs": configs, "training": module.training, **tensors}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_same(_words_of(tokenizer), _words_of(read))


def _words_of(tokenizer: Any) -> dict[str, Any]:
    """All that makes a tokenizer."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    names = ("chat_template", "model_max_length", "padding_side", "truncation_side")
    settings = {name: getattr(tokenizer, name) for name in names}
    return {"ids": tokenizer.backend_tokenizer.to_str(), "special": special, **settings}


def _write_config(config: Any, folder: Path) -> None:
    from transformers import AutoConfig

    config.save_pretrained(folder)
    read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_same(config.to_diff_dict(), read.to_diff_dict())


def _check_same(made: dict[str, Any], read: dict[str, Any]) -> None:
    """Raise ValueError unless what was read back from a folder is what was written to it."""
    for name in made.keys() | read.keys():
        one, other = made.get(name), read.get(name)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            is_same = one.dtype == other.dtype and torch.equal(one, other)
        else:
            is_same = one == other
        if not is_same:
            raise ValueError(f"{name} is not read back as it was written")
