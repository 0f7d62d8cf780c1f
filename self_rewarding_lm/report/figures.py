"""The numbers of a run: of each stage its state, costs, curves, scores, lengths and warnings.

Reads a run's records one by one and keeps numbers. Knows nothing of pages. What is not known is
None or absent.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from self_rewarding_lm.records import Candidate, Judgement, PreferencePair
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.scores import candidate_scores, exact, label_of

BINS = 20
"""Bars of a histogram if there are more different scores than that."""


POINTS = 300
"""Points of a curve; longer ones are drawn as means of steps one after the other."""


GIVEN = "the given model"
"""What the first stage starts from, in words."""


PHASES = {"begin": "data", "training": "training", "trained": "data"}
"""What a stage does after an event, until the next one of these and of ENDS."""


ENDS = ("done", "stopped")
"""After which a stage does nothing."""


TRAINED = ("eval/", "early_stopping/")
"""Beginnings of numbers that are curves, though the first is known before training."""


@dataclass(frozen=True)
class Histogram:
    """counts[i] scores lie in edges[i] to edges[i + 1], or are values[i] if these are given."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    values: tuple[float, ...] = ()


@dataclass
class StageFigures:
    """A stage in numbers.

    start: the stage whose weights it starts from, in words. seconds: by phase ("data": sampling,
    judging, pairing, reference; "training"), of attempts whose end is known. lost: attempts whose
    end is not. stopped: the words of the error that ended the last attempt. histograms: of scores
    by the name of an ensemble's member or an earlier model, whose scales may differ; "" is the
    stage's own judge. prompt_scores: of each prompt with two scores by that judge the worst, mean
    and best one, by mean. margins: of best against worst of these prompts; of a stage without such
    scores, as those of an ensemble, of its pairs, and has_pair_margins is True. rounds: the numbers
    of the data of each round, if the stage has several.
    """

    name: str
    kind: str
    state: str
    start: str
    settings: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    began: float | None = None
    lost: int = 0
    stopped: str | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    data: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    prompt_scores: list[tuple[float, float, float]] = field(default_factory=list)
    margins: Histogram | None = None
    has_pair_margins: bool = False

    @property
    def scores(self) -> Histogram | None:
        """Of the scores that the stage's own judge gave."""
        return self.histograms.get("")

    @property
    def dropped(self) -> dict[str, float]:
        """How much was left out, by reason: those of pairs, candidates, prompts, rows."""
        return {k: v for k, v in self.data.items() if "dropped_" in k or k == "rows/skipped"}


@dataclass(frozen=True)
class RunFigures:
    """A run in numbers. label: how it is called among several."""

    label: str
    info: dict[str, Any]
    stages: list[StageFigures]

    @property
    def seconds(self) -> float | None:
        """Of all stages together, as far as it is known."""
        known = [seconds for stage in self.stages for seconds in stage.seconds.values()]
        return math.fsum(known) if known else None

    @property
    def totals(self) -> dict[str, int]:
        """Counts and tokens of all stages together."""
        totals: dict[str, int] = {}
        for stage in self.stages:
            for key, count in (stage.tokens | stage.counts).items():
                totals[key] = totals.get(key, 0) + count
        return totals


def run_figures(run: Run, label: str) -> RunFigures:
    """All figures of a run, which may still be going on."""
    return RunFigures(label, run.info, [stage_figures(run, name) for name in run.stages])


def stage_figures(run: Run, name: str, *, records: bool = True) -> StageFigures:
    """A stage's figures; records are read one by one, or not at all."""
    config = run.settings(name)
    state = "done" if run.is_done(name) else "not done" if config else "not begun"
    settings = config.get("settings") or {}
    start = _start(run, name, str(settings.get("init_from", "previous")))
    figures = StageFigures(name, str(config.get("stage", "unknown")), state, start, config)
    _add_metrics(figures, run.metrics(name))
    _add_events(figures, run.events(name))
    if records:
        _add_records(figures, run)
    return figures


def _start(run: Run, name: str, init_from: str) -> str:
    place = run.stages.index(name)
    if init_from == "initial" or (init_from == "previous" and place == 0):
        return GIVEN
    return run.stages[place - 1] if init_from == "previous" else init_from


def _add_metrics(figures: StageFigures, lines: Sequence[dict[str, Any]]) -> None:
    """Metrics that have steps become curves; the others, and all of anchors, single numbers."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        step = line.get("step", 0)
        for key, value in line.items():
            if key in ("step", "round") or not is_metric(value):
                continue
            by_name.setdefault(key, []).append((step, value))
    for key, points in by_name.items():
        if any(step > 0 for step, _ in points) and not key.startswith("anchor/"):
            figures.curves[key] = points
        else:
            figures.data[key] = points[-1][1]
    figures.rounds = _rounds(lines)
    if "num_tokens" in figures.curves:
        figures.tokens["trained"] = int(sum(value for _, value in figures.curves["num_tokens"]))
    steps = [step for step, _ in figures.curves.get("loss", [])]
    if steps:
        figures.counts["steps"] = int(max(steps))


def _rounds(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Numbers by round of those names that the first round logged before its training."""
    numbers: dict[int, dict[str, float]] = {}
    for line in lines:
        place = line.get("round")
        if isinstance(place, int):
            known = {k: v for k, v in line.items() if k not in ("step", "round") and is_metric(v)}
            numbers.setdefault(place, {}).update(known)
    before = {key for line in lines if line.get("step") == 0 for key in line}
    rounds = [
        {k: v for k, v in of_round.items() if k in before and not k.startswith(TRAINED)}
        for _, of_round in sorted(numbers.items())
    ]
    return rounds if len(rounds) > 1 else []


def _add_events(figures: StageFigures, events: Sequence[dict[str, Any]]) -> None:
    """Times between events that are known, and the last warning of each check."""
    last_warnings: dict[str, dict[str, Any]] = {}
    marks = []
    for event in events:
        if event.get("event") == "warning":
            last_warnings[str(event.get("check"))] = event
        elif event.get("event") in (*PHASES, *ENDS) and is_metric(event.get("time")):
            marks.append((str(event.get("event")), float(event["time"])))
    figures.warnings = list(last_warnings.values())
    if marks:
        figures.began = marks[0][1]
    for (before, start), (after, end) in pairwise(marks):
        if after == "begin":
            figures.lost += before != "stopped"
        elif before in PHASES:
            phase = PHASES[before]
            figures.seconds[phase] = figures.seconds.get(phase, 0.0) + max(0.0, end - start)
    stops = [event for event in events if event.get("event") == "stopped"]
    if stops and events[-1] is stops[-1] and figures.state != "done":
        figures.stopped = str(stops[-1].get("words", ""))


def _add_records(figures: StageFigures, run: Run) -> None:
    name, counts, tokens = figures.name, figures.counts, figures.tokens
    prompts, rows = run.prompts(name), run.rows(name)
    if len(prompts):
        counts["prompts"], tokens["prompts"] = len(prompts), sum(len(p.ids) for p in prompts)
    candidates, samples = run.stage(name).stored(Candidate), run.stage(name).samples
    prompt_ids: dict[str, None] = {}
    for candidate in candidates:
        prompt_ids[candidate.prompt_id] = None
        if samples:
            tokens["sampled"] = tokens.get("sampled", 0) + len(candidate.ids)
    if len(candidates):
        counts["candidates"] = len(candidates)
    _add_judgements(figures, run, prompt_ids)
    pairs = run.pairs(name)
    if len(pairs):
        counts["pairs"] = len(pairs)
        lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
        if figures.margins is None:
            by_id = Groups(candidates)
            figures.margins = _pair_margins(
                p for p in pairs if p.chosen_id and p.chosen_id in by_id
            )
            figures.has_pair_margins = figures.margins is not None
        for side, of_side in zip(("chosen", "rejected"), zip(*lengths, strict=True), strict=True):
            figures.data[f"pairs/{side}_length"] = sum(of_side) / len(of_side)
    if graded := len(run.advantages(name)):
        counts["responses"] = graded
    if len(rows):
        counts["rows"] = len(rows)
    num_demonstrations = len(run.demonstrations(name))
    if num_demonstrations:
        counts["demonstrations"] = num_demonstrations


def _add_judgements(figures: StageFigures, run: Run, prompt_ids: Iterable[str]) -> None:
    """Scores by judge; those of the stage's own by prompt too, read one prompt after the other."""
    judgements = run.stage(figures.name).stored(Judgement)
    scores, characters, count = defaultdict[str, array](lambda: array("d")), 0, 0
    for judgement in judgements:
        count += 1
        characters += len(judgement.text or "")
        if judgement.score is not None and math.isfinite(judgement.score):
            is_own = label_of(judgement) is None
            scores["" if is_own else judgement.judge].append(judgement.score)
    if not count:
        return
    figures.counts["judgements"] = count
    figures.tokens["judge_characters"] = characters
    for judge in sorted(scores):
        if (bars := histogram(scores[judge])) is not None:
            figures.histograms[judge] = bars
    candidates_of = Groups(run.stage(figures.name).stored(Candidate), lambda c: c.prompt_id)
    judgements_of = Groups(judgements, lambda j: j.candidate_ids[0])
    for prompt_id in prompt_ids:
        group = candidates_of[prompt_id]
        own = [j for c in group for j in judgements_of[c.id] if label_of(j) is None]
        of_prompt = candidate_scores(group, own).values()
        known = [score for score in of_prompt if score is not None and math.isfinite(score)]
        if len(known) > 1:
            mean = math.fsum(known) / len(known)
            figures.prompt_scores.append((min(known), mean, max(known)))
    figures.prompt_scores.sort(key=lambda scores: (scores[1], scores[0]))
    figures.margins = histogram([_apart(best, low) for low, _, best in figures.prompt_scores])


def _pair_margins(pairs: Iterable[PreferencePair]) -> Histogram | None:
    sides = ((pair.chosen_score, pair.rejected_score) for pair in pairs)
    known = [(c, r) for c, r in sides if c is not None and r is not None]
    return histogram([_apart(c, r) for c, r in known if math.isfinite(c) and math.isfinite(r)])


def _apart(high: float, low: float) -> float:
    """By how much, exactly: 0.7 and 0.4 are as far apart as 0.4 and 0.1."""
    return float(exact(high) - exact(low))


def histogram(scores: Sequence[float]) -> Histogram | None:
    """Scores counted by value if these are few, else in BINS bars of one width."""
    if not len(scores):
        return None
    numbers = np.asarray(scores, dtype=np.float64)
    values, counts = np.unique(numbers, return_counts=True)
    if len(values) <= BINS:
        return Histogram(tuple(counts.tolist()), (), tuple(values.tolist()))
    counts, edges = np.histogram(numbers, bins=BINS)
    return Histogram(tuple(counts.tolist()), tuple(edges.tolist()))


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """A curve of at most POINTS points, and of how many steps each is the mean.

    Points that are no finite numbers are left out.
    """
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    width = math.ceil(len(known) / POINTS) or 1
    groups = [known[i : i + width] for i in range(0, len(known), width)]
    return [(g[-1][0], math.fsum(y for _, y in g) / len(g)) for g in groups], width


def is_metric(value: Any) -> bool:
    """Whether a value of metrics.jsonl is a number; a loss that became NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
