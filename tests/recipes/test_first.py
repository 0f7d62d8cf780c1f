"""The first recipe: what `init` writes passes `check` and `plan`, and fits prompts, model, machine."""

import json
from pathlib import Path

import pytest
import torch

from self_rewarding_lm.cli import main
from self_rewarding_lm.data.ranked import ranked_row
from self_rewarding_lm.data.rows import prompt_of, training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.recipes import first
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.runs.installed import SCHEMA
from tests.support.hf_models import tiny, word_tokenizer

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m0"
    tokenizer = word_tokenizer()
    tiny("llama", vocab=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def shipped(name):
    lines = Path(first.__file__).with_name(f"first_{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def prompts_file(folder, count):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"tell {i}"}) + "\n" for i in range(count)))
    return path


def test_what_init_writes_passes_check_and_plan(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "new/first", "--model", model]) == 0
    told = capsys.readouterr().out
    recipe = Path("new/first/recipe.yaml")
    assert "Next: self-rewarding-lm check new/first/recipe.yaml" in told
    assert "a LoRA adapter is trained; 32 prompts make one round" in told
    assert sorted(path.name for path in recipe.parent.iterdir()) == [
        "ift.jsonl",
        "prompts.jsonl",
        "ranked.jsonl",
        "recipe.yaml",
    ]
    assert recipe.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert main(["check", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert "The recipe is in order: 4 stages" in told and "more than" not in told
    assert main(["plan", str(recipe), "--no-times"]) == 0
    before = {path: path.read_bytes() for path in recipe.parent.iterdir()}
    assert main(["init", "new/first", "--model", model]) == 1
    assert "recipe.yaml, new/first/ift.jsonl" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in recipe.parent.iterdir()} == before


def test_own_data_is_named_and_stays(model, tmp_path, capsys):
    mine = prompts_file(tmp_path, 900)
    folder = tmp_path / "first"
    assert main(["init", str(folder), "--model", model, "--prompts", str(mine)]) == 0
    assert "900 prompts make two rounds" in capsys.readouterr().out
    assert not (folder / "prompts.jsonl").exists() and (folder / "ift.jsonl").exists()
    stages = read_recipe(folder / "recipe.yaml").stages
    assert [Path(s.prompt_dataset).resolve() for s in stages[-2:]] == [mine] * 2
    assert stages[-1].optim.batch_size == 16


def test_few_prompts_are_asked_once_in_small_batches(model, tmp_path):
    for count in (2, 40, 300):
        folder = tmp_path / str(count)
        folder.mkdir()
        mine = prompts_file(folder, count)
        assert main(["init", str(folder), "--model", model, "--prompts", str(mine)]) == 0
        last = read_recipe(folder / "recipe.yaml").stages[-1]
        assert last.unless_few_prompts
        assert 2 <= last.optim.batch_size <= max(2, count / 2 / first.STEPS)


@pytest.mark.parametrize(
    ("memory", "words", "settings"),
    [
        ("24GB", "all weights are trained", ("mixed_precision: bf16",)),
        ("6GB", "on weights in bfloat16", ("torch_dtype: bf16", "peft:")),
    ],
)
def test_what_is_trained_follows_the_memory(memory, words, settings, tmp_path, capsys):
    t = pytest.importorskip("transformers")
    config = t.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "m0")
    word_tokenizer().save_pretrained(tmp_path / "m0")
    command = ["init", str(tmp_path / "first"), "--model", str(tmp_path / "m0")]
    assert main([*command, "--device-memory", memory]) == 0
    assert f"on a GPU of {memory[:-2]} GB: " in (told := capsys.readouterr().out)
    assert words in told
    text = (tmp_path / "first" / "recipe.yaml").read_text()
    assert all(setting in text for setting in settings)
    plan = [
        "plan",
        str(tmp_path / "first" / "recipe.yaml"),
        "--no-times",
        "--device-memory",
        memory,
    ]
    assert main(plan) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_what_cannot_be_written_is_said_and_nothing_is(model, tmp_path, capsys):
    command = ["init", str(tmp_path / "first")]
    assert main([*command, "--model", model, "--prompts", "none.jsonl"]) == 1
    assert "--prompts: there is no file 'none.jsonl'" in capsys.readouterr().err
    assert main([*command, "--model", str(tmp_path)]) == 1
    assert "no configuration of a causal LM could be read" in capsys.readouterr().err
    assert main([*command, "--model", model, "--device-memory", "1kB"]) == 1
    assert "too many for 1,000 bytes of memory even in 4 bit" in capsys.readouterr().err
    assert not (tmp_path / "first").exists()


def test_the_example_data_has_the_forms_that_it_is_for():
    tokens = Tokens(word_tokenizer(), eos_id=None, vocab=None, chat_template="chatml")
    rows = {name: shipped(name) for name in first.DATA}
    for name, read in (("ift", training_row), ("prompts", prompt_of)):
        for row in rows[name]:
            assert read(row, "here", tokens)
    for row in rows["ranked"]:
        assert ranked_row(row, "here").ranks
    texts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("unused", [None, "this CPU has instructions that are not used"])
def test_a_cpu_with_instructions_for_bfloat16_trains_in_mixed_precision(
    unused, model, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(first, "products_unused", lambda *a, **k: asked.append((a, k)) or unused)
    assert main(["init", str(tmp_path / "first"), "--model", model]) == 0
    recipe = read_recipe(tmp_path / "first" / "recipe.yaml")
    expected = {} if unused is None else {"mixed_precision": "bf16"}
    assert recipe.arguments["accelerate_kwargs"] == expected
    assert {(a[0], a[1], k["mixed"]) for a, k in asked} == {("cpu", torch.float32, False)}
