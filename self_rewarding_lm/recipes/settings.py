"""The settings of a recipe, with defaults and words. Knows nothing of files."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    PAPER_REWARD_CONFIG,
    Config,
    Object,
    RewardConfig,
)
from self_rewarding_lm.models.loading import dtype_of
from self_rewarding_lm.stages.kinds import STAGES

RUBRICS = {"paper": PAPER_REWARD_CONFIG, "short": DEFAULT_REWARD_CONFIG}
"""The library's own judge's prompts, by their name in a recipe."""


STAGE_KINDS = {stage.folder_name: stage for stage in STAGES}
"""The stages by the name that they have in a recipe."""


class LoraSettings(Config):
    """A LoRA adapter; the settings have peft's names."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; "all-linear" is all but the output layer."""
    modules_to_save: tuple[str, ...] = ()
    """Names of layers that are trained in full and saved with the adapter."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""


class RecipeSettings(Config):
    """The settings at the top of a recipe."""

    model: str
    """M0: a folder that save_pretrained wrote, a name on the hub, a .gguf file, or
    package.module:attribute (a torch module, or a function without arguments that makes one)."""
    out: str = "checkpoints"
    """The run's folder. The same recipe with the same folder resumes where it was stopped."""
    paper: Object = None
    """The paper's stages; the settings are those of paper_recipe."""
    stages: Object = None
    """In place of `paper`: a list of stages of your own."""
    reward_prompts: Object = None
    """Reward prompts by name; stages use `default` unless they name another."""
    engine: Object = None
    """A server that generates and judges with the stages' weights (docs/server.md). None: this
    process does."""
    tokenizer: str | None = None
    """A folder, a name on the hub or package.module:attribute. None: the model's own."""
    chat_template: str | None = None
    """plain, chatml, llama-3, gemma, zephyr, jinja text, or raw (texts as they are). None: the
    tokenizer's own, or plain if it has none."""
    torch_dtype: str | None = None
    """Type of the weights: auto, float32, bfloat16 (bf16), float16, float64. None: float32, in
    which updates at small learning rates are not rounded away."""
    device_map: str | dict[str, int | str] | None = None
    """Devices of the parts of a model (transformers); for a single process."""
    load_in_4bit: bool = False
    """Load the model in 4 bits (bitsandbytes); with `peft`."""
    peft: LoraSettings | None = None
    """Train a LoRA adapter in place of all weights; {} takes its defaults."""
    merge_adapter: bool = False
    """Write the model with the adapter merged to <out>/merged after the last stage."""
    keep_stages: int | None = Field(default=None, ge=1)
    """How many finished stages keep their weights on disk: the last ones. None: all."""
    report: bool = True
    """Write report.html into the run's folder when the run is done."""
    report_to: str | tuple[str, ...] = ()
    """Trackers that get all metrics: wandb, tensorboard, mlflow, trackio, comet_ml, aim, ... as
    Accelerate names them; one, or a list. Their files are in <out>/trackers."""
    eos_id: int | None = Field(default=None, ge=0)
    """The token that ends a response. None: those of the tokenizer and the model."""
    seed: int = 0
    """Seed of sampling, of the order of rows and of dropout."""
    accelerate: dict[str, Any] = Field(default={})
    """Arguments of accelerate.Accelerator, for example {mixed_precision: bf16}."""

    @field_validator("torch_dtype")
    @classmethod
    def _dtype_known(cls, name: str | None) -> str | None:
        dtype_of(name)
        return name


class RubricSettings(RewardConfig):
    """A reward prompt that changes settings of one of the library's own."""

    rubric: Literal["paper", "short"] = "paper"
    """The reward prompt whose settings are taken if they are not given: `paper` is the paper-length
    additive rubric, `short` one of 700 characters for models with little room."""


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


NESTED = ("paper", "stages", "reward_prompts", "engine")
"""Settings of which each holds a mapping or a list of further settings."""


NOT_AS_THEY_ARE = ("model", "out", "tokenizer", "peft", "accelerate", *NESTED)
"""Settings that the trainer takes in another form; it takes all others as they are."""
