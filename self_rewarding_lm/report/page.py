"""A run, or several side by side, as one HTML file that opens without a network.

Gathers figures and examples of the runs and writes them through the template `report.html`, piece
by piece: here is what each section says, there how it looks. Knows nothing of how a figure is
computed (`figures.py`) or drawn (`charts.py`).
"""

import base64
import hashlib
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
    TOKENS,
    UNCHARTED,
    in_order,
    kind_words,
    unit_of,
    words_of,
)
from self_rewarding_lm.runs.atomic import OTHER_PLACE, writing
from self_rewarding_lm.runs.lock import is_at_work
from self_rewarding_lm.runs.run import REPORT, Run
from self_rewarding_lm.text import amount, duration, number

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


EVERY = 10
"""Seconds after which a page of a run that goes on is written, and read by a browser, again."""


@typed
def write_report(
    runs: Sequence[str | Path | Run] | str | Path | Run,
    out: str | Path | None = None,
    *,
    examples: int = EXAMPLES,
) -> Path:
    """Write the report of one or several runs as an HTML file. Returns its path.

    The runs may still be active. out: default report.html in the folder of the first run.
    examples: most prompts that the page shows with their candidates; all other numbers count
    everything. Raises ConfigError without a run, StoreError if a folder holds none, a record's file
    was changed, or the page cannot be written.
    """
    runs = [runs] if isinstance(runs, str | Path | Run) else runs
    if not runs:
        raise ConfigError("write_report needs at least one run.")
    if examples < 0:
        raise ConfigError(f"examples is a number of prompts, 0 or more; got {examples}.")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    return _write(opened, _path(opened, out), examples)


def watch_report(
    runs: Sequence[str | Path], out: str | Path | None, examples: int, every: float = EVERY
) -> Iterator[Path]:
    """As `write_report`, again and again while a run goes on; yields the path each time.

    A browser that shows the page reads it again after `every` seconds, until it is that of the
    end. That one is written however this ends, also by a key.
    """
    try:
        last = 0.0
        while any(is_at_work(Path(run)) for run in runs):
            opened = [Run.open(run) for run in runs]
            path = _path(opened, out)
            if not last or not all(_is_up_to_date(run, path) for run in opened):
                last = time.monotonic()
                yield _write(opened, path, examples, every)
                last = time.monotonic() - last
            time.sleep(max(every, 9 * last))  # a tenth of the time at most goes into it
    finally:
        path = write_report(runs, out, examples=examples)
    yield path


def _path(runs: Sequence[Run], out: str | Path | None) -> Path:
    return runs[0].folder / REPORT if out is None else Path(out)


def _write(runs: Sequence[Run], path: Path, examples: int, every: float | None = None) -> Path:
    """every: after how many seconds a browser reads the page again; None if it does not."""
    with (
        writing(path, advice=OTHER_PLACE) as draft,
        draft.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        file.writelines(_pieces(runs, examples, every))
    return path


def report_at_end(run: Run) -> None:
    """Write a run's report, unless nothing changed since it was written.

    Whatever fails is a warning, for the run itself is done.
    """
    if _is_up_to_date(run, run.folder / REPORT):
        return
    try:
        logger.info("report: %s", write_report([run]))
    except Exception as error:
        logger.warning(
            "the report of %s could not be written (%s: %s); the run is complete. Try again with "
            "`self-rewarding-lm report %s`.",
            run.folder,
            type(error).__name__,
            error,
            run.folder,
        )


def _is_up_to_date(run: Run, path: Path) -> bool:
    """Whether the report is younger than all records and numbers of the run's stages."""
    if not path.exists():
        return False
    written = path.stat().st_mtime_ns
    files = (f for name in run.stages for f in run.stage(name).path.glob("*.json*"))
    return all(file.stat().st_mtime_ns < written for file in files)


def _pieces(runs: Sequence[Run], at_most: int, every: float | None) -> Iterator[str]:
    """The page in pieces, which a browser reads again every `every` seconds.

    The template calls a function when it comes to its section.
    """
    labels = _labels(runs)
    figures = [run_figures(run, label) for run, label in zip(runs, labels, strict=True)]
    verdicts = {label: " ".join(verdict(run)) for run, label in zip(runs, labels, strict=True)}
    parts = parts_of(runs, at_most)
    style, script = _file("report.css"), _file("report.js")
    return _template().generate(
        labels=labels,
        every=every,
        policy=_policy(style, script),
        style=Safe(style),
        script=Safe(script),
        sections=SECTIONS,
        runs=figures,
        about=_about,
        facts=_facts,
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
        yield from map(Safe, example_lines(parts.pop(0)))  # its files are closed after it


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
        f"{done} of {amount(len(run.stages), 'stage')} done; {kind}, {size} parameters; seed "
        f"{seed}; begun {begun}"
    )


def _facts(run: RunFigures) -> Iterator[tuple[str, str]]:
    """What the run took in all, and what came of it: names and numbers."""
    totals = run.totals
    yield "total time", _with_lost(run.seconds, sum(stage.lost for stage in run.stages))
    named = {"prompts": "prompts", "pairs": "pairs", "steps": "steps", **TOKENS}
    yield from ((named[key], number(totals[key])) for key in named if key in totals)


def _origin(run: RunFigures) -> list[str]:
    """When it began, its seed, the model's class and parameters, versions."""
    model, versions = run.info.get("model") or {}, run.info.get("versions") or {}
    begun, seed = (str(run.info.get(key, "unknown")) for key in ("created", "seed"))
    with suppress(ValueError):
        begun = datetime.fromisoformat(begun).strftime("%Y-%m-%d %H:%M UTC%z").removesuffix("+0000")
        begun = _unbroken(begun)
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
    """A row for each stage."""
    counts = [key for key in COUNTS if any(key in stage.counts for stage in run.stages)]
    tokens = [key for key in TOKENS if any(key in stage.tokens for stage in run.stages)]
    head = ["stage", "kind", "state", "begun"]
    numbers = [*counts, *(TOKENS[key] for key in tokens), "time for data", "time for training"]
    rows = [[stage.name, *_row(stage, counts, tokens)] for stage in run.stages]
    return Table("The stages, in order", [*head, *numbers], rows, texts=len(head))


def _row(stage: StageFigures, counts: Sequence[str], tokens: Sequence[str]) -> Iterator[str | None]:
    when = None if stage.began is None else time.localtime(stage.began)
    yield from (kind_words(stage.kind), stage.state)
    yield "unknown" if when is None else _unbroken(time.strftime("%Y-%m-%d %H:%M", when))
    for count in (*map(stage.counts.get, counts), *map(stage.tokens.get, tokens)):
        yield None if count is None else number(count)
    yield _with_lost(stage.seconds.get("data"), stage.lost)
    trains = "steps" in stage.counts or "training" in stage.seconds
    yield _time(stage.seconds.get("training")) if trains else None


def _unbroken(date: str) -> str:
    """A date whose hyphens end no line."""
    return date.replace("-", "\N{NON-BREAKING HYPHEN}")


def _with_lost(seconds: float | None, lost: int) -> str:
    attempts = "a stopped attempt" if lost == 1 else f"{lost} stopped attempts"
    return _time(seconds) + (f" and {attempts} of unknown length" if lost else "")


def _time(seconds: float | None) -> str:
    return duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _number_or_unknown(value: Any) -> str:
    return number(value if isinstance(value, int | float) else None)


# -- warnings --------------------------------------------------------------------------------------


def _warnings(runs: Sequence[RunFigures]) -> Iterator[dict[str, Any]]:
    """Errors that ended an attempt, and what checks warned of with what each check looks at."""
    meanings = {setting.name: setting.words for setting in settings_of(ChecksConfig)}
    for run, stage in _stages_of(runs):
        where = f"{run.label}, {stage.name}" if len(runs) > 1 else stage.name
        if stage.stopped is not None:
            yield {"title": f"{where}: the last attempt was ended", "error": stage.stopped}
        for event in stage.warnings:
            check, seen, limit = (event.get(key) for key in ("check", "seen", "limit"))
            first, rest = _first_clause(str(event.get("words", "")))
            yield {
                "title": f"{where}: {first}",
                "error": None,
                "words": rest,
                "check": check,
                "meaning": meanings.get(str(check), ""),
                "seen": _number_or_unknown(seen),
                "limit": _number_or_unknown(limit),
            }


def _first_clause(words: str) -> tuple[str, str]:
    """What was seen, and all that is said after it."""
    end = re.search(r"(?= \()|[.;:](?=\s|$)", words)
    if end is None:
        return words, ""
    rest = words[end.end() :].strip()
    inner, _, behind = rest[1:].partition(")")
    if rest.startswith("(") and "(" not in inner:
        rest = inner + behind
    return words[: end.start()], rest[:1].upper() + rest[1:]


def _stages_of(runs: Iterable[RunFigures]) -> Iterator[tuple[RunFigures, StageFigures]]:
    return ((run, stage) for run in runs for stage in run.stages)


# -- over the rounds -------------------------------------------------------------------------------


class Column(NamedTuple):
    """The numbers of a stage's data, or of one of its rounds."""

    run: int
    name: str
    data: dict[str, float]


def _columns(runs: Sequence[RunFigures]) -> Iterator[Column]:
    for place, run in enumerate(runs):
        for stage in run.stages:
            for i, data in enumerate(stage.rounds):
                yield Column(place, f"{stage.name}, round {i + 1}", data)
            if not stage.rounds:
                yield Column(place, stage.name, stage.data)


def _rounds(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """Numbers of data round after round: judge, lengths, anchors, pairs; what was left out."""
    columns = list(_columns(runs))
    dropped = sorted({key for _, stage in _stages_of(runs) for key in stage.dropped})
    keys = {key for column in columns for key in column.data} - set(dropped)
    ordered = in_order(keys, ROUNDS, "anchor/")
    charted = [key for key in ordered if not key.startswith(UNCHARTED)]
    charts = [_round_chart(i, key, columns, runs) for i, key in enumerate(charted)]
    tables = [
        _numbers("Numbers of the data", ordered, columns, runs),
        _numbers("What was left out, by reason", dropped, columns, runs),
    ]
    return {
        "charts": [chart for chart in charts if chart is not None],
        "tables": tables if keys or dropped else [],
    }


def _stage_names(runs: Sequence[RunFigures]) -> list[str]:
    """Names of the stages of all runs, in their order."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def _round_chart(
    place: int, key: str, columns: Sequence[Column], runs: Sequence[RunFigures]
) -> Chart | None:
    """A number over the rounds; None if no run has it in two of them."""
    known = [column for column in columns if math.isfinite(column.data.get(key, math.nan))]
    names = list(dict.fromkeys(column.name for column in columns if column in known))
    lines = [
        (
            run.label,
            style,
            [(float(names.index(c.name)), c.data[key]) for c in known if c.run == style],
        )
        for style, run in enumerate(runs)
    ]
    return line_chart(
        f"round-{place}",
        words_of(key),
        lines,
        across="stage",
        up=unit_of(key),
        names=names,
        share=key in SHARES,
    )


def _numbers(
    caption: str, keys: Sequence[str], columns: Sequence[Column], runs: Sequence[RunFigures]
) -> Table:
    """A column for each stage or round that has any of the numbers."""
    shown = [column for column in columns if not column.data.keys().isdisjoint(keys)]
    several = len(runs) > 1
    head = [f"{runs[c.run].label}, {c.name}" if several else c.name for c in shown]
    rows = [
        [words_of(key), *(number(c.data[key]) if key in c.data else None for c in shown)]
        for key in keys
    ]
    return Table(caption, ["number", *head], rows)


# -- stages ----------------------------------------------------------------------------------------


def _stage_charts(place: int, name: str, runs: Sequence[RunFigures]) -> dict[str, Any]:
    """A stage's curves, those that are always shown first, and the bars of its scores.

    What would be a chart of one point or one bar is a row of a table.
    """
    stages = [_stage_of(run, name) for run in runs]
    keys = {key for stage in stages if stage is not None for key in stage.curves}
    keys -= {key for s in stages if s is not None for of_round in s.rounds for key in of_round}
    charts, more_charts, widths, rows = list[Chart](), list[Chart](), [1], []
    for i, key in enumerate(in_order(keys, CURVES, "\0")):
        lines = []
        for style, (run, stage) in enumerate(zip(runs, stages, strict=True)):
            points, width = thinned([] if stage is None else stage.curves.get(key, []))
            widths.append(width)
            lines.append((run.label, style % STYLES, points))
        chart = line_chart(
            f"curve-{place}-{i}",
            words_of(key),
            lines,
            across="step",
            up=unit_of(key),
            share=key in SHARES,
        )
        if chart is None:
            values = [number(points[0][1]) if points else None for _, _, points in lines]
            rows.append([words_of(key), *values])
        else:
            is_first = key in CURVES or key.startswith("eval/")
            (charts if is_first else more_charts).append(chart)
    bars, of_prompts = list[Chart](), list[Chart | None]()
    for style, (run, stage) in enumerate(zip(runs, stages, strict=True)):
        if stage is None:
            continue
        of_run = f" of {run.label}" if len(runs) > 1 else ""
        for title, counted, across, up in _histograms(stage):
            titled = f"{title}{of_run}"
            chart = _bars(f"bars-{place}-{len(bars)}", titled, counted, across, up)
            if chart is None:
                value = f"{number(counted.values[0])} ({amount(counted.counts[0], 'time')})"
                rows.append([titled, *(value if i == style else None for i in range(len(runs)))])
            else:
                bars.append(chart)
        of_prompts.append(_prompt_chart(f"prompts-{place}-{style}", stage, of_run))
    head = ["value", *(run.label for run in runs)] if len(runs) > 1 else ["number", "value"]
    return {
        "charts": [*charts, *bars, *(chart for chart in of_prompts if chart is not None)],
        "more_charts": more_charts,
        "single": Table("Numbers with one value", head, rows),
        "steps_a_point": max(widths),
        "is_empty": not keys and not bars and not rows,
    }


def _histograms(stage: StageFigures) -> Iterator[tuple[str, Histogram, str, str]]:
    """Title, numbers, and what the axes are called."""
    for judge, scores in stage.histograms.items():
        yield f"Scores by {judge}" if judge else "Scores", scores, "score", "judgements"
    if stage.margins is not None and stage.has_pair_margins:
        yield "Margins: score of chosen minus rejected", stage.margins, "margin", "pairs"
    elif stage.margins is not None:
        yield "Margins: best score of a prompt minus its worst", stage.margins, "margin", "prompts"


def _prompt_chart(key: str, stage: StageFigures, of_run: str) -> Chart | None:
    """The best, mean and worst score of each prompt."""
    lines = []
    for style, (name, i) in enumerate((("best", 2), ("mean", 1), ("worst", 0))):
        points = [(float(x), scores[i]) for x, scores in enumerate(stage.prompt_scores, 1)]
        lines.append((name, style, thinned(points)[0]))
    return line_chart(
        key,
        f"Scores by prompt{of_run}",
        lines,
        across="prompt, in the order of mean scores",
        up="score",
        has_legend=True,
    )


def _stage_of(run: RunFigures, name: str) -> StageFigures | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _bars(key: str, title: str, scores: Histogram, across: str, up: str) -> Chart | None:
    names = [number(value) for value in scores.values]
    if not names:
        edges = [number(edge) for edge in scores.edges]
        names = [f"{low} to {high}" for low, high in pairwise(edges)]
    bars = list(zip(names, map(float, scores.counts), strict=True))
    return bar_chart(key, title, bars, across=across, up=up, edges=scores.edges)


# -- settings --------------------------------------------------------------------------------------


def _origins(runs: Sequence[RunFigures]) -> Table:
    head = ["run", "begun", "seed", "model", "parameters", "versions"]
    rows = [[run.label, *_origin(run)] for run in runs]
    return Table("Where the runs come from", head, rows, texts=len(head))


def _settings_tables(name: str, runs: Sequence[RunFigures]) -> dict[str, Table]:
    """All settings of a stage, and those that differ between runs."""
    settings = [_flat(_stage_of(run, name)) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [[key, *(values.get(key) for values in settings)] for key in keys]
    head = ["setting", *(run.label for run in runs)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return {
        "differing": Table(f"{name}: settings that differ", head, differing, texts=len(head)),
        "all": Table(f"{name}: all settings", head, rows, texts=len(head)),
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
