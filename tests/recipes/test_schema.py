"""The JSON schema of recipes: it is the one that ships, and says what the reader says."""

import copy
import re
from pathlib import Path

import pytest

from self_rewarding_lm.describe import REQUIRED, settings_of
from self_rewarding_lm.recipes.paper import paper_recipe
from self_rewarding_lm.recipes.schema import recipe_schema, schema_text
from self_rewarding_lm.recipes.settings import STAGE_KINDS, LoraSettings, RecipeSettings
from self_rewarding_lm.recipes.settings_file import STAGES_MARK, recipe_text
from self_rewarding_lm.recipes.yaml_nodes import parse_yaml, read_yaml
from self_rewarding_lm.runs.installed import SCHEMA

jsonschema = pytest.importorskip("jsonschema")

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = """\
model: m0
peft: {r: 8}
reward_prompts: {default: {rubric: short, score_mode: expected}}
stages:
  - {stage: sft, train_dataset: [ift.jsonl, {from_stage: eft}], optim: {learning_rate: 2e-4}}
  - {stage: "mine:Stage", anything: 3}
  - stage: self_reward
    prompt_dataset: {self_instruct: {seed_dataset: {hub: owner/name}, num_prompts: 9}}
    judge: my:judge
"""


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft7Validator.check_schema(recipe_schema())
    return jsonschema.Draft7Validator(recipe_schema())


def plain(text):
    return parse_yaml(text, "recipe", Path()).plain()


def uncommented(text):
    return re.sub(r"^( *)#(?: (.*))?$", r"\1\2", text, flags=re.MULTILINE)


def test_the_schema_that_ships_is_the_one_that_the_classes_give():
    """Where this fails: python -m tests.support.recipe_files"""
    assert SCHEMA.read_text(encoding="utf-8") == schema_text()


def test_every_example_recipe_fits_and_names_the_schema(validator):
    recipes = sorted(EXAMPLES.rglob("*.yaml"))
    assert EXAMPLES / "recipe.yaml" in recipes
    for path in recipes:
        assert not list(validator.iter_errors(read_yaml(path).plain())), path
        mark, _, named = path.read_text().splitlines()[0].partition("$schema=")
        assert mark == "# yaml-language-server: "
        assert (path.parent / named).resolve() == SCHEMA


def test_every_default_fits(validator):
    paper, stages = recipe_text().split(f"## {STAGES_MARK}")
    for text in (uncommented(paper), f"model: m0\n{uncommented('## ' + stages)}"):
        assert not list(validator.iter_errors(plain(text)))


def test_every_setting_is_there_with_its_words_and_no_other():
    schema = recipe_schema()
    defs = schema["$defs"]
    places = {"paper": paper_recipe, "LoraSettings": LoraSettings}
    places |= {f"stage_{kind}": cls for kind, cls in STAGE_KINDS.items()}
    for name, owner in [*places.items(), ("", RecipeSettings)]:
        told = dict((defs[name] if name else schema)["properties"])
        told.pop("stage", None)
        settings = {setting.name: setting for setting in settings_of(owner)}
        assert told.keys() == settings.keys()
        for key, setting in settings.items():
            assert told[key]["description"] == setting.words
            if setting.allowed and setting.default is not REQUIRED:
                assert all(str(value) in str(told[key]) for value in setting.allowed), key


def test_a_recipe_fits_and_is_refused_with_one_wrong_value(validator):
    good = plain(RECIPE)
    assert not list(validator.iter_errors(good))
    wrong = [
        (("modle",), "m0"),
        (("model",), 3),
        (("paper",), {"ift": "a.jsonl", "prompts": "b.jsonl"}),  # beside `stages`
        (("peft", "r"), 0),
        (("peft", "rank"), 8),
        (("reward_prompts", "default", "rubric"), "long"),
        (("stages",), []),
        (("stages", 0, "stage"), "sfd"),
        (("stages", 0, "optim", "learning_rate"), "fast"),
        (("stages", 0, "train_dataset"), {"from": "eft"}),
        (("stages", 0, "prompt_dataset"), "p.jsonl"),
        (("stages", 2, "judge"), "my judge"),
        (("stages", 2, "prompt_dataset", "self_instruct", "num_prompts"), 0),
    ]
    for path, value in wrong:
        changed = copy.deepcopy(good)
        at = changed
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert list(validator.iter_errors(changed)), path
    del good["stages"][0]["train_dataset"]
    assert list(validator.iter_errors(good))


def test_parts_of_the_papers_stages_need_not_be_whole(validator):
    paper = "model: m0\npaper: {ift: a.jsonl, prompts: {rounds: [b.jsonl, c.jsonl]}, %s}\n"
    assert not list(validator.iter_errors(plain(paper % "sft: {num_train_steps: 2}")))
    assert not list(validator.iter_errors(plain(paper % "self_reward: {min_score: 4}")))
    assert list(validator.iter_errors(plain(paper % "sft: {min_score: 4}")))
    assert list(validator.iter_errors(plain("model: m0\npaper: {ift: a.jsonl}\n")))
