"""Causal LMs by folder, name and options: what is loaded, and what is refused before any work."""

import importlib.util
import json
import logging
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from self_rewarding_lm import SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models import loading
from self_rewarding_lm.models.loading import (
    Loading,
    check_placement,
    check_trainable,
    dtype_of,
    end_ids_of,
    is_placed,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    open_model,
    warn_of_low_precision,
)
from self_rewarding_lm.recipes.plan.model import read_shape
from tests.support.hf_models import VOCAB, tiny, word_tokenizer
from tests.support.models import Recurrent

ROWS = [{"prompt": "a", "completion": "b"}]
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
IDS = torch.tensor([[9, 20, 31, 42]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that save_pretrained wrote, the tokenizer and its template beside the weights."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", VOCAB).save_pretrained(path)
    word_tokenizer(TEMPLATES["chatml"]).save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, which is read when the package is imported."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def trainer_of(model, tmp_path, **options):
    return SelfRewardingTrainer(
        model,
        finetune_configs=[SFTConfig(train_dataset=ROWS)],
        checkpoints_folder=tmp_path / "run",
        accelerate_kwargs=dict(cpu=True),
        quiet=True,
        **options,
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_gives_its_model_in_float32_and_its_tokenizer(folder, as_text):
    model, tokenizer = load_causal_lm(str(folder) if as_text else folder)
    truth = tiny("llama", VOCAB)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(IDS).logits, truth(IDS).logits, rtol=0, atol=1e-5)
    assert tokenizer.chat_template == TEMPLATES["chatml"]


def test_a_checkpoint_in_low_precision_is_loaded_in_float32_unless_asked(tmp_path):
    tiny("gpt2", VOCAB, torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    names = {None: torch.float32, "auto": torch.bfloat16, "bf16": torch.bfloat16}
    names |= {"float64": torch.float64, "torch.float16": torch.float16}
    names |= {torch.bfloat16: torch.bfloat16, "fp32": torch.float32}
    for name, dtype in names.items():
        model, _ = load_causal_lm(tmp_path, torch_dtype=name)
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["int8", "float", "bfloat"])
def test_a_dtype_that_is_none_is_refused_with_the_names_there_are(name):
    with pytest.raises(ConfigError, match=f"auto, float32, bfloat16.*got '{name}'"):
        dtype_of(name)


def test_a_trainer_loads_a_folder_and_takes_its_tokenizer_and_template(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    assert isinstance(trainer.unwrapped_model, transformers.LlamaForCausalLM)
    assert trainer.tokens.prompt("a").text == "a" and trainer.tokens.template is None
    assert trainer.tokens.prompt("a").ids[0] == 3  # <|im_start|>
    other = trainer_of(folder, tmp_path, tokenizer=word_tokenizer(), chat_template="zephyr")
    assert other.tokens.template == TEMPLATES["zephyr"]


def test_a_trainer_takes_the_model_as_an_object(tmp_path):
    model = tiny("qwen2", VOCAB)
    assert trainer_of(model, tmp_path, tokenizer=word_tokenizer()).unwrapped_model is model


@pytest.mark.parametrize("name", ["nobody/nothing-such", "no-such-folder/", "./nothing"])
def test_a_name_that_is_nothing_is_refused_and_says_what_a_model_is(name, offline):
    with pytest.raises(ConfigError, match=r"an object, a folder .* a name on the hub, or a \.gguf"):
        load_causal_lm(name)
    with pytest.raises(
        ConfigError, match=re.escape(f"There is no folder {name!r} in {Path.cwd()}")
    ):
        load_causal_lm(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no causal LM could be loaded from"):
        load_causal_lm(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    tiny("gpt2", VOCAB).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no causal LM could be loaded from"):
        load_causal_lm(tmp_path)


def test_a_model_of_another_kind_is_refused_with_few_words(tmp_path):
    config = transformers.T5Config(
        vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="T5Config") as found:
        load_causal_lm(tmp_path)
    assert len(str(found.value)) < 1000  # transformers lists all kinds it knows


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match="there is no file"):
        load_causal_lm(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + b"nonsense")
    with pytest.raises(ConfigError, match=r"no causal LM could be loaded from .*bad\.gguf"):
        load_causal_lm(tmp_path / "bad.gguf")


def test_a_model_without_a_tokenizer_warns_and_gives_none(tmp_path, caplog):
    tiny("gpt2", VOCAB).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model, tokenizer = load_causal_lm(tmp_path)
    assert tokenizer is None and isinstance(model, transformers.GPT2LMHeadModel)
    assert ["no tokenizer could be loaded" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(
    "options",
    [{"torch_dtype": "bfloat16"}, {"device_map": "auto"}, {"load_in_4bit": True}],
    ids=str,
)
def test_how_to_load_a_model_that_is_loaded_already_is_refused(options, tmp_path):
    with pytest.raises(ConfigError, match="this GPT2LMHeadModel is already loaded"):
        trainer_of(tiny("gpt2", VOCAB), tmp_path, tokenizer=word_tokenizer(), **options)


def test_device_map_is_refused_with_several_processes_and_says_why():
    for processes in (1, 2):
        check_placement(tiny("gpt2"), None, processes)
        check_placement("folder", None, processes)
    check_placement("folder", "auto", 1)
    with pytest.raises(ConfigError, match=r"device_map \(auto\) .* 2 processes run.*without"):
        check_placement("folder", "auto", 2)
    spread = tiny("gpt2")
    spread.hf_device_map = {"transformer": 0, "lm_head": 1}
    check_placement(spread, None, 1)
    with pytest.raises(ConfigError, match=r"device_map \(\['0', '1'\]\)"):
        check_placement(spread, None, 2)
    spread.hf_device_map = {"": 0}
    check_placement(spread, None, 2)


def test_a_model_that_is_spread_is_not_moved():
    module = tiny("gpt2")
    assert not is_placed(module) and not is_placed(Recurrent())
    module.hf_device_map = {"": 0}
    assert is_placed(module)


def test_a_device_map_of_one_process_is_passed_on(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, device_map="cpu")
    assert {p.device.type for p in trainer.unwrapped_model.parameters()} == {"cpu"}


def test_low_precision_of_trained_weights_is_warned_of(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        open_model(folder, Loading())
        warn_of_low_precision(tiny("gpt2", dtype=torch.bfloat16).requires_grad_(False))
        assert not caplog.records
        open_model(folder, Loading(torch_dtype="bf16"))
        open_model(tiny("gpt2", dtype=torch.float16), Loading())
    said = [r.getMessage() for r in caplog.records]
    assert ["bfloat16" in said[0], "float16" in said[1], len(said)] == [True, True, 2]
    assert all("rounded away" in text and "mixed_precision" in text for text in said)


def test_weights_in_bfloat16_do_round_such_updates_away():
    """What the warning says, at a weight of usual size."""
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight - 1e-6 == weight and torch.tensor(0.02) - 1e-6 != torch.tensor(0.02)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_4_bit_without_bitsandbytes_is_an_error_with_the_pip_line(folder):
    with pytest.raises(ConfigError, match=r"pip install .*\[bitsandbytes\]"):
        load_causal_lm(folder, load_in_4bit=True)


@pytest.mark.skipif(
    not (HAS_BITSANDBYTES and torch.cuda.is_available()), reason="needs bitsandbytes and a GPU"
)
def test_a_base_in_4_bit_is_trained_by_an_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SelfRewardingTrainer(
        folder,
        finetune_configs=[SFTConfig(train_dataset=ROWS, num_train_steps=1)],
        checkpoints_folder=tmp_path,
        peft_config=config,
        load_in_4bit=True,
    )
    assert trainer.token_model.caches
    trainer()
    assert (tmp_path / "01-sft" / "model" / "adapter_model.safetensors").exists()


def test_4_bit_weights_without_an_adapter_are_refused():
    module = tiny("gpt2")
    module.is_loaded_in_4bit = True
    with pytest.raises(ConfigError, match="4 bit cannot be trained themselves; give peft_config"):
        check_trainable(module)


def test_merging_into_4_bit_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="merge_adapter does not go with load_in_4bit"):
        open_model("nobody/nothing", Loading(load_in_4bit=True, merge_adapter=True))


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no weights that require gradients"):
        trainer_of(tiny("gpt2", VOCAB).requires_grad_(False), tmp_path, tokenizer=word_tokenizer())
    check_trainable(Recurrent().requires_grad_(False))  # other modules are the user's business


def test_a_model_that_transformers_cannot_save_is_refused_before_it_trains(tmp_path):
    """Such as one that `from_pretrained(gguf_file=)` gave; its check is at the end of a stage."""
    model = tiny("gpt2", VOCAB)
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: False)
    with pytest.raises(ConfigError, match=r"cannot save\. Give the \.gguf file by its path"):
        trainer_of(model, tmp_path, tokenizer=word_tokenizer())
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: True)
    check_trainable(model)


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_a_missing_package_is_named_with_the_pip_line(package, folder, tmp_path, monkeypatch):
    present = importlib.util.find_spec
    stub = SimpleNamespace(find_spec=lambda name: None if name == package else present(name))
    monkeypatch.setattr(loading, "importlib", SimpleNamespace(util=stub))
    with pytest.raises(ConfigError, match=rf'{package}, .*pip install .*\[hf\]"'):
        load_causal_lm(tmp_path / "some.gguf")


def test_the_end_tokens_of_a_generation_config_are_none_one_or_several():
    module = tiny("gpt2")
    for given, ids in ((None, ()), (5, (5,)), ([5, 7], (5, 7))):
        module.generation_config.eos_token_id = given
        assert end_ids_of(module) == ids
    assert end_ids_of(Recurrent()) == ()


def test_a_trainer_ends_responses_at_them_too_unless_eos_id_is_given(tmp_path):
    model, tokenizer = tiny("gpt2", VOCAB), word_tokenizer(TEMPLATES["chatml"])
    model.generation_config.eos_token_id = [7, 2]
    trainer = trainer_of(model, tmp_path, tokenizer=tokenizer)
    assert set(trainer.tokens.end_ids) == {4, 2, 7} and trainer.tokens.eos_id == 4
    given = trainer_of(model, tmp_path, tokenizer=tokenizer, eos_id=9)
    assert set(given.tokens.end_ids) == {4, 9}


MODULE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({trace!r}).touch()


class Config(LlamaConfig):
    model_type = "of_its_own"


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def brings_code(tmp_path, monkeypatch):
    """A folder whose config.json and tokenizer name classes in a file of its own; "y" on stdin.

    Any trace of the code having run is a file that the fixture returns beside it.
    """
    folder, trace = tmp_path / "m0", tmp_path / "trace"
    tiny("llama", VOCAB).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "code_of_it.py").write_text(MODULE.format(trace=str(trace)))
    names = {"AutoConfig": "code_of_it.Config", "AutoModelForCausalLM": "code_of_it.Model"}
    names["AutoModelForSequenceClassification"] = "code_of_it.Model"
    for file, changes in (
        ("config.json", {"auto_map": names, "model_type": "of_its_own"}),
        (
            "tokenizer_config.json",
            {
                "auto_map": {"AutoTokenizer": [None, "code_of_it.Tokenizer"]},
                "tokenizer_class": "Tokenizer",
            },
        ),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **changes}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder, trace


def adapter_on(folder):
    adapter = folder.with_name("adapter")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    adapter.mkdir()
    config["base_model_name_or_path"] = str(folder)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


@pytest.mark.parametrize(
    "open_it",
    [
        load_causal_lm,
        lambda folder: load_causal_lm(adapter_on(folder)),
        lambda folder: load_tokenizer(str(folder)),
        load_classifier,
        lambda folder: read_shape(str(folder)),
        lambda folder: read_shape(str(adapter_on(folder))),
        lambda folder: trainer_of(folder, folder.with_name("run")),
    ],
    ids=["model", "adapter", "tokenizer", "classifier", "plan", "planned adapter", "trainer"],
)
def test_code_in_a_models_folder_is_never_run_and_nobody_is_asked(open_it, brings_code):
    folder, trace = brings_code
    with pytest.raises(ConfigError, match="runs no code from a model's folder"):
        open_it(folder)
    assert not trace.exists()


def test_a_tokenizer_that_brings_code_is_left_out_with_a_warning(brings_code, caplog):
    folder, trace = brings_code
    tiny("llama", VOCAB).save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        _, tokenizer = load_causal_lm(folder)
    assert tokenizer is None and "no tokenizer could be loaded" in caplog.text
    assert not trace.exists()
