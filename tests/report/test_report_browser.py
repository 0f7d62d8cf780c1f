"""The report in a real Chromium: what it shows, how it is used, how it looks at several widths."""

import json
import time
from pathlib import Path

import pytest

from self_rewarding_lm import Run
from self_rewarding_lm.report.page import watch_report, write_report
from self_rewarding_lm.runs.lock import locked
from tests.report.test_report import HOSTILE, made_run, sampled, two_rounds
from tests.support.browser import MISSING, Browser

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

ARABIC = "مرحبا بالعالم"
LONG = "w" * 3000


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


def many_stages(folder: Path) -> Run:
    """Fourteen stages with long names; of the first prompt of each no pair was made."""
    stages = {}
    for i in range(14):
        name = f"self_reward_of_round_{i + 1}"
        told = [{"step": step, "loss": 1 / step, "grad_norm": 1e5 * step} for step in range(1, 40)]
        stages[name] = {
            **sampled(name, [["a", "b"], ["c", "d"], ["e", "f"]], [[3, 3], [4, 2], [1, 5]]),
            "config.json": {"stage": "SelfRewardDPOConfig", "settings": {"judge_prompt": "Rate. " * 99}},
            "metrics.jsonl": [{"step": 0, "judge/score_mean": i / 7, "pairs/kept": 123456}, *told],
            "events.jsonl": [
                {"time": 1e9 + 1e5 * i, "event": "begin"},
                {"time": 1e9 + 1e5 * i + 12345, "event": "done"},
            ],
        }  # fmt: skip
    return made_run(folder, stages)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run, two beside each other, many stages, hostile texts, a run that has hardly begun."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [two_rounds(folder / "a"), two_rounds(folder / "b" / LONG[:80])]
    texts = [[HOSTILE, LONG], [ARABIC, "b"]]
    held = {
        **sampled(LONG[:90], texts, [[5, 1], [2, 1]]),
        "config.json": {"stage": LONG, "settings": {"text": LONG, "init_from": LONG}},
        "events.jsonl": [{"time": 1.0, "event": "warning", "check": LONG, "words": HOSTILE + LONG}],
    }
    wide = made_run(folder / "wide", {LONG[:90]: held, **{f"stage-{i}": {} for i in range(12)}})
    return {
        "one": write_report([runs[0]], folder / "one.html"),
        "two": write_report(runs, folder / "two.html"),
        "many": write_report([many_stages(folder / "many")], folder / "many.html"),
        "wide": write_report([wide], folder / "wide.html"),
        "empty": write_report([made_run(folder / "e", {"sft": {}})], folder / "empty.html"),
    }


def shown(browser) -> str:
    return browser.run("document.getElementById('example').textContent")


def put(browser, name: str, value: str) -> str:
    """Fill a field of the filter; how many examples are left, in words."""
    browser.run(
        f"""(() => {{ const field = document.forms.filter.elements[{name!r}];
        field.value = {value!r}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"""
    )
    browser.run("new Promise((done) => setTimeout(done, 140))")  # it waits 120 for the next key
    return browser.run("document.getElementById('count').textContent")


def test_hostile_texts_are_shown_as_texts(browser, pages):
    browser.open(pages["wide"])
    text = shown(browser)
    assert "</script><script>window.pwned = 1</script><img src=x" in text
    assert "U+202E turned U+0000 end" in text and "U+2028 line U+001B[31m" in text
    assert browser.run("typeof window.pwned") == "undefined"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.problems() == []


OUTSIDE = """[...document.querySelectorAll('body *')].filter((e) => !e.closest('.wide, .skip, thead')
    && e.getClientRects().length && (e.getBoundingClientRect().right > innerWidth + 1
    || e.getBoundingClientRect().left < -1)).map((e) => e.outerHTML.slice(0, 200))"""
SCROLLED = """[...document.querySelectorAll('.wide')].filter((e) => e.scrollWidth > e.clientWidth + 1)
    .map((e) => e.textContent.slice(0, 99))"""
OVERLAPPING = """[...document.querySelectorAll('svg')].flatMap((svg) => {
    const texts = [...svg.querySelectorAll('text:not([transform])')];
    const boxes = texts.map((e) => e.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => a.left < b.right - 1
        && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        .map((b) => texts[i].textContent)); })"""


@pytest.mark.parametrize("name", ["one", "two", "many", "wide", "empty"])
def test_a_page_asks_for_nothing_and_fits_its_window_in_both_colours(browser, pages, name):
    browser.look(1400)
    browser.open(pages[name])
    for width in (1400, 390):
        for dark in (False, True):
            browser.look(width, dark=dark)
            ground = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") is not dark
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(OUTSIDE) == [] and browser.run(OVERLAPPING) == []
    browser.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.run(SCROLLED) == []  # at 390 pixels
    assert browser.run(OUTSIDE) == [] and browser.run(OVERLAPPING) == []
    assert browser.problems() == []


def test_the_button_changes_the_colours(browser, pages):
    browser.look(1400)
    browser.open(pages["one"])
    grounds = []
    for _ in range(2):
        browser.run("document.getElementById('theme').click()")
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(20, 22, 26)", "rgb(255, 255, 255)"]


def test_examples_are_filtered_by_stage_score_margin_pair_and_text(browser, pages):
    browser.look(1400)
    browser.open(pages["one"])
    clear = "document.forms.filter.reset()"
    for fields, left in (
        ({}, 4),
        ({"stage": "one"}, 3),
        ({"low": "4"}, 2),
        ({"low": "3", "high": "4"}, 2),
        ({"least": "3"}, 1),
        ({"most": "3"}, 1),
        ({"kind": "none"}, 2),
        ({"kind": "unread"}, 1),
        ({"text": "SAY 3 OF"}, 1),
        ({"text": "nobody wrote this"}, 0),
        ({"stage": "two", "kind": "pair"}, 1),
    ):
        browser.run(clear)
        told = put(browser, "text", "")
        for name, value in fields.items():
            told = put(browser, name, value)
        assert told == f"of {left}", fields
        assert ("No example is like that." in shown(browser)) is (left == 0)


def test_examples_are_put_in_order(browser, pages):
    browser.open(pages["one"])
    for order, first in (("-m", "one/0/0"), ("m", "two/0/0"), ("x", "one/2/0"), ("", "one/0/0")):
        put(browser, "order", order)
        assert shown(browser).startswith(f"Prompt {first}")


def test_examples_open_on_the_first_pair_and_show_it_first(browser, pages):
    browser.open(pages["many"])
    assert shown(browser).startswith("Prompt self_reward_of_round_1/1/0prompt 1")
    browser.run("document.getElementById('next').click()")
    titles = "[...document.querySelectorAll('#example h4')].map((e) => e.textContent)"
    assert browser.run(titles) == ["Candidate 1, score 5 CHOSEN", "Candidate 0, score 1 REJECTED"]


def test_examples_are_turned_over_by_keys_and_buttons(browser, pages):
    browser.open(pages["one"])
    browser.run("document.getElementById('viewer').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.press(key)
        seen.append(browser.run("document.querySelector('#example h3').textContent"))
    turned = ["one/1/0", "one/2/0", "two/0/0", "two/0/0", "one/2/0"]
    assert seen == [f"Prompt {name}" for name in turned]
    browser.run("document.getElementById('next').focus()")
    browser.press("Enter")
    assert shown(browser).startswith("Prompt two/0/0")
    assert browser.run("document.getElementById('next').disabled")
    browser.run("document.querySelector('[name=text]').focus()")
    browser.press("ArrowLeft")  # in a field the key is the field's
    assert shown(browser).startswith("Prompt two/0/0")


def test_a_page_is_read_again_while_its_run_goes_on_but_not_while_it_is_used(
    browser, tmp_path, monkeypatch
):
    """The test lets the time pass, in the page and for who writes it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    browser.page.add_init_script("window.setInterval = (tick) => { window.tick = tick; }")
    run = two_rounds(tmp_path / "run")
    written = watch_report([run.folder], None, 9)
    with locked(run.folder):
        browser.look(1400)
        browser.open(next(written))
        browser.run("document.getElementById('theme').click()")
        browser.run("document.getElementById('next').focus()")
        with (run.folder / "03-two" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 0, "judge/parse_rate": 0.9999}\n')
        next(written)
        browser.run("window.seen = true; tick()")
        browser.run("new Promise((done) => setTimeout(done, 100))")
        assert browser.run("window.seen") and "0.9999" not in browser.run(
            "document.body.textContent"
        )
        browser.run("document.activeElement.blur()")
        with browser.page.expect_navigation():
            browser.run("setTimeout(tick)")
        assert "0.9999" in browser.run("document.body.textContent")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    [*_] = written
    with browser.page.expect_navigation():
        browser.run("setTimeout(tick)")
    assert browser.run("window.tick") is None  # it is not read again
    browser.run("sessionStorage.clear()")


def test_two_runs_have_a_field_for_the_run_and_one_has_none(browser, pages):
    hidden = "document.getElementById('of-run').getClientRects().length === 0"
    browser.open(pages["one"])
    assert browser.run(hidden)
    browser.open(pages["two"])
    assert not browser.run(hidden)
    assert put(browser, "run", "1") == "of 4" and LONG[:80] in shown(browser)


def test_everything_can_be_reached_by_keyboard_and_shows_its_focus(browser, pages):
    browser.open(pages["one"])
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    reached = set()
    for _ in range(120):
        browser.press("Tab")
        told = browser.run(
            """(() => { const e = document.activeElement;
            return [e.id || e.name || e.tagName, getComputedStyle(e).outlineStyle]; })()"""
        )
        if told[0] == "BODY":
            break
        assert told[1] != "none", told
        reached.add(told[0])
    assert {"theme", "stage", "kind", "low", "most", "text", "viewer", "next", "words"} <= reached


def test_a_screen_reader_is_told_a_name_for_each_control_and_chart(browser, pages):
    browser.open(pages["two"])
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "searchbox", "combobox", "spinbutton", "checkbox", "link"}
    roles |= {"image", "img", "table", "navigation", "region", "main"}
    found = [n for n in nodes if not n.get("ignored") and n["role"]["value"] in roles]
    named = {n["role"]["value"] for n in found}
    assert {"spinbutton", "combobox", "table", "navigation", "main"} <= named
    bare = [n["role"]["value"] for n in found if not n.get("name", {}).get("value")]
    assert set(bare) <= {"main"}


def test_on_paper_there_are_numbers_and_no_controls(browser, pages):
    browser.look(800, dark=True, paper=True)
    browser.open(pages["one"])
    gone = "[...document.querySelectorAll('nav, form, button')].every((e) => !e.getClientRects().length)"
    assert browser.run(gone)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("document.querySelector('article').getClientRects().length") == 1
    browser.look(1400)


def big(folder, prompts: int):
    """Prompts with four candidates of 150 words and three judgements of 100 words each."""
    answer, words = " ".join(["answer"] * 150), " ".join(["because"] * 100)
    held = sampled("one", [[f"{i} {k} {answer}" for k in range(4)] for i in range(prompts)], [[1, 2, 3, 4]] * prompts)  # fmt: skip
    said = [
        {"id": f"{c.id}/j{k}", "candidate_ids": [c.id], "judge": "self", "score": k, "text": words}
        for c in held["candidates.jsonl"]
        for k in range(3)
    ]
    return made_run(folder, {"one": {**held, "judgements.jsonl": said}})


def test_one_example_is_in_the_page_however_many_there_are(browser, tmp_path):
    counts = []
    for prompts in (1, 60):
        page = write_report([big(tmp_path / str(prompts), prompts)], tmp_path / f"{prompts}.html")
        browser.open(page)
        counts.append(browser.run("document.querySelectorAll('*').length"))
    assert max(counts) < 600


@pytest.mark.slow
def test_two_thousand_prompts_open_in_three_seconds(browser, tmp_path):
    page = write_report([big(tmp_path / "run", 2000)], tmp_path / "page.html")
    taken = min(browser.open(page) for _ in range(3))
    print(json.dumps({"megabytes": page.stat().st_size / 1e6, "seconds": taken}))
    assert taken < 3
    start = time.monotonic()
    assert put(browser, "text", "1999 3 answer") == "of 1"
    assert time.monotonic() - start < 3
