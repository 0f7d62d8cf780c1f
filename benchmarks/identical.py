"""Share of sampled candidates that do not change with the batch, for several precisions.

    python benchmarks/identical.py [--json FILE]

A random x-transformers model; the same prompts are sampled with `max_rows` 64, then 1 and 3, and in
shuffled order. What differs is the rounding of the logits alone.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import LocalEngine
from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import stable_hash

NEW_TOKENS = 64


def build_model(vocab: int, flash: bool) -> TransformerWrapper:
    layers = Decoder(
        dim=64, depth=4, heads=4, attn_dim_head=32, rotary_pos_emb=True, attn_flash=flash
    )
    model = TransformerWrapper(num_tokens=vocab, max_seq_len=128, attn_layers=layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are nearly without effect
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sample(model: TransformerWrapper, requests: list[Request], rows: int) -> dict[int, tuple]:
    decoding = Decoding(temperature=0.7, top_p=0.9)
    engine = LocalEngine(max_rows=rows)
    found = engine.generate(adapt(model), requests, decoding)
    return {requests[index].key: completion.ids for index, completion in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for vocab in (256, 64):
        draw = random.Random(0)
        requests = [
            Request(
                tuple(draw.randrange(vocab) for _ in range(draw.randrange(4, 40))),
                stable_hash(0, f"prompt/{i}"),
                NEW_TOKENS,
            )
            for i in range(64)
        ]
        shuffled = draw.sample(requests, len(requests))
        for name, flash, dtype in (
            ("float64, flash", True, torch.float64),
            ("fp32", False, torch.float32),
            ("fp32, flash", True, torch.float32),
            ("bf16", False, torch.bfloat16),
        ):
            model = build_model(vocab, flash).to(dtype)
            base = sample(model, requests, 64)
            others = (sample(model, requests, 1), sample(model, requests, 3))
            shares = [
                100 * sum(other[key] == ids for key, ids in base.items()) / len(base)
                for other in (*others, sample(model, shuffled, 64))
            ]
            print(
                f"vocabulary {vocab:4} {name:15} identical with max_rows 1, 3, and shuffled: "
                + ", ".join(f"{share:.1f} %" for share in shares),
                flush=True,
            )
            for setting, share in zip(("rows_1", "rows_3", "shuffled"), shares, strict=True):
                entry = {"name": f"{name} vocab {vocab} {setting}", "ours": share, "peer": 100.0}
                results.append(
                    {**entry, "ratio": share / 100, "unit": "% identical to max_rows 64"}
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results}, indent=2))


if __name__ == "__main__":
    main()
