"""Tokens per second of this library and of the ancestor's `sample`, on the same model, in turn.

    pip install -c constraints.txt ".[bench]"
    python benchmarks/generation.py [--quick] [--json FILE]

The model is a random x-transformers TransformerWrapper; prompts are random ids of ragged lengths,
no end token, so every row runs to its full length on both sides. Both sides use temperature 0.7 and
top-p 0.9 and the same number of rows at once. Each figure is the median of the runs, taken in turn
(ours, peer, ours, peer, ...) after one warm-up of each.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import LocalEngine, SamplingConfig, generate


class Plain(torch.nn.Module):
    """The same transformer as a plain module, which hides its cache from the library."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.max_seq_len = net.max_seq_len

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(ids)


def build_model(dim: int, depth: int, max_seq_len: int) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=dim, depth=depth, heads=8)
    return TransformerWrapper(num_tokens=256, max_seq_len=max_seq_len, attn_layers=layers).eval()


def ours(model: torch.nn.Module, prompts: list[torch.Tensor], new_tokens: int, rows: int) -> int:
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=new_tokens)
    found = generate(model, prompts, sampling=sampling, engine=LocalEngine(max_rows=rows))
    return sum(len(candidate.ids) for [candidate] in found)


def ancestor(
    model: torch.nn.Module, prompts: list[torch.Tensor], new_tokens: int, rows: int
) -> int:
    """`sample` of self-rewarding-lm-pytorch, which counts prompt and response together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from self_rewarding_lm_pytorch.sampling_utils import sample, top_p

    total = max(map(len, prompts)) + new_tokens
    made = 0
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        sample(
            model,
            part,
            seq_len=total,
            temperature=0.7,
            filter_fn=top_p,
            filter_kwargs={"thres": 0.9},
        )
        made += sum(total - len(prompt) for prompt in part)
    return made


def rate(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    return run() / (time.perf_counter() - started)


def compare(name: str, mine: Callable[[], int], peer: Callable[[], int], runs: int) -> dict:
    mine(), peer()
    pairs = [(rate(mine), rate(peer)) for _ in range(runs)]
    result = {
        "name": name,
        "ours": statistics.median(a for a, _ in pairs),
        "peer": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "unit": "tokens/s",
    }
    print(
        f"{name:14} ours {result['ours']:9.1f}   peer {result['peer']:9.1f} tokens/s   "
        f"ratio {result['ratio']:.1f} (of {runs}: {', '.join(f'{a / b:.1f}' for a, b in pairs)})",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="smaller, one run: for a look")
    arguments = parser.parse_args()
    prompts_count, new_tokens, runs = (8, 32, 1) if arguments.quick else (8, 128, 5)
    dim, depth = (128, 2) if arguments.quick else (256, 4)
    torch.set_num_threads(os.cpu_count() or 1)

    model = build_model(dim, depth, 512)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, 256, (int(length),), generator=generator)
        for length in torch.randint(16, 65, (prompts_count,), generator=generator)
    ]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"x-transformers, {parameters / 1e6:.1f} M parameters, fp32, {torch.get_num_threads()} CPU "
        f"threads; {prompts_count} prompts of 16-64 tokens, {new_tokens} new tokens, "
        f"{prompts_count} rows at once, temperature 0.7, top-p 0.9; load {os.getloadavg()[0]:.1f}"
    )

    def peer() -> int:
        return ancestor(model, prompts, new_tokens, prompts_count)

    results = [
        compare("ancestor", lambda: ours(model, prompts, new_tokens, prompts_count), peer, runs),
        compare(
            "plain_module",
            lambda: ours(Plain(model), prompts, new_tokens, prompts_count),
            peer,
            runs,
        ),
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results}, indent=2))


if __name__ == "__main__":
    main()
