"""How often are gradients sent in a step of several processes, and how long does a step take?

`python benchmarks/reductions.py` starts two processes of gloo on this machine. Each works through 8
micro-batches a step, all of one size, of a random model in float32.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.records import TrainingRow
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import SupervisedObjective

PROCESSES, MICRO_BATCHES, STEPS, TOKENS, VOCAB = 2, 8, 6, 64, 1000
MESSAGE = 1000
"""Fewer numbers than this in one message are metrics, not gradients."""


class Sent(TorchDispatchMode):
    """Counts the numbers of gradients that are sent to be summed, by whatever sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "c10d" and "reduce" in str(function):
            largest = max(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))
            self.numbers += largest if largest >= MESSAGE else 0
        return function(*args, **(kwargs or {}))


def context() -> Context:
    torch.manual_seed(0)
    layers = Decoder(dim=384, depth=8, heads=6, attn_flash=True, rotary_pos_emb=True)
    module = TransformerWrapper(num_tokens=VOCAB, max_seq_len=TOKENS, attn_layers=layers)
    model, runtime = adapt(module), Runtime({"cpu": True}, quiet=True)
    return Context(
        stage="sft",
        seed=0,
        model=model,
        policy=runtime.prepare(Policy(model)),
        engine=LocalEngine(),
        tokens=Tokens(None, eos_id=None, vocab=VOCAB),
        runtime=runtime,
        rewards={},
        adapt=adapt,
    )


def train(ctx: Context, folder: Path, steps: int) -> float:
    """Seconds of a step."""
    out = StageDir(folder, ctx.runtime)
    out.begin({})
    size = PROCESSES * MICRO_BATCHES
    ids = torch.randint(VOCAB, (steps * size, TOKENS)).tolist()
    rows = [TrainingRow(f"sft/{i}", tuple(row), (True,) * TOKENS) for i, row in enumerate(ids)]
    optim = OptimConfig(
        learning_rate=1e-5,
        final_learning_rate=1e-5,
        schedule="constant",
        epochs=1,
        batch_size=size,
        micro_batch_size=1,
    )
    ctx.runtime.barrier()
    start = time.perf_counter()
    Fit(ctx, out, SupervisedObjective(rows), optim).run()
    return (time.perf_counter() - start) / steps


def work(folder: Path) -> None:
    ctx = context()
    train(ctx, folder / "warm", 1)
    with Sent() as sent:
        train(ctx, folder / "counted", 1)
    seconds = [train(ctx, folder / str(i), STEPS) for i in range(3)]
    if ctx.runtime.is_main:
        size = sum(p.numel() for p in ctx.model.module.parameters())
        print(f"{ctx.runtime.world} processes, {size / 1e6:.1f} M weights, {MICRO_BATCHES} each:")
        print(f"  each gradient was sent {sent.numbers / size:.2f} times a step")
        print(f"  a step took {min(seconds):.2f} s, the best of {len(seconds)} times {STEPS} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    folder = parser.parse_args().folder
    if folder is not None:
        work(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launch, __file__, "--folder", place]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
