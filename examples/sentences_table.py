"""Prints what `sentences.py --json` wrote as Markdown: the figures of each run, and answers.

    python examples/sentences_table.py docs/results/sentences_*.json

First a line a run; then the runs on own scores, a line a model; then what M1, M2 and M3 of the
first of these runs wrote to the same held-out requests, and how they reviewed the same answer.
"""

import argparse
import json
from pathlib import Path
from statistics import median

WORDS = {"none": "own scores", "shuffled": "shuffled", "sft": "more SFT", "oracle": "the checker's"}


def line(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    """A table's first two lines."""
    return [line(*cells), line(*("---" for _ in cells))]


def accuracy(model: dict) -> str:
    """A model's share of held-out requests, with its interval."""
    low, high = model["interval"]
    return f"{model['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def gain(result: dict) -> float:
    """Points of the last model over M1."""
    return result["models"][-1]["accuracy"] - result["models"][1]["accuracy"]


def by_control(results: list[dict]) -> list[tuple[str, list[dict]]]:
    """The runs of each control, by seed, with its name in words."""
    found = []
    for control in (name for name in WORDS if any(r["control"] == name for r in results)):
        some = sorted((r for r in results if r["control"] == control), key=lambda r: r["seed"])
        found.append((WORDS[control], some))
    return found


def middle(some: list[dict]) -> list[str]:
    """The medians of some runs: of each model after M0, and of the gain after M1."""
    columns = zip(*([m["accuracy"] for m in r["models"][1:]] for r in some), strict=True)
    return [*(f"{median(column):.1f}" for column in columns), f"{median(map(gain, some)):+.1f}"]


def runs(results: list[dict]) -> list[str]:
    """A line a run: held-out accuracy of each model after M0, and the gain after M1."""
    names = [model["name"] for model in results[0]["models"][1:]]
    lines = head("scores", "seed", *names, f"{names[-1]} - {names[0]}")
    for words, some in by_control(results):
        lines += [
            line(words, r["seed"], *map(accuracy, r["models"][1:]), f"{gain(r):+.1f}") for r in some
        ]
        if len(some) > 1:
            lines.append(line(f"**{words}**", "median", *(f"**{m}**" for m in middle(some))))
    return lines


def medians(results: list[dict]) -> list[str]:
    """A line a control: medians over its seeds, and each seed's gain."""
    names = [model["name"] for model in results[0]["models"][1:]]
    lines = head("scores", *names, f"{names[-1]} - {names[0]}", "each seed's")
    for words, some in by_control(results):
        lines.append(line(words, *middle(some), ", ".join(f"{gain(r):+.1f}" for r in some)))
    return lines


def models(results: list[dict]) -> list[str]:
    """A line a model: what the checker and M0 say of its answers, its pairs and its reviews."""
    lines = head("seed", "model", "all demands", "each demand", "pairs: right, tied, wrong",
                 "reviews exact", "words", "distinct words", "log-loss under M0")  # fmt: skip
    for result in results:
        for model in result["models"]:
            pairs = ", ".join(map(str, model["right_tied_wrong"])) if model["pairs"] else ""
            demands = " / ".join(f"{share:.0f}" for share in model["demands"])
            figures = (f"{model['judge_exact']:.1f}", f"{model['words']:.1f}",
                       model["distinct_words"], f"{model['log_loss']:.2f}")  # fmt: skip
            shown = f"{model['accuracy']:.1f}"
            lines.append(line(result["seed"], model["name"], shown, demands, pairs, *figures))
    return lines


def texts(result: dict, key: str) -> list[str]:
    """The same questions to each model of a run (`answers` or `reviews`), side by side."""
    asked = [row[:-1] for row in result["models"][0][key]]
    lines = []
    for place, question in enumerate(asked):
        lines += ["```text", *question]
        lines += [f"{m['name']}: {m[key][place][-1].strip()}" for m in result["models"]]
        lines += ["```", ""]
    return lines[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of sentences.py")
    told = parser.parse_args()
    results = [json.loads(path.read_text()) for path in told.results]
    own = sorted((r for r in results if r["control"] == "none"), key=lambda r: r["seed"])
    parts = [runs(results), models(own)]
    parts += [texts(own[0], key) for key in ("answers", "reviews") if own]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
