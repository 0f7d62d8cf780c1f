"""Tiny models, a tokenizer and a context, built anew for each test."""

import string
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan, Session, TokenModel
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runtime import Runtime

VOCAB = 17
LIMIT = 24

POSITIONS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "none": {"use_abs_pos_emb": False},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_pos_emb": True, "rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True},
    "dynamic": {"dynamic_pos_bias": True},
    "grouped": {"rotary_pos_emb": True, "attn_kv_heads": 1},
    "memory": {"attn_num_mem_kv": 2},
}
# without flash attention x-transformers takes its softmax in float32 whatever the model's type
IN_FLOAT64 = ("absolute", "none", "rotary", "alibi", "grouped")

_OF_WRAPPER = ("use_abs_pos_emb", "num_memory_tokens", "max_seq_len")


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every weight, so that no part of the model is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return module


def transformer(
    positions: str = "absolute",
    *,
    vocab: int = VOCAB,
    depth: int = 2,
    seed: int = 0,
    **options: Any,
) -> TransformerWrapper:
    """A TransformerWrapper in float32; options of the wrapper and of its layers."""
    return lively(untrained(positions, vocab=vocab, depth=depth, seed=seed, **options))  # type: ignore[return-value]


def untrained(
    positions: str = "absolute",
    *,
    vocab: int = VOCAB,
    depth: int = 2,
    seed: int = 0,
    **options: Any,
) -> TransformerWrapper:
    """The same with the weights that x-transformers gives it."""
    options = {"max_seq_len": LIMIT, **POSITIONS[positions], **options}
    outer = {name: options.pop(name) for name in _OF_WRAPPER if name in options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = Decoder(dim=16, depth=depth, **{"heads": 2, "attn_dim_head": 32, **options})
        return TransformerWrapper(num_tokens=vocab, attn_layers=layers, **outer)


def transformer64(positions: str = "absolute", **options: Any) -> TransformerWrapper:
    """The same in float64 throughout."""
    return transformer(positions, attn_flash=True, **options).double()


class Recurrent(nn.Module):
    """A plain causal module without a cache; with `dropout`, a dropout layer."""

    def __init__(self, vocab: int = VOCAB, dim: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(vocab, dim)
            self.mix = nn.GRU(dim, dim, batch_first=True)
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(dim, vocab)
        lively(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.mix(self.embed(ids))[0]))


class WithLogits(nn.Module):
    """A model that answers with an object, as Hugging Face's do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(ids))


class Successor(nn.Module):
    """The next token is the last one plus 1, and 0 after the last: known by hand."""

    def __init__(self, vocab: int = 10, max_seq_len: int | None = None) -> None:
        super().__init__()
        self.vocab, self.max_seq_len = vocab, max_seq_len

    def forward(self, ids: Tensor) -> Tensor:
        return 10.0 * nn.functional.one_hot((ids + 1) % self.vocab, self.vocab).float()


class Fixed(nn.Module):
    """The same logits after every token."""

    def __init__(self, logits: list[float], max_seq_len: int | None = None) -> None:
        super().__init__()
        self.register_buffer("row", torch.tensor(logits))
        self.max_seq_len = max_seq_len

    def forward(self, ids: Tensor) -> Tensor:
        return self.row.expand(*ids.shape, -1)


KINDS = {
    **{positions: (lambda p=positions: transformer(p)) for positions in POSITIONS},
    "wrapped": lambda: AutoregressiveWrapper(transformer()),
    "uncached": lambda: transformer(shift_tokens=1),
    "plain": Recurrent,
    "logits": lambda: WithLogits(Recurrent()),
}
KINDS64 = {
    **{positions: (lambda p=positions: transformer64(p)) for positions in IN_FLOAT64},
    "wrapped": lambda: AutoregressiveWrapper(transformer64()),
    "plain": lambda: Recurrent().double(),
    "logits": lambda: WithLogits(Recurrent().double()),
}


@torch.no_grad()
def last_logits(module: nn.Module, row: list[int]) -> Tensor:
    """The oracle: logits (v,) of what follows one whole row, asked of the bare model."""
    bare = module.net if isinstance(module, AutoregressiveWrapper) else module
    training = bare.training
    output = bare.eval()(torch.tensor([row]))
    bare.train(training)
    return getattr(output, "logits", output)[0, -1]


ALPHABET = string.ascii_lowercase + string.digits + " :.<>?S\n"
END = len(ALPHABET)
TEXT_VOCAB = END + 1


def encode(text: str) -> Tensor:
    return torch.tensor([ALPHABET.index(c) for c in text], dtype=torch.long)


def decode(ids: Tensor) -> str:
    return "".join(ALPHABET[i] for i in ids.tolist())


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(encode(text).tolist())


CHARACTERS = CallableTokenizer(encode, decode)


def text_tokens(eos_id: int | None = END) -> Tokens:
    return Tokens(CHARACTERS, eos_id=eos_id, vocab=TEXT_VOCAB)


def context(module: nn.Module, *, stage: str = "stage", seed: int = 0, **fields: Any) -> Context:
    """What a stage of that name would be given; `fields` replaces parts of it."""
    model = adapt(module)
    runtime = fields.pop("runtime", None) or Runtime({"cpu": True}, quiet=True)
    values: dict[str, Any] = {
        "policy": runtime.prepare(Policy(model)),
        "engine": LocalEngine(),
        "tokens": Tokens(None, eos_id=None, vocab=model.vocab),
        "rewards": {},
        "adapt": adapt,
        **fields,
    }
    return Context(stage=stage, seed=seed, model=model, runtime=runtime, **values)


def stage_dir(ctx: Context, path: Path) -> StageDir:
    """The folder of the context's stage, begun."""
    out = StageDir(path, ctx.runtime)
    out.begin({})
    return out


def started(model: TokenModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Session]:
    """The first logits of rows, and a session in which they are in flight."""
    session = model.session(Plan((), max(map(len, rows)), max_new=16, max_rows=8))
    logits = session.prefill(rows)
    session.add(range(len(rows)))
    session.release(range(len(rows)))
    return logits, session


def run_of_format_1() -> Run:
    """A run that version 0.1.0 began, of which nothing but its format is known."""
    run = Run.__new__(Run)
    run.info = {"format": 1}
    return run
