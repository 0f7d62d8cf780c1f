"""Draws what `sentences.py --json` wrote: held-out accuracy after each stage, a line a control.

    python examples/sentences_picture.py docs/results/sentences_*.json --out docs/real_model.png

A line goes through the medians of its seeds, between the lowest and the highest. `--own` draws one
more run by itself, beside those results that are of its task.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

WORDS = {
    "none": ("its own scores", "#0b6e4f", "o"),
    "oracle": ("the checker's scores", "#7a5195", "D"),
    "shuffled": ("its own scores, shuffled", "#b23a48", "s"),
    "sft": ("as many more SFT steps", "#5c677d", "^"),
}
"""Of each control: its label, colour and mark."""


def draw(results: list[dict], out: Path, own: dict | None = None) -> None:
    """One PNG of all results, which must be of one task; `own` is a run of the reader's."""
    tasks = {result["task"] for result in (*results, *filter(None, [own]))}
    if len(tasks) != 1:
        raise SystemExit(f"one picture shows one task; these are of {', '.join(sorted(tasks))}")
    by_control: dict[str, list[list[dict]]] = defaultdict(list)
    for result in results:
        by_control[result["control"]].append(result["models"][1:])  # without M0
    figure = Figure(figsize=(6.4, 3.8), dpi=160, layout="constrained")
    axes = figure.subplots()
    for control in (name for name in WORDS if name in by_control):
        label, colour, mark = WORDS[control]
        runs = [[model["accuracy"] for model in models] for models in by_control[control]]
        stages = [model["name"] for model in by_control[control][0]]
        columns = list(zip(*runs, strict=True))
        axes.plot(stages, [median(c) for c in columns], color=colour, marker=mark, label=label)
        axes.fill_between(stages, *zip(*((min(c), max(c)) for c in columns), strict=True),
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    if own:
        stages, values = zip(*((m["name"], m["accuracy"]) for m in own["models"][1:]), strict=True)
        how = ", policy gradients" if own.get("method") == "grpo" else ""
        label = f"{own['model']}, seed {own['seed']}, {WORDS[own['control']][0]}{how}"
        axes.plot(stages, values, color="black", linestyle="--", marker="x", label=label)
    seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
    axes.set_title("Held-out requests met in all demands" + (f"; seeds {seeds}" if seeds else ""))
    axes.set_ylabel("% of held-out requests")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of sentences.py")
    parser.add_argument("--own", type=Path, help="the JSON file of one more run, drawn by itself")
    parser.add_argument("--out", type=Path, required=True, help="the PNG file")
    told = parser.parse_args()
    own = json.loads(told.own.read_text()) if told.own else None
    results = [json.loads(path.read_text()) for path in told.results]
    draw([r for r in results if own is None or r["task"] == own["task"]], told.out, own)
    print(f"written: {told.out}")


if __name__ == "__main__":
    main()
