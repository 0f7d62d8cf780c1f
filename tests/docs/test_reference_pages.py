"""The reference pages of the site name everything that can be used or set, in the code's words."""

import re
import sys
from pathlib import Path

import pytest

import self_rewarding_lm
from self_rewarding_lm.cli import COMMANDS
from self_rewarding_lm.config import Config
from self_rewarding_lm.describe import settings_of

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import reference_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    reference_pages.write_pages(folder)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_every_public_name_has_a_section(pages):
    titles = re.findall(r"^###? (\w+)$", "\n".join(pages.values()), re.MULTILINE)
    assert sorted(set(titles) & set(self_rewarding_lm.__all__)) == sorted(self_rewarding_lm.__all__)


def test_stages_begin_with_those_of_the_paper_and_go_on_as_in_the_readme(pages):
    titles = [it for it in re.findall(r"^## (\w+)$", pages["stages"], re.M) if it[0].isupper()]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+Config)` \|", readme, re.M)
    assert titles[:2] == ["SFTConfig", "SelfRewardDPOConfig"]
    assert titles[2:] == [name for name in table if name not in titles[:2]]


def test_every_setting_is_there_with_its_default(pages):
    told = pages["stages"] + pages["settings"]
    owners = (getattr(self_rewarding_lm, name) for name in self_rewarding_lm.__all__)
    for owner in (it for it in owners if isinstance(it, type) and issubclass(it, Config)):
        for setting in settings_of(owner):
            assert re.search(rf"^`{setting.name}` \(", told, re.MULTILINE), (owner, setting.name)
    assert "`spin_lambda` (`float`, above 0, default `0.1`)\n: lambda of Eq. 4.7" in told
    assert "`num_candidate_responses` (`int`, at least 2, default `4`)" in told


def test_every_command_is_there(pages):
    assert re.findall(r"^## (\w+)$", pages["command"], re.MULTILINE) == list(COMMANDS)


def test_markup_in_words_is_escaped_and_code_is_not():
    words = "a * b <c> `x_*` _d_ snake_case, see docs/losses.md"
    found = r"a \* b \<c\> `x_*` \_d\_ snake_case, see [losses.md](../losses.md)"
    assert reference_pages._text(words) == found
    assert reference_pages._text("one ` alone") == r"one \` alone"


def test_a_page_that_says_what_it_said_is_left_alone(tmp_path):
    reference_pages.write_pages(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    reference_pages.write_pages(tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
