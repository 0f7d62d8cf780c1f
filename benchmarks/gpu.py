"""What a CUDA device makes of the library: whether its fast paths are right, and how fast it is.

    pip install -c constraints.txt ".[hf]" trl
    python benchmarks/gpu.py [--part paths,decoding,training] [--tiny] [--json FILE]

`paths`: decoding, log-probs of packed rows, gradients and expected scores of small random models
(Llama, with LoRA, Mistral with a sliding window, x-transformers) in float32 and bfloat16, against
the model's own forward in float64 on the CPU. One that is further away than rounding takes the
model's own forward on the device is an error at the end. `decoding`: tokens a second of a random
Llama of 1.24 B parameters in bfloat16 at 1, 16 and 128 rows, and of transformers' generate, as a
share of the memory's bandwidth. `training`: DPO of the same model with its reference pass against
TRL's: pairs a second, the share of the product rate that useful tokens reached (MFU), and the most
memory. `compiled` (not by default): decoding once more, beside transformers' generate over a static
cache, whose step it compiles on a GPU: what a compiled step would bring.

The parts are run in this order as long as --seconds (480) last; what is left out is said. --tiny
runs all of it at small sizes on any device, the CPU included, in a minute or two: its rates mean
nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_paths import check_paths, make_models
from gpu_speed import decode, floors_of, random_llama, train
from machine import describe_machine

PARTS = ("paths", "decoding", "training", "compiled")
BY_DEFAULT = PARTS[:3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (1, 16, 128)
TINY_ROWS = (1, 3)
GROWING: dict = {}  # transformers' own default, a cache that grows
STATIC = {"cache_implementation": "static"}
LEAST_SECONDS = 20.0  # that must be left for a part to begin


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", default=",".join(BY_DEFAULT), help=f"of {', '.join(PARTS)}")
    add("--tiny", action="store_true", help="small sizes, on any device")
    add("--device", help="default: cuda if there is one, with --tiny else the CPU")
    add("--seconds", type=float, default=480.0, help="for everything; default 480")
    add("--new-tokens", type=int, help="of a row in decoding; default 128")
    add("--json", type=Path, help="results, written after each entry")
    arguments = parser.parse_args()
    arguments.part = arguments.part.split(",")
    if unknown := {*arguments.part} - {*PARTS}:
        raise SystemExit(f"--part: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    has_cuda = torch.cuda.is_available()
    if arguments.device is None:
        if not has_cuda and not arguments.tiny:
            raise SystemExit("there is no CUDA device; --tiny runs the same on the CPU")
        arguments.device = "cuda" if has_cuda else "cpu"
    arguments.new_tokens = arguments.new_tokens or (6 if arguments.tiny else 128)
    return arguments


class Run:
    """The entries so far, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tiny, self.file = arguments.tiny, arguments.json
        self.new_tokens = arguments.new_tokens
        self.device = torch.device(arguments.device)
        self.ends = time.monotonic() + arguments.seconds
        self.entries: list[dict] = []
        self.facts = describe_machine()
        if self.device.type == "cuda":
            self.facts["device"] = torch.cuda.get_device_name(self.device)
        self.floors = floors_of(self.device, DTYPES, tiny=self.tiny)
        self.facts["bandwidth"], self.facts["matrix"] = self.floors.bandwidth, self.floors.matrix

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, entry: dict) -> None:
        self.entries.append(entry)
        numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in entry.items()}
        print("  " + ", ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
        if self.file is not None:
            content = {"machine": self.facts, "tiny": self.tiny, "entries": self.entries}
            self.file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def paths(run: Run) -> Iterator[dict]:
    for dtype in DTYPES.values():
        for name, make in make_models().items():
            yield from check_paths(name, make, run.device, dtype)


def decoding(run: Run, *, compiled: bool = False) -> Iterator[dict]:
    module = random_llama(run.device, torch.bfloat16, tiny=run.tiny)
    peer = STATIC if compiled else GROWING
    for rows in TINY_ROWS if run.tiny else ROWS:
        yield decode(
            module,
            rows,
            run.floors,
            run.device,
            prompt=8 if run.tiny else 128,
            new=run.new_tokens,
            peer=peer,
        )


def training(run: Run) -> Iterator[dict]:
    pairs = 4 if run.tiny else 64
    limit = max(LEAST_SECONDS, run.left / 3)
    yield from train(run.floors, run.device, tiny=run.tiny, pairs=pairs, limit=limit)


WORK: dict[str, Callable[[Run], Iterator[dict]]] = {
    "paths": paths,
    "decoding": decoding,
    "training": training,
    "compiled": partial(decoding, compiled=True),
}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = read_arguments()
    run = Run(arguments)
    print(json.dumps(run.facts))
    for part in (part for part in PARTS if part in arguments.part):
        if run.left < LEAST_SECONDS:
            print(f"{part}: left out, {run.left:.0f} s are left")
            continue
        print(f"{part}:", flush=True)
        for entry in WORK[part](run):
            run.add(entry)
            if run.left < 0:
                print(f"{part}: the rest is left out, the time is over")
                break
    wrong = [entry["name"] for entry in run.entries if entry.get("holds") is False]
    if wrong:
        raise SystemExit("further from float64 than rounding explains: " + "; ".join(wrong))
    print("done")


if __name__ == "__main__":
    main()
