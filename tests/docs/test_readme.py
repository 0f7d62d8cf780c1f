"""The code of README and docs/examples.md is what the tests run, and its claims about files are true."""

import ast
import re
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import Run, SFTConfig
from self_rewarding_lm.errors import JudgeError
from tests.test_trainer import sft, trainer_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README + EXAMPLES, re.DOTALL)
SEEDS = ROOT.parent / "shared" / "seeds" / "002_e10b03e72cbcf2f1.txt"


def block(words: str) -> str:
    """The one block that has these words."""
    [found] = [text for text in BLOCKS if words in text]
    return found


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELF_REWARDING_LM_QUIET", "1")
    torch.manual_seed(0)


def smaller(code: str, **sizes: int) -> str:
    """The code with smaller numbers, so that it takes seconds; each must be in it."""
    for name, value in sizes.items():
        code, found = re.subn(rf"\b{name} = \d+", f"{name} = {value}", code)
        assert found, name
    return code


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_of_the_readme_is_python(code):
    filled = code.replace("    ...,\n", "").replace("    ...\n", "")
    assert ast.parse(filled).body


@pytest.mark.skipif(not SEEDS.exists(), reason="the ancestor's README is not beside this checkout")
def test_the_readmes_examples_are_the_ancestors_with_only_the_import_name_changed():
    theirs = SEEDS.read_text(encoding="utf-8").replace("\u00ce\u00bb", "λ")
    theirs = theirs.replace("self_rewarding_lm_pytorch", "self_rewarding_lm")
    for code in re.findall(r"```python\n(.*?)```", theirs, re.DOTALL):
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
        own = [line for text in BLOCKS for line in text.splitlines()]
        assert [line for line in lines if line not in own] == []


def test_the_first_example_stops_at_its_unreadable_judge_with_the_sft_checkpoint_on_disk():
    code = block("prompt_dataset = create_mock_dataset")
    with pytest.raises(JudgeError) as error:
        exec(smaller(code, dim=64, heads=2), {})  # its 512 and 8 take more than a minute
    run = Run.open("./checkpoints")
    assert run.stages == ["sft", "self_reward", "self_reward-2"]
    assert run.is_done("sft") and run.weights("sft").exists()
    assert not run.is_done("self_reward")
    assert len(run.judgements("self_reward")) == 64
    message = str(error.value)
    assert "of 64 judgements" in message and "%" in message
    assert message.count("no_score: ") == 3
    assert "Change one of these" in message and "reward_regex_template" in message


def test_the_second_example_trains_by_self_play():
    code = block("spin_trainer = SPINTrainer")
    exec(smaller(code, depth=1), {})
    run = Run.open("./spin-checkpoints")
    assert run.stages == ["spin"] and run.is_done("spin")
    assert len(run.pairs("spin")) == 100
    assert run.settings("spin")["settings"]["spin_lambda"] == 0.1
    assert len([m for m in run.metrics("spin") if "loss" in m]) == 14  # 2 epochs of 7 steps


def test_reading_a_run_as_the_readme_prints_it(capsys, tmp_path):
    from tests.test_trainer import self_reward

    trainer_of(tmp_path / "runs" / "paper", [self_reward(name="m2")])()
    exec(block("Run.open"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_files_that_the_readme_names_are_those_of_a_run(tmp_path):
    run = trainer_of(tmp_path / "checkpoints", [sft()])()
    named = set(
        re.findall(
            r"[a-z]+\.jsonl?\b", README.split("## What is in a run directory")[1].split("```")[1]
        )
    )
    assert {path.name for path in run.folder.rglob("*.json*")} <= named


def test_every_room_of_the_package_is_in_the_readmes_map():
    package = ROOT / "self_rewarding_lm"
    rooms = [f"{p.parent.name}/" for p in package.glob("*/__init__.py")]
    files = [p.name for p in package.glob("*.py") if not p.name.startswith("__")]
    tree = README.split("## The code")[1].split("```")[1].split()
    assert [name for name in rooms + files if name not in tree] == []


def test_the_defaults_that_the_docs_state():
    stage = SFTConfig(train_dataset=[])
    assert stage.optim.batch_size == 16 and stage.default_epochs == 3 and stage.dropout == 0.1
