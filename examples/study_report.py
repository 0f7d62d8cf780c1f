"""The study's page, written from the results alone: means, intervals and a plain reading.

An interval is Student's t over seeds at 95 %. A difference is taken seed by seed against `plain`
behind its first round, so that what is a seed's own falls out of it. No torch here.
"""

import math
from statistics import mean, stdev

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, two-sided 95 %, by degrees of freedom."""

FEW_PAIRS = 30
"""Of a seed; a setting with fewer hardly trained."""

HEAD = """# A study of methods at toy size

`python examples/study.py` repeats it: {settings} settings on the quickstart's task
([quickstart.md](quickstart.md)), {seeds} seeds, {prompts} prompts a round. M1 is trained once a
seed ({steps} steps) and shared. Accuracy is the share of {held_out:,} held-out prompts that the
greedy answer solves; the loop never sees the checker. This page is written by
`examples/study_report.py` from the result files; nothing in it is written by hand.

M1: {m1}.

| setting | what it is | accuracy | against plain | length | judge exact | pairs | pairs right | s |
|---|---|---|---|---|---|---|---|---|
"""

TAIL = """
Accuracy and what stands beside it: mean of the seeds behind the first round; ± is half of the 95
% interval (Student's t), which is wide with {seeds} seeds. "Against plain" is the mean of the
differences seed by seed, with its interval. "Pairs right": the share of pairs in which the
checker rates the chosen answer above the rejected one (ties count half). Seconds are of a whole
run with its measurements, beside others on the machine. Of so many comparisons at 95 % one in
twenty is expected to look like more than chance where there is nothing.
"""

LIMITS = """
## What this does not show

One task, a model of half a million weights, constraints that a program can check, and one set of
sizes and learning rates that was chosen for the plain loop. A method that needs what this task
lacks (a language, long answers, a judge that drifts) cannot gain here. The order of the rows is
no ranking of methods for large models.
"""


def report(results: list[dict], words: dict[str, str]) -> str:
    """The page of all results (the JSON files' contents). words: of each setting, in order."""
    first = _by_seed(results, "M1", 0)
    plain = _by_seed(results, "plain", 0)
    rows, readings, seconds = [], [], 0.0
    for name, told in words.items():
        runs = [r for r in results if r["setting"] == name]
        if not runs:
            continue
        seconds += sum(r["seconds"] for r in runs)
        rows.append(_row(name, told, runs, plain))
        readings.append(_reading(name, runs, plain, first))
    seconds += sum(r["seconds"] for r in results if r["setting"] == "M1")
    seeds = len(first)
    page = HEAD.format(
        settings=len(rows),
        seeds=seeds,
        prompts=_only(results, "prompts"),
        steps=_only(results, "sft_steps"),
        held_out=1000,
        m1=_with_interval([s["accuracy"] for s in first.values()], " %"),
    )
    page += "\n".join(rows) + "\n" + TAIL.format(seeds=seeds)
    page += f"\nAll runs together took {seconds / 60:.0f} minutes of one core.\n"
    page += "\n## Read plainly\n\n" + "\n".join(r for r in readings if r) + "\n"
    return page + _later_rounds(results, words) + LIMITS


def _by_seed(results: list[dict], name: str, stage: int) -> dict[int, dict]:
    """What was measured behind a stage of a setting, by seed, where the run came so far."""
    runs = [r for r in results if r["setting"] == name and len(r["stages"]) > stage]
    return {r["seed"]: r["stages"][stage] for r in sorted(runs, key=lambda r: r["seed"])}


def _only(results: list[dict], key: str) -> str:
    """A setting that all results share; all of them where they do not."""
    return " or ".join(str(value) for value in sorted({r[key] for r in results}))


def interval(values: list[float]) -> float | None:
    """Half of the 95 % interval of the mean; None where it is not known."""
    if len(values) < 2 or len(values) - 1 not in T95:
        return None
    return T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def _with_interval(values: list[float], unit: str = "", sign: str = "") -> str:
    if not values:
        return "-"
    half = interval(values)
    return f"{mean(values):{sign}.1f}{unit}" + ("" if half is None else f" ± {half:.1f}")


def _mean(stages: dict[int, dict], key: str, form: str) -> str:
    values = [s[key] for s in stages.values() if s.get(key) is not None]
    return format(mean(values), form) if values else "-"


def _row(name: str, told: str, runs: list[dict], plain: dict[int, dict]) -> str:
    stages = _by_seed(runs, name, 0)
    gained = _differences(stages, plain)
    cells = [
        f"`{name}`",
        told,
        _with_interval([s["accuracy"] for s in stages.values()]),
        "" if name == "plain" else _with_interval(gained, sign="+"),
        _mean(stages, "length", ".2f"),
        _mean(stages, "judge_exact", ".1f"),
        _mean(stages, "pairs", ".0f"),
        _mean(stages, "pairs_right", ".1f"),
        f"{mean(r['seconds'] for r in runs):.0f}",
    ]
    failed = [r["seed"] for r in runs if not r["stages"]]
    if failed:
        cells[1] += f" (no result with seed {', '.join(map(str, failed))})"
    return f"| {' | '.join(cells)} |"


def _differences(stages: dict[int, dict], others: dict[int, dict]) -> list[float]:
    both = stages.keys() & others.keys()
    return [stages[s]["accuracy"] - others[s]["accuracy"] for s in sorted(both)]


def _reading(name: str, runs: list[dict], plain: dict[int, dict], first: dict[int, dict]) -> str:
    """One line that says what the numbers say, and no more."""
    stages = _by_seed(runs, name, 0)
    errors = [r["error"].splitlines()[0] for r in runs if "error" in r]
    if not stages:
        return f"- `{name}`: no run came to a result. {errors[0] if errors else ''}"
    over_first = _differences(stages, first)
    line = f"- `{name}`: {mean(over_first):+.1f} points on M1 ({_signs(over_first)})"
    if name != "plain":
        gained = _differences(stages, plain)
        if gained:
            line += f"; {mean(gained):+.1f} against plain, {_verdict(gained)}"
    pairs = [s["pairs"] for s in stages.values() if s.get("pairs")]
    if pairs and mean(pairs) < FEW_PAIRS:
        line += f", on {mean(pairs):.0f} pairs a seed"
    ended = f" {len(errors)} of {len(runs)} runs ended with {errors[0]}" if errors else ""
    return f"{line}.{ended}"


def _signs(values: list[float]) -> str:
    up = sum(value > 0 for value in values)
    return f"up with {up} of {len(values)} seeds"


def _verdict(gained: list[float]) -> str:
    half = interval(gained)
    if half is None:
        return "one seed: nothing follows"
    if abs(mean(gained)) > half:
        return "more than chance explains" if mean(gained) > 0 else "worse than chance explains"
    return "no difference that these seeds show"


def _later_rounds(results: list[dict], words: dict[str, str]) -> str:
    """The settings with a second round."""
    lines = []
    for name in words:
        after = [_by_seed(results, name, stage) for stage in (0, 1)]
        if name and after[1]:
            cells = [_with_interval([s["accuracy"] for s in found.values()]) for found in after]
            gained = _differences(after[1], after[0])
            lines.append(f"| `{name}` | {' | '.join(cells)} | {_with_interval(gained, sign='+')} |")
    if not lines:
        return ""
    head = "\n## Second rounds\n\n| setting | round 1 | round 2 | gained |\n|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n"
