"""Recipes in YAML: what is read, what is refused and where, and that the example tells all."""

import inspect
import json
import math
import re
import sys
from pathlib import Path

import pytest

from self_rewarding_lm.config import Config, FromStage, RewardConfig, SelfInstruct
from self_rewarding_lm.describe import REQUIRED, settings_of
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.recipes.paper import paper_recipe
from self_rewarding_lm.recipes.reader import Recipe, read_recipe
from self_rewarding_lm.recipes.settings import (
    NOT_AS_THEY_ARE,
    RUBRICS,
    STAGE_KINDS,
    LoraSettings,
    RecipeSettings,
)
from self_rewarding_lm.recipes.settings_file import STAGES_MARK, recipe_text
from self_rewarding_lm.recipes.yaml_nodes import Node, parse_yaml, read_yaml
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.trainer import SelfRewardingTrainer
from tests.support.recipe_files import EXAMPLE, example_text


def message(message_id, text, role, replies=(), **fields):
    return {
        "message_id": message_id,
        "text": text,
        "role": role,
        "lang": "en",
        "replies": list(replies),
        **fields,
    }


def tree(number):
    """A message tree whose first prompt has two ranked replies."""
    replies = [
        message(f"{number}-{rank}", f"answer {rank}", "assistant", rank=rank) for rank in (0, 1)
    ]
    prompt = message(f"{number}", f"question {number}", "prompter", replies)
    return {"message_tree_id": f"{number}", "tree_state": "ready_for_export", "prompt": prompt}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data, and a module of objects, beside the recipe."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # a recipe's folder is added to it
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    write_lines(tmp_path / "ift.jsonl", [{"prompt": "a", "completion": "b"}])
    write_lines(tmp_path / "ranked.jsonl", [{"prompt": "a", "replies": ["b", "c"]}])
    write_lines(tmp_path / "prompts.jsonl", ["a", "b"])
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    write_lines(tmp_path / "trees.jsonl", [tree(i) for i in range(10)])
    (tmp_path / "m0").mkdir()
    (tmp_path / "my_rewards.py").write_text(
        "rows = [{'prompt': 'a', 'completion': 'b'}]\n"
        "def score(prompts, completions):\n    return [1.0 for _ in completions]\n"
        "def make():\n    raise AssertionError('made before the run')\n"
        "def parse(text):\n    return None\n"
    )
    return tmp_path


PAPER = """\
model: m0
paper:
  ift: ift.jsonl
  prompts: prompts.jsonl
"""


def read(folder, text) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(read_yaml(path))


def problems(folder, text) -> list[str]:
    """The lines that name a problem, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    found = str(caught.value).splitlines()[1:]
    return [line.removeprefix(f"  {folder / 'recipe.yaml'}, ") for line in found]


# -- YAML ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5.5E-06", 5.5e-6),
        ("1.0e+3", 1000.0),
        ("1_000", 1000),
        ("-3", -3),
        (".5", 0.5),
        (".inf", math.inf),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_words_and_numbers_are_read_as_yaml_1_2_does(text, value):
    read = parse_yaml(f"key: {text}", "x", Path()).plain()["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", r"x, line 3: the key 'a' appears twice \(also at x, line 1\)"),
        ("a:\n  - [1", "x, line 2: this is not valid YAML"),
        ("a: *b", "x, line 1: this is not valid YAML: found undefined alias"),
        ("a: &a\n  - *a", "x, line 1: an alias stands within what it names"),
        ("a: 1\n---\nb: 2", "x, line 2: this is not valid YAML"),
        ("? [1]\n: 2", "x, line 1: a key must be a word; got a sequence"),
        ("a: !!python/object:os.system x", "x, line 1: 'x' cannot be read"),
        ("a:\n  <<: 1", "x, line 2: << takes a mapping"),
        ("", "x is empty"),
    ],
)
def test_what_is_no_recipe_s_yaml_is_refused_with_its_line(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, "x", Path())


def test_aliases_within_aliases_are_bounded():
    """Nine levels of ten are a thousand million values."""
    levels = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match=r"x: its aliases .* more than 10,000 values besides"):
        parse_yaml("\n".join(levels), "x", Path())
    merged = ["a0: &a0 {k: 1}"]
    merged += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="its aliases"):
        parse_yaml("\n".join(merged), "x", Path())
    assert parse_yaml("\n".join(levels[:3]), "x", Path()).at(("l2", 9, 9, 9)).plain() == 1


def test_a_node_knows_the_line_of_its_key():
    root = parse_yaml("a:\n  b:\n    - 1\n    - 2\n", "x", Path())
    assert root.at(("a", "b")).place == "x, line 2"
    assert root.at(("a", "b", 1)).place == "x, line 4"
    assert root.at(("a", "c", "d")).place == "x, line 1"


def test_an_anchor_s_keys_stand_under_those_of_the_mapping_that_takes_them():
    text = (
        "- &one {a: 1, b: 2}\n- &two {b: 3, c: 3}\n- {<<: *one, b: 4}\n- {b: 5, <<: [*one, *two]}\n"
    )
    root = parse_yaml(text, "x", Path())
    assert root.plain()[2:] == [{"a": 1, "b": 4}, {"a": 1, "b": 5, "c": 3}]
    assert root.at((2, "a")).place == "x, line 1" and root.at((2, "b")).place == "x, line 3"


def test_flags_stand_above_the_file():
    flag = Node(3, "--iterations", Path())
    root = parse_yaml("a: {b: 1, c: 2}", "x", Path()).replaced({("a", "b"): flag, ("d", "e"): flag})
    assert root.plain() == {"a": {"b": 3, "c": 2}, "d": {"e": 3}}
    assert root.at(("a", "b")).place == "--iterations"


# -- what is read ----------------------------------------------------------------------------------


def test_a_short_recipe_is_the_paper_s(folder):
    recipe = read(folder, PAPER)
    expected = paper_recipe(ift=str(folder / "ift.jsonl"), prompts=str(folder / "prompts.jsonl"))
    assert [s.model_dump() for s in recipe.stages] == [s.model_dump() for s in expected]
    assert recipe.model == str(folder / "m0")
    assert recipe.folder == folder / "checkpoints"
    assert recipe.arguments["self_reward_prompt_config"] == {"default": RUBRICS["paper"]}
    assert (recipe.arguments["seed"], recipe.peft, recipe.tokenizer) == (0, None, None)


def test_settings_of_the_paper_and_of_its_stages_reach_them(folder):
    recipe = read(
        folder,
        PAPER
        + """\
  ranked: ranked.jsonl
  iterations: 3
  dpo_learning_rates: [2e-6, 1e-7]
  sft: {optim: {epochs: 1}}
  eft: {method: ranks}
  self_reward: {nll_weight: 0.5}
seed: 7
out: runs/one
chat_template: chatml
torch_dtype: bf16
accelerate: {mixed_precision: bf16}
""",
    )
    baseline, eft, m1, m2, m3, m4 = recipe.stages
    assert [s.name for s in (baseline, eft, m1, m2, m3, m4)][-1] == "m4"
    assert (baseline.optim.epochs, baseline.optim.learning_rate) == (1, 5.5e-6)
    assert eft.method == "ranks"
    assert (m4.optim.learning_rate, m4.nll_weight) == (2e-6, 0.5)
    assert recipe.folder == folder / "runs" / "one"
    assert recipe.arguments["seed"] == 7
    assert recipe.arguments["chat_template"] == "chatml"
    assert recipe.arguments["torch_dtype"] == "bf16"
    assert recipe.arguments["accelerate_kwargs"] == {"mixed_precision": "bf16"}


def test_stages_of_one_s_own(folder):
    recipe = read(
        folder,
        """\
model: m0
stages:
  - stage: sft
    name: m1
    train_dataset: ift.jsonl
  - stage: external_reward
    prompt_dataset: prompts.jsonl
    reward_model: my_rewards:score
  - stage: dpo
    train_dataset: [{from_stage: external_reward}, rows.jsonl]
    init_from: m1
  - stage: self_rewarding_lm.stages:SelfPlayConfig
    train_dataset: my_rewards:rows
""",
    )
    sft, external, dpo, spin = recipe.stages
    assert isinstance(sft, SFTConfig) and sft.name == "m1"
    assert external.reward_model([], ["x", "y"]) == [1.0, 1.0]
    assert dpo.train_dataset == [FromStage("external_reward"), str(folder / "rows.jsonl")]
    assert dpo.init_from == "m1"
    assert type(spin).__name__ == "SelfPlayConfig"
    assert spin.train_dataset == [{"prompt": "a", "completion": "b"}]


def test_parts_of_open_assistant_trees_are_disjoint_and_read_once(folder):
    text = """\
model: m0
paper:
  ift: {open_assistant: trees.jsonl, part: ift, trees: [0, 9], shares: [0.5, 0.25, 0.0]}
  ranked: {open_assistant: trees.jsonl, part: eft_train, trees: [0, 9], shares: [0.5, 0.25, 0.0]}
  prompts: {open_assistant: trees.jsonl, part: prompts, trees: [0, 9], shares: [0.5, 0.25, 0.0]}
"""
    baseline, eft, _, m2, m3 = read(folder, text).stages
    asked = [row["prompt"] for row in baseline.train_dataset]
    ranked = [item.prompt for item in eft.ranked_dataset]
    new = [row["prompt"] for row in m2.prompt_dataset]
    assert len(asked) + len(ranked) + len(new) == 9
    assert set(asked) | set(ranked) | set(new) == {f"question {i}" for i in range(9)}
    assert m2.prompt_dataset is m3.prompt_dataset


def test_new_prompts_written_by_a_model(folder):
    text = PAPER.replace(
        "prompts.jsonl",
        "{self_instruct: {seed_dataset: prompts.jsonl, num_prompts: 9, model: initial}}",
    )
    source = read(folder, text).stages[1].prompt_dataset
    assert isinstance(source, SelfInstruct)
    assert (source.seed_dataset, source.num_prompts) == (str(folder / "prompts.jsonl"), 9)
    assert (source.model, source.sampling.temperature) == ("initial", 0.6)


def test_prompts_by_round(folder):
    recipe = read(folder, PAPER.replace("prompts.jsonl", "{rounds: [prompts.jsonl, rows.jsonl]}"))
    found = [stage.prompt_dataset for stage in recipe.stages[1:]]
    assert found == [str(folder / "prompts.jsonl"), str(folder / "rows.jsonl")]


def test_positive_only_takes_the_settings_of_its_own_stage(folder):
    recipe = read(folder, PAPER + "  positive_only: true\n  self_reward: {min_score: 4}\n")
    assert [type(s) for s in recipe.stages[1:]] == [SelfRewardSFTConfig] * 2
    assert recipe.stages[1].min_score == 4


def test_reward_prompts_begin_with_a_rubric_or_are_whole(folder):
    rewards = read(
        folder,
        PAPER
        + """\
reward_prompts:
  default: {rubric: short, score_mode: expected}
  mine:
    prompt_template: "{{ prompt }} {{ response }}"
    parse_reward: my_rewards:parse
""",
    ).arguments["self_reward_prompt_config"]
    short = RUBRICS["short"]
    assert type(rewards["default"]) is RewardConfig
    assert rewards["default"].prompt_template == short.prompt_template
    assert (rewards["default"].score_mode, rewards["default"].score_range) == ("expected", (0, 5))
    assert rewards["mine"].parse_reward("Score: 1") is None
    assert rewards["mine"].score_range is None


MARKED = """\
reward_prompts:
  default:
    prompt_template: "{{ prompt }} {{ response }}"
    score_mode: expected
    marks: {items: 4, yes: ", yes.", no: ", no.", points: [1, 1, 1, 0.5]}
  named:
    prompt_template: "{{ prompt }} {{ response }}"
    marks:
      items: [right, kind]
      yes: yes
      no: no
"""


def test_marks_of_a_rubric_and_their_words(folder):
    rewards = read(folder, PAPER + MARKED).arguments["self_reward_prompt_config"]
    default, named = rewards["default"], rewards["named"]
    assert (default.score_mode, default.score_range) == ("expected", (0, 3.5))
    assert (default.marks.items, default.marks.yes, default.marks.no) == (4, ", yes.", ", no.")
    assert (named.marks.items, named.marks.yes, named.marks.no) == (("right", "kind"), "yes", "no")
    assert named.score_range == (0, 2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "items: 4",
            "items: 0",
            r"line \d+: reward_prompts.default.marks: items must be 1 or more",
        ),
        ('no: ", no."', 'no: ", YES."', "marks: yes and no must differ"),
        (
            "    score_mode: expected\n",
            '    reward_regex_template: "S: {{ reward }}"\n',
            "leave out",
        ),
        ("score_mode: expected", "rubric: short", "'?rubric'?.*is not a setting"),
        (
            '    prompt_template: "{{ prompt }} {{ response }}"\n    score_mode',
            "    score_mode",
            "default.marks: marks need a prompt_template that asks for them",
        ),
    ],
)
def test_marks_that_cannot_be_are_refused_at_their_line(folder, old, new, words):
    assert MARKED.count(old) == 1
    with pytest.raises(ConfigError, match=words):
        read(folder, PAPER + MARKED.replace(old, new))


def test_an_adapter_s_settings(folder):
    assert read(folder, PAPER + "peft: {r: 4, lora_alpha: 8}\n").peft.r == 4
    assert read(folder, PAPER + "peft: {}\n").peft.model_dump() == LoraSettings().model_dump()


def test_a_model_is_made_when_the_run_begins(folder):
    recipe = read(folder, PAPER.replace("m0", "my_rewards:make"))
    with pytest.raises(AssertionError, match="made before the run"):
        recipe.trainer()


def test_a_name_that_is_no_path_is_one_of_the_hub(folder):
    assert read(folder, PAPER.replace("m0", "org/model-1.5B")).model == "org/model-1.5B"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("paper: {ift: ift.jsonl, prompts: prompts.jsonl}\n", "line 1: 'model' is required."),
        (PAPER + "sed: 1\n", "line 5: sed: this is not a setting; did you mean 'seed'? There are:"),
        (
            PAPER + "  iteration: 2\n",
            "line 5: paper.iteration: this is not a setting; did you mean 'iterations'?",
        ),
        (
            PAPER + "  on_bad_row: skip\n",
            "line 5: paper.on_bad_row: this is not a setting; it stands below a stage: `sft`, `eft`, "
            "`self_reward`. There are:",
        ),
        (
            PAPER + "  min_margin: 0.5\n",
            "line 5: paper.min_margin: this is not a setting; it stands below a stage: "
            "`self_reward`. There are:",
        ),
        (
            PAPER + "  sft:\n    optim:\n      schedule: cosin\n",
            "line 7: paper.sft.optim.schedule: Input should be 'cosine', 'linear' or 'constant'; "
            "got 'cosin'.",
        ),
        (
            PAPER + "  batch_size: 0\n",
            "line 2: paper: OptimConfig: batch_size: Input should be greater than or equal to 1; "
            "got 0.",
        ),
        (
            PAPER + "  iterations: two\n",
            "line 5: paper.iterations: Input should be a valid integer",
        ),
        (
            PAPER + "  num_generated_preference_pairs: many\n",
            "line 5: paper.num_generated_preference_pairs: Input should be a valid integer",
        ),
        (PAPER + "seed: [1]\n", "line 5: seed: Input should be a valid integer; got [1]."),
        (PAPER + "torch_dtype: fp12\n", "line 5: torch_dtype: torch_dtype must be auto, float32"),
        (
            PAPER + "peft: {target_modules: [1, 2]}\n",
            "line 5: peft.target_modules: Input should be a valid string; got [1, 2].",
        ),
        (
            PAPER + "reward_prompts: {default: {forced_ending: maybe}}\n",
            "line 5: reward_prompts.default.forced_ending: Input should be a valid boolean, unable "
            "to interpret input or 'at_once'; got 'maybe'.",
        ),
        (PAPER + "peft: {rank: 4}\n", "line 5: peft.rank: this is not a setting;"),
        (PAPER + "peft: 4\n", "line 5: peft: this must be a mapping of settings; got 4."),
        (
            PAPER.replace("ift.jsonl", "if.jsonl"),
            "line 3: paper.ift: there is no file '",
        ),
        (
            PAPER.replace("ift.jsonl", "my_rewards.py"),
            "line 3: paper.ift: a dataset's file must be",
        ),
        (PAPER.replace("ift.jsonl", "[]"), "line 3: paper.ift: a dataset is a .jsonl, "),
        (PAPER.replace("ift.jsonl", "{open: x}"), "line 3: paper.ift: a dataset is a .jsonl, "),
        (
            PAPER.replace("ift.jsonl", "{open_assistant: trees.jsonl}"),
            "line 3: paper.ift.part: must be one of ift, eft_train, eft_eval, prompts; got none.",
        ),
        (
            PAPER.replace("ift.jsonl", "{open_assistant: trees.jsonl, part: ift, trees: [1]}"),
            "line 3: paper.ift.trees: must be [first, end]",
        ),
        (
            PAPER.replace("ift.jsonl", "{open_assistant: trees.jsonl, part: ift, lange: en}"),
            "line 3: paper.ift.lange: this is not a setting; did you mean 'lang'?",
        ),
        (
            PAPER.replace("ift.jsonl", "my_rewards:row"),
            "line 3: paper.ift: my_rewards:row cannot be imported: AttributeError",
        ),
        (
            PAPER + "  early_stopper_eval_module: stop\n",
            "line 5: paper.early_stopper_eval_module: an object is named package.module:attribute; "
            "got 'stop'.",
        ),
        (
            PAPER.replace("prompts.jsonl", "{rounds: prompts.jsonl}"),
            "line 4: paper.prompts: datasets by round are {rounds: [first, second]};",
        ),
        (
            PAPER.replace("prompts.jsonl", "{rounds: [prompts.jsonl]}"),
            "line 2: paper: prompts as a tuple are one dataset a round",
        ),
        (
            PAPER.replace("prompts.jsonl", "{self_instruct: {seed_dataset: prompts.jsonl}}"),
            "line 4: paper.prompts.self_instruct: 'num_prompts' is required.",
        ),
        (PAPER + "stages: []\n", "line 1: give paper (settings of the paper's stages) or stages"),
        ("model: m0\n", "line 1: give paper (settings of the paper's stages) or stages"),
        ("model: m0\nstages: {}\n", "line 2: stages: stages are a list; got a mapping"),
        (
            "model: m0\nstages:\n  - train_dataset: ift.jsonl\n",
            f"line 3: stages[0].stage: must be {', '.join(STAGE_KINDS)}, or package.module:Class of "
            "a FinetuneConfig; got no `stage`.",
        ),
        (
            "model: m0\nstages:\n  - stage: sftt\n",
            "line 3: stages[0].stage: must be sft, eft, ",
        ),
        (
            "model: m0\nstages:\n  - stage: sft\n    optim: {}\n",
            "line 3: stages[0]: 'train_dataset' is required.",
        ),
        (
            "model: m0\nstages:\n  - stage: dpo\n    train_dataset: {from_stage: m1}\n",
            "line 4: stages[0].train_dataset.from_stage: dpo: from_stage('m1') must name an earlier "
            "stage; before it come: none.",
        ),
        (
            "model: m0\nstages:\n  - stage: sft\n    train_dataset: ift.jsonl\n    init_from: m1\n",
            "line 5: stages[0].init_from: sft: init_from must be 'previous', 'initial', the name of an "
            "earlier stage (there is none) or a path; got 'm1'.",
        ),
        (
            "model: m0\nstages:\n  - stage: self_reward\n    prompt_dataset: prompts.jsonl\n"
            "    self_reward_config_keyname: mine\n",
            "line 5: stages[0].self_reward_config_keyname: self_reward: self_reward_config_keyname "
            "'mine' is not one of the reward prompts: 'default'.",
        ),
        (
            "model: m0\nstages:\n  - {stage: sft, name: a, train_dataset: ift.jsonl}\n"
            "  - {stage: sft, name: a, train_dataset: ift.jsonl}\n  - {stage: sft, name: a-2, "
            "train_dataset: ift.jsonl}\n",
            "line 2: stages: two stages are named 'a-2'; give them different names.",
        ),
        (
            "model: m0\nstages:\n  - stage: sft\n    train_dataset: ift.jsonl\n"
            "    num_train_steps: 3\n    optim: {epochs: 2}\n",
            "line 3: stages[0]: num_train_steps and optim.epochs both say how long to train",
        ),
        (PAPER.replace("m0", "./m9"), "line 1: model: there is no file or folder '"),
        (PAPER.replace("m0", "m9.gguf"), "line 1: model: there is no file or folder '"),
        (PAPER.replace("m0", "4"), "line 1: model: Input should be a valid string; got 4."),
        (
            PAPER + "reward_prompts: {default: {rubric: long}}\n",
            "line 5: reward_prompts.default.rubric: Input should be 'paper' or 'short'; got 'long'.",
        ),
        (
            PAPER + "reward_prompts:\n  default:\n    prompt_template: x\n    rubric: paper\n",
            "line 8: reward_prompts.default.rubric: this is not a setting.",
        ),
        (
            PAPER + "  positive_only: true\n  self_reward: {dpo_beta: 0.2}\n",
            "line 6: paper.self_reward: dpo_beta: for pairs only, and this stage makes none.",
        ),
        (
            PAPER + "  self_reward: {reference: m9}\n",
            "line 2: paper: m3: reference must be 'initial', the name of an earlier stage (m1, m2) "
            "or a path; got 'm9'.",
        ),
        (
            "model: m0\nstages:\n  - stage: self_reward\n    prompt_dataset:\n      self_instruct: "
            "{seed_dataset: {from_stage: m1}, num_prompts: 1, model: m1}\n",
            "line 3: stages[0].weights: self_reward: weights must be 'initial', the name of an "
            "earlier stage (there is none) or a path; got 'm1'.",
        ),
        ("[1, 2]\n", "line 1: this must be a mapping of settings; got [1, 2]."),
    ],
)
def test_a_wrong_value_is_named_with_its_line_its_key_and_what_is_allowed(folder, text, problem):
    assert any(line.startswith(problem) for line in problems(folder, text)), problems(folder, text)


def test_all_wrong_values_are_told_at_once(folder):
    text = """\
model: m0
sed: 1
paper:
  ift: nothing.jsonl
  prompts: prompts.jsonl
  dropout: much
  sft: {optim: {epochs: 0, warmup: 1}}
"""
    found = problems(folder, text)
    lines = sorted(int(problem.split(":")[0].removeprefix("line ")) for problem in found)
    assert lines == [2, 4, 6, 7, 7]


def test_an_error_of_a_flag_names_the_flag(folder):
    (folder / "recipe.yaml").write_text(PAPER)
    root = read_yaml(folder / "recipe.yaml")
    changed = root.replaced({("paper", "iterations"): Node("two", "--iterations", folder)})
    with pytest.raises(
        ConfigError, match=r"--iterations: paper\.iterations: Input should be a valid"
    ):
        read_recipe(changed)


def test_nothing_is_loaded_or_written_by_a_check(folder):
    read(folder, PAPER.replace("m0", "my_rewards:make") + "out: run\n")
    assert not (folder / "run").exists()


# -- a server --------------------------------------------------------------------------------------


def test_a_recipe_names_the_server_that_generates(folder):
    pytest.importorskip("openai")
    server = 'engine: {launch: "serve {checkpoint} {port}", folder: here, extra: {top_k: 4}}\n'
    engine = read(folder, PAPER + server).arguments["engine"]
    assert isinstance(engine, ServerEngine)
    assert (engine.launch, engine.extra) == ("serve {checkpoint} {port}", {"top_k": 4})
    assert engine.folder == str(folder / "here")
    for without in (PAPER, PAPER + "engine: null\n"):
        assert read(folder, without).arguments["engine"] is None
    assert problems(folder, PAPER + "engine: {url: 'http://a', launch: b}\n") == [
        "line 5: engine: ServerEngine takes url=, the address of a running server, or launch=, the "
        "command that starts one; both came."
    ]
    [unknown] = problems(folder, PAPER + "engine: {adress: a}\n")
    assert unknown.startswith("line 5: engine.adress: this is not a setting")
    [kind] = problems(folder, PAPER + "engine: vllm\n")
    assert "this must be a mapping of settings; got 'vllm'" in kind


# -- the recipe that documents itself --------------------------------------------------------------


def test_the_example_is_the_text_that_the_settings_give():
    """Where this fails: python -m tests.support.recipe_files"""
    assert EXAMPLE.read_text() == example_text()


def test_the_example_is_a_recipe(folder):
    recipe = read(folder, recipe_text())
    assert [s.name for s in recipe.stages] == ["sft_baseline", "eft", "m1", "m2", "m3"]


def test_settings_that_the_trainer_takes_as_they_are_have_its_defaults():
    arguments = inspect.signature(SelfRewardingTrainer).parameters
    for name, field in RecipeSettings.model_fields.items():
        if name not in NOT_AS_THEY_ARE:
            assert field.default == arguments[name].default, name


def uncommented(text):
    """The text with all settings in force; words stay comments."""
    return re.sub(r"^( *)#(?: (.*))?$", r"\1\2", text, flags=re.MULTILINE)


def paper_part(text):
    return text[: text.index(f"## {STAGES_MARK}")]


def stages_part(text):
    return text[text.index(f"## {STAGES_MARK}") :]


def test_the_defaults_that_the_example_tells_are_the_defaults(folder):
    """With every mark taken away the recipe is the same."""
    plain = read(folder, recipe_text())
    full = read(folder, uncommented(paper_part(recipe_text())))
    assert [s.model_dump() for s in full.stages] == [s.model_dump() for s in plain.stages]
    for name, value in plain.arguments.items():
        if name == "self_reward_prompt_config":
            rewards = full.arguments[name]
            assert {k: v.model_dump() for k, v in rewards.items()} == {
                k: v.model_dump() for k, v in value.items()
            }
        elif name != "finetune_configs":
            assert full.arguments[name] == value, name
    assert full.peft == plain.peft


def test_every_stage_of_the_example_is_told_with_its_defaults(folder):
    text = uncommented(stages_part(recipe_text()))
    found = read(folder, f"model: m0\n{text}").stages
    told = {type(stage).folder_name: stage for stage in found}
    assert set(told) == set(STAGE_KINDS)
    for kind, stage in told.items():
        required = {
            s.name: getattr(stage, s.name)
            for s in settings_of(STAGE_KINDS[kind])
            if s.default is REQUIRED
        }
        defaults = STAGE_KINDS[kind](**required)
        assert stage.model_dump() == defaults.model_dump(), kind


@pytest.mark.parametrize(
    "owner", [RecipeSettings, paper_recipe, LoraSettings, *STAGE_KINDS.values()]
)
def test_every_setting_stands_in_the_example_with_words(owner):
    text = recipe_text()
    for setting in settings_of(owner):
        assert setting.words, f"{owner.__name__}.{setting.name} has no words"
        assert f"{setting.name}:" in text, setting.name


def test_no_line_of_the_example_is_too_wide():
    assert max(map(len, recipe_text().splitlines())) <= 100


def test_settings_of_a_class_have_the_words_below_their_fields():
    class Parent(Config):
        one: int = 1
        """First
        of all."""
        two: str | None = None

    class Child(Parent):
        two: str | None = "2"
        """Second."""

    found = {s.name: (s.default, s.words) for s in settings_of(Child)}
    assert found == {"one": (1, "First of all."), "two": ("2", "Second.")}


def test_settings_of_a_function_have_the_words_of_its_docstring():
    def bake(flour: int, *, time: float = 1.5, salt: bool = False):
        """Bake something.

        flour: Grams, of
            wheat. time: Minutes.

        Nothing else.
        """

    found = [(s.name, s.default, s.words) for s in settings_of(bake)]
    assert found == [
        ("flour", REQUIRED, "Grams, of wheat."),
        ("time", 1.5, "Minutes."),
        ("salt", False, ""),
    ]


def test_settings_of_pairs_are_not_told_of_a_stage_that_makes_none():
    names = {s.name for s in settings_of(SelfRewardSFTConfig)}
    assert {"dpo_beta", "min_margin"} & names == set()
    assert {"min_score", "fit_from"} <= names
    assert {"dpo_beta", "min_margin"} <= {s.name for s in settings_of(SelfRewardDPOConfig)}


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "a: !!bool maybe": "'maybe' cannot be read",
        "a: !!int ''": "'' cannot be read",
        "a: !!timestamp soon": "'soon' cannot be read",
        "- " * 1500 + "a": "too many lists or mappings within each other",
    }.items(),
)
def test_values_that_the_reader_of_yaml_breaks_at_are_errors_in_words(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, "x", Path())
