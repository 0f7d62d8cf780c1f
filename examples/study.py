"""What each method gains on the quickstart's task: a table of settings over several seeds.

M1 is trained once a seed and shared; every setting goes on from it. Each run writes one JSON file;
a run that has one is not done again, and one that was stopped goes on where it was. The report is
written from those files alone:

    python examples/study.py                      # all runs, then docs/study.md
    python examples/study.py --only plain cream   # some settings
    python examples/study.py --report             # docs/study.md from what is there
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import quickstart
import quickstart_task as task
import torch
from study_report import report
from study_settings import SETTINGS, Lab, Setting, rewards

from self_rewarding_lm import JudgeError, PairingError, Run, SelfRewardingTrainer

PROMPTS = 500  # of a round
SFT_STEPS = 700
M1 = "M1"


def trainer_of(
    stages: list, folder: Path, *, seed: int, model: torch.nn.Module
) -> SelfRewardingTrainer:
    return SelfRewardingTrainer(
        model,
        finetune_configs=stages,
        tokenizer=task.Characters(),
        self_reward_prompt_config=rewards(),
        seed=seed,
        checkpoints_folder=folder,
        engine=quickstart.ENGINE,
        quiet=True,
    )


def first_model(folder: Path, seed: int, sft_steps: int) -> dict:
    """Train M1, with its weights at half of the way beside; what is measured of it."""
    torch.manual_seed(seed)
    model, data = quickstart.build_model(), data_of(seed)
    [m1, *_] = quickstart.build_stages(data, "none", sft_steps)
    optim = m1.optim.model_copy(update={"checkpoint_every": sft_steps // 2})
    trainer_of([m1.model_copy(update={"optim": optim})], folder, seed=seed, model=model)()
    return measure(model, data)


def setting_run(setting: Setting, folder: Path, m1: Path, seed: int, sft_steps: int) -> list[dict]:
    """What is measured behind each stage of a setting."""
    torch.manual_seed(seed)
    model, data = quickstart.build_model(), data_of(seed)
    started = Run.open(m1)
    started.load_weights(model, M1)
    halfway = started.stage(M1).path / f"checkpoint-{sft_steps // 2}"
    stages = setting.stages(Lab(seed, data, halfway))
    run = trainer_of(stages, folder, seed=seed, model=model)()
    found = []
    for stage in run.stages:
        run.load_weights(model, stage)
        found.append({"stage": stage, **measure(model, data), **measure_pairs(run, stage)})
    return found


def data_of(seed: int) -> task.TaskData:
    return task.make_data(seed, prompts_per_round=PROMPTS)


def measure(model: torch.nn.Module, data: task.TaskData) -> dict:
    """On held-out prompts, greedily: what the loop never sees."""
    greedy = quickstart.greedy
    prompts, items = data.held_out_prompts, data.held_out_judge_items
    words = greedy(model, prompts, quickstart.BEST_ANSWER)
    scores = [task.points(*pair) for pair in zip(prompts, words, strict=True)]
    reviews = greedy(model, [task.judge_prompt(*item) for item in items], quickstart.REVIEW)
    exact = [r.endswith(f"Score: {task.points(*i)}") for r, i in zip(reviews, items, strict=True)]
    return {
        "accuracy": 100 * sum(score == 5 for score in scores) / len(scores),
        "mean_score": sum(scores) / len(scores),
        "length": sum(map(len, words)) / len(words),
        "judge_exact": 100 * sum(exact) / len(exact),
    }


def measure_pairs(run: Run, stage: str) -> dict:
    """How many pairs there were, and the share in which the checker agrees (ties: half)."""
    truth = []
    for pair in run.pairs(stage):
        if pair.prompt is None or not pair.prompt.startswith("len "):
            continue  # of a judge
        chosen, rejected = (task.points(pair.prompt, t or "") for t in (pair.chosen, pair.rejected))
        truth.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    share = 100 * sum(truth) / len(truth) if truth else None
    return {"pairs": len(truth), "pairs_right": share}


def one_job(name: str, seed: int, out: Path, sft_steps: int) -> None:
    """One run, its JSON written at its end."""
    started, m1 = time.time(), out / "runs" / f"{M1}-{seed}"
    result = {"setting": name, "seed": seed, "sft_steps": sft_steps, "prompts": PROMPTS}
    if name == M1:
        result["stages"] = [first_model(m1, seed, sft_steps)]
    else:
        [setting] = [s for s in SETTINGS if s.name == name]
        folder = out / "runs" / f"{name}-{seed}"
        try:
            result["stages"] = setting_run(setting, folder, m1, seed, sft_steps)
        except (
            JudgeError,
            PairingError,
        ) as error:  # a method may find no pair at all: that is a result
            result |= {"stages": [], "error": f"{type(error).__name__}: {error}"}
    result["seconds"] = time.time() - started
    draft = out / f"{name}-{seed}.json.tmp"
    draft.write_text(json.dumps(result, indent=2))
    draft.replace(out / f"{name}-{seed}.json")


def run_all(names: list[str], seeds: list[int], out: Path, jobs: int, sft_steps: int) -> None:
    """All runs that have no JSON yet, `jobs` processes at a time; M1 of all seeds first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        words = [__file__, "--job", name, str(seed), "--out", out, "--sft-steps", sft_steps]
        subprocess.run([sys.executable, *map(str, words)], env=environment, check=True)
        found = json.loads((out / f"{name}-{seed}.json").read_text())
        last = found["stages"][-1]["accuracy"] if found["stages"] else None
        told = found.get("error", "").splitlines()[:1] if last is None else f"{last:.1f} %"
        print(f"{name:16} seed {seed}: {told}, {found['seconds']:.0f} s", flush=True)

    for group in ([M1], names):
        jobs_left = [(n, s) for s in seeds for n in group if not (out / f"{n}-{s}.json").exists()]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, jobs_left))


def main() -> None:
    known = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="SETTING")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("study"), help="runs and JSON files")
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--job", nargs=2, metavar=("SETTING", "SEED"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    if told.job:
        one_job(told.job[0], int(told.job[1]), told.out, told.sft_steps)
        return
    if not told.report:
        run_all(told.only, told.seeds, told.out, told.jobs, told.sft_steps)
    results = [json.loads(path.read_text()) for path in sorted(told.out.glob("*.json"))]
    told.page.write_text(report(results, {setting.name: setting.words for setting in SETTINGS}))
    print(f"written: {told.page}")


if __name__ == "__main__":
    main()
