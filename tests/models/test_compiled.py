"""Models that torch.compile has made something of, and vocabularies that were resized."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from self_rewarding_lm import OptimConfig, SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.loading import Loading, check_trainable, open_model
from self_rewarding_lm.runs.weights import import_checkpoint, read_weights, write_weights
from tests.support.hf_models import tiny, word_tokenizer
from tests.support.models import Recurrent, transformer

IDS = torch.tensor([[3, 9, 4, 1, 5], [2, 6, 5, 3, 5]])


def whole(module):
    return torch.compile(module, backend="eager")


def in_place(module):
    module.compile(backend="eager")
    return module


def its_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def a_part(module):
    name = next(name for name, _ in module.named_children())
    setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
    return module


WAYS = [whole, in_place, its_forward, a_part]


def hugging_face():
    pytest.importorskip("transformers")
    return tiny("llama")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [hugging_face, transformer, Recurrent])
def test_a_compiled_model_is_the_model_itself(make, way, caplog):
    module = make().eval()
    keys, plain = [*module.state_dict()], adapt(module)
    with torch.no_grad():
        exact = plain.logits(IDS)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        adapted = adapt(way(module))
    assert sum("torch.compile" in r.message for r in caplog.records) == 1
    assert [*adapted.module.state_dict()] == keys and adapted.module is module
    assert getattr(adapted, "attends", None) == getattr(plain, "attends", None)
    assert (adapted.training is None) == (plain.training is None)
    with torch.no_grad():
        torch.testing.assert_close(adapted.logits(IDS), exact)


def test_an_adapter_around_a_compiled_model_stays():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    compiled = torch.compile(tiny("llama"), backend="eager")
    wrapped = peft.get_peft_model(compiled, config)
    exact = adapt(peft.get_peft_model(tiny("llama"), config))
    exact.module.load_state_dict(
        {name.replace("_orig_mod.", ""): t for name, t in wrapped.state_dict().items()}
    )
    adapted = adapt(wrapped)
    assert adapted.module is wrapped
    assert not any("_orig_mod" in name for name in adapted.state())
    with torch.no_grad():
        torch.testing.assert_close(adapted.logits(IDS), exact.logits(IDS))


def test_a_model_that_is_not_compiled_is_not_spoken_of(caplog):
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        adapt(Recurrent())
    assert not [r for r in caplog.records if "compile" in r.message]


@pytest.mark.parametrize("way", [whole, a_part], ids=lambda way: way.__name__)
def test_a_run_trains_and_saves_a_compiled_model_by_its_own_names(way, tmp_path):
    module = transformer(vocab=64)
    names = set(module.state_dict())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stage = SFTConfig(
        train_dataset=[([1, 2, 3, 4], 1)], dropout=0.0, optim=OptimConfig(batch_size=1)
    )
    run = SelfRewardingTrainer(
        way(module),
        finetune_configs=[stage],
        checkpoints_folder=tmp_path,
        accelerate_kwargs={"cpu": True},
        quiet=True,
        report=False,
    )(rehearse=False)
    saved = load_file(run.weights("sft"))
    assert set(saved) <= names and not any("_orig_mod" in name for name in saved)
    now = module.state_dict()
    assert any(not torch.equal(now[name], before[name]) for name in now)
    for name, tensor in saved.items():
        assert torch.equal(tensor, now[name])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_were_saved_under_a_compiled_models_names_are_read(tied, tmp_path):
    module, other = (Recurrent() for _ in range(2))
    for made in (module, other) if tied else ():
        made.head.weight = made.embed.weight
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    write_weights(torch.compile(module, backend="eager"), tmp_path / "model.safetensors")
    assert all("_orig_mod." in name for name in load_file(tmp_path / "model.safetensors"))
    read_weights(other, tmp_path / "model.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_file_of_a_compiled_model_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"_orig_mod.a": torch.ones(2)}, path)
    with pytest.raises(StoreError, match="another model"):
        read_weights(Recurrent(), path)


def test_a_checkpoint_of_a_compiled_model_is_imported(tmp_path):
    module, other = Recurrent(), Recurrent()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    torch.save(torch.compile(module, backend="eager").state_dict(), tmp_path / "a.pt")
    import_checkpoint(other, tmp_path / "a.pt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.fixture
def stored(tmp_path):
    pytest.importorskip("peft")
    model = tiny("llama", 96)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder, vocab):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if vocab is not None:
        model.resize_token_embeddings(vocab)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return open_model(model, Loading(peft_config=config))[0]


@pytest.mark.parametrize("vocab", [99, 90])
def test_an_adapter_on_a_resized_vocabulary_is_refused_with_what_to_do(vocab, stored):
    module = opened(stored, vocab)
    with pytest.raises(ConfigError, match=f"resized to {vocab} tokens.*has 96.*save_pretrained"):
        check_trainable(module)
    check_trainable(opened(stored, None))


def test_the_way_that_the_error_names_works(stored, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(stored)
    model.resize_token_embeddings(99)
    model.save_pretrained(tmp_path / "resized")
    check_trainable(opened(tmp_path / "resized", None))
