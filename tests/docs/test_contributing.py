"""CONTRIBUTING.md: what it adds works in a copy of the package, by its file and its row alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))
STEP = re.compile(
    r"<!-- (?P<what>new file|add to|then)(?:: (?P<path>[\w/.]+))?"
    r"(?:, (?P<side>before|after): (?P<line>[^\n]+?))? -->\n```python\n(?P<code>.*?)```",
    re.S,
)


def followed(section: str, package: Path) -> str:
    """Do what a section says in a copy of the package. Returns the code that then works."""
    works = ""
    for step in STEP.finditer(SECTIONS[section]):
        path, code = package.parent / (step["path"] or ""), step["code"]
        if step["what"] == "then":
            works += code
        elif step["what"] == "new file":
            assert not path.exists()
            path.write_text(code)
        else:
            text = path.read_text()
            assert text.count(step["line"]) == 1, f"{path.name}: {step['line']!r} is not there once"
            if step["side"] == "before":
                text = text.replace(step["line"], f"{code}\n\n{step['line']}")
            else:
                text = text.replace(step["line"], f"{step['line']}\n{code.rstrip()}")
            path.write_text(text)
    return works


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "SELF_REWARDING_LM_QUIET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its generated list of names for editors."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "self_rewarding_lm", tmp_path / "self_rewarding_lm", ignore=ignored)
    return tmp_path / "self_rewarding_lm"


def test_the_page_has_the_five_examples():
    assert list(SECTIONS) == ["A stage", "A judge", "A model family", "A loss", "A check"]


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_works_by_its_file_and_its_row(section, package):
    works = followed(section, package)
    run("import self_rewarding_lm\n" + works, package.parent)
    assert works and STEP.search(SECTIONS[section])


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_without_the_row_it_does_not_work(section, package):
    """So that what follows the rows is the rows' doing."""
    works = followed(section, package)
    for step in STEP.finditer(SECTIONS[section]):
        if step["what"] == "add to":
            shutil.copy(ROOT / step["path"], package.parent / step["path"])
    with pytest.raises(AssertionError):
        run(works, package.parent)


def test_files_that_the_page_names_are_there():
    names = re.findall(r"`((?:[\w]+/)+\w+\.py|\w+\.py)`", PAGE)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "self_rewarding_lm" / name).exists(), name
