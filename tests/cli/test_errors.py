"""Errors at the command line: in its own words, flags and keys of recipes."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from self_rewarding_lm import read_recipe
from self_rewarding_lm.checks import Checker
from self_rewarding_lm.cli import main
from self_rewarding_lm.errors import ArgumentTypeError, at_the_command, said, setting, typed
from self_rewarding_lm.judges.tally import JudgeWatcher
from self_rewarding_lm.records import Judgement
from self_rewarding_lm.runs import installed

PACKAGE = Path(installed.__file__).parents[1]


def usage(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def refused(capsys, *arguments):
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_an_unknown_flag_is_named_with_the_one_that_was_meant(capsys):
    words = usage(capsys, "run", "--modle", "m0")
    assert "no flag --modle; did you mean '--model'?" in words
    assert "self-rewarding-lm run --help" in words
    assert "no flag --rewrad; did" in usage(
        capsys, "judge", "--model", "m", "--ranked", "r.jsonl", "--rewrad=paper"
    )
    assert "'more.yaml' is one argument too many" in usage(capsys, "run", "a.yaml", "more.yaml")


def test_an_unknown_command_is_named_with_the_one_that_was_meant(capsys):
    assert "'runn' is not a command; did you mean 'run'? There are: init, preview, run," in usage(
        capsys, "runn"
    )


def test_a_recipe_with_anothers_word_for_a_setting_is_told_ours(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: org/m0\nlora: {r: 8}\nprompts: p.jsonl\nxyz: 1\npaper: {}\n")
    words = refused(capsys, "run", str(recipe))
    assert "line 2: lora: this is not a setting; did you mean 'peft'? There are: model," in words
    assert "line 3: prompts: this is not a setting; it stands below `paper`. There are:" in words
    assert "line 4: xyz: this is not a setting. There are: model," in words


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ prompt }}", "it has no {{ response }}"),
        ("{{ prompt }} {{ response }} {{ score }}", "there is no value for {{ score }}"),
        ("{{ prompt }} {{ response }", "not a valid jinja2 template"),
    ],
)
def test_a_wrong_judge_prompt_is_told_with_its_line_before_the_model_is_looked_for(
    template, words, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: org/not-there\nreward_prompts:\n  default:\n"
        f"    prompt_template: '{template}'\n    reward_regex_template: 'S: {{{{ reward }}}}'\n"
        "paper: {}\n"
    )
    told = refused(capsys, "run", str(recipe))
    assert "recipe.yaml, line 4: reward_prompts.default.prompt_template: " in told
    assert words in told


def test_a_wrong_comparison_in_a_stage_is_told_with_its_line(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: org/m0\nstages:\n  - stage: self_reward\n    prompt_dataset: recipe.yaml\n"
        "    comparison: {prompt_template: '{{ prompt }} {{ response }}'}\n"
    )
    told = refused(capsys, "run", str(recipe))
    assert "line 5: stages[0].comparison.prompt_template: " in told
    assert "{{ response_a }}, {{ response_b }}" in told


def test_words_are_those_of_where_the_user_stands():
    assert said("a=1", "--a 1") == "a=1"
    assert setting("on_bad_row", "skip") == "on_bad_row='skip'"
    with at_the_command():
        assert said("a=1", "--a 1") == "--a 1"
        assert setting("on_bad_row", "skip") == "`on_bad_row: skip`"
        assert [setting("s", value) for value in (None, True, 1)] == [
            "`s: null`",
            "`s: true`",
            "`s: 1`",
        ]
    assert said("a=1", "--a 1") == "a=1"


def test_what_a_command_meets_names_no_argument_of_python():
    """Texts of the library that hold one, outside of the calls that know where the user stands."""
    arguments = re.compile(
        r"overwrite_checkpoints|checkpoints_folder|rehearse=|on_bad_row=|peft_config=|judge_model="
        r"|score_mode='|method='|dict\(mixed_precision"
    )
    own_places = ("trainer.py", "errors.py", "recipes", "describe.py", "moved.py", "report/card.py")
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        if place.startswith(own_places):
            continue
        tree = ast.parse(file.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        known = {
            id(text)
            for call in calls
            if getattr(call.func, "id", None) in ("said", "setting")
            for text in ast.walk(call)
        }
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in known | docs and " " in node.value:
                    assert not arguments.search(node.value), f"{place}:{node.lineno}"


def test_a_wrong_type_is_told_in_a_line():
    @typed
    def opened(folder: Path, *, rows: int | None = None) -> None:
        pass

    with pytest.raises(ArgumentTypeError) as error:
        opened(Path(), rows="many")
    assert str(error.value).endswith("opened: rows must be int | None; got 'many'.")


@pytest.mark.parametrize(
    "origin, words",
    [
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, 'pip install -e "/a b[hf]"'),
        ({"url": "file:///a", "dir_info": {}}, 'pip install "/a[hf]"'),
        (
            {"url": "https://g.org/r", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            'pip install "self-rewarding-lm[hf] @ git+https://g.org/r"',
        ),
        (
            {"url": "file:///a.whl", "archive_info": {}},
            'pip install "self-rewarding-lm[hf] @ file:///a.whl"',
        ),
        (None, 'pip install "self-rewarding-lm[hf]"'),
    ],
)
def test_an_extra_is_installed_from_where_the_library_came(origin, words, monkeypatch):
    class Found:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(metadata, "distribution", lambda name: Found())
    assert installed.install("hf") == words


def test_without_an_installation_the_checkout_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert installed.install("hf") == f'pip install "{PACKAGE.parent}[hf]"'


def test_scores_at_once_that_are_all_unlikely_are_told_with_their_probability():
    watcher = JudgeWatcher(Checker(None, "m2"), min_parse_rate=0.5)
    watcher.count(
        [
            Judgement(f"p/{i}/j0", (f"p/{i}",), "default", None, reason="low_mass", score_mass=0.02)
            for i in range(64)
        ]
    )
    words = watcher.see_parsed("m2", "runs/m2")
    assert "asked for its score at once and writes no text" in words
    assert "0.02, 0.02, 0.02; at least 0.1 counts" in words
    assert "{{ reward }}" in words and "texts are cut off" not in words


CALLS = """
from self_rewarding_lm import *
from self_rewarding_lm.errors import ArgumentTypeError
for call in (
    lambda: LocalEngine(max_rows="many"),
    lambda: load_causal_lm(3),
    lambda: read_recipe({"model": "m0"}),
    lambda: from_stage(7),
    lambda: write_report(3),
    lambda: push_to_hub("runs/a", "m1", "a/b"),
):
    try:
        call()
    except ArgumentTypeError as error:
        print(error)
"""


def test_public_functions_tell_what_they_take():
    """In a process of its own, without the type hook of the tests, which would speak first."""
    told = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [
        "LocalEngine: max_rows must be int; got 'many'.",
        "load_causal_lm: source must be str | Path; got 3.",
        "read_recipe: root must be Node | str | Path; got {'model': 'm0'}.",
        "from_stage: stage must be str; got 7.",
        "write_report: runs must be Sequence[str | Path | Run] | str | Path | Run; got 3.",
        "push_to_hub: run must be Run; got 'runs/a'.",
    ]


def test_a_recipe_is_read_by_the_name_of_its_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text(
        "model: org/m0\nstages:\n  - stage: sft\n    train_dataset: rows.jsonl\n"
    )
    for path in (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml")):
        recipe = read_recipe(path)
        assert recipe.model == "org/m0" and recipe.folder == tmp_path / "checkpoints"
