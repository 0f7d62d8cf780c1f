"""How fast a device decodes and trains, beside what its memory and its products allow."""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floors import Floors, Sizes, least_work
from torch import nn
from training_models import Flops, flops_of
from training_request import DPO, OURS, Request
from training_rows import Pair, save_pairs

from self_rewarding_lm.generation.engine import Decoding
from self_rewarding_lm.generation.engine import Request as Asked
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt

LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""The sizes of Llama 3.2 1B: 1.24 billion parameters, of which 0.26 are embeddings and head."""


TINY = LARGE | {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}


COPY, SQUARE = 2**31, 8192  # bytes, and the side of a product's matrices
TINY_COPY, TINY_SQUARE = 2**24, 512
WARM_TOKENS = 4


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    sync(device)
    started = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - started


def floors_of(device: torch.device, dtypes: dict[str, torch.dtype], *, tiny: bool) -> Floors:
    """Bytes a second of a copy, and operations a second of a large product: the best of ten."""
    count, side = (TINY_COPY, TINY_SQUARE) if tiny else (COPY, SQUARE)
    bandwidth = 2 * count / _copy_seconds(count, device)
    rates = {}
    for name, dtype in dtypes.items():
        one = torch.randn(side, side, device=device).to(dtype)
        other = torch.randn(side, side, device=device).to(dtype)
        rates[name] = 2 * side**3 / _best(lambda a=one, b=other: a @ b, device)
    return Floors(bandwidth, rates)


def _copy_seconds(count: int, device: torch.device) -> float:
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    run()
    return min(seconds_of(run, device) for _ in range(10))


def random_llama(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        sizes: dict[str, Any] = TINY if tiny else LARGE
        config = LlamaConfig(**sizes, eos_token_id=None)  # nothing ends a row
        return LlamaForCausalLM(config).to(dtype).eval()


def sizes_of(module: Any) -> Sizes:
    config, item = module.config, next(module.parameters()).element_size()
    head = config.vocab_size * config.hidden_size
    width = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * width * item
    return Sizes(sum(p.numel() for p in module.parameters()) - head, head, item, kv)


def decode(
    module: nn.Module,
    rows: int,
    floors: Floors,
    device: torch.device,
    *,
    prompt: int,
    new: int,
    peer: dict[str, Any],
) -> dict:
    """Tokens a second of `rows` rows, and of transformers' generate, with `new` tokens each.

    Each row has a prompt of its own. peer: further settings of generate. share: of the device's
    bandwidth, by the bytes that no engine can leave unread.
    """
    generator = torch.Generator().manual_seed(rows)
    vocab = adapt(module).vocab
    prompts = torch.randint(3, vocab, (rows, prompt), generator=generator)
    requests = [Asked(tuple(ids), n, new) for n, ids in enumerate(prompts.tolist())]
    model, engine, decoding = adapt(module), LocalEngine(max_rows=rows), Decoding(temperature=1.0)

    def ours(new_tokens: int) -> None:
        asked = [replace(one, max_new_tokens=new_tokens) for one in requests]
        found = dict(engine.generate(model, asked, decoding))
        assert all(len(one.ids) == new_tokens for one in found.values())

    def theirs(new_tokens: int) -> None:
        ids = prompts.to(device)
        settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, **peer}
        out = module.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            **settings,
        )
        assert out.shape[1] == prompt + new_tokens

    least = least_work(
        [tuple(p) for p in prompts.tolist()], [new] * rows, rows=rows, sizes=sizes_of(module)
    )
    found: dict[str, Any] = {"name": f"decoding, {rows} rows", "rows": rows, "new_tokens": new}
    if peer:
        found["transformers_settings"] = peer
    for name, run in {"ours": ours, "transformers": theirs}.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run(WARM_TOKENS)
        seconds = seconds_of(lambda run=run: run(new), device)
        found[name] = rows * new / seconds
        found[f"{name}_share_of_bandwidth"] = least.bytes / floors.bandwidth / seconds
        found[f"{name}_peak_gb"] = peak_gb(device)
    return found


def peak_gb(device: torch.device) -> float | None:
    """The most memory that tensors had since the last reset; None where it is not known."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def train(
    floors: Floors, device: torch.device, *, tiny: bool, pairs: int, limit: float
) -> list[dict]:
    """Rows a second, MFU and memory of DPO with its reference pass, ours and TRL's.

    Each side has a process of its own, at most `limit` seconds. Weights are in float32, products in
    bfloat16; MFU counts useful tokens, three times for a forward with its backward.
    """
    gc.collect()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _pairs(pairs, tiny=tiny)
        save_pairs(folder / "pairs.json", rows)
        write_configured(folder / "model", tiny=tiny)
        request = Request(
            side=OURS,
            kind=DPO,
            model=str(folder / "model"),
            rows=str(folder / "pairs.json"),
            pairs=pairs,
            batch_size=2 if tiny else 8,
            max_length=64 if tiny else 512,
            learning_rate=1e-6,
            checkpointing=False,
            threads=torch.get_num_threads(),
            device=device.type,
            precision="bf16",
        )
        with torch.device("meta"):
            flops = flops_of(random_llama(torch.device("meta"), torch.float32, tiny=tiny))
        sides = (OURS, "dpo_precomputed", "dpo_grouped_one")
        return [
            _trained(replace(request, side=s), rows, flops, floors, folder, limit) for s in sides
        ]


def write_configured(folder: Path, *, tiny: bool) -> None:
    """A folder with a configuration and a tokenizer: each side draws the same weights of them."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(**(TINY if tiny else LARGE), architectures=["LlamaForCausalLM"]).save_pretrained(
        folder
    )  # type: ignore[arg-type]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _pairs(count: int, *, tiny: bool) -> list[Pair]:
    """Prompts of 128 tokens, and responses from a quarter of the rest to all of it."""
    generator = torch.Generator().manual_seed(0)
    prompt, rest = (16, 48) if tiny else (128, 384)
    vocab = (TINY if tiny else LARGE)["vocab_size"]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, int(vocab), (length,), generator=generator).tolist())

    lengths = [rest * (1 + n % 4) // 4 for n in range(2 * count)]
    return [Pair(ids(prompt), ids(lengths[n]), ids(lengths[-1 - n])) for n in range(count)]


def _trained(
    request: Request, pairs: list[Pair], flops: Flops, floors: Floors, folder: Path, limit: float
) -> dict:
    name = f"DPO, {'ours' if request.side == OURS else 'TRL ' + request.side}"
    request.write(folder / "request.json")
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    worker = Path(__file__).with_name("training_worker.py")
    command = [sys.executable, str(worker), str(folder / "request.json"), str(result)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(limit, 1.0))
    except subprocess.TimeoutExpired:
        return {"name": name, "failure": f"not finished after {limit:.0f} s"}
    if done.returncode:
        return {"name": name, "failure": " ".join(done.stderr.split())[-300:]}
    found = json.loads(result.read_text(encoding="utf-8"))
    forward, rate = flops.pairs(pairs), floors.matrix["bf16"]
    training, whole = found["seconds"]["training"], sum(found["seconds"].values())
    return {
        "name": name,
        "pairs_per_second": len(pairs) / whole,
        "training_mfu": 3 * forward / training / rate,
        "whole_mfu": 4 * forward / whole / rate,
        "peak_gb": found["peak"] / 1e9,
        "above_states_gb": found["above"] / 1e9,
        "first_loss": found["first_loss"],
        "seconds": found["seconds"],
    }
