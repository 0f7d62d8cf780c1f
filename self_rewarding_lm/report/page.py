"""A run, or several side by side, as one HTML file that opens without a network.

Gathers figures and examples of the runs and writes them through the template `report.html`, piece
by piece: here is what each section says, there how it looks. Knows nothing of how a figure is
computed (`figures.py`) or drawn (`charts.py`).
"""

import base64
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from self_rewarding_lm.checks import PAGE, ChecksConfig
from self_rewarding_lm.describe import settings_of
from self_rewarding_lm.errors import ConfigError, typed
from self_rewarding_lm.report.charts import (
    STYLES,
    Chart,
    Table,
    bar_chart,
    legend,
    line_chart,
)
from self_rewarding_lm.report.examples import Part, example_lines, in_script, parts_of
from self_rewarding_lm.report.figures import (
    GIVEN,
    Histogram,
    RunFigures,
    StageFigures,
    run_figures,
    thinned,
)
from self_rewarding_lm.report.markup import Safe, visible
from self_rewarding_lm.report.verdict import verdict
from self_rewarding_lm.report.words import (
    COUNTS,
    CURVES,
    ROUNDS,
    SHARES,
    UNCHARTED,
    in_order,
    words_of,
)
from self_rewarding_lm.runs.atomic import OTHER_PLACE, writing
from self_rewarding_lm.runs.run import REPORT, Run
from self_rewarding_lm.text import duration, number

logger = logging.getLogger(__name__)


SECTIONS = {
    "loop": "The loop as run",
    "warnings": "Warnings",
    "rounds": "Over the rounds",
    "stages": "Stages",
    "examples": "Examples",
    "settings": "Settings",
}


EXAMPLES = 2000
"""Prompts that a page holds at most."""


@typed
def write_report(
    runs: Sequence[str | Path | Run] | str | Path | Run,
    out: str | Path | None = None,
    *,
    examples: int = EXAMPLES,
) -> Path:
    """Write the page of one or several runs, which may still be going on; its path.

    out: default report.html in the folder of the first run. examples: prompts, with all that
    came of them, that the page holds at most; their numbers count all. Raises ConfigError without
    a run, StoreError if a folder holds none, a record's file was changed, or the page cannot be
    written.
    """
    runs = [runs] if isinstance(runs, str | Path | Run) else runs
    if not runs:
        raise ConfigError("write_report needs at least one run.")
    if examples < 0:
        raise ConfigError(f"examples is a number of prompts, 0 or more; got {examples}.")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    path = opened[0].folder / REPORT if out is None else Path(out)
    with (
        writing(path, advice=OTHER_PLACE) as draft,
        draft.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        file.writelines(_pieces(opened, examples))
    return path


def report_at_end(run: Run) -> None:
    """Write a run's report, unless nothing changed since it was written.

    Whatever fails is a warning, for the run itself is done.
    """
    if _is_up_to_date(run):
        return
    try:
        logger.info("report: %s", write_report([run]))
    except Exception as error:
        logger.warning(
            "the report of %s could not be written (%s: %s); the run is whole. Try again with "
            "`self-rewarding-lm report %s`.",
            run.folder,
            type(error).__name__,
            error,
            run.folder,
        )


def _is_up_to_date(run: Run) -> bool:
    """Whether the report is younger than all records and numbers of the run's stages."""
    path = run.folder / REPORT
    if not path.exists():
        return False
    written = path.stat().st_mtime_ns
    files = (f for name in run.stages for f in run.stage(name).path.glob("*.json*"))
    return all(file.stat().st_mtime_ns < written for file in files)


def _pieces(runs: Sequence[Run], at_most: int) -> Iterator[str]:
    """The page in pieces. The template calls a function when it comes to its section."""
    labels = _labels(runs)
    figures = [run_figures(run, label) for run, label in zip(runs, labels, strict=True)]
    verdicts = {label: " ".join(verdict(run)) for run, label in zip(runs, labels, strict=True)}
    parts = parts_of(runs, at_most)
    style, script = _file("report.css"), _file("report.js")
    return _template().generate(
        labels=labels,
        policy=_policy(style, script),
        style=Safe(style),
        script=Safe(script),
        sections=SECTIONS,
        runs=figures,
        about=_about,
        verdicts=verdicts,
        way=_way,
        loop_table=_loop_table,
        warnings=list(_warnings(figures)),
        checks_page=PAGE,
        legend=legend(labels),
        rounds=_rounds(figures),
        stage_names=_stage_names(figures),
        stage_charts=lambda place, name: _stage_charts(place, name, figures),
        num_examples=sum(len(part.examples) for part in parts),
        num_shown=sum(len(part.places) for part in parts),
        origins=_origins(figures),
        settings_tables=lambda name: _settings_tables(name, figures),
        labels_json=Safe(in_script(labels)),
        example_lines=_lines(parts),
    )


def _lines(parts: list[Part]) -> Iterator[Safe]:
    while parts:
        yield from map(Safe, example_lines(parts.pop(0)))  # its files are closed behind it


def _labels(runs: Sequence[Run]) -> list[str]:
    """What runs are called: their folders' names, or whole paths if these are the same."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return names


# -- the template ------------------------------------------------------------------------------


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, finalize=visible, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.from_string(_file("report.html"))


def _file(name: str) -> str:
    return files("self_rewarding_lm.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Only this style and this script run, and nothing is fetched."""
    allowed = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# -- the head, and the loop as run ---------------------------------------------------------------


def _about(run: RunFigures) -> str:
    done = sum(stage.state == "done" for stage in run.stages)
    begun, seed, kind, size, _ = _origin(run)
    return (
        f"{done} of {len(run.stages)} stages done; {kind}, {size} parameters; seed {seed}; begun "
        f"{begun}"
    )


def _origin(run: RunFigures) -> list[str]:
    """When it began, its seed, the model's class and parameters, versions."""
    model, versions = run.info.get("model") or {}, run.info.get("versions") or {}
    begun, seed = (str(run.info.get(key, "unknown")) for key in ("created", "seed"))
    kind = str(model.get("class", "unknown")).rpartition(".")[2]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [begun, seed, kind, _number_or_unknown(model.get("parameters")), named or "unknown"]


def _way(run: RunFigures) -> Iterator[str]:
    """The model and the stages, one after the other; if a stage starts elsewhere, from where."""
    yield GIVEN
    before = [GIVEN, *(stage.name for stage in run.stages)]
    for stage, previous in zip(run.stages, before, strict=False):
        yield stage.name if stage.start == previous else f"{stage.name}, from {stage.start}"


def _loop_table(run: RunFigures) -> Table:
    """A column for each stage."""
    counts = [key for key in COUNTS if any(key in stage.counts for stage in run.stages)]
    names = ["kind", "state", "starts from", *counts, "tokens sampled", "characters of judges"]
    names += ["tokens trained", "begun", "time for data", "time for training"]
    columns = [list(_column(stage, counts)) for stage in run.stages]
    rows = [[name, *cells] for name, *cells in zip(names, *columns, strict=True)] if columns else []
    return Table(run.label, ["stage", *(stage.name for stage in run.stages)], rows)


def _column(stage: StageFigures, counts: Sequence[str]) -> Iterator[str]:
    yield from (stage.kind, stage.state, stage.start)
    yield from (number(stage.counts.get(key), "none") for key in counts)
    for key in ("sampled", "judge_characters", "trained"):
        yield number(stage.tokens.get(key), "none")
    when = None if stage.began is None else time.localtime(stage.began)
    yield "unknown" if when is None else time.strftime("%Y-%m-%d %H:%M", when)
    lost = f" and {stage.lost} stopped attempts of unknown length" if stage.lost else ""
    yield duration(stage.seconds.get("data")) + lost
    trains = "steps" in stage.counts or "training" in stage.seconds
    yield duration(stage.seconds.get("training")) if trains else "none"


def _number_or_unknown(value: Any) -> str:
    return number(value if isinstance(value, int | float) else None)


# -- warnings --------------------------------------------------------------------------------------


def _warnings(runs: Sequence[RunFigures]) -> Iterator[dict[str, Any]]:
    """Errors that ended an attempt, and what checks warned of with what each check looks at."""
    meanings = {setting.name: setting.words for setting in settings_of(ChecksConfig)}
    for run, stage in _stages_of(runs):
        where = f"{run.label}, {stage.name}"
        if stage.stopped is not None:
            yield {"title": f"{where}: the last attempt was ended", "error": stage.stopped}
        for event in stage.warnings:
            check, seen, limit = (event.get(key) for key in ("check", "seen", "limit"))
            seen, limit = _number_or_unknown(seen), _number_or_unknown(limit)
            yield {
                "title": f"{where}: {check} is {seen}, its limit {limit}",
                "error": None,
                "words": event.get("words", ""),
                "meaning": meanings.get(str(check), ""),
            }


def _stages_of(runs: Iterable[RunFigures]) -> Iterator[tuple[RunFigures, StageFigures]]:
    return ((run, stage) for run in runs for stage in run.stages)


# -- over the rounds -------------------------------------------------------------------------------


def _rounds(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """Numbers of data stage after stage: judge, lengths, anchors, pairs; what was left out."""
    names = _stage_names(runs)
    keys = {key for _, stage in _stages_of(runs) for key in stage.data if key not in stage.dropped}
    ordered = in_order(keys, ROUNDS, "anchor/")
    dropped = sorted({key for _, stage in _stages_of(runs) for key in stage.dropped})
    charted = [key for key in ordered if not key.startswith(UNCHARTED)]
    charts = [_round_chart(i, key, names, runs) for i, key in enumerate(charted)]
    tables = [
        _numbers("Numbers of the data of each stage", ordered, runs),
        _numbers("What was left out, by reason", dropped, runs),
    ]
    return {
        "charts": [chart for chart in charts if chart is not None],
        "tables": tables if keys or dropped else [],
    }


def _stage_names(runs: Sequence[RunFigures]) -> list[str]:
    """Names of the stages of all runs, in their order."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def _round_chart(
    place: int, key: str, names: Sequence[str], runs: Sequence[RunFigures]
) -> Chart | None:
    """A number over the stages; None if no run has it in two of them."""
    lines: list[tuple[str, int, list[tuple[int, float]]]] = []
    for style, run in enumerate(runs):
        values = {names.index(s.name): s.data[key] for s in run.stages if key in s.data}
        lines.append((run.label, style, sorted(values.items())))
    if all(len(points) < 2 for _, _, points in lines):
        return None
    used = sorted({x for _, _, points in lines for x, _ in points})
    lines = [(n, style, [(used.index(x), y) for x, y in points]) for n, style, points in lines]
    return line_chart(
        f"round-{place}",
        words_of(key),
        lines,
        across="stage",
        names=[names[x] for x in used],
        share=key in SHARES,
    )


def _numbers(caption: str, keys: Sequence[str], runs: Sequence[RunFigures]) -> Table:
    """A column for each stage that has any of the numbers."""
    columns = [
        (r, stage) for r, stage in _stages_of(runs) if any(key in stage.data for key in keys)
    ]
    several = len(runs) > 1
    head = [f"{run.label}, {stage.name}" if several else stage.name for run, stage in columns]
    rows = [
        [words_of(key), *(number(s.data[key]) if key in s.data else None for _, s in columns)]
        for key in keys
    ]
    return Table(caption, ["number", *head], rows)


# -- stages ----------------------------------------------------------------------------------------


def _stage_charts(place: int, name: str, runs: Sequence[RunFigures]) -> dict[str, Any]:
    """A stage's curves, those that are always shown first, and the bars of its scores."""
    stages = [_stage_of(run, name) for run in runs]
    keys = {key for stage in stages if stage is not None for key in stage.curves}
    charts, more_charts, widths = list[Chart | None](), list[Chart | None](), [1]
    for i, key in enumerate(in_order(keys, CURVES, "\0")):
        lines = []
        for style, (run, stage) in enumerate(zip(runs, stages, strict=True)):
            points, width = thinned([] if stage is None else stage.curves.get(key, []))
            widths.append(width)
            lines.append((run.label, style % STYLES, points))
        chart = line_chart(
            f"curve-{place}-{i}", words_of(key), lines, across="step", share=key in SHARES
        )
        (charts if key in CURVES or key.startswith("eval/") else more_charts).append(chart)
    bars = []
    for run, stage in zip(runs, stages, strict=True):
        for judge, scores in ({} if stage is None else stage.histograms).items():
            title = f"Scores of {run.label if len(runs) > 1 else name}"
            title = f"{title}, {judge}" if judge else title
            bars.append(_bars(f"scores-{place}-{len(bars)}", title, scores))
    return {
        "charts": [chart for chart in (*charts, *bars) if chart is not None],
        "more_charts": [chart for chart in more_charts if chart is not None],
        "steps_a_point": max(widths),
        "is_empty": not keys and not bars,
    }


def _stage_of(run: RunFigures, name: str) -> StageFigures | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _bars(key: str, title: str, scores: Histogram) -> Chart:
    names = [number(value) for value in scores.values]
    if not names:
        edges = [number(edge) for edge in scores.edges]
        names = [f"{low} to {high}" for low, high in pairwise(edges)]
    bars = list(zip(names, map(float, scores.counts), strict=True))
    return bar_chart(key, title, bars, across="score")


# -- settings --------------------------------------------------------------------------------------


def _origins(runs: Sequence[RunFigures]) -> Table:
    head = ["run", "begun", "seed", "model", "parameters", "versions"]
    return Table("Where the runs come from", head, [[run.label, *_origin(run)] for run in runs])


def _settings_tables(name: str, runs: Sequence[RunFigures]) -> dict[str, Table]:
    """All settings of a stage, and those that differ between runs."""
    settings = [_flat(_stage_of(run, name)) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [[key, *(values.get(key) for values in settings)] for key in keys]
    head = ["setting", *(run.label for run in runs)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return {
        "differing": Table(f"{name}: settings that differ", head, differing),
        "all": Table(f"{name}: all settings", head, rows),
    }


def _flat(stage: StageFigures | None) -> dict[str, str]:
    """Settings by their place: optim.learning_rate."""
    flat: dict[str, str] = {}

    def add(value: Any, place: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(inner, f"{place}.{key}" if place else str(key))
        else:
            flat[place] = "not set" if value is None else str(value)

    add({} if stage is None else stage.settings, "")
    flat.pop("", None)
    return flat
