"""Many rows through a stage in bounded memory and linear time, the model and the engine faked.

    pip install -c constraints.txt ".[bench]"
    python benchmarks/data_scale.py [--sizes 10000 40000 160000] [--full] [--json FILE]

`prompts`: prompt rows of a .jsonl file pass through a whole ExternalRewardDPOConfig stage: read,
sampled (two candidates each), judged, paired (every fifth prompt gives a pair, the others tie),
reference log-probs of all pairs, and STEPS steps of training. `pairs`: preference rows of a .jsonl
file pass through a whole DPOConfig stage. --full adds 1,000,000 prompts, of which 200,000 pairs
come, and 200,000 pairs. Everything but the following is the library as it is used: trainer, files,
records, merging, reference, training.

Faked: the model is a table of VOCAB x VOCAB logits, so that a forward costs next to nothing; the
engine answers each request at once with WORDS ids that are a function of its noise key, in another
order than it was asked; the reward is a function of the text. Prompts have 20 to 40 characters,
which are tokens.

`again` is the CPU seconds of a second call of the finished run, with a trainer made anew, which
finds that all is done.

Each size runs in a process of its own. It says seconds and microseconds a row, the peak of the
resident memory above what the process held when the model was made (the library and PyTorch are in
that; what they load or allocate later is not), and the disk that the records take. The bar is
LIMIT_GB for every size. Time is linear where microseconds a row do not grow; those of the processor
do not depend on who else computes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch
from machine import describe_machine
from torch import Tensor, nn

from self_rewarding_lm import DPOConfig, ExternalRewardDPOConfig, OptimConfig, SelfRewardingTrainer
from self_rewarding_lm.generation.engine import Completion, Decoding, Request

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "
VOCAB = len(LETTERS) + 1
END = VOCAB - 1
WORDS = 24
CANDIDATES = 2
PAIR_EVERY = 5
STEPS = 8
SIZES = (10_000, 40_000, 160_000)
FULL = {"prompts": 1_000_000, "pairs": 200_000}
LIMIT_GB = 1.0


class Table(nn.Module):
    """ids (b, n) -> logits (b, n, VOCAB), a row of a table for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Canned:
    """An engine that answers at once, in an order of its own, as engines do."""

    def generate(
        self, model: object, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        for place, request in sorted(enumerate(requests), key=lambda one: one[1].key):
            drawn = request.key.to_bytes(32, "big", signed=request.key < 0)[-WORDS:]
            ids = tuple(byte % (VOCAB - 1) for byte in drawn.rjust(WORDS, b"\x07"))
            yield place, Completion((*ids, END), True)

    def chances(self, *_: object) -> Iterator[tuple]:
        raise AssertionError("no score is computed here")

    def serving(self, save: object, tokens: object) -> AbstractContextManager[None]:
        return nullcontext()


def encode(text: str) -> Tensor:
    return torch.tensor([LETTERS.index(c) for c in text])


def decode(ids: Tensor) -> str:
    return "".join(LETTERS[i] for i in ids.tolist() if i != END)


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Scores that differ for every fifth prompt, which begins with "0"."""
    return [
        float(sum(map(ord, text))) if prompt.startswith("0") else 1.0
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def texts(count: int) -> Iterator[str]:
    generator = random.Random(0)
    for row in range(count):
        rest = generator.choices(LETTERS[:-1], k=generator.randint(19, 39))
        yield f"{row % PAIR_EVERY}{''.join(rest)}"


def write_prompts(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in texts(count))


def write_pairs(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts(count):
            row = {"prompt": text, "chosen": text[::-1], "rejected": text[1:]}
            file.write(json.dumps(row) + "\n")


def prompt_stage(path: Path, optim: OptimConfig) -> ExternalRewardDPOConfig:
    return ExternalRewardDPOConfig(
        prompt_dataset=path,
        reward_model=reward,
        num_candidate_responses=CANDIDATES,
        num_train_steps=STEPS,
        optim=optim,
    )


def pair_stage(path: Path, optim: OptimConfig) -> DPOConfig:
    return DPOConfig(train_dataset=path, num_train_steps=STEPS, optim=optim)


KINDS: dict[str, tuple[Callable, Callable]] = {
    "prompts": (write_prompts, prompt_stage),
    "pairs": (write_pairs, pair_stage),
}


def measure(kind: str, count: int) -> dict:
    """One size, in this process."""
    write, stage_of = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write(path, count)
        torch.manual_seed(0)
        model = Table()
        before = psutil.Process().memory_info().rss
        stages = [stage_of(path, OptimConfig(batch_size=16))]

        def trainer_of(model: nn.Module) -> SelfRewardingTrainer:
            return SelfRewardingTrainer(
                model,
                finetune_configs=stages,
                tokenizer_encode=encode,
                tokenizer_decode=decode,
                eos_id=END,
                checkpoints_folder=Path(folder) / "run",
                accelerate_kwargs={"cpu": True},
                engine=Canned(),
                quiet=True,
            )

        started, used = time.perf_counter(), time.process_time()
        trainer = trainer_of(model)
        opened = time.perf_counter() - started
        run = trainer()
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = time.process_time()
        trainer_of(Table())()
        again = time.process_time() - used
        disk = sum(file.stat().st_size for file in run.stage(0).path.glob("*.jsonl"))
        return {
            "name": f"{kind}_{count}",
            "rows": count,
            "pairs": run.summary(0)["pairs"],
            "steps": run.summary(0)["steps"],
            "seconds": seconds,
            "opened_seconds": opened,
            "again_cpu_seconds": again,
            "cpu_microseconds_a_row": 1e6 * cpu / count,
            "microseconds_a_row": 1e6 * seconds / count,
            "model_mb": before / 1e6,
            "memory_mb": max(0, peak - before) / 1e6,
            "disk_mb": disk / 1e6,
        }


def told(entry: dict) -> str:
    verdict = "" if entry["memory_mb"] <= 1e3 * LIMIT_GB else f"   OVER {LIMIT_GB:g} GB"
    return (
        f"{entry['name']:16} {entry['pairs']:9,} pairs {entry['seconds']:9.1f} s "
        f"{entry['microseconds_a_row']:7.0f} us a row, {entry['cpu_microseconds_a_row']:.0f} of "
        f"the CPU, again {entry['again_cpu_seconds']:.1f} s   "
        f"{entry['memory_mb']:6.0f} MB above the {entry['model_mb']:.0f} MB of the model"
        f"   {entry['disk_mb']:7.0f} MB on disk{verdict}"
    )


def in_a_process(kind: str, count: int) -> dict:
    words = [sys.executable, __file__, "--one", kind, str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--full", action="store_true", help="1,000,000 prompts and 200,000 pairs")
    parser.add_argument("--json", type=Path, help="write the entries to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    entries = []
    for kind in options.kinds:
        for count in (*options.sizes, *([FULL[kind]] if options.full else [])):
            entries.append(in_a_process(kind, count))
            print(told(entries[-1]), flush=True)
    if options.json:
        content = {"machine": describe_machine(), "limit_gb": LIMIT_GB, "results": entries}
        options.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
