"""The study's page, written from the results alone: means, intervals and a plain reading.

An interval is Student's t over seeds at 95 %. A difference is taken seed by seed against the page's
base after the same round, so that what is a seed's own falls out of it. No torch here.
"""

import math
from statistics import mean, stdev
from typing import Any

from study_pages import Page

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, two-sided 95 %, by degrees of freedom."""

FEW_PAIRS = 30
"""Of a seed; a setting with fewer hardly trained."""

SHARED = ("prompts", "sft_steps", "held_out", "model")
"""What all results share, where they say it; the page's words may name it."""


def report(page: Page, results: list[dict], words: dict[str, str]) -> str:
    """The page of all results (the JSON files' contents). words: of each setting, in order."""
    first = _by_seed(results, "M1", page.place)
    base = _by_seed(results, page.base, page.place)
    rows, readings = [], []
    for name, told in words.items():
        runs = [r for r in results if r["setting"] == name]
        if runs:
            rows.append(_row(page, name, told, runs, base))
            readings.append(_reading(page, name, runs, base, first))
    seconds = sum(r["seconds"] for r in results if r["setting"] in ("M1", *words))
    filled: dict[str, Any] = {key: _only(results, key) for key in SHARED}
    filled |= {"settings": len(rows), "seeds": len(first)}
    filled["m1"] = _with_interval([s["accuracy"] for s in first.values()], " %")
    if page.by_seed:
        filled["m1"] += f" ({_of_seeds(first)})"
    titles = ["setting", "what it is", "accuracy", *(["each seed"] if page.by_seed else [])]
    titles += [f"against {page.base}"]
    others = [*(title for title, _, _ in page.columns), "s"]
    if page.by_seed:
        tables = [_table(titles, [row[: len(titles)] for row in rows])]
        tables += [_table(["setting", *others], [[row[0], *row[len(titles) :]] for row in rows])]
    else:
        tables = [_table([*titles, *others], rows)]
    text = page.head.format(**filled) + "".join(tables) + page.tail.format(**filled)
    text += f"\nThe times of all runs add up to {seconds / 60:.0f} minutes.\n"
    text += "\n## Read plainly\n\n" + "\n".join(r for r in readings if r) + "\n"
    return text + _later_rounds(results, words) + page.limits


def _by_seed(results: list[dict], name: str, place: int) -> dict[int, dict]:
    """What was measured after a round of a setting, by seed, where the run came so far."""
    least = place + 1 if place >= 0 else -place
    runs = [r for r in results if r["setting"] == name and len(r["stages"]) >= least]
    return {r["seed"]: r["stages"][place] for r in sorted(runs, key=lambda r: r["seed"])}


def _only(results: list[dict], key: str) -> str:
    """A setting that all results share; all of them where they do not."""
    return " or ".join(str(value) for value in sorted({r[key] for r in results if key in r}))


def _of_seeds(stages: dict[int, dict]) -> str:
    return ", ".join(format(s["accuracy"], ".1f") for s in stages.values())


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


def _table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown between two empty lines."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _row(page: Page, name: str, told: str, runs: list[dict], base: dict[int, dict]) -> list[str]:
    """The cells of a setting, from its name to its seconds."""
    stages = _by_seed(runs, name, page.place)
    gained = _differences(stages, base)
    cells = [
        f"`{name}`",
        told,
        _with_interval([s["accuracy"] for s in stages.values()]),
        *([_of_seeds(stages)] if page.by_seed else []),
        "" if name == page.base else _with_interval(gained, sign="+"),
        *(_mean(stages, key, form) for _, key, form in page.columns),
        f"{mean(r['seconds'] for r in runs):.0f}",
    ]
    failed = [r["seed"] for r in runs if not r["stages"]]
    if failed:
        cells[1] += f" (no result with seed {', '.join(map(str, failed))})"
    return cells


def _differences(stages: dict[int, dict], others: dict[int, dict]) -> list[float]:
    both = stages.keys() & others.keys()
    return [stages[s]["accuracy"] - others[s]["accuracy"] for s in sorted(both)]


def _reading(
    page: Page, name: str, runs: list[dict], base: dict[int, dict], first: dict[int, dict]
) -> str:
    """One line that says what the numbers say, and no more."""
    stages = _by_seed(runs, name, page.place)
    errors = [r["error"].splitlines()[0] for r in runs if "error" in r]
    if not stages:
        return f"- `{name}`: no run came to a result. {errors[0] if errors else ''}"
    over_first = _differences(stages, first)
    line = f"- `{name}`: {mean(over_first):+.1f} points on M1 ({_signs(over_first)})"
    if name != page.base:
        gained = _differences(stages, base)
        if gained:
            line += f"; {mean(gained):+.1f} against {page.base}, {_verdict(gained)}"
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
    """The settings with more than one round."""
    rounds = max((len(r["stages"]) for r in results if r["setting"] in words), default=0)
    lines = []
    for name in words:
        after = [_by_seed(results, name, stage) for stage in range(rounds)]
        if rounds > 1 and after[1]:
            last = [found for found in after if found][-1]
            cells = [_with_interval([s["accuracy"] for s in found.values()]) for found in after]
            gained = _with_interval(_differences(last, after[0]), sign="+")
            lines.append(f"| `{name}` | {' | '.join(cells)} | {gained} |")
    if not lines:
        return ""
    titles = ["setting", *(f"round {number}" for number in range(1, rounds + 1)), "gained"]
    name = "Second rounds" if rounds == 2 else "Later rounds"
    head = f"\n## {name}\n\n| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|\n"
    return head + "\n".join(lines) + "\n"
