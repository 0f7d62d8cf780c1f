"""A run, or several side by side, as one HTML file that opens without a network.

Gathers figures and examples of the runs, puts them into sections, and writes the page piece by
piece. Knows nothing of how a figure is computed (`figures.py`) or drawn (`charts.py`).
"""

import base64
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from self_rewarding_lm.checks import PAGE, ChecksConfig
from self_rewarding_lm.describe import settings_of
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.report.charts import STYLES, bar_chart, legend, line_chart
from self_rewarding_lm.report.examples import Part, example_lines, in_script, parts_of
from self_rewarding_lm.report.figures import (
    GIVEN,
    Histogram,
    RunFigures,
    StageFigures,
    run_figures,
    thinned,
)
from self_rewarding_lm.report.markup import Safe, details, duration, number, safe, table, tag
from self_rewarding_lm.report.words import (
    COUNTS,
    CURVES,
    ROUNDS,
    SHARES,
    UNCHARTED,
    in_order,
    words_of,
)
from self_rewarding_lm.runs.atomic import writing
from self_rewarding_lm.runs.run import REPORT, Run

SECTIONS = {
    "loop": "The loop as run",
    "warnings": "Warnings",
    "rounds": "Over the rounds",
    "stages": "Stages",
    "examples": "Examples",
    "settings": "Settings",
}


def heading(runs: Sequence[RunFigures]) -> Safe:
    """The page's head: which runs, the way around."""
    told = [tag("p", tag("strong", run.label), ": ", _about(run)) for run in runs]
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title in SECTIONS.items()]
    button = tag("button", "Dark or light", id="theme", type="button")
    title = tag("h1", "Report: ", " and ".join(run.label for run in runs))
    nav = tag("nav", tag("ul", *links), aria_label="Sections")
    return tag("header", tag("div", title, button, class_="top"), *told, nav)


def loop_section(runs: Sequence[RunFigures]) -> Safe:
    """Stages with the weights they start from, what they cost, and their way."""
    parts = [tag("div", *map(_loop, runs), class_="sides")]
    note = (
        "Times are those of the main process. Data: sampling, judging, pairing and the reference. "
        "Tokens are counted once for each record; those of a judge's words are not recorded, their "
        "characters are."
    )
    return _section("loop", *parts, tag("p", note, class_="note"))


def warnings_section(runs: Sequence[RunFigures]) -> Safe:
    """What checks warned of, what each check looks at, and errors that ended an attempt."""
    meanings = {setting.name: setting.words for setting in settings_of(ChecksConfig)}
    items = []
    for run, stage in _each(runs):
        where = f"{run.label}, {stage.name}"
        if stage.stopped is not None:
            title = tag("h3", f"{where}: the last attempt was ended")
            items.append(tag("li", title, tag("p", stage.stopped, class_="text", dir="auto")))
        for found in stage.warnings:
            name, seen, limit = (found.get(key) for key in ("check", "seen", "limit"))
            title = tag("h3", f"{where}: {name} is {_any(seen)}, its limit {_any(limit)}")
            meaning = meanings.get(str(name), "")
            says = [tag("p", found.get("words", ""))]
            says += [tag("p", tag("em", "What the check looks at: "), meaning)] if meaning else []
            items.append(tag("li", title, *says))
    if not items:
        return _section("warnings", tag("p", "No warning of a check is recorded for these stages."))
    note = tag("p", f"More about each is in {PAGE} of the library.", class_="note")
    return _section("warnings", tag("ul", *items, class_="warnings"), note)


def rounds_section(runs: Sequence[RunFigures]) -> Safe:
    """Numbers of data stage after stage: judge, lengths, anchors, pairs; what was left out."""
    names = stage_names(runs)
    keys = {key for _, stage in _each(runs) for key in stage.data if key not in stage.dropped}
    ordered = in_order(keys, ROUNDS, "anchor/")
    shown = [k for k in ordered if not k.startswith(UNCHARTED)]
    charts = [_round_chart(i, key, names, runs) for i, key in enumerate(shown)]
    dropped = sorted({key for _, stage in _each(runs) for key in stage.dropped})
    parts = [
        legend([run.label for run in runs]) if any(charts) else Safe(""),
        tag("div", *charts, class_="charts"),
        _numbers("Numbers of the data of each stage", ordered, runs),
        _numbers("What was left out, by reason", dropped, runs),
    ]
    if not keys and not dropped:
        parts = [tag("p", "No stage has recorded numbers of its data.")]
    return _section("rounds", *parts)


def stages_section(runs: Sequence[RunFigures]) -> Safe:
    """Each stage's curves and its scores."""
    parts = [_stage(i, name, runs) for i, name in enumerate(stage_names(runs))]
    return _section("stages", legend([run.label for run in runs]), *parts)


def settings_section(runs: Sequence[RunFigures]) -> Safe:
    """Settings of each stage; of several runs those that differ first."""
    parts = []
    for name in stage_names(runs):
        found = [_flat(_stage_of(run, name)) for run in runs]
        keys = list(dict.fromkeys(key for one in found for key in one))
        rows = [[key, *(one.get(key, "") for one in found)] for key in keys]
        differ = [row for row in rows if len(set(map(str, row[1:]))) > 1]
        head = ["setting", *(run.label for run in runs)]
        if differ:
            parts.append(table(f"{name}: settings that differ", head, differ))
        if rows:
            title = f"{name}: all settings"
            parts.append(details(title, table(title, head, rows)))
    known = [[run.label, *_origin(run)] for run in runs]
    head = ["run", "begun", "seed", "model", "parameters", "versions"]
    return _section("settings", table("Where the runs come from", head, known), *parts)


def stage_names(runs: Sequence[RunFigures]) -> list[str]:
    """Names of the stages of all runs, in their order."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def _section(name: str, *parts: object) -> Safe:
    title = tag("h2", SECTIONS[name], id=f"{name}-title")
    return tag("section", title, *parts, id=name, aria_labelledby=f"{name}-title")


def _each(runs: Iterable[RunFigures]) -> Iterator[tuple[RunFigures, StageFigures]]:
    return ((run, stage) for run in runs for stage in run.stages)


def _stage_of(run: RunFigures, name: str) -> StageFigures | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _about(run: RunFigures) -> str:
    done = sum(stage.state == "done" for stage in run.stages)
    begun, seed, kind, size, _ = _origin(run)
    return (
        f"{done} of {len(run.stages)} stages done; {kind}, {size} parameters; seed {seed}; begun "
        f"{begun}"
    )


def _origin(run: RunFigures) -> list[str]:
    model, versions = run.info.get("model") or {}, run.info.get("versions") or {}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    begun, seed = (str(run.info.get(key, "unknown")) for key in ("created", "seed"))
    kind = str(model.get("class", "unknown")).rpartition(".")[2]
    return [begun, seed, kind, _any(model.get("parameters")), told or "unknown"]


def _loop(run: RunFigures) -> Safe:
    before = [GIVEN, *(stage.name for stage in run.stages)]
    steps = [tag("li", GIVEN)]
    for stage, name in zip(run.stages, before, strict=False):
        steps.append(tag("li", stage.name, "" if stage.start == name else f", from {stage.start}"))
    counts = [key for key in COUNTS if any(key in stage.counts for stage in run.stages)]
    rows = [*zip(*(_column(stage, counts) for stage in run.stages), strict=True)]
    head = ["stage", *(stage.name for stage in run.stages)]
    names = ["kind", "state", "starts from", *counts, "tokens sampled", "characters of judges"]
    names += ["tokens trained", "begun", "time for data", "time for training"]
    told = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return tag("div", tag("ol", *steps, class_="way"), table(run.label, head, told))


def _column(stage: StageFigures, counts: Sequence[str]) -> Iterator[object]:
    yield from (stage.kind, stage.state, stage.start)
    yield from (_count(stage.counts.get(key)) for key in counts)
    for key in ("sampled", "judge_characters", "trained"):
        yield _count(stage.tokens.get(key))
    when = None if stage.began is None else time.localtime(stage.began)
    yield "unknown" if when is None else time.strftime("%Y-%m-%d %H:%M", when)
    lost = f" and {stage.lost} stopped attempts of unknown length" if stage.lost else ""
    yield duration(stage.seconds.get("data")) + lost
    trains = "steps" in stage.counts or "training" in stage.seconds
    yield duration(stage.seconds.get("training")) if trains else "none"


def _count(value: int | None) -> str:
    return "none" if value is None else number(value)


def _any(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else "unknown"


def _round_chart(place: int, key: str, names: Sequence[str], runs: Sequence[RunFigures]) -> Safe:
    """A number over the stages; "" where no run has it in two of them."""
    lines: list[tuple[str, int, list[tuple[int, float]]]] = []
    for style, run in enumerate(runs):
        found = {names.index(s.name): s.data[key] for s in run.stages if key in s.data}
        lines.append((run.label, style, sorted(found.items())))
    if all(len(points) < 2 for _, _, points in lines):
        return Safe("")
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


def _numbers(caption: str, keys: Sequence[str], runs: Sequence[RunFigures]) -> Safe:
    """A table with a column for each stage that has any of the numbers."""
    columns = [(run, stage) for run, stage in _each(runs) if any(key in stage.data for key in keys)]
    several = len(runs) > 1
    head = [f"{run.label}, {stage.name}" if several else stage.name for run, stage in columns]
    rows = [
        [words_of(key), *(number(s.data[key]) if key in s.data else "" for _, s in columns)]
        for key in keys
    ]
    return table(caption, ["number", *head], rows)


def _stage(place: int, name: str, runs: Sequence[RunFigures]) -> Safe:
    stages = [_stage_of(run, name) for run in runs]
    keys = {key for stage in stages if stage is not None for key in stage.curves}
    ordered = in_order(keys, CURVES, "\0")
    main = [k for k in ordered if k in CURVES or k.startswith("eval/")]
    charts, widths = {}, [1]
    for i, key in enumerate(ordered):
        lines = []
        for style, (run, stage) in enumerate(zip(runs, stages, strict=True)):
            points, width = thinned([] if stage is None else stage.curves.get(key, []))
            widths.append(width)
            lines.append((run.label, style % STYLES, points))
        charts[key] = line_chart(
            f"curve-{place}-{i}", words_of(key), lines, across="step", share=key in SHARES
        )
    bars = []
    for run, stage in zip(runs, stages, strict=True):
        for judge, scores in ({} if stage is None else stage.histograms).items():
            title = f"Scores of {run.label if len(runs) > 1 else name}"
            title = f"{title}, {judge}" if judge else title
            bars.append(_bars(f"scores-{place}-{len(bars)}", title, scores))
    parts = [tag("div", *(charts[k] for k in main), *bars, class_="charts")]
    rest = [chart for key, chart in charts.items() if key not in main]
    if any(rest):
        parts.append(details("More curves", tag("div", *rest, class_="charts")))
    if max(widths) > 1:
        note = f"A point is the mean of up to {max(widths)} steps; metrics.jsonl has each of them."
        parts.append(tag("p", note, class_="note"))
    if not keys and not bars:
        parts = [tag("p", "Nothing was trained or judged in this stage so far.")]
    return tag("section", tag("h3", name, id=f"s{place}"), *parts, aria_labelledby=f"s{place}")


def _bars(key: str, title: str, scores: Histogram) -> Safe:
    names = [number(value) for value in scores.values]
    if not names:
        edges = [number(edge) for edge in scores.edges]
        names = [f"{a} to {b}" for a, b in pairwise(edges)]
    bars = list(zip(names, map(float, scores.counts), strict=True))
    return bar_chart(key, title, bars, across="score")


def _flat(stage: StageFigures | None) -> dict[str, Safe]:
    """Settings by their place: optim.learning_rate."""
    found: dict[str, Safe] = {}

    def add(value: Any, place: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(inner, f"{place}.{key}" if place else str(key))
        else:
            found[place] = tag("span", _in_words(value), class_="text", dir="auto")

    add({} if stage is None else stage.settings, "")
    found.pop("", None)
    return found


def _in_words(value: Any) -> Safe:
    return safe("not set" if value is None else value)


logger = logging.getLogger(__name__)


EXAMPLES = 2000
"""Prompts that a page holds at most."""


def write_report(
    runs: Sequence[str | Path | Run], out: str | Path | None = None, *, examples: int = EXAMPLES
) -> Path:
    """Write the page of one or several runs, which may still be going on; its path.

    out: default report.html in the folder of the first run. examples: prompts, with all that
    came of them, that the page holds at most; their numbers count all. Raises ConfigError without
    a run, StoreError where a folder holds none, a record's file was changed, or the page cannot be
    written.
    """
    if not runs:
        raise ConfigError("write_report needs at least one run.")
    if examples < 0:
        raise ConfigError(f"examples is a number of prompts, 0 or more; got {examples}.")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    path = opened[0].folder / REPORT if out is None else Path(out)
    with (
        writing(path) as draft,
        draft.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        file.writelines(_pieces(opened, examples))
    return path


def report_at_end(run: Run) -> None:
    """Write a run's report; whatever fails is a warning, for the run itself is done."""
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


def _pieces(runs: Sequence[Run], examples: int) -> Iterator[str]:
    labels = _labels(runs)
    found = [run_figures(run, label) for run, label in zip(runs, labels, strict=True)]
    parts = parts_of(runs, examples)
    style, script = (_own(f"report.{kind}") for kind in ("css", "js"))
    yield _head(f"Report: {' and '.join(labels)}", style, script)
    yield tag("a", "Skip to the numbers", href="#main", class_="skip")
    yield heading(found)
    yield '<main id="main">'
    yield loop_section(found)
    yield warnings_section(found)
    yield rounds_section(found)
    yield stages_section(found)
    yield _examples_section(parts)
    yield settings_section(found)
    yield "</main>\n"
    yield f'<script type="application/json" id="runs">{in_script(labels)}</script>\n'
    yield '<script type="application/json" id="data">['
    comma = "\n"
    while parts:
        for line in example_lines(parts.pop(0)):  # its files are closed behind it
            yield comma + line
            comma = ",\n"
    yield f"\n]</script>\n<script>{script}</script>\n</body>\n</html>\n"


def _labels(runs: Sequence[Run]) -> list[str]:
    """What runs are called: their folders' names, or whole paths where these are the same."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return names


def _own(name: str) -> str:
    return files("self_rewarding_lm.report").joinpath(name).read_text(encoding="utf-8")


def _head(title: str, style: str, script: str) -> str:
    """Up to the body. Only this style and this script run, and nothing is fetched."""
    allowed = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"{allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>{style}</style>\n</head>\n<body>\n"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _examples_section(parts: Sequence[Part]) -> Safe:
    title = tag("h2", SECTIONS["examples"], id="examples-title")
    total, taken = sum(len(p.examples) for p in parts), sum(len(p.places) for p in parts)
    inner: list[Safe] = [tag("p", "No stage has examples with a text so far.")]
    if taken:
        left = f"{total - taken} more are left out; `--examples N` sets how many the page holds."
        words = f"{taken} of {total} examples. " if total > taken else f"All {taken} examples. "
        inner = [tag("p", words, left if total > taken else "", class_="note"), Safe(BROWSER)]
    return tag("section", title, *inner, id="examples", aria_labelledby="examples-title")


BROWSER = """
<noscript><p>The browser of examples needs JavaScript; the rest of this page does not.</p>
</noscript>
<form id="filter" aria-label="Which examples">
<label id="of-run">Run <select name="run"></select></label>
<label>Stage <select name="stage"></select></label>
<label>With <select name="kind"><option value="">anything</option>
<option value="pair">a pair</option>
<option value="none">no pair</option><option value="unread">a judgement without a score</option>
</select></label>
<span class="range" role="group" aria-label="Best score">Best score
<input name="low" type="number" step="any" aria-label="Best score at least"> to
<input name="high" type="number" step="any" aria-label="Best score at most"></span>
<span class="range" role="group" aria-label="Margin">Margin
<input name="least" type="number" step="any" aria-label="Margin at least"> to
<input name="most" type="number" step="any" aria-label="Margin at most"></span>
<label>Order <select name="order"><option value="">as worked</option>
<option value="-m">largest margin first</option><option value="m">smallest margin first</option>
<option value="x">lowest best score first</option></select></label>
<label class="search">Text <input name="text" type="search"></label>
<button type="reset">Clear</button>
</form>
<div id="viewer" tabindex="0" role="group"
 aria-label="Example; left and right arrow keys turn over">
<div class="turn"><button type="button" id="previous">Previous</button>
<label>Example <input id="place" type="number" min="1" value="1"></label>
<span id="count" role="status"></span>
<button type="button" id="next">Next</button>
<label><input id="words" type="checkbox" checked> judges' texts</label></div>
<article id="example"></article>
</div>
"""
