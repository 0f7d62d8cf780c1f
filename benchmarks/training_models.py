"""The models that are trained, as folders that both sides read, and their operations."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_rows import Pair
from workloads import Chat

from self_rewarding_lm.runs.pretrained import save_pretrained

SMOLLM2, LLAMA = "smollm2", "llama128k"
MODELS = (SMOLLM2, LLAMA)
LLAMA_SIZES = {
    "vocab_size": 128_256,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""The vocabulary of Llama 3, tied as in its smallest models."""


@dataclass(frozen=True)
class Flops:
    """Of a model's forward. linear: weights of its layers' products; head: of the last product;
    width: of all heads of attention together."""

    linear: int
    head: int
    width: int
    layers: int

    def forward(self, length: int, targets: int) -> float:
        """Of one sequence whose last `targets` tokens get log-probs. Attention is causal, so it
        needs half of all products of queries with keys, and of weights with values."""
        attention = 2 * self.layers * self.width * length**2
        return 2 * self.linear * length + 2 * self.head * targets + attention

    def pairs(self, pairs: Sequence[Pair]) -> float:
        """Of one forward of both sequences of each pair."""
        return sum(
            self.forward(len(pair.prompt) + len(response), len(response))
            for pair in pairs
            for response in (pair.chosen, pair.rejected)
        )

    def supervised(self, pairs: Sequence[Pair]) -> float:
        """Of one forward of each pair's chosen sequence."""
        return sum(
            self.forward(len(pair.prompt) + len(pair.chosen), len(pair.chosen)) for pair in pairs
        )


@dataclass(frozen=True)
class Model:
    """folder: weights in float32 and a tokenizer. suffix: of its entries' names."""

    name: str
    folder: Path
    parameters: int
    flops: Flops

    @property
    def suffix(self) -> str:
        return "" if self.name == SMOLLM2 else f"_{self.name}"


def write_models(chat: Chat, names: Sequence[str], folder: Path) -> list[Model]:
    """A folder for each model, with the tokenizer of `chat`, which all of them read texts by."""
    found = []
    for name in names:
        module = chat.model if name == SMOLLM2 else random_llama()
        own = folder / name
        own.mkdir(parents=True)
        save_pretrained(module, own)
        chat.tokenizer.save_pretrained(str(own))
        parameters = sum(p.numel() for p in module.parameters())
        found.append(Model(name, own, parameters, flops_of(module)))
        del module
        gc.collect()
    return found


def random_llama() -> nn.Module:
    """36.6 million parameters, of which 32.8 are the embeddings, which are also the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES))  # type: ignore[arg-type]


def flops_of(module: Any) -> Flops:
    config, head = module.config, module.get_output_embeddings()
    linear = sum(
        part.weight.numel()
        for part in module.modules()
        if isinstance(part, nn.Linear) and part is not head
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Flops(
        linear,
        head.weight.numel(),
        width * config.num_attention_heads,
        config.num_hidden_layers,
    )
