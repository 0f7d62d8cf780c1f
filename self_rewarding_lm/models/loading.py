"""Models, tokenizers and classifiers by name (a folder, a hub name, a GGUF file), and adapters."""

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.errors import ConfigError, StoreError, an_adapter, mixed_precision, typed
from self_rewarding_lm.models.compiled import uncompiled
from self_rewarding_lm.models.gguf import GgufOpener
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.runs.pretrained import GENERATION, has_adapter, is_hugging_face
from self_rewarding_lm.runtime import random_numbers_kept

logger = logging.getLogger(__name__)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"float64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


LOW = (torch.bfloat16, torch.float16)


GGUF = ".gguf"


ENDLESS = 1_000_000
"""A tokenizer whose model_max_length is this or more knows of no limit."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, and which adapter is put on it.

    seed: of the adapter's first weights. The others are arguments of SelfRewardingTrainer.
    """

    torch_dtype: str | torch.dtype | None = None
    device_map: Any = None
    load_in_4bit: bool = False
    peft_config: Any = None
    merge_adapter: bool = False
    seed: int = 0


def open_model(model: nn.Module | str | Path, options: Loading) -> tuple[nn.Module, Any]:
    """A module with its adapter, as it was given or loaded by name, and its tokenizer.

    The tokenizer is None if the module was given or comes without one. Raises ConfigError for
    options that do not go together.
    """
    tokenizer = None
    if options.load_in_4bit and options.merge_adapter:
        raise ConfigError(
            "merge_adapter does not go with load_in_4bit: merged weights would be rounded to 4 "
            "bit. Merge after training: load the base model in full, put the adapter on it with "
            "peft.PeftModel.from_pretrained and call merge_and_unload."
        )
    if isinstance(model, nn.Module):
        how = (options.torch_dtype, options.device_map, options.load_in_4bit or None)
        if any(option is not None for option in how):
            raise ConfigError(
                "torch_dtype, device_map and load_in_4bit say how a model is loaded by name; this "
                f"{type(model).__name__} is already loaded. Load it with them, or leave them out."
            )
        model = uncompiled(model)
    else:
        model, tokenizer = load_causal_lm(
            model,
            torch_dtype=options.torch_dtype,
            device_map=options.device_map,
            load_in_4bit=options.load_in_4bit,
        )
    if options.peft_config is not None:
        model = with_adapter(model, options.peft_config, seed=options.seed)
    if options.merge_adapter and not has_adapter(model):
        raise ConfigError(f"merge_adapter needs a model with an adapter; give {an_adapter()}.")
    warn_of_low_precision(model)
    return model, tokenizer


@typed
def load_causal_lm(
    source: str | Path,
    *,
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    load_in_4bit: bool = False,
    cache_folder: str | Path | None = None,
) -> tuple[nn.Module, Any]:
    """A causal LM and its tokenizer from a folder, a hub name or a GGUF file.

    A folder may hold an adapter of peft: then its base model is loaded too, and the adapter can be
    trained further. torch_dtype: by default float32, in which the updates of small learning rates
    are not rounded away. cache_folder: where the weights of a GGUF file are kept once they were
    read, so that it opens in a second; default the environment variable SELF_REWARDING_LM_CACHE,
    else self_rewarding_lm in the user's cache directory. The tokenizer is None if there is none.
    Raises ConfigError for what cannot be found or read.
    """
    require("transformers", "a model by name")
    options: dict[str, Any] = {"dtype": dtype_of(torch_dtype), "device_map": device_map}
    if load_in_4bit:
        options["quantization_config"] = _four_bit()
    if (Path(source) / "adapter_config.json").exists():
        require("peft", "a model with an adapter")
    opener = GgufOpener(cache_folder)
    try:
        model, base = _read(str(source), options, opener)
    except (ConfigError, StoreError):
        raise
    except Exception as error:  # of transformers, peft, safetensors or gguf, each with its own
        raise ConfigError(
            f"no causal LM could be loaded from {str(source)!r}. A model is given as an object, "
            "a folder that save_pretrained wrote, a name on the hub, or a .gguf file. "
            f"{_no_folder(source)}What was wrong: {what_is_wrong(error)}"
        ) from error
    return model, tokenizer_of([str(source), base] if base else [str(source)], opener)


def what_is_wrong(error: Exception) -> str:
    """Words for what a library raised when a model or tokenizer was to be loaded."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, and this library runs no code from a model's "
            "folder. If you trust the code, load it yourself and give the object."
        )
    return f"{type(error).__name__}: {error!s:.500}"


def _no_folder(source: str | Path) -> str:
    """Words for a source that was taken for a name on the hub; none if it is a folder or file."""
    if Path(source).exists():
        return ""
    where = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
    return f"There is no folder {str(source)!r}{where}, so the hub was asked for it. "


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file; ConfigError if it would be, and cannot be opened."""
    path = Path(source)
    if path.suffix != GGUF:
        return False
    require("gguf", "a GGUF file")
    if not path.is_file():
        raise ConfigError(f"there is no file {str(source)!r}.")
    return True


def with_adapter(model: nn.Module, peft_config: Any, *, seed: int = 0) -> nn.Module:
    """A model with a new adapter of peft, which is then the only part that is trained.

    The adapter names a base in a folder or file by its whole path, to be found from anywhere. seed:
    of the adapter's first weights, so that a run that begins again has the same ones. Raises
    ConfigError for a configuration that does not fit.
    """
    require("peft", "peft_config")
    from peft import get_peft_model, prepare_model_for_kbit_training

    _check_adapter(model, peft_config)
    name = getattr(model, "name_or_path", "")
    if name and Path(name).exists():
        # not resolved: in the hub's cache a .gguf file is a link to one without a suffix
        model.name_or_path = str(Path(name).absolute())  # type: ignore[assignment]
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with random_numbers_kept(), warnings.catch_warnings():
            # peft asks transformers by a name that is deprecated there
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            torch.manual_seed(seed)
            return get_peft_model(model, peft_config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{an_adapter()} does not fit the model: {error}") from error


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigError if a Hugging Face model has nothing that can be trained and saved."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "the model holds an adapter that transformers loaded, beside its own weights. Put it "
            "on with peft.PeftModel.from_pretrained(base, folder, is_trainable=True), or give the "
            "adapter's folder as the model."
        )
    if has_adapter(model) and set(model.peft_config) != {"default"}:  # type: ignore[arg-type]
        raise ConfigError(
            "a model with an adapter must have one, named 'default' (peft's own name for the "
            f"first); got {', '.join(model.peft_config)}."  # type: ignore[arg-type]
        )
    if has_adapter(model):
        _check_new_adapter(model.peft_config["default"])  # type: ignore[index]
        _check_vocabulary(model)
    if is_hugging_face(model) and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"the {type(model).__name__} has no weights that require gradients, so nothing can be "
            "trained. An adapter is loaded with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not has_adapter(model) and not quantizer.is_serializable():
        raise ConfigError(
            f"the weights of the {type(model).__name__} are marked as quantised, in a form that "
            'transformers cannot save. Give the .gguf file by its path (model="folder/some.gguf"), '
            f"which the library unpacks to plain weights; or train an adapter with {an_adapter()}."
        )
    if getattr(model, "is_loaded_in_4bit", False) and not has_adapter(model):
        raise ConfigError(
            f"weights in 4 bit cannot be trained themselves; give {an_adapter()}, so that an "
            "adapter is trained on them."
        )


def _check_new_adapter(config: Any) -> None:
    """Raise ConfigError for an adapter that would not be read as it was trained."""
    if getattr(config, "target_modules_to_tie", None):
        raise ConfigError(
            "ensure_weight_tying of a LoRA on head or embeddings is not supported: peft makes two "
            "parameters that share memory. An optimiser steps it twice, moving the model to "
            "another device separates them, and saving then loses one. Leave ensure_weight_tying "
            "out (each layer then has an adapter of its own, and merge_adapter unties them), or "
            "train the embeddings through modules_to_save, whose ties hold."
        )
    base = config.base_model_name_or_path
    if base and Path(base).is_dir() and not (Path(base) / "config.json").exists():
        raise ConfigError(
            f"the adapter names {base!r} as its base, which holds no config.json, so nothing could "
            'open it again. Give a .gguf file by its path (model="folder/some.gguf") with '
            f"{an_adapter()}; another model by the folder that its save_pretrained wrote."
        )


def _check_vocabulary(model: Any) -> None:
    """Raise ConfigError if an adapter's base has another vocabulary here than where it is stored.

    An adapter is put on the stored base when it is opened again, which has none of the new rows. A
    base on the hub is looked up in the cache alone.
    """
    from transformers import AutoConfig

    source = model.peft_config["default"].base_model_name_or_path
    embeddings = model.get_base_model().get_input_embeddings()
    if not source or not hasattr(embeddings, "weight"):
        return
    try:
        stored = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:  # nothing to be found there, each kind with an error of its own
        return
    rows, vocab = len(embeddings.weight), stored.get_text_config().vocab_size
    if rows != vocab:
        raise ConfigError(
            f"the model's vocabulary was resized to {rows} tokens, but its base {source!r} has "
            f"{vocab}: an adapter is opened again on that base, which lacks the rows of the new "
            "tokens. Save the resized model as a folder first (model.save_pretrained(folder), "
            "and the tokenizer too), and put the adapter on the model of that folder."
        )


def check_placement(model: nn.Module | str | Path, device_map: Any, processes: int) -> None:
    """Raise ConfigError if a model is spread over devices while several processes run."""
    spread = getattr(model, "hf_device_map", None) or {}
    if processes > 1 and (device_map is not None or len(set(spread.values())) > 1):
        shown = device_map if device_map is not None else sorted(set(map(str, spread.values())))
        raise ConfigError(
            f"device_map ({shown}) spreads one model over devices that a process sees, and "
            f"{processes} processes run, which would each do so on the same devices. Load it "
            "without device_map (each process then holds the model on its own device), or start "
            "one process."
        )


def is_placed(model: nn.Module) -> bool:
    """Whether tensors must stay on their devices: the model is spread over some, or quantised."""
    return bool(getattr(model, "hf_device_map", None)) or bool(
        getattr(model, "is_loaded_in_4bit", False)
    )


def end_ids_of(model: nn.Module) -> tuple[int, ...]:
    """The end tokens that a Hugging Face model's generation config names."""
    eos_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos_id is None:
        return ()
    return tuple(eos_id) if isinstance(eos_id, list | tuple) else (eos_id,)


def warn_of_low_precision(model: nn.Module) -> None:
    """Warn of trained weights in a type that rounds small updates away."""
    low = [p for p in model.parameters() if p.requires_grad and p.dtype in LOW]
    if low:
        logger.warning(
            "the trained weights are %s: updates of a learning rate such as 1e-6 are rounded "
            "away. Load the model in float32 (and set %s for speed), or train an adapter with %s.",
            low[0].dtype,
            mixed_precision("bf16"),
            an_adapter(),
        )


def dtype_of(torch_dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by name; float32 for None; "auto" stays, for the checkpoint's own."""
    if torch_dtype is None:
        return torch.float32
    if isinstance(torch_dtype, torch.dtype) or torch_dtype == "auto":
        return torch_dtype
    name = torch_dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"torch_dtype must be auto, {', '.join(DTYPES)} or a torch.dtype; got {torch_dtype!r}."
        )
    return DTYPES[name]


def require(package: str, what: str) -> None:
    """Raise ConfigError with the pip line if a package of the [hf] extra is missing.

    what: for which thing the package is needed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{what} needs the package {package}, which is not installed: {install('hf')}"
        )


def _read(source: str, options: dict[str, Any], opener: GgufOpener) -> tuple[nn.Module, str | None]:
    """A model and, if an adapter was read, the name of its base model."""
    from transformers import GenerationConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    is_file = source.endswith(GGUF)
    without_peft = is_file or importlib.util.find_spec("peft") is None
    if without_peft or find_adapter_config_file(source) is None:
        return _read_whole(source, options, opener), None
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise ValueError(
            "its adapter_config.json names no base model. Load that, put the adapter on it with "
            "peft.PeftModel.from_pretrained(base, folder, is_trainable=True), and give the object."
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise ConfigError(
            f"the adapter in {source!r} was trained on {base!r}, which is not there. Put it back, "
            "or set base_model_name_or_path in adapter_config.json to where it is now."
        )
    model: nn.Module
    if base.endswith(GGUF):
        whole: Any = _read_whole(base, options, opener)
        model = PeftModel.from_pretrained(whole, source, is_trainable=True)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(
            source, is_trainable=True, trust_remote_code=False, **options
        )
    if (Path(source) / GENERATION).exists():  # where a response of the adapter ends
        model.generation_config = GenerationConfig.from_pretrained(source)  # type: ignore[assignment]
    return model, base


def _read_whole(source: str, options: dict[str, Any], opener: GgufOpener) -> nn.Module:
    """A model that is no adapter; one from a GGUF file is named by that file."""
    from transformers import AutoModelForCausalLM

    if not is_gguf(source):
        return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    if "quantization_config" in options:
        raise ConfigError(
            f"load_in_4bit cannot be used with the GGUF file {source!r}, whose weights are packed "
            "in a format of their own. Save it as a folder first (load_causal_lm(file), then "
            "save_pretrained of the model and of the tokenizer), and load that."
        )
    return opener.model(Path(source), options)


def _check_adapter(model: nn.Module, peft_config: Any) -> None:
    """Raise ConfigError if a model cannot have the adapter of peft_config."""
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            "peft_config must be a configuration of peft, for example LoraConfig(r=16, "
            f"target_modules='all-linear', task_type='CAUSAL_LM'); got {peft_config!r:.100}."
        )
    if not is_hugging_face(model):
        raise ConfigError(
            f"{an_adapter()} needs a Hugging Face causal LM; the model is a {type(model).__name__}."
        )
    if has_adapter(model):
        raise ConfigError(f"the model has an adapter already; leave {an_adapter()} out.")
    if peft_config.is_prompt_learning or peft_config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(
            "peft_config must be of a kind that changes layers, such as LoraConfig, with "
            f"task_type 'CAUSAL_LM'; got {type(peft_config).__name__} with task_type "
            f"{str(peft_config.task_type)!r}."
        )


def _four_bit() -> Any:
    """The settings of bitsandbytes for 4-bit weights (NF4, arXiv:2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_in_4bit needs the package bitsandbytes, which is not installed: "
            f"{install('bitsandbytes')}"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def tokenizer_of(sources: list[str], opener: GgufOpener) -> Any:
    """The tokenizer of the first folder, hub name or GGUF file that has one; None if none has."""
    reason: object = None
    for source in sources:
        try:
            tokenizer = _read_tokenizer(source, opener)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error
            continue
        ids = tokenizer.encode("a", add_special_tokens=False)
        if set(ids) - set(tokenizer.all_special_ids):
            return tokenizer
        reason = "no vocabulary is there"  # transformers makes an empty one of the model's kind
    logger.warning("no tokenizer could be loaded from %s (%.200s)", " or ".join(sources), reason)
    return None


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a hub name or a GGUF file; ConfigError if there is none."""
    require("transformers", "a tokenizer by name")
    try:
        return _read_tokenizer(source, GgufOpener())
    except (ConfigError, StoreError):
        raise
    except Exception as error:  # of transformers, tokenizers or gguf, each with its own
        raise ConfigError(
            f"no tokenizer could be loaded from {source!r}. A tokenizer is given as a folder that "
            "save_pretrained wrote, a name on the hub or a .gguf file. What was wrong here: "
            f"{what_is_wrong(error)}"
        ) from error


def _read_tokenizer(source: str, opener: GgufOpener) -> Any:
    from transformers import AutoTokenizer

    if is_gguf(source):
        return opener.tokenizer(Path(source))
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


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


def load_classifier(
    source: nn.Module | str | Path, *, torch_dtype: str | torch.dtype = "auto"
) -> tuple[nn.Module, Any]:
    """A sequence classifier and its tokenizer, from a folder or a hub name.

    A module is returned as it is. The tokenizer is None for a module, and if there is none beside
    the model. Raises ConfigError for what cannot be found or read.
    """
    if isinstance(source, nn.Module):
        return source, None
    require("transformers", "a reward model by name")
    from transformers import AutoModelForSequenceClassification

    name = str(source)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype_of(torch_dtype), trust_remote_code=False
        )
    except Exception as error:  # of transformers or safetensors, each with its own
        raise ConfigError(
            f"no sequence-classification model could be loaded from {name!r}. A reward model is "
            "given as a module, a folder that save_pretrained wrote, or a name on the hub. What "
            f"was wrong here: {what_is_wrong(error)}"
        ) from error
    return model, tokenizer_of([name], GgufOpener())


def longest_input(model: nn.Module, tokenizer: Any) -> int | None:
    """Tokens that a model of transformers takes at most, as it or its tokenizer says."""
    config: Any = getattr(model, "config", None)
    limits = [
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    return min((int(n) for n in limits if n is not None and 0 < n < ENDLESS), default=None)
