"""The site as a reader finds it: the landing page names every page, titles tell pages apart; built,
it fits a telephone, needs no network, and its code can be copied."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.browser import MISSING, Browser

DOCS = Path(__file__).parents[2] / "docs"
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")
GENERATED = [f"reference/{name}" for name in ("stages", "settings", "recipe", "names", "command")]
LOOKED_AT = ("index", "getting_started", "reference/stages", "errors", "reference/notebooks/loop")


def test_the_landing_page_has_a_line_for_every_page_in_the_order_of_the_sidebar():
    sections = {
        title: re.findall(r"^- \[.+?\]\((\S+)\.md\): \S+", text, re.MULTILINE)
        for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^##|^```|\Z)", INDEX, re.M | re.S)
    }
    trees = re.findall(r"```{toctree}\n:hidden:\n:caption: (.+?)\n\n(.*?)```", INDEX, re.S)
    assert sections == {caption: pages.split() for caption, pages in trees}
    listed = [name for names in sections.values() for name in names]
    written = [path.stem for path in DOCS.glob("*.md") if path.stem != "index"]
    assert sorted(listed) == sorted([*written, *GENERATED])


def test_pages_have_titles_of_their_own():
    titles = [path.read_text(encoding="utf-8").partition("\n")[0] for path in DOCS.glob("*.md")]
    assert sorted(set(titles)) == sorted(titles)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    if MISSING:
        pytest.skip(MISSING)
    opened = Browser()
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_pages_of_the_site_are_as_wide_as_the_window_and_ask_for_nothing(
    site, browser, width, dark
):
    browser.look(width, dark=dark)
    for name in LOOKED_AT:
        browser.open(site / f"{name}.html")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), name
        assert browser.run("[...document.images].every((it) => it.naturalWidth > 0)"), name
        assert [it for it in browser.problems() if not it.startswith("file:")] == [], name


@pytest.mark.slow
def test_errors_wrap_and_each_has_an_anchor(site, browser):
    browser.look(390)
    browser.open(site / "errors.html")
    assert browser.run(
        "[...document.querySelectorAll('pre')].every((it) => it.scrollWidth <= it.clientWidth)"
    )
    anchors = browser.run("[...document.querySelectorAll('h3')].map((it) => it.parentNode.id)")
    assert len(anchors) > 150 and "a-setting-is-misspelt" in anchors
    assert [name for name in anchors if re.fullmatch(r"id\d+", name)] == []


@pytest.mark.slow
def test_code_has_a_button_that_copies_it_without_prompts_and_output_has_none(site, browser):
    browser.look(1400)
    browser.open(site / "index.html")
    browser.run("document.querySelector('.highlight-bash code, .highlight-bash pre').prepend('$ ')")
    browser.page.hover(".highlight-bash")
    browser.page.click(".highlight-bash .copybtn")
    browser.run("document.body.prepend(document.createElement('textarea'))")
    browser.page.focus("textarea")
    browser.press("Control+V")
    assert browser.page.input_value("textarea") == 'pip install -c constraints.txt ".[hf]"'
    browser.open(site / "errors.html")
    assert browser.run("document.querySelectorAll('pre').length") > 150
    assert browser.run("document.querySelectorAll('.copybtn').length") == 0
