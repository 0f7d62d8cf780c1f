"""The report: its figures against hand-made runs, its text against hostile ones, its page parsed."""

import errno
import io
import json
import logging
import math
import os
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from self_rewarding_lm import Check, ChecksConfig, Run, cli
from self_rewarding_lm.checks import Checker
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.records import (
    Candidate,
    Demonstration,
    Judgement,
    PreferencePair,
    Prompt,
    TrainingRow,
    to_json,
)
from self_rewarding_lm.report import page
from self_rewarding_lm.report.charts import bar_chart, line_chart, ticks
from self_rewarding_lm.report.examples import parts_of
from self_rewarding_lm.report.figures import histogram, run_figures, stage_figures, thinned
from self_rewarding_lm.report.markup import safe, tag
from self_rewarding_lm.report.page import report_at_end, write_report
from self_rewarding_lm.report.terminal import stage_table
from self_rewarding_lm.report.words import kind_words, reason_words, unit_of, words_of
from self_rewarding_lm.runs import stored
from self_rewarding_lm.runs.lock import locked
from self_rewarding_lm.runs.run import REPORT
from self_rewarding_lm.runs.stage_files import FORMAT
from self_rewarding_lm.runtime import LogHandler
from self_rewarding_lm.text import amount, duration, number
from tests.test_trainer import self_reward, sft, trainer_of

HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    "<!-- <script> \" ' & &lt; \u2028 line \x1b[31m \u202e turned \u0000 end"
)


def lines(path: Path, values) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def made_run(folder: Path, stages: dict, **info) -> Run:
    """A run directory: of each stage its files by name; records, lines of JSON, or a JSON value."""
    folder.mkdir(parents=True)
    names = [f"{i:02d}-{name}" for i, name in enumerate(stages, 1)]
    told = {"library": "self_rewarding_lm", "format": FORMAT, "stages": names, "seed": 0, **info}
    (folder / "run.json").write_text(json.dumps(told))
    for name, held in zip(names, stages.values(), strict=True):
        (folder / name).mkdir()
        for file, value in held.items():
            path = folder / name / file
            if file.endswith(".json"):
                path.write_text(json.dumps(value))
            else:
                lines(path, [v if isinstance(v, dict) else to_json(v) for v in value])
    return Run.open(folder)


def sampled(stage: str, texts: list[list[str]], scores: list[list[float | None]]) -> dict:
    """Prompts with candidates, one judgement each, and pairs of best and worst where they differ."""
    prompts, candidates, judgements, pairs = [], [], [], []
    for row, (own, said) in enumerate(zip(texts, scores, strict=True)):
        prompt = Prompt(f"{stage}/{row}/0", row, (1, 2, 3), f"prompt {row} {own[0]}")
        made = [
            Candidate(f"{prompt.id}/{k}", prompt.id, (5,) * (k + 1), text, k > 0, 8)
            for k, text in enumerate(own)
        ]
        judgements += [
            Judgement(
                f"{c.id}/j0", (c.id,), "self", score, None if score is not None else "no_score",
                f"I say {score} of {c.text}", "sampled",
            )
            for c, score in zip(made, said, strict=True)
        ]  # fmt: skip
        known = [(score, c) for score, c in zip(said, made, strict=True) if score is not None]
        high, low = (f(known, key=lambda one: one[0]) for f in (max, min))
        if high[0] > low[0]:
            pairs.append(
                PreferencePair(
                    prompt.id, prompt.ids, high[1].ids, low[1].ids, prompt.text, high[1].text,
                    low[1].text, high[1].id, low[1].id, high[0], low[0],
                )
            )  # fmt: skip
        prompts.append(prompt)
        candidates += made
    return {
        "prompts.jsonl": prompts,
        "candidates.jsonl": candidates,
        "judgements.jsonl": judgements,
        "pairs.jsonl": pairs,
    }


def two_rounds(folder: Path) -> Run:
    """An SFT stage and two rounds; the second is not done."""
    first = {
        **sampled("one", [["aa", "bb"], ["cc", "dd"], ["ee", "ff"]], [[5, 1], [3, 3], [None, 2]]),
        "config.json": {"stage": "SelfRewardDPOConfig", "settings": {"init_from": "previous"}},
        "metrics.jsonl": [
            {"step": 0, "judge/tie_rate": 0.5, "pairs/kept": 1, "pairs/dropped_tie": 1},
            {"step": 1, "loss": 0.7, "num_tokens": 10.0, "rewards/accuracies": 0.5},
            {"step": 2, "loss": 0.5, "num_tokens": 14.0, "rewards/accuracies": 1.0},
            {"step": 2, "anchor/accuracy": 0.75},
        ],
        "events.jsonl": [
            {"time": 100.0, "event": "begin"},
            {"time": 107.0, "event": "stopped", "words": "Interrupted: stopped"},
            {"time": 200.0, "event": "begin"},
            {"time": 200.5, "event": "warning", "check": "ties", "seen": 0.95, "limit": 0.9,
             "words": "many prompts tie."},
            {"time": 220.0, "event": "micro_batch", "tokens": 512},
            {"time": 230.0, "event": "training"},
            {"time": 250.0, "event": "micro_batch", "tokens": 256},
            {"time": 290.0, "event": "trained"},
            {"time": 291.0, "event": "done"},
        ],
        "done.json": {"pairs": 1, "steps": 2},
    }  # fmt: skip
    second = {
        **sampled("two", [["gg", "hh"]], [[4, 2]]),
        "config.json": {"stage": "SelfRewardDPOConfig", "settings": {"init_from": "sft"}},
        "metrics.jsonl": [{"step": 0, "judge/tie_rate": 0.25}, {"step": 0, "anchor/accuracy": 0.5}],
        "events.jsonl": [
            {"time": 300.0, "event": "begin"},
            {"time": 400.0, "event": "begin"},
            {"time": 410.0, "event": "stopped", "words": "JudgeError: only 3 of 64 could be read"},
        ],
    }
    sft_stage = {
        "config.json": {"stage": "SFTConfig", "settings": {"init_from": "previous"}},
        "rows.jsonl": [TrainingRow("sft/0", (1, 2), (False, True))],
        "done.json": {"rows": 1},
    }
    return made_run(folder, {"sft": sft_stage, "one": first, "two": second})


class Page(HTMLParser):
    """A page as a browser would read it: elements with attributes, scripts, text, what is open."""

    VOID = ("meta", "input", "br", "img", "link", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text, self._open, self.wrong = "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open and not self.wrong

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open[-1] == "option" and tag != "option":
            self._open.pop()
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif not self._open or self._open[-1] != "style":
            self.text += data

    @property
    def examples(self) -> list[dict]:
        return json.loads(self.scripts[1])


def test_figures_of_a_stage_are_those_of_its_files(tmp_path):
    first = run_figures(two_rounds(tmp_path / "run"), "run").stages[1]
    assert (first.kind, first.state, first.start) == ("SelfRewardDPOConfig", "done", "sft")
    assert first.counts == {
        "prompts": 3, "candidates": 6, "judgements": 6, "pairs": 1, "steps": 2,
    }  # fmt: skip
    assert first.tokens["prompts"] == 9 and first.tokens["sampled"] == 3 * (1 + 2)
    assert first.tokens["trained"] == 24
    assert first.tokens["judge_characters"] == sum(
        len(f"I say {s} of {t}")
        for s, t in ((5, "aa"), (1, "bb"), (3, "cc"), (3, "dd"), (None, "ee"), (2, "ff"))
    )
    assert first.curves["loss"] == [(1, 0.7), (2, 0.5)]
    assert first.data["anchor/accuracy"] == 0.75 and "anchor/accuracy" not in first.curves
    assert first.dropped == {"pairs/dropped_tie": 1}
    assert (first.data["pairs/chosen_length"], first.data["pairs/rejected_length"]) == (1, 2)
    assert first.scores.values == (1, 2, 3, 5) and first.scores.counts == (1, 1, 2, 1)


def test_scores_and_margins_are_those_of_each_prompt(tmp_path):
    """A prompt with one score has no margin; 0.7 and 0.4 are as far apart as 0.4 and 0.1."""
    texts = [["a", "b", "c"], ["d", "e"], ["f", "g"], ["h", "i"]]
    held = sampled("m", texts, [[5, 1, 3], [None, 2], [0.7, 0.4], [0.4, 0.1]])
    more = [
        replace(j, id=j.id.replace("/j0", "/j1"), score=1) for j in held["judgements.jsonl"][:1]
    ]
    held["judgements.jsonl"] += more  # the first candidate's score is their mean, 3
    run = made_run(tmp_path / "run", {"m": held, "n": {**sampled("n", [["a", "b"]], [[4, 4]])}})
    stage, other = run_figures(run, "run").stages
    means = [pytest.approx(0.25), pytest.approx(0.55), pytest.approx(7 / 3)]
    assert [mean for _, mean, _ in stage.prompt_scores] == means
    assert [(low, best) for low, _, best in stage.prompt_scores] == [(0.1, 0.4), (0.4, 0.7), (1, 3)]
    assert (stage.margins.values, stage.margins.counts) == ((0.3, 2.0), (2, 1))
    assert not stage.has_pair_margins and other.margins.values == (0.0,)
    page = Page(write_report([run]))
    for words in ("Margins: best score of a prompt minus its worst", "Scores by prompt"):
        assert words in page.text
    assert "best: 0.4 at prompt, in the order of mean scores 1, 3 at" in page.text


def test_margins_of_an_ensemble_are_those_of_its_pairs(tmp_path):
    held = sampled("m", [["a", "b"], ["c", "d"]], [[5, 1], [4, 2]])
    judged = held["judgements.jsonl"]
    held["judgements.jsonl"] = [
        replace(j, id=j.id.replace("/j0", f"/m{k}/j0")) for j in judged for k in (0, 1)
    ]
    [stage] = run_figures(made_run(tmp_path / "run", {"m": held}), "run").stages
    assert stage.prompt_scores == [] and stage.has_pair_margins
    assert (stage.margins.values, stage.margins.counts) == ((2.0, 4.0), (1, 1))


def test_of_a_prompt_numbers_are_kept_and_no_records(tmp_path):
    """Peaks of memory for 100 and for 500 prompts with eight candidates each, in bytes a prompt."""

    def peak(count: int) -> int:
        texts = [[f"{row} {k}" for k in range(8)] for row in range(count)]
        scores = [[float(k) for k in range(8)] for _ in range(count)]
        run = made_run(tmp_path / str(count), {"one": sampled("one", texts, scores)})
        tracemalloc.start()
        stage = stage_figures(run, run.stages[0])
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(stage.prompt_scores) == count
        return used

    peak(10)  # what is made once
    assert (peak(500) - peak(100)) / 400 < 2000


def test_the_page_begins_with_what_the_run_took_in_all(tmp_path):
    run = two_rounds(tmp_path / "run")
    figures = run_figures(run, "run")
    assert figures.seconds == 7 + 30 + 1 + 60 + 10
    names = ("prompts", "pairs", "steps", "sampled", "trained")
    assert [figures.totals[name] for name in names] == [4, 2, 2, 12, 24]
    told = "".join(Page(write_report([run])).text.split())
    assert "totaltime1min48sandastoppedattemptofunknownlengthprompts4pairs2steps2" in told
    nothing = run_figures(made_run(tmp_path / "new", {"sft": {}}), "new")
    assert nothing.seconds is None and nothing.totals == {}


def test_a_page_is_written_again_while_its_run_goes_on_and_then_once_more(tmp_path):
    run = two_rounds(tmp_path / "run")
    written = page.watch_report([run.folder], None, 9, every=0.01)
    with locked(run.folder):
        path = next(written)
        assert 'data-every="0.01"' in path.read_text() and "0.9999" not in path.read_text()
        with (run.folder / "03-two" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 0, "judge/parse_rate": 0.9999}\n')
        assert "0.9999" in next(written).read_text()
    assert [*written] == [path] and "data-every" not in path.read_text()
    assert [*page.watch_report([run.folder], None, 9)] == [path]  # no run is at work
    with locked(run.folder):
        stopped = page.watch_report([run.folder], tmp_path / "out.html", 9, every=0.01)
        path = next(stopped)
        stopped.close()  # as a key does
        assert "data-every" not in path.read_text()


def test_times_are_those_between_events_and_a_stopped_attempt_counts(tmp_path):
    """7 s of an attempt that was stopped, 30 s of data, 60 s of training, 1 s after it."""
    _, first, second = run_figures(two_rounds(tmp_path / "run"), "run").stages
    assert first.seconds == {"data": 7 + 30 + 1, "training": 60} and first.lost == 0
    assert first.stopped is None
    assert second.seconds == {"data": 10} and second.lost == 1
    assert second.stopped == "JudgeError: only 3 of 64 could be read"
    assert second.state == "not done"


def test_a_stage_starts_from_what_its_settings_say(tmp_path):
    def settings(start):
        return {"config.json": {"stage": "SFTConfig", "settings": {"init_from": start}}}

    starts = {"a": "previous", "b": "previous", "c": "initial", "d": "a", "e": "/some/where"}
    run = made_run(tmp_path / "run", {name: settings(s) for name, s in starts.items()})
    found = [stage.start for stage in run_figures(run, "run").stages]
    assert found == ["the given model", "a", "the given model", "a", "/some/where"]


def test_a_histogram_counts_by_value_or_in_bars_of_one_width():
    assert histogram([]) is None
    assert histogram([2.0, 1.0, 2.0]).counts == (1, 2)
    many = histogram([i / 2 for i in range(41)])  # 0 to 20 in twenty bars of one
    assert many.values == () and many.edges == tuple(map(float, range(21)))
    assert many.counts == (*[2] * 19, 3) and sum(many.counts) == 41


def test_long_curves_are_means_of_steps_one_after_the_other():
    points, width = thinned([(i, float(i)) for i in range(1, 601)])
    assert width == 2 and len(points) == 300
    assert points[0] == (2, 1.5) and points[-1] == (600, 599.5)
    assert thinned([(1, math.nan), (2, 3.0)]) == ([(2, 3.0)], 1)
    assert thinned([]) == ([], 1)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 1, [0, 0.5, 1]), (0, 4, [0, 1, 2, 3, 4]), (-3, 95, [-50, 0, 50, 100]), (2, 2, [1, 1.5, 2, 2.5, 3])],
)  # fmt: skip
def test_ticks_are_round_and_hold_all_values(low, high, found):
    assert ticks(low, high, 4) == pytest.approx(found)


def test_ticks_of_tiny_numbers_are_as_few_as_those_of_others():
    """There were thirteen: what is allowed for rounding was larger than the numbers."""
    found = ticks(3e-16, 1.2e-15, 4)
    assert found == pytest.approx([0, 5e-16, 1e-15, 1.5e-15])


def test_numbers_and_times_are_written_for_people():
    assert [number(x) for x in (None, 1234567, 0.123456, 2.0, math.nan, -3)] == [
        "unknown", "1,234,567", "0.1235", "2", "nan", "-3",
    ]  # fmt: skip
    assert [duration(x) for x in (None, 1.25, 59.9, 125, 7260)] == [
        "unknown", "1.2 s", "59.9 s", "2 min 5 s", "2 h 1 min",
    ]  # fmt: skip
    assert [amount(x, "row") for x in (0, 1, 2, 2000)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "2,000 rows",
    ]
    assert [amount(x, "reply", "replies") for x in (1, 2)] == ["1 reply", "2 replies"]


def test_text_is_escaped_and_what_steers_is_shown_by_its_number():
    assert tag("p", "<b>&\"'") == "<p>&lt;b&gt;&amp;&quot;&#x27;</p>"
    assert tag("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    assert safe("a\u202eb\x1b\u2028\ud800\n\t") == "a[U+202E]b[U+001B][U+2028][U+D800]\n\t"
    assert safe("عربي 👩‍👩‍👧 é") == "عربي 👩‍👩‍👧 é"


def test_the_page_holds_hostile_texts_as_data_alone(tmp_path):
    stage = {
        **sampled("one", [[HOSTILE, "b"]], [[5, 1]]),
        "config.json": {"stage": HOSTILE, "settings": {HOSTILE: HOSTILE}},
        "metrics.jsonl": [{"step": 1, "loss": 0.5, HOSTILE: 1.0}, {"step": 0, "anchor/<b>": 1.0}],
        "events.jsonl": [{"time": 1.0, "event": "warning", "check": HOSTILE, "words": HOSTILE}],
    }
    name = "one<img src=x>"
    run = made_run(tmp_path / "<i>run", {name: stage}, model={"class": HOSTILE}, created=HOSTILE)
    path = write_report([run], tmp_path / "page.html")
    page = Page(path)
    assert [example["c"][0]["t"] for example in page.examples] == [HOSTILE]
    assert page.examples[0]["c"][0]["j"][0]["t"] == f"I say 5 of {HOSTILE}"
    assert len(page.scripts) == 3 and "pwned" not in page.scripts[2]
    names = {name for name, _ in page.tags}
    assert not names & {"img", "link", "iframe", "object", "b", "i"}
    assert page.text.count("window.pwned = 1") >= 2  # the warning is told, as a text
    assert not set("\u202e\u2028\x1b\x00") & set(path.read_text())


def test_the_page_asks_for_nothing_and_lets_only_its_own_script_run(tmp_path):
    page = Page(write_report([two_rounds(tmp_path / "run")]))
    for name, attributes in page.tags:
        assert not any(
            key.startswith("on") or key in ("src", "style", "srcset") for key in attributes
        )
        assert attributes.get("href", "#").startswith("#"), (name, attributes)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    own = "".join(files("self_rewarding_lm.report").joinpath(f"report.{k}").read_text() for k in ("css", "js"))  # fmt: skip
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|insertAdjacent|eval|fetch", own)


def test_headings_come_in_order_and_ids_are_given_once(tmp_path):
    page = Page(write_report([two_rounds(tmp_path / "run")]))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert [n for n, _ in page.tags if n in ("header", "nav", "main")] == ["header", "nav", "main"]
    links = [a["href"][1:] for n, a in page.tags if n == "a"]
    pointed = [i for _, a in page.tags for i in a.get("aria-labelledby", "").split()]
    assert {*links, *pointed} <= set(ids)
    assert all("scope" in a for n, a in page.tags if n == "th")
    charts = [a for n, a in page.tags if n == "svg" and "aria-hidden" not in a]
    assert charts and all(a["role"] == "img" and a["aria-labelledby"] for a in charts)


def test_the_page_says_what_is_known_and_what_is_not(tmp_path):
    page = Page(write_report([two_rounds(tmp_path / "run")]))
    for words in (
        "2 of 3 stages done",
        "one: many prompts tie",
        "Seen: 0.95, limit: 0.9.",
        "Share of prompts whose best and worst candidate have the same score",
        "the last attempt was ended",
        "JudgeError: only 3 of 64 could be read",
        "10.0\xa0s and a stopped attempt of unknown length",
        "Pairs: best and worst score are equal",
        "Anchor: accuracy",
        "self reward DPO",
        "All 4 examples.",
    ):
        assert words in page.text, words
    assert "one: 0.5 at one" not in page.text and "run: 0.5 at one, 0.25 at two" in page.text


def test_examples_hold_scores_judgements_and_the_pair(tmp_path):
    examples = Page(write_report([two_rounds(tmp_path / "run")])).examples
    assert [(e["s"], e["m"]) for e in examples] == [
        ("one", 4),
        ("one", None),
        ("one", None),
        ("two", 2),
    ]
    first, _, third, _ = examples
    assert [(c["n"], c["x"], c["l"], c["k"]) for c in first["c"]] == [
        ("0", 5, "chosen", 1),
        ("1", 1, "rejected", 2),
    ]
    assert first["c"][0]["e"] == "cut off" and "e" not in first["c"][1]
    assert third["c"][0]["j"] == [
        {"b": "self, sampled", "x": None, "r": "no score in it", "t": "I say None of ee"}
    ]


def test_examples_of_pairs_and_demonstrations_alone_and_of_comparisons(tmp_path):
    pair = PreferencePair("dpo/0", (1,), (2,), (3, 4), "p", "good", None)
    made = Demonstration("eft/0", (1,), (2,), "asked", "learn this")
    compared = sampled("cmp", [["a", "b"]], [[1, 0]])
    ids = [c.id for c in compared["candidates.jsonl"]]
    compared["judgements.jsonl"] = [
        Judgement("cmp/0/0/0/j0", (ids[0], ids[1]), "self", 1.0, source="compared", text="first"),
        Judgement("cmp/0/0/1/j0", (ids[1], ids[0]), "self", 0.0, source="compared", text="second"),
    ]
    stages = {
        "dpo": {"pairs.jsonl": [pair]},
        "eft": {"demonstrations.jsonl": [made]},
        "cmp": compared,
    }
    one, two, three = Page(write_report([made_run(tmp_path / "run", stages)])).examples
    assert [(c["t"], c["l"]) for c in one["c"]] == [
        ("good", "chosen"),
        ("token ids 3 4", "rejected"),
    ]
    assert (two["p"], two["c"][0]["t"], two["c"][0]["l"]) == ("asked", "learn this", "learnt")
    assert [(c["x"], [j["x"] for j in c["j"]]) for c in three["c"]] == [(1, [1, 1]), (0, [0, 0])]
    assert three["c"][1]["j"][0]["b"] == "self, compared with 0, shown second"


def test_spin_rows_are_shown_once_with_their_own_answers(tmp_path):
    """The rows are prompts without answers; each iteration's prompts are others, with answers."""
    rows = [Prompt("spin/0", 0, (1,), "p", completion=(2,)), Prompt("spin/0/0", 0, (1,), "p")]
    own = Candidate("spin/0/0/0", "spin/0/0", (3,), "mine", True, 4)
    pair = PreferencePair("spin/0/0", (1,), (2,), (3,), "p", "theirs", "mine", None, own.id)
    held = {"prompts.jsonl": rows, "candidates.jsonl": [own], "pairs.jsonl": [pair]}
    [example] = Page(write_report([made_run(tmp_path / "run", {"spin": held})])).examples
    assert [(c["t"], c["l"]) for c in example["c"]] == [("mine", "rejected"), ("theirs", "chosen")]


def test_a_page_holds_as_many_examples_as_it_may_and_says_so(tmp_path):
    few, many = (
        sampled(name, [["a", "b"]] * n, [[1, 0]] * n) for name, n in (("few", 2), ("many", 20))
    )
    run = made_run(tmp_path / "run", {"few": few, "many": many})
    few_part, many_part = parts_of([run], 7)
    assert list(few_part.places) == [0, 1] and list(many_part.places) == [0, 4, 8, 12, 16]
    page = Page(write_report([run], tmp_path / "p.html", examples=7))
    assert len(page.examples) == 7 and "7 of 22 examples. 15 more are left out" in page.text
    assert "20" in page.text  # all prompts are counted
    assert Page(write_report([run], tmp_path / "none.html", examples=0)).examples == []


@pytest.mark.parametrize("stages", [{}, {"sft": {}}, {"sft": {"config.json": {}}}])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, stages):
    page = Page(write_report([made_run(tmp_path / "run", stages or {"sft": {}})]))
    assert "0 of 1 stage done" in page.text and "No stage has examples" in page.text


def test_a_record_that_is_being_written_is_left_out(tmp_path):
    run = two_rounds(tmp_path / "run")
    with (run.folder / "03-two" / "candidates.0.jsonl").open("w") as file:
        file.write('{"id": "two/0/0/2", "prompt_id": "two/0')
    assert run_figures(run, "run").stages[2].counts["candidates"] == 2
    assert len(Page(write_report([run])).examples) == 4


def test_two_runs_stand_side_by_side(tmp_path):
    one, other = two_rounds(tmp_path / "a"), two_rounds(tmp_path / "b")
    path = other.folder / "02-one" / "config.json"
    path.write_text(json.dumps({"stage": "X", "settings": {"init_from": "previous", "beta": 0.2}}))
    page = Page(write_report([one, other.folder]))
    assert "settings that differ" in page.text and "settings.beta" in page.text
    assert "a: 0.5 at one, 0.25 at two" in page.text and "b: 0.5 at one, 0.25 at two" in page.text
    assert {e["r"] for e in page.examples} == {0, 1} and json.loads(page.scripts[0]) == ["a", "b"]
    styles = {a["class"] for n, a in page.tags if n == "polyline"}
    assert styles == {"line s0", "line s1", "line s2"}  # runs, and best, mean and worst of prompts


def test_names_of_the_code_are_words_on_the_page():
    kinds = {
        "SelfRewardDPOConfig": "self reward DPO",
        "BuildEFTConfig": "build EFT",
        "Mine": "mine",
    }
    assert {kind: kind_words(kind) for kind in kinds} == kinds
    numbers = {
        "eval/nll": ("Held out: NLL of chosen, per token", "NLL"),
        "anchor/spearman": ("Anchor: spearman", "spearman"),
        "candidates/dropped_unfinished": ("Candidates: cut off before the end", "dropped unfinished"),
        "pairs/judge_dropped_my_own": ("Pairs, judge: my own", "tokens"),
        "meta/tie_rate": ("Comparisons of judgements that tie", "tie rate"),
        "eval/rewards/accuracies": (
            "Held out: pairs whose chosen response has the higher implicit reward", "share of pairs",
        ),
    }  # fmt: skip
    assert {key: (words_of(key), unit_of(key)) for key in numbers} == numbers
    assert reason_words("no_score") == "no score in it" and reason_words("too_long") == "too long"


def test_a_chart_has_two_points_at_least_and_names_at_its_axes():
    one = [("run", 0, [(1.0, 2.0)])]
    assert line_chart("k", "t", one, across="step", up="loss") is None
    assert bar_chart("k", "t", [("4", 9.0)], across="score", up="judgements") is None
    two = [("a", 0, [(1.0, 2.0), (2.0, 3.0)]), ("b", 1, [(1.0, 2.0)])]
    for chart in (
        line_chart("k", "t", two, across="step", up="loss"),
        bar_chart("k", "t", [("0 to 1", 3.0), ("1 to 2", 1.0)], across="step", up="loss", edges=[0, 10, 20]),
    ):  # fmt: skip
        assert ">step</text>" in chart.svg and ">loss</text>" in chart.svg
        assert "0.5<" not in chart.svg and "1.5<" not in chart.svg  # there is no half step or count


def test_long_names_below_an_axis_are_aslant_and_keep_their_end():
    names = [f"self_reward_of_the_round_{i}" for i in range(14)]
    line = [("run", 0, [(float(i), 1.0) for i in range(14)])]
    svg = line_chart("k", "t", line, across="stage", up="score", names=names).svg
    labels = re.findall(r'<text[^>]*transform="rotate[^>]*>([^<]*)<', svg)
    assert len(labels) == 14 == len(set(labels)) and all("…" in label for label in labels)
    assert labels[-1].endswith("_13")
    few = line_chart("k", "t", line, across="stage", up="score", names=["M1", "M2"] * 7).svg
    assert "rotate" not in few


def test_numbers_of_one_step_are_a_table_and_no_charts(tmp_path):
    stage = {
        **sampled("one", [["a", "b"]], [[3, 3]]),
        "metrics.jsonl": [{"step": 1, "loss": 0.5, "num_tokens": 7.0}],
    }
    page = Page(write_report([made_run(tmp_path / "run", {"one": stage})]))
    assert "svg" not in {name for name, _ in page.tags}
    words = "".join(page.text.split())
    assert "NumberswithonevaluenumbervalueLoss0.5Tokensofastep7Scores3(2times)" in words


def test_rounds_of_a_stage_stand_one_after_the_other(tmp_path):
    """They were curves of the training, and the last one alone was a number of the data."""
    lines = [
        {"step": 0, "judge/tie_rate": 0.5, "eval/loss": 2.0, "round": 0},
        {"step": 1, "loss": 0.7, "round": 0},
        {"step": 1, "judge/tie_rate": 0.25, "eval/loss": 1.0, "round": 1},
        {"step": 2, "loss": 0.6, "round": 1},
    ]
    run = made_run(tmp_path / "run", {"m": {"metrics.jsonl": lines}})
    [stage] = run_figures(run, "run").stages
    assert stage.rounds == [{"judge/tie_rate": 0.5}, {"judge/tie_rate": 0.25}]
    assert "round" not in stage.curves
    text = Page(write_report([run])).text
    assert "run: 0.5 at m, round 1, 0.25 at m, round 2" in text
    assert "run: 2 at step 0, 1 at step 1" in text and "Round" not in text


@pytest.mark.parametrize(
    ("words", "first", "rest"),
    [
        ("many prompts tie.", "many prompts tie", ""),
        ("both fall (by 0.5 on average). Less is more.", "both fall", "By 0.5 on average. Less is more."),
        ("a (b (c)). d", "a", "(b (c)). d"),
        ("step 0.5 is it", "step 0.5 is it", ""),
    ],
)  # fmt: skip
def test_a_warning_begins_with_what_was_seen(tmp_path, words, first, rest):
    event = {
        "time": 1.0,
        "event": "warning",
        "check": "ties",
        "seen": 1.0,
        "limit": 0.5,
        "words": words,
    }
    run = made_run(tmp_path / "run", {"m": {"events.jsonl": [event]}})
    assert f"m: {first}{rest}\nSeen: 1, limit: 0.5." in Page(write_report([run])).text


def test_wrong_use_is_an_error_in_words(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([])
    with pytest.raises(StoreError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="0 or more"):
        write_report([two_rounds(tmp_path / "run")], examples=-1)


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    run = two_rounds(tmp_path / "run")
    assert cli.main(["report", str(run.folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run.folder / "report.html")
    out = tmp_path / "both.html"
    assert cli.main(["report", str(run.folder), str(run.folder), "--out", str(out), "--examples", "1"]) == 0  # fmt: skip
    assert len(Page(out).examples) == 1
    assert cli.main(["report", str(run.folder), "--watch"]) == 0  # it is at rest
    assert capsys.readouterr().out.splitlines()[-1] == str(run.folder / "report.html")
    assert cli.main(["report", str(tmp_path)]) == 1 and "holds no run" in capsys.readouterr().err


def test_a_run_writes_its_report_events_and_warnings(tmp_path):
    checks = ChecksConfig(few_pairs=Check(limit=1.0))
    stages = [
        sft(num_train_steps=10),
        self_reward(num_generated_preference_pairs=99, max_prompt_passes=1, checks=checks),
    ]
    run = trainer_of(tmp_path, stages)()
    _, second = run_figures(run, "run").stages
    told = run.events(0)
    assert [e["event"] for e in told] == ["begin", "ways", "training", "trained", "done"]
    generating, training = told[1]["words"]
    assert generating.startswith("generation: without a cache, a whole forward a token (")
    assert training == "training: padded rows, all logits at once (the model gives logits alone)"
    assert {"few_pairs"} <= {w["check"] for w in second.warnings}
    assert set(second.seconds) == {"data", "training"} and second.lost == 0
    page = Page(tmp_path / "report.html")
    assert "Setting: checks.few_pairs." in page.text and len(page.examples) == 10
    off = tmp_path / "off"
    trainer_of(off, [sft()], report=False)()
    assert not (off / "report.html").exists()


@pytest.mark.parametrize(
    "name", [None, REPORT, "01-sft/metrics.jsonl", "02-self_reward/pairs.jsonl"]
)
def test_a_report_is_written_again_only_if_something_changed(tmp_path, monkeypatch, name):
    """name: the file that changed between two calls, or the report that is gone."""
    stages = [sft(), self_reward()]
    run = trainer_of(tmp_path, stages)()
    written = []
    monkeypatch.setattr(page, "write_report", lambda runs: written.append(runs[0].folder))
    if name == REPORT:
        (tmp_path / name).unlink()
    elif name is not None:
        os.utime(tmp_path / name)
    trainer_of(tmp_path, stages)()
    assert written == ([] if name is None else [run.folder])


def test_a_finished_run_reads_no_record_again(tmp_path, monkeypatch):
    stages = [sft(), self_reward()]
    trainer_of(tmp_path, stages)()
    monkeypatch.setattr(stored.Stored, "_opened", lambda self: pytest.fail("records are read"))
    trainer_of(tmp_path, stages)()


def test_a_stage_that_ends_in_an_error_tells_it(tmp_path):
    def breaks(ids):
        raise ValueError("no reward today")

    from tests.test_trainer import external

    with pytest.raises(ValueError, match="no reward today"):
        trainer_of(tmp_path, [external(reward_model=breaks)])(rehearse=False)
    [stage] = run_figures(Run.open(tmp_path), "run").stages
    assert stage.stopped == "ValueError: no reward today" and stage.state == "not done"
    assert "no reward today" in Page(write_report([tmp_path])).text


def test_a_report_that_fails_loses_no_run(tmp_path, caplog):
    run = two_rounds(tmp_path / "run")
    (run.folder / "03-two" / "pairs.jsonl").write_text("no json\n")
    report_at_end(run)
    assert "could not be written" in caplog.text and "self-rewarding-lm report" in caplog.text
    assert not (run.folder / REPORT).exists()


def test_a_checker_tells_its_warnings_once_and_errors_not():
    told = []
    checker = Checker(
        ChecksConfig(ties=Check(action="error")), "s", tell=lambda event, **words: told.append((event, words))
    )  # fmt: skip
    for seen in (0.97, 0.99):
        checker.failing("one_score", seen, "one score.")
    assert checker.failing("ties", 1.0, "all tie.") is not None
    words = {"check": "one_score", "seen": 0.97, "limit": 0.95, "words": "one score."}
    assert told == [("warning", words)]


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2.2 has it."""
    full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_ground():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    style = files("self_rewarding_lm.report").joinpath("report.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r"\{[^{}]*--paper:[^{}]*\}", style)]  # fmt: skip
    light, dark, chosen, _ = themes
    assert dark == chosen
    for theme in (light, dark):
        for ground in (theme["paper"], theme["card"]):
            for name in ("ink", "soft", "link", "good", "bad", "warn"):
                assert contrast(theme[name], ground) >= 4.5, (name, theme[name])
            assert all(contrast(theme[f"s{i}"], ground) >= 3 for i in range(6))


def make_read_only(monkeypatch) -> None:
    """From now on nothing can be written or deleted, as on a disk that is mounted so."""

    def refused(path, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path, mode="r", *args, **options):
        open_or_not = open_file if mode in ("r", "rb") else refused
        return open_or_not(path, mode, *args, **options)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", opened)
    for name in ("unlink", "mkdir", "replace", "write_text"):
        monkeypatch.setattr(Path, name, refused)


@pytest.mark.parametrize(
    "command", [["report"], ["report", "--out", "report.html"], ["export", "--stage", "one"]]
)
def test_a_disk_that_is_read_only_is_said_in_words(command, tmp_path, capsys, monkeypatch):
    run = two_rounds(tmp_path / "run")
    make_read_only(monkeypatch)
    to = ["--to", str(tmp_path / "rows.jsonl")] if command[0] == "export" else []
    assert cli.main([command[0], str(run.folder), *command[1:], *to]) == 1
    words = r"error: .*(report\.html|rows\.jsonl) could not be written: .*Read-only.* another place"
    assert re.search(words, capsys.readouterr().err)


def test_what_others_wrote_steers_no_terminal(tmp_path, capsys):
    """Ids, reasons, metric names, judge names and times among it."""
    evil = "\x1b[2J\x1b]0;mine\x07\u202e\x9b31m\r"
    held = sampled(f"one{evil}", [["a", f"b{evil}"]], [[5, 1]])
    held["candidates.jsonl"][0] = replace(held["candidates.jsonl"][0], reason=f"refused{evil}")
    held["judgements.jsonl"] = [
        replace(j, judge=f"self{evil}", source=f"given{evil}", score=None, reason=f"no{evil}")
        for j in held["judgements.jsonl"]
    ]
    named = {"step": 0, f"pairs/dropped_{evil}": 3, f"anchor/{evil}": 2.0, f"more{evil}": 1}
    held["metrics.jsonl"] = [named, {"step": 1, "loss": 0.5}]
    run = made_run(
        tmp_path / "run", {"one": held}, model={"class": f"A{evil}"}, created=evil, seed=evil
    )
    logger = logging.getLogger("self_rewarding_lm.tests")
    stream = io.StringIO()
    handler = LogHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("the server said %s\n\tand %s", f"evil{evil}", "é")
    finally:
        logger.removeHandler(handler)
    assert cli.main(["show", str(run.folder)]) == 0
    assert cli.main(["show", f"{tmp_path}/none{evil}"]) == 1
    told = capsys.readouterr()
    for text in (stage_table(run, "one"), stream.getvalue(), told.out, told.err):
        assert all(c.isprintable() or c in "\n\t" for c in text) and text
    assert "self\ufffd[2J" in told.out and "none\ufffd[2J" in told.err
    assert stream.getvalue().endswith("\n\tand é\n")
