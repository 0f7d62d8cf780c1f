"""Adapters trained on a GGUF file: every command of ours and the card's own code open them."""

import json
import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gguf")
import transformers

from self_rewarding_lm import SelfRewardingTrainer
from self_rewarding_lm.cli import main
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.loading import load_causal_lm
from self_rewarding_lm.runs.cache import CACHE_VARIABLE
from self_rewarding_lm.runs.run import Run
from tests.models.test_peft import logits_of, lora, sft
from tests.support.gguf_models import write_gguf
from tests.support.hf_models import VOCAB, tiny, word_tokenizer

RECIPE = """\
model: {model}
out: {out}
stages:
  - stage: sft
    train_dataset: rows.jsonl
    num_train_steps: 1
    optim: {{batch_size: 2}}
"""
SHORT = "{max_new_tokens: 4, temperature: 1.0}"


def trainer_of(folder, model, **options):
    settings = dict(
        chat_template="chatml", accelerate_kwargs=dict(cpu=True), quiet=True, report=False
    )
    return SelfRewardingTrainer(
        model, finetune_configs=[sft()], checkpoints_folder=folder, **{**settings, **options}
    )


def rows(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose model was given by a relative path, and the logits of what it trained."""
    at = tmp_path_factory.mktemp("gguf")
    write_gguf(at / "blob")
    (at / "m0.gguf").symlink_to(at / "blob")  # as it lies in the hub's cache
    rows(at / "rows.jsonl", *({"prompt": f"say {i}", "completion": f"{i}"} for i in range(4)))
    rows(at / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"})
    rows(at / "ranked.jsonl", {"prompt": "a", "chosen": "x", "rejected": "y"})
    (at / "objects_of_gguf.py").write_text(
        "def longer(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        trainer = trainer_of("run", "m0.gguf", peft_config=lora(), merge_adapter=True)
        trainer()
    return at, logits_of(trainer.unwrapped_model)


@pytest.fixture
def at(trained, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def adapter_of(trained):
    return Run.open(trained[0] / "run").weights("sft").parent


def same(module, truth):
    torch.testing.assert_close(logits_of(module), truth, rtol=0, atol=1e-4)


def test_it_names_the_file_by_its_whole_path_and_is_loaded_from_anywhere(trained, tmp_path):
    config = json.loads((adapter_of(trained) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained[0] / "m0.gguf")
    model, tokenizer = load_causal_lm(adapter_of(trained))
    same(model, trained[1])
    assert tokenizer.eos_token == "<|im_end|>"
    base, _ = load_causal_lm(trained[0] / "m0.gguf")
    assert not torch.allclose(logits_of(base), trained[1], atol=1e-2)


def test_the_tokenizer_is_the_files_where_the_adapter_has_none(trained, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter_of(trained) / name).read_bytes())
    _, tokenizer = load_causal_lm(tmp_path)
    assert tokenizer.eos_token == "</s>" and "im_start" in tokenizer.chat_template


def test_the_cards_own_code_opens_it(trained):
    folder = adapter_of(trained)
    names = {"folder": folder}
    exec(loading_code(folder), names)
    same(names["model"], trained[1])
    assert names["model"].generation_config.eos_token_id[0] == names["tokenizer"].eos_token_id
    assert str(trained[0]) not in (folder / "README.md").read_text()


def loading_code(folder):
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def test_the_merged_folder_needs_neither_file_nor_peft(trained):
    merged = transformers.AutoModelForCausalLM.from_pretrained(trained[0] / "run" / "merged")
    same(merged, trained[1])
    names = {"folder": trained[0] / "run" / "merged"}
    exec(loading_code(names["folder"]), names)
    same(names["model"], trained[1])


def test_it_judges(trained, at, capsys):
    judge = ["judge", "--model", str(adapter_of(trained)), "--ranked", "ranked.jsonl", "--json"]
    assert main([*judge, "--judging", SHORT, "--quiet", "--reward", "short"]) == 1
    assert json.loads(capsys.readouterr().out)["metrics"]["parse_rate"] == 0  # it is random


def test_it_is_compared_with_its_base(trained, at, capsys):
    words = ["compare", "run:sft", "m0.gguf", "--prompts", "prompts.jsonl", "--json", "--quiet"]
    assert main([*words, "--judge", "objects_of_gguf:longer", "--sampling", SHORT]) == 0
    assert "rates" in json.loads(capsys.readouterr().out)


def test_it_is_planned_and_trained_further(trained, at, capsys):
    recipe = at / "further.yaml"
    recipe.write_text(RECIPE.format(model="run/01-sft/model", out="further"))
    assert main(["plan", str(recipe)]) == 0
    assert ": 36,320 parameters, 1,984 trained" in capsys.readouterr().out
    assert main(["run", str(recipe), "--quiet"]) == 0
    before = json.loads((adapter_of(trained) / "adapter_config.json").read_text())
    after = json.loads((at / "further/01-sft/model/adapter_config.json").read_text())
    assert after["base_model_name_or_path"] == before["base_model_name_or_path"]
    assert main(["export", "further", "--stage", "sft", "--to", "rows_of_it.jsonl"]) == 0


def test_a_base_that_is_not_there_is_named(trained, tmp_path):
    file = tmp_path / "adapter_config.json"
    config = json.loads((adapter_of(trained) / file.name).read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "x.gguf")}))
    with pytest.raises(ConfigError, match=r"trained on '.*x\.gguf', which is not there.*Put it"):
        load_causal_lm(tmp_path)


def test_a_model_that_transformers_read_from_the_file_is_refused(trained, tmp_path):
    """It does not know the file's name, so that an adapter of it could not be opened again."""
    model = transformers.AutoModelForCausalLM.from_pretrained(trained[0], gguf_file="m0.gguf")
    with pytest.raises(ConfigError, match=r"no config\.json.*Give a \.gguf file by its path"):
        trainer_of(tmp_path / "run", model, tokenizer=word_tokenizer(), peft_config=lora())
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_a_folder_is_loaded_from_anywhere_too(tmp_path, monkeypatch):
    tiny("llama", VOCAB).save_pretrained(tmp_path / "m0")
    word_tokenizer().save_pretrained(tmp_path / "m0")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of("run", "m0", peft_config=lora())
    folder = trainer().weights("sft").parent.resolve()
    monkeypatch.chdir(tmp_path / "elsewhere")
    truth = logits_of(trainer.unwrapped_model)
    same(load_causal_lm(folder)[0], truth)
    names = {"folder": folder}
    exec(loading_code(folder), names)
    same(names["model"], truth)


def test_the_card_of_an_adapter_of_an_object_asks_for_that(tmp_path):
    base = tiny("llama", VOCAB)
    trainer = trainer_of(tmp_path, base, tokenizer=word_tokenizer(), peft_config=lora())
    folder = trainer().weights("sft").parent
    names = {"folder": folder, "base": tiny("llama", VOCAB)}
    exec(loading_code(folder), names)
    same(names["model"], logits_of(trainer.unwrapped_model))
