"""docs/upgrading.md says what 0.2.0 is: defaults as they are now, names that can be imported."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import self_rewarding_lm
from self_rewarding_lm import OptimConfig, SelfRewardDPOConfig, ServerEngine, ServerJudge
from self_rewarding_lm.checks import ChecksConfig
from self_rewarding_lm.recipes.paper import create_default_paper_config, paper_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "upgrading.md").read_text(encoding="utf-8")
MOVED = re.findall(r"^\| `(self_rewarding_lm\.\w+)\.(\w+)` \| `(\S+)` \|$", PAGE, re.MULTILINE)


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


def test_the_defaults_that_the_page_tells():
    for recipe in (paper_recipe, create_default_paper_config):
        assert default_of(recipe, "num_generated_preference_pairs") is None
    assert OptimConfig().micro_batch_tokens is None
    assert SelfRewardDPOConfig(prompt_dataset=[]).judge_all is False
    for server in (ServerEngine, ServerJudge):
        assert default_of(server, "max_in_flight") is None
    for name in ("cut_off", "few_steps", "follows_position", "repeated_prompts"):
        assert getattr(ChecksConfig(), name).action == "warn"


@pytest.mark.parametrize(("module", "name", "now"), MOVED)
def test_a_name_that_moved_is_public_and_its_old_place_has_it_or_says_where_it_is(
    module, name, now
):
    assert now == f"self_rewarding_lm.{name}"
    public = getattr(self_rewarding_lm, name)
    try:
        assert getattr(importlib.import_module(module), name) is public
    except ImportError as error:
        assert "was moved. Import from self_rewarding_lm." in str(error)


def test_the_page_names_what_guides_of_0_1_0_imported_from_files():
    assert {name for _, name, _ in MOVED} == {
        *("CallableTokenizer", "Callback", "Judge", "JudgeError"),
        *("PairingError", "read_recipe", "read_yaml"),
    }
