"""Runs of both sides in turn, and what they come to: the entries of the results."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from timing import CLOCK_SECONDS, MOST_OTHERS
from training_models import Model
from training_request import DPO, OURS, SETTINGS, SFT, Request
from training_rows import Pair

WORKER = Path(__file__).with_name("training_worker.py")
SAME_LOSS = 1e-2  # how far the first losses of supervised training may be apart, relatively
SAME_LOG2 = 1e-3  # how far the first losses of DPO may be from log 2
NEAR = 0.05  # of the best: a setting of TRL that is so near to it stays in the running
FORWARD, BOTH = 1, 3  # forwards that a forward costs, and one with its backward


@dataclass(frozen=True)
class Run:
    """One run of a side, as its process reported it."""

    side: str
    kind: str
    pairs: int
    seconds: dict[str, float]
    cpu: dict[str, float]
    tokens: dict[str, int]
    others: float
    base: int
    left: int
    peak: int
    above: int
    peak_by: str
    warm_loss: float
    first_loss: float
    settings: dict

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def disturbed(self) -> bool:
        return self.others > MOST_OTHERS * self.total + CLOCK_SECONDS

    @property
    def checked_loss(self) -> float:
        """The loss by which sides are compared: of the first step, or of the first batch, which
        has the same rows on both sides."""
        return self.first_loss if self.kind == DPO else self.warm_loss

    @property
    def forwards(self) -> float:
        """Tokens that went through, each as often as its phase costs forwards."""
        training = self.tokens["training"]
        asked = self.tokens.get("reference")
        if asked is None and self.side in SETTINGS and SETTINGS[self.side].live:
            asked = training = training / 2  # one half of them through the second model
        return FORWARD * (asked or 0) + BOTH * training


@dataclass(frozen=True)
class Metric:
    """A figure. value: of a run; None where the run has none. bar: of ours to TRL's."""

    name: str
    kind: str
    unit: str
    bar: float
    better: str
    value: Callable[[Run], float | None]

    def near_best(self, runs: dict[str, Run]) -> set[str]:
        """Of TRL's settings, the one with the best value and those that are NEAR it."""
        found = {name: self.value(run) for name, run in runs.items() if name != OURS}
        known = {name: value for name, value in found.items() if value is not None}
        if not known:
            return set()
        least, most = min(known.values()), max(known.values())
        if self.better == "higher":
            return {name for name, value in known.items() if value >= most * (1 - NEAR)}
        return {name for name, value in known.items() if value <= least + NEAR * abs(least)}


def _reference_rate(run: Run) -> float | None:
    return run.pairs / run.seconds["reference"] if "reference" in run.seconds else None


METRICS = (
    Metric("dpo_rows", DPO, "pairs/s", 1.3, "higher", lambda run: run.pairs / run.total),
    Metric("dpo_memory", DPO, "bytes", 0.7, "lower", lambda run: run.above),
    Metric("reference_rows", DPO, "pairs/s", 1.3, "higher", _reference_rate),
    Metric("sft_rows", SFT, "rows/s", 1.1, "higher", lambda run: run.pairs / run.total),
)


@dataclass
class Trial:
    """Runs of one kind of training on one model. rounds: of each, the runs by side.

    request: of ours. settings: of TRL that are tried in the first round.
    """

    model: Model
    request: Request
    pairs: list[Pair]
    settings: Sequence[str]
    metrics: Sequence[Metric]
    rounds: list[dict[str, Run]] = field(default_factory=list)

    def run(self, folder: Path, runs: int, repeats: int, told: Callable[[Run], None]) -> None:
        """All sides in turn, `runs` times; from the second on TRL's settings near the best."""
        chosen = list(self.settings)
        for _ in range(runs):
            found: dict[str, Run] = {}
            for side in (OURS, *chosen):
                found[side] = self._undisturbed(side, folder, repeats)
                told(found[side])
            self.rounds.append(found)
            best = set().union(*(metric.near_best(self.rounds[0]) for metric in self.metrics))
            chosen = [name for name in self.settings if name in best]

    def _undisturbed(self, side: str, folder: Path, repeats: int) -> Run:
        """The first run that others did not disturb, else the least disturbed."""
        tried = []
        for _ in range(1 + repeats):
            tried.append(run_once(replace(self.request, side=side), folder))
            if not tried[-1].disturbed:
                break
        return min(tried, key=lambda run: (run.disturbed, run.others / run.total))

    def entry(self, metric: Metric, rate: float) -> dict | None:
        """A figure's entry; None where no setting of TRL has it. rate: of products, in flop/s."""
        peer = self._peer(metric)
        if peer is None:
            return None
        sides = {"ours": OURS, "peer": peer}
        values = [
            {name: _known(metric, found[side]) for name, side in sides.items()}
            for found in self.rounds
        ]
        entry = {
            "name": metric.name + ("_checkpointed" if self.request.checkpointing else ""),
            "ours": statistics.median(value["ours"] for value in values),
            "peer": statistics.median(value["peer"] for value in values),
            "ratio": statistics.median(value["ours"] / value["peer"] for value in values),
            "unit": metric.unit,
            "bar": metric.bar,
            "better": metric.better,
            "sides": sides,
            "tried": {
                name: value
                for name, run in self.rounds[0].items()
                if (value := metric.value(run)) is not None
            },
            "model": {"name": self.model.name, "parameters": self.model.parameters},
            "pairs": self.request.pairs,
            "disturbed": sum(
                any(found[side].disturbed for side in sides.values()) for found in self.rounds
            ),
            "work": {side: self._work(metric, name, rate) for side, name in sides.items()},
            "checks": [self._check(found[OURS], found[peer]) for found in self.rounds],
            "runs": [
                {
                    "ratio": value["ours"] / value["peer"],
                    **{name: _record(found[side], value[name]) for name, side in sides.items()},
                }
                for found, value in zip(self.rounds, values, strict=True)
            ],
        }
        entry["name"] += self.model.suffix
        return entry

    def _peer(self, metric: Metric) -> str | None:
        """TRL's setting with the best median, of those that were in all rounds."""
        medians = {
            name: statistics.median(_known(metric, found[name]) for found in self.rounds)
            for name in metric.near_best(self.rounds[0])
        }
        pick = max if metric.better == "higher" else min
        return pick(medians, key=medians.__getitem__) if medians else None

    def _work(self, metric: Metric, side: str, rate: float) -> dict:
        """What was useful, what went through the model, and the shares of the product rate."""
        runs = [found[side] for found in self.rounds]
        asked_only = metric.name == "reference_rows"
        phases = ("reference",) if asked_only else tuple(runs[0].seconds)
        seconds = statistics.median(sum(run.seconds[p] for p in phases) for run in runs)
        passed = runs[0].tokens["reference"] if asked_only else sum(runs[0].tokens.values())
        forwards = passed if asked_only else runs[0].forwards
        useful, flops = self._useful(asked_only)
        return {
            "seconds": seconds,
            "useful_tokens": useful,
            "passed_tokens": passed,
            "padding": max(0.0, 1 - useful / passed),
            "shared": max(0.0, 1 - passed / useful),
            "flops": flops,
            "matrix_share": flops / (seconds * rate),
            "linear_share": 2 * self.model.flops.linear * forwards / (seconds * rate),
        }

    def _useful(self, asked_only: bool) -> tuple[int, float]:
        """Tokens without padding, of all forwards that are needed, and their operations."""
        flops, pairs = self.model.flops, self.pairs
        if self.request.kind == SFT:
            tokens = sum(len(pair.prompt) + len(pair.chosen) for pair in pairs)
            return tokens, BOTH * flops.supervised(pairs)
        tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        one = flops.pairs(pairs)
        return (tokens, one) if asked_only else (2 * tokens, (FORWARD + BOTH) * one)

    def _check(self, ours: Run, peer: Run) -> dict:
        """Whether both sides' first losses are those of the same work."""
        losses = {"ours": ours.checked_loss, "peer": peer.checked_loss}
        if self.request.kind == DPO:
            same = all(abs(loss - math.log(2)) < SAME_LOG2 for loss in losses.values())
            return {"first_losses": losses, "expected": math.log(2), "same_work": same}
        same = abs(losses["ours"] / losses["peer"] - 1) < SAME_LOSS
        return {"first_losses": losses, "same_work": same}


def run_once(request: Request, folder: Path) -> Run:
    """A run in a process of its own; SystemExit with its last words where it fails."""
    asked, answered = folder / "request.json", folder / "result.json"
    request.write(asked)
    answered.unlink(missing_ok=True)
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "SELF_REWARDING_LM_QUIET": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OMP_NUM_THREADS": str(request.threads),
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), str(asked), str(answered)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    if done.returncode or not answered.exists():
        words = (done.stdout + done.stderr)[-3000:]
        raise SystemExit(f"the run of {request.side} ended with {done.returncode}:\n{words}")
    return Run(**json.loads(answered.read_text(encoding="utf-8")))


def _known(metric: Metric, run: Run) -> float:
    value = metric.value(run)
    assert value is not None
    return value


def _record(run: Run, value: float) -> dict:
    return {
        "value": value,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu,
        "tokens": run.tokens,
        "others_cores": run.others / run.total,
        "disturbed": run.disturbed,
        "memory": {
            name: getattr(run, name) for name in ("base", "left", "peak", "above", "peak_by")
        },
        "losses": {"warm_up": run.warm_loss, "first": run.first_loss},
        "settings": run.settings,
    }
