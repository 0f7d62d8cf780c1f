"""A GGUF file is read once: what is kept opens as the very model and tokenizer of the file."""

import json
import logging
import os
import shutil

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gguf")
import transformers

from self_rewarding_lm import SelfRewardingTrainer
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models import gguf, loading
from self_rewarding_lm.models.gguf import GgufOpener
from self_rewarding_lm.models.loading import load_causal_lm, load_tokenizer
from self_rewarding_lm.recipes.plan.model import read_shape
from self_rewarding_lm.runs.cache import CACHE_VARIABLE
from tests.models.test_peft import lora, sft
from tests.support.gguf_models import TEMPLATE, write_gguf

TEXTS = ["a b\n<|im_start|>ab", " two  spaces", "ünïcode ✓"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "at").mkdir()
    return write_gguf(tmp_path / "at" / "m.gguf")


@pytest.fixture
def unread(monkeypatch):
    """Call it, and from then on no GGUF file is read."""

    def forbid():
        def refuse(*args, **options):
            raise AssertionError("the file was read again")

        monkeypatch.setattr("gguf.GGUFReader", refuse)
        monkeypatch.setattr("gguf.gguf_reader.GGUFReader", refuse)

    return forbid


def kept(file):
    """The folders that are kept, by kind."""
    cache = file.parents[1] / "cache"
    return {path.name.split("-")[-1]: path for path in cache.glob("gguf-*") if path.is_dir()}


def tensors(module):
    return {**module.state_dict(), **dict(module.named_buffers())}


def assert_same(module, truth):
    ours, theirs = tensors(module), tensors(truth)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [None, "bf16", "float16", "float64", "auto"])
def test_it_gives_what_transformers_reads_from_the_file_the_first_time_and_later(
    dtype, file, unread
):
    """Rotary frequencies too, which stay float32 in a model of a narrow type."""
    truth = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=loading.dtype_of(dtype)
    )
    before = torch.random.get_rng_state()
    first, _ = load_causal_lm(file, torch_dtype=dtype)
    unread()
    later, _ = load_causal_lm(file, torch_dtype=dtype)
    for model in (first, later):
        assert_same(model, truth)
        assert type(model) is type(truth) and model.training == truth.training
        assert model.generation_config.to_dict() == truth.generation_config.to_dict()
        assert model.name_or_path == str(file)
        assert not hasattr(model.config, "quantization_config")
    assert later.config.to_diff_dict() == first.config.to_diff_dict()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_tokenizer_and_its_template_are_the_files(file, unread):
    truth = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    first = load_causal_lm(file)[1]
    unread()
    for tokenizer in (first, load_causal_lm(file)[1], load_tokenizer(str(file))):
        assert [tokenizer.encode(t) for t in TEXTS] == [truth.encode(t) for t in TEXTS]
        assert tokenizer.chat_template == truth.chat_template == TEMPLATE
        assert tokenizer.all_special_ids == truth.all_special_ids
        assert tokenizer.name_or_path == truth.name_or_path


def trained(folder, file, *stages, **options):
    trainer = SelfRewardingTrainer(
        file,
        finetune_configs=[sft(name=stage, num_train_steps=1) for stage in stages],
        checkpoints_folder=folder,
        accelerate_kwargs=dict(cpu=True),
        quiet=True,
        report=False,
        **options,
    )
    return trainer(rehearse=False)


def test_what_a_run_writes_is_the_same_without_a_cache_and_from_it(
    file, tmp_path, monkeypatch, unread
):
    """The weights' hash in run.json, and every file of the model's folder."""

    def written(name):
        run = trained(tmp_path / name, file, "one")
        files = [path for path in run.weights("one").parent.iterdir() if path.suffix != ".md"]
        return run.info["model"], {path.name: path.read_bytes() for path in files}

    with monkeypatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(file / "none"))  # below a file: nothing can be kept there
        without = written("without")
    load_causal_lm(file)
    unread()
    assert written("later") == without


@pytest.fixture
def once(file):
    """A file that was opened, so that all of it is kept."""
    load_causal_lm(file)
    return file


def test_another_content_of_the_same_size_and_time_is_another_file(once):
    status = once.stat()
    write_gguf(once, seed=1)
    os.utime(once, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert once.stat().st_size == status.st_size
    truth = transformers.AutoModelForCausalLM.from_pretrained(once.parent, gguf_file=once.name)
    assert_same(load_causal_lm(once)[0], truth)


def test_the_same_content_elsewhere_is_the_same_file(once, tmp_path, unread):
    unread()
    other = tmp_path / "other.gguf"
    shutil.copy(once, other)
    assert load_causal_lm(other)[0].name_or_path == str(other)


def test_what_other_versions_made_is_left_alone(once, monkeypatch):
    [before] = [path for kind, path in kept(once).items() if kind == "float32"]
    monkeypatch.setattr(gguf, "version", lambda package: "99")
    load_causal_lm(once)
    assert before.exists() and len(list(before.parent.glob("gguf-*-float32"))) == 2


def test_without_a_place_it_is_read_each_time_and_said_once(file, monkeypatch, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(file / "none"))
    truth = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    for _ in range(2):
        model, tokenizer = load_causal_lm(file)
        assert_same(model, truth)
        assert tokenizer.chat_template == TEMPLATE
    assert sum("nothing can be kept in" in r.getMessage() for r in caplog.records) == 1


def test_the_argument_names_the_place_and_the_log_says_where_and_how_large(file, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "self_rewarding_lm"):
        load_causal_lm(file, cache_folder=tmp_path / "mine")
    assert not kept(file) and len(list((tmp_path / "mine").glob("gguf-*-float32"))) == 1
    [said] = [r.getMessage() for r in caplog.records if "is opened from" in r.getMessage()]
    assert str(tmp_path / "mine") in said and "0 MB" in said and "may delete that folder" in said


def test_kept_weights_that_were_cut_are_made_again(once):
    weights = kept(once)["float32"] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    load_causal_lm(once)
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    "kind, name", [("float32", "config.json"), ("tokenizer", "tokenizer.json")]
)
def test_a_kept_folder_that_cannot_be_opened_is_named(kind, name, once):
    damaged = kept(once)[kind] / name
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(StoreError, match=rf"copy of .*m\.gguf in .*{kind}.*delete it; it will"):
        load_causal_lm(once)


def test_a_file_that_changes_while_it_is_read_is_not_kept(file, monkeypatch, caplog):
    unpacked = gguf._unpacked

    def changing(*args):
        write_gguf(file, seed=1)
        return unpacked(*args)

    monkeypatch.setattr(gguf, "_unpacked", changing)
    load_causal_lm(file)
    assert "float32" not in kept(file) and "was changed while it was read" in caplog.text


@pytest.mark.parametrize("what", ["a weight", "the configuration"])
def test_what_is_not_read_back_as_it_was_written_is_not_kept(what, file, monkeypatch, caplog):
    read = gguf.read_pretrained

    def other(kind, folder):
        model = read(kind, folder)
        if what == "a weight":
            model.lm_head.weight.data[3, 5] += 1e-6
        else:
            model.config.rms_norm_eps *= 2
        return model

    monkeypatch.setattr(gguf, "read_pretrained", other)
    model, _ = load_causal_lm(file)
    assert "float32" not in kept(file) and "not read back as it was written" in caplog.text
    truth = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert_same(model, truth)


def test_a_run_goes_on_where_nothing_is_kept_any_more(file, tmp_path):
    """On another machine, say: the adapter names the file, not what was made of it."""

    options = dict(peft_config=lora())
    begun = trained(tmp_path / "run", file, "one", **options)
    config = json.loads((begun.weights("one").parent / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
    shutil.rmtree(tmp_path / "cache")
    run = trained(tmp_path / "run", file, "one", "two", **options)
    whole = trained(tmp_path / "whole", file, "one", "two", **options)
    assert run.weights("two").read_bytes() == whole.weights("two").read_bytes()
    assert kept(file)


def test_a_plan_reads_the_configuration_once(file, unread):
    truth = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    first = read_shape(str(file))
    unread()
    later = read_shape(str(file))
    assert first.parameters == later.parameters and first.max_len == later.max_len
    assert GgufOpener().config(file).to_diff_dict() == truth.to_diff_dict()


def test_four_bits_are_refused_whether_or_not_it_is_kept(file, monkeypatch):
    monkeypatch.setattr(loading, "_four_bit", object)
    for _ in range(2):
        with pytest.raises(ConfigError, match="load_in_4bit cannot be used with the GGUF file"):
            load_causal_lm(file, load_in_4bit=True)
        load_causal_lm(file)


def test_a_device_map_is_of_the_kept_model(file, monkeypatch):
    read = transformers.AutoModelForCausalLM.from_pretrained
    maps = []

    def noted(source, **options):
        maps.append(options.get("device_map"))
        return read(source, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    for _ in range(2):
        load_causal_lm(file, device_map={"": "cpu"})
    assert maps == [None, {"": "cpu"}, {"": "cpu"}]
