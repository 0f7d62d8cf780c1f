"""A run, or several side by side, as one HTML file that opens without a network.

Knows files: it puts together what `reporting` makes of runs, and writes the page piece by piece.
"""

import base64
import hashlib
import logging
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from self_rewarding_lm.durable import writing
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.reporting.examples import Part, example_lines, in_script, parts_of
from self_rewarding_lm.reporting.figures import run_figures
from self_rewarding_lm.reporting.markup import Safe, tag
from self_rewarding_lm.reporting.page import (
    SECTIONS,
    heading,
    loop_section,
    rounds_section,
    settings_section,
    stages_section,
    warnings_section,
)
from self_rewarding_lm.run import REPORT, Run

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
    for part in parts:
        for line in example_lines(part):
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
    return files("self_rewarding_lm.reporting").joinpath(name).read_text(encoding="utf-8")


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
    total, taken = sum(len(p.records) for p in parts), sum(len(p.places) for p in parts)
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
