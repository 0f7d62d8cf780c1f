"""A run as text for a terminal: its stages, their numbers, a few prompts with what became of them.

Reads a run's records, also while the run goes on, under the names that metrics.jsonl has. Knows
nothing of models and imports no torch.
"""

import textwrap
from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any

from tqdm import tqdm

from self_rewarding_lm.records import Candidate, Judgement
from self_rewarding_lm.report.examples import (
    Example,
    Response,
    examples,
    score_said_of,
    signed,
)
from self_rewarding_lm.report.figures import StageFigures, is_metric, stage_figures
from self_rewarding_lm.report.verdict import verdict
from self_rewarding_lm.report.words import CURVES, ROUNDS, in_order
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.text import aligned, amount, number, printable

WIDTH = 100


LINES_OF_TEXT = 3  # of a prompt, a response or a judge's words


COLUMNS = ("stage", "state", "rows", "pairs", "steps", "loss", "parsed", "score", "ties")


SHOWN = ("judge/parse_rate", "judge/score_mean", "judge/tie_rate", "pairs/kept")
"""Metrics that have a column of the table; all others are listed below it."""


def show_run(run: Run, *, stage: str | None = None, prompts: int = 3) -> str:
    """The run in lines of at most 100 characters.

    stage: whose prompts are shown, and then no other's numbers; default the last that sampled
    any. prompts: how many. Raises StoreError if there is no such stage.
    """
    names = run.stages if stage is None else [run.stages[_place(run, stage)]]
    table = [COLUMNS, *(_row(run, name) for name in names)]
    said = verdict(run) if stage is None else []
    lines = [*_heading(run), *_wrapped(" ".join(said), ""), "", *aligned(table, "<<>")]
    for name in names:
        lines += _remarks(run, name)
    of_examples = _last_sampled(run) if stage is None else names[0]
    if of_examples is not None and prompts > 0:
        lines += _examples(run, of_examples, prompts)
    return "\n".join(printable(line, keep="") for line in lines)


def _place(run: Run, stage: str) -> int:
    """The place of a stage that is named by name, folder or number (from 1)."""
    folders = list(run.info["stages"])
    names = [*run.stages, *folders, *(str(i) for i in range(1, len(folders) + 1))]
    if stage not in names:
        run.stage(stage)  # raises with the names that there are
    return names.index(stage) % len(folders)


def stage_name(run: Run, stage: str) -> str:
    """The name of a stage that is given by name, folder or number (from 1).

    Raises StoreError if there is none.
    """
    return run.stages[_place(run, stage)]


def _heading(run: Run) -> list[str]:
    model = run.info.get("model", {})
    done = sum(run.is_done(name) for name in run.stages)
    kind, size = str(model.get("class", "?")).rpartition(".")[2], model.get("parameters")
    words = f"{kind}, {size:,} parameters" if isinstance(size, int) else kind
    return _wrapped(
        f"{run.folder}: {done} of {amount(len(run.stages), 'stage')} done; {words}; "
        f"seed {run.info.get('seed')}; begun {run.info.get('created')}",
        "",
    )


def _row(run: Run, name: str) -> tuple[str, ...]:
    """A stage's line of the table; "-" for what is not known."""
    metrics, summary = run.metrics(name), run.summary(name)
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    loss = f"{losses[0][1]:.3f} -> {losses[-1][1]:.3f}" if losses else "-"
    state = "done" if run.is_done(name) else "begun" if run.settings(name) else "to do"
    judge = {key: _metric(metrics, key) for key in SHOWN}
    pairs = summary.get("pairs", len(run.pairs(name)) or None)
    place = run.stages.index(name) + 1
    return (
        f"{place} {textwrap.shorten(name, 24, placeholder='...')}",
        state,
        number(_rows(run, name, summary), "-"),
        number(pairs, "-"),
        number(summary.get("steps", losses[-1][0] if losses else None), "-"),
        loss,
        _share(judge["judge/parse_rate"]),
        "-" if judge["judge/score_mean"] is None else f"{judge['judge/score_mean']:.2f}",
        _share(judge["judge/tie_rate"]),
    )


def _rows(run: Run, name: str, summary: dict[str, Any]) -> int | None:
    """Supervised rows, or demonstrations for a later stage; None if there are none."""
    for key, read in (("rows", run.rows), ("demonstrations", run.demonstrations)):
        count = summary.get(key) or len(read(name))
        if count:
            return count
    return None


def _remarks(run: Run, name: str) -> list[str]:
    """What the stage's arrows logged beside the table's columns, dropped prompts among it.

    Where a number was logged in several rounds or evaluations: its first value -> its last.
    """
    metrics: dict[str, list[float]] = {}
    for line in run.metrics(name):
        for key, value in line.items():
            begins = key in metrics or line.get("step") == 0
            if begins and key not in ("step", "round", *SHOWN) and is_metric(value):
                metrics.setdefault(key, []).append(value)
    dropped = {k: v for k, v in metrics.items() if "dropped_" in k}
    rest = {k: v for k, v in metrics.items() if k not in dropped and any(v)}
    lines = []
    for words, found in (("dropped", dropped), ("also", rest)):
        if found:
            named = [f"{k.replace('dropped_', '')} {_ends(v)}" for k, v in found.items()]
            lines += _wrapped(f"{name}, {words}: {', '.join(named)}", "    ")
    return ["", *lines] if lines else []


def _ends(values: Sequence[float]) -> str:
    """The first and the last of a number's values; one of them if they are the same."""
    return " -> ".join(dict.fromkeys((number(values[0]), number(values[-1]))))


def _last_sampled(run: Run) -> str | None:
    sampled = [name for name in run.stages if run.candidates(name) or run.pairs(name)]
    return sampled[-1] if sampled else None


def _examples(run: Run, name: str, count: int) -> list[str]:
    """So many examples of a stage, those that it trained on first, and as many demonstrations."""
    of_stage, settings = examples(run, name), run.settings(name).get("settings") or {}
    has_pairs, has_groups = len(run.pairs(name)) > 0, len(run.advantages(name)) > 0
    noun, has_any = "pair" if has_pairs else _made_of_prompt(settings), has_pairs or has_groups
    picked = list(islice((e for e in of_stage.worked if e.is_used), count)) if has_any else []
    rest = (example for example in of_stage.worked if not (has_any and example.is_used))
    picked += islice(rest, count - len(picked))
    lines = []
    for example in (*picked, *of_stage.demonstrations[:count]):
        lines += _example(example)
        sampled = [r for r in example.responses if r.candidate is not None]
        if noun is not None and sampled and not example.is_used:
            lines += _wrapped(f"no {noun}: {_why_none(noun, sampled, settings)}", "    ")
    return lines


def _made_of_prompt(settings: dict[str, Any]) -> str | None:
    """What a stage with these settings makes of a prompt: a pair, a group, or neither."""
    if "pairing" not in settings or "fit_from" in settings:
        return None
    return "group" if "normalise" in settings else "pair"


def _why_none(noun: str, responses: Sequence[Response], settings: dict[str, Any]) -> str:
    """Why a prompt with these responses gave no pair or group. settings: of the stage."""
    candidates = [response.candidate for response in responses if response.candidate is not None]
    reasons = [candidate.reason for candidate in candidates if candidate.reason is not None]
    cut = sum(candidate.finished is False for candidate in candidates)
    whole = [
        r
        for r in responses
        if r.candidate is not None
        and r.candidate.reason is None
        and r.candidate.finished is not False
    ]
    scored = [response for response in whole if response.score is not None]
    scores = [response.score for response in scored if response.score is not None]
    needs = f"and a {noun} needs two that are complete"
    least = 1 if cut and settings.get("cut_off") == "lowest" else 2  # the others have a score too
    if len(whole) < least and reasons:
        return f"{len(reasons)} of {len(candidates)} have no response ({reasons[0]}), {needs}"
    if len(whole) < least:
        return f"{cut} of {len(candidates)} were cut off, {needs}: raise max_new_tokens"
    if len(whole) > 1 and len({response.text or response.ids for response in whole}) == 1:
        return "all responses are the same (identical)"
    if any(response.has_parts for response in whole):
        return "the scores, as made from their parts, gave none"
    if len(scored) < least:
        return f"{len(whole) - len(scored)} of {len(whole)} have no score, and a {noun} needs two"
    if min(scores) == max(scores):
        return f"the best and the worst have the same score, {number(scores[0])} (tie)"
    margin = settings.get("min_margin") or 0.0
    if max(scores) - min(scores) < margin:
        return f"the scores differ by less than min_margin, {number(margin)}"
    return "there were enough pairs already (surplus), or a setting of the stage left it out"


def _example(example: Example) -> list[str]:
    """A prompt, the responses that it was given with, and its candidates with their judgements."""
    lines = ["", example.id, *_text("prompt  ", example.prompt, example.prompt_ids)]
    for response in sorted(example.responses, key=lambda response: response.candidate is not None):
        lines += _text(f"{response.role or '':8}", response.text, response.ids)
        if response.candidate is None or not response.judgements:
            continue
        lines += _wrapped(_scores(response, response.candidate), " " * 10)
        first = response.judgements[0]
        if first.text is not None and response.role is not None:
            lines += _text("  judge:", first.text, ())
        for judgement in response.judgements:
            role = example.judgement_roles.get(judgement.id)
            if role is not None:
                lines += _text(f"  {role} judgement:", judgement.text, ())
    return lines


def _scores(response: Response, candidate: Candidate) -> str:
    by_judge: dict[str, list[str]] = {}
    for judgement in response.judgements:
        judge = f"{judgement.judge}, {judgement.source}"
        by_judge.setdefault(judge, []).append(_said(judgement, candidate))
    said = ", ".join(f"{', '.join(scores)} ({judge})" for judge, scores in by_judge.items())
    cut = "; cut off" if candidate.finished is False else ""
    words = "parts of a score" if response.has_parts else "no score"
    words = words if response.score is None else f"score {number(response.score)}"
    [one, *others] = response.judgements
    is_itself = not others and words == f"score {_said(one, candidate)}"
    words = f"score {said}" if is_itself else f"{words} of {said}"
    gain = "" if response.advantage is None else f", advantage {signed(response.advantage)}"
    return f"          {words}{gain}{cut}"


def _said(judgement: Judgement, candidate: Candidate) -> str:
    score = score_said_of(judgement, candidate.id)
    return judgement.reason or "no score" if score is None else number(score)


def _text(role: str, text: str | None, ids: Sequence[int]) -> list[str]:
    """A text in a few lines after its role; ids if there is no text."""
    words = f"ids {' '.join(map(str, ids))}" if text is None else _joined(text)
    width = WIDTH - len(role) - 2
    lines = textwrap.wrap(words, width) or ['""']
    if len(lines) > LINES_OF_TEXT:
        lines = [*lines[: LINES_OF_TEXT - 1], lines[LINES_OF_TEXT - 1][: width - 4] + " ..."]
    return [f"{role if i == 0 else ' ' * len(role)}  {line}" for i, line in enumerate(lines)]


def _joined(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True
    )


def _metric(metrics: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((line[key] for line in reversed(metrics) if key in line), None)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def stage_table(run: Run, stage: str) -> str:
    """A stage in lines: what it took; its data's numbers to the left, its curves' first and last
    values to the right. In several rounds `first` is of the first one. Records are not read.
    """
    figures = stage_figures(run, stage, records=False)
    named = in_order(set(figures.data), ROUNDS, "anchor/")
    data = [(key, number(figures.data[key])) for key in named]
    curves = []
    for key in in_order(set(figures.curves), CURVES, "\0"):
        values = [value for _, value in figures.curves[key]]
        first = number(values[0]) if len(values) > 1 else ""
        curves.append((key, first, number(values[-1])))
    right = aligned([("", "first", "last"), *curves], "<>") if curves else []
    left = aligned([("", ""), *data], "<>")[0 if curves else 1 :]
    width = max(map(len, left), default=0)
    lines = [f"  {a:{width}}    {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return "\n".join(printable(line, keep="") for line in (_stage_heading(figures), *lines))


def _stage_heading(figures: StageFigures) -> str:
    times = [f"{name} {tqdm.format_interval(seconds)}" for name, seconds in figures.seconds.items()]
    return f"{figures.name}: {figures.state}" + (f" in {' + '.join(times)}" if times else "")
