"""How often each reading of a review comes to the checker's points, on a run's own answers.

    python examples/sentences.py --seed 1 --out runs/sentences-1
    python examples/sentences_readings.py runs/sentences-1 --json docs/results/readings_1.json

A review marks each demand and ends in a sum. `counted` are its marks, as the run scored them,
`stated` is the sum that it wrote.
"""

import argparse
import importlib
import json
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

from self_rewarding_lm import Run


def readings(run: Run, stage: str, task_name: str) -> dict:
    """Shares of a stage's reviews, in percent, and how often each sum was stated."""
    task = importlib.import_module(f"{task_name}_task")
    prompts = {prompt.id: prompt.text for prompt in run.prompts(stage)}
    candidates = {candidate.id: candidate for candidate in run.candidates(stage)}
    counted, stated, sums = [], [], Counter()
    for judgement in run.judgements(stage):
        candidate = candidates[judgement.candidate_ids[0]]
        points = task.points(prompts[candidate.prompt_id], candidate.text)
        found = re.findall(r"Score: (\d+)\b", judgement.text or "")
        total = found[-1] if found else None
        counted.append(judgement.score == points)
        stated.append(total == str(points))
        sums[total or "none"] += 1
    shares = {"counted": 100 * fmean(counted), "stated": 100 * fmean(stated)}
    return {"stage": stage, "reviews": len(counted), **shares, "sums": dict(sorted(sums.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run of sentences.py")
    parser.add_argument("--task", choices=("sentences", "json"), default="sentences")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    told = parser.parse_args()
    run = Run.open(told.run)
    found = [readings(run, stage, told.task) for stage in run.stages if run.judgements(stage)]
    for row in found:
        print(
            f"{row['stage']}: {row['reviews']} reviews; exact {row['counted']:.1f} % by their "
            f"marks, {row['stated']:.1f} % by the sum they state; sums stated: {row['sums']}"
        )
    if told.json:
        told.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
