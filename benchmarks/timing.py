"""Sides of a comparison, run in turn and timed, with what other processes took meanwhile."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from floors import Floors, Least
from machine import OthersClock

MOST_OTHERS = 0.10  # cores that others may take in a run
CLOCK_SECONDS = 0.05  # what the machine's CPU clock may be wrong by


@dataclass(frozen=True)
class Work:
    """What a side did. lengths: useful new tokens of each row; items: candidates or judgements."""

    lengths: Sequence[int]
    items: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def amount(self, unit: str) -> int:
        return self.tokens if unit == "tokens/s" else self.items


@dataclass(frozen=True)
class Timed:
    """One run of a side. others: cores that other processes had during it, on average."""

    work: Work
    seconds: float
    others: float
    disturbed: bool

    def rate(self, unit: str) -> float:
        return self.work.amount(unit) / self.seconds

    def record(self, unit: str) -> dict:
        return {
            "rate": self.rate(unit),
            "seconds": self.seconds,
            "tokens": self.work.tokens,
            "others_cores": self.others,
            "disturbed": self.disturbed,
        }


@dataclass(frozen=True)
class Side:
    """run(rows, seed): the whole workload, at most so many rows at once. warm: a little of it.
    slower: how many times longer than ours it is thought to take, for the estimate alone."""

    run: Callable[[int, int], Work]
    warm: Callable[[], object]
    slower: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """Two sides of a trial, by name. bar: the ratio that is aimed at."""

    name: str
    ours: str
    peer: str
    unit: str = "tokens/s"
    bar: float | None = None


@dataclass
class Trial:
    """Sides that do the same work. least(lengths): for each of our sides, of what it must do.

    sequences: rows of the work. extra: a further measurement as an entry, or None.
    """

    name: str
    dtype: str
    sides: dict[str, Side]
    comparisons: tuple[Comparison, ...]
    least: dict[str, Callable[[Sequence[int]], Least]]
    expected_lengths: Sequence[int]
    sequences: int
    settings: dict
    extra: Callable[[], dict | None] | None = None
    taken: dict[str, list[Timed]] = field(default_factory=dict)

    def guess(self, floors: Floors, runs: int) -> float:
        """Seconds of one trial, roughly: as if ours reached 35 % of the floor."""
        floor = self.least["ours"](self.expected_lengths).seconds(floors, self.dtype)
        return runs * floor / 0.35 * sum(side.slower for side in self.sides.values())


def run_timed(side: Side, rows: int, seed: int, repeats: int) -> tuple[Timed, list[Timed]]:
    """The first run that was not disturbed, else the least disturbed; and all attempts.

    repeats: of a run that was disturbed, at most.
    """
    attempts: list[Timed] = []
    for _ in range(1 + repeats):
        clock, started = OthersClock(), time.perf_counter()
        work = side.run(rows, seed)
        seconds = time.perf_counter() - started
        others = clock.seconds()
        disturbed = others > MOST_OTHERS * seconds + CLOCK_SECONDS
        attempts.append(Timed(work, seconds, others / seconds, disturbed))
        if not disturbed:
            break
    return min(attempts, key=lambda one: (one.disturbed, one.others)), attempts


def run_in_turn(
    trial: Trial,
    *,
    runs: int,
    rows: int,
    repeats: int,
    told: Callable[[int, dict[str, Timed], float], None],
) -> dict[str, list[list[Timed]]]:
    """All sides `runs` times, one after the other each time; all attempts of each run.

    `trial.taken` has what counts. told(run, its runs, seconds that are left) after each.
    """
    for side in trial.sides.values():
        side.warm()
    trial.taken = {name: [] for name in trial.sides}
    attempts: dict[str, list[list[Timed]]] = {name: [] for name in trial.sides}
    started = time.perf_counter()
    for run in range(runs):
        for name, side in trial.sides.items():
            kept, tried = run_timed(side, rows, run, repeats)
            trial.taken[name].append(kept)
            attempts[name].append(tried)
        each = (time.perf_counter() - started) / (run + 1)
        told(run, {name: own[-1] for name, own in trial.taken.items()}, each * (runs - 1 - run))
    return attempts


def compared(
    comparison: Comparison,
    taken: dict[str, list[Timed]],
    attempts: dict[str, list[list[Timed]]],
) -> dict:
    """The entry of a comparison: medians, the median of the runs' ratios, and each run."""
    unit = comparison.unit
    ours, peer = taken[comparison.ours], taken[comparison.peer]
    sides = {"ours": comparison.ours, "peer": comparison.peer}
    pairs = list(zip(ours, peer, strict=True))
    return {
        "name": comparison.name,
        "ours": statistics.median(one.rate(unit) for one in ours),
        "peer": statistics.median(one.rate(unit) for one in peer),
        "ratio": statistics.median(a.rate(unit) / b.rate(unit) for a, b in pairs),
        "unit": unit,
        "bar": comparison.bar,
        "sides": sides,
        "disturbed": sum(a.disturbed or b.disturbed for a, b in pairs),
        "runs": [
            {
                "ratio": a.rate(unit) / b.rate(unit),
                "ours": a.record(unit),
                "peer": b.record(unit),
                "attempts": {
                    side: [one.record(unit) for one in attempts[name][run]]
                    for side, name in sides.items()
                },
            }
            for run, (a, b) in enumerate(pairs)
        ],
    }


def best_compared(
    comparison: Comparison,
    base: dict[str, list[Timed]],
    others: dict[str, dict[int, Timed]],
    rows: int,
) -> dict:
    """The entry of each side's best number of rows. base: the runs at `rows`, of which the median
    counts; others: one run at each other number."""
    unit = comparison.unit
    rates, best = {}, {}
    sides = {"ours": comparison.ours, "peer": comparison.peer}
    for side, name in sides.items():
        own = {rows: statistics.median(one.rate(unit) for one in base[name])}
        own |= {number: one.rate(unit) for number, one in others[name].items()}
        rates[side], best[side] = own, max(own, key=own.__getitem__)
    ours, peer = (rates[side][best[side]] for side in sides)
    return {
        "name": f"{comparison.name}_best",
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "unit": unit,
        "bar": None,
        "sides": sides,
        "best": best,
        "rates_by_rows": rates,
        "disturbed": sum(one.disturbed for name in sides.values() for one in others[name].values()),
    }
