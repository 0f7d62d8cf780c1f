"""Adapters merged into their model's weights: the folder gives the logits of what was trained."""

import warnings
from copy import deepcopy

import pytest
import torch

pytest.importorskip("peft")
import peft
import transformers

from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models import merging
from self_rewarding_lm.models.loading import check_trainable, with_adapter
from self_rewarding_lm.models.merging import MergedAdapter, check_merge, merged
from self_rewarding_lm.runs.weights import save_folder, weights_hash
from tests.models.test_peft import logits_of, lora, sft, trainer_of
from tests.support.hf_models import VOCAB, tiny

ADAPTERS = {
    "layers": lora(),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "both": lora(target_modules=["embed_tokens", "lm_head"]),
    "both, by a pattern": lora(target_modules=r".*(q_proj|embed_tokens|lm_head)"),
    "head saved": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings saved": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "one saved, one adapted": lora(target_modules=["lm_head"], modules_to_save=["embed_tokens"]),
    "saved and tied": lora(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "some tokens": lora(target_modules=["q_proj"], trainable_token_indices=[9, 20, 31]),
    "some tokens, tied": lora(
        target_modules=["q_proj"], trainable_token_indices=[9, 20], ensure_weight_tying=True
    ),
    "some tokens of the head": lora(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 9]}
    ),
    "other tokens of each": lora(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [3], "embed_tokens": [9]}
    ),
    "dora": lora(target_modules=["q_proj", "lm_head", "embed_tokens"], use_dora=True),
    "rslora": lora(target_modules=["q_proj", "lm_head"], use_rslora=True),
    "biases": lora(target_modules=["q_proj", "lm_head"], bias="all"),
    "pissa": lora(target_modules=["lm_head"], init_lora_weights="pissa"),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "lm_head"], feedforward_modules=[]
    ),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
}


def adapted(config, kind="llama", *, tied=True, **changes):
    """A model with an adapter that has learnt something."""
    base, config = tiny(kind, VOCAB, tie_word_embeddings=tied, **changes), deepcopy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of tied weights
        model = with_adapter(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_folder_gives_the_logits_of_the_adapter(name, tied, tmp_path):
    model = adapted(ADAPTERS[name], tied=tied)
    check_merge(model)
    before, truth = weights_hash(model), logits_of(model)
    save_folder(MergedAdapter(model), tmp_path / "merged")
    assert weights_hash(model) == before
    torch.testing.assert_close(logits_of(read(tmp_path / "merged")), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("name", ["both", "dora", "other tokens of each"])
def test_other_tied_models_are_merged_too(kind, name, tmp_path):
    model = adapted(ADAPTERS[name], kind)
    check_merge(model)
    save_folder(MergedAdapter(model), tmp_path / "merged")
    truth = logits_of(model)
    torch.testing.assert_close(logits_of(read(tmp_path / "merged")), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("target", ["wte", "lm_head", "c_attn"])
def test_a_model_with_other_names_is_merged_too(target, tmp_path):
    model = with_adapter(tiny("gpt2", VOCAB), lora(target_modules=[target]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    check_merge(model)
    save_folder(MergedAdapter(model), tmp_path / "merged")
    truth = logits_of(model)
    torch.testing.assert_close(logits_of(read(tmp_path / "merged")), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["layers", "saved and tied", "some tokens"])
def test_what_came_out_the_same_is_tied_again(name):
    module = merged(adapted(ADAPTERS[name]))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.config.tie_word_embeddings


def test_what_did_not_is_untied_in_the_configuration_too():
    module = merged(adapted(ADAPTERS["head"]))
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    assert not module.config.tie_word_embeddings
    base = tiny("llama", VOCAB, tie_word_embeddings=True)
    assert torch.equal(module.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_a_run_with_an_adapter_on_head_and_embeddings_writes_what_it_trained(tmp_path):
    base = tiny("llama", VOCAB, tie_word_embeddings=True)
    config = lora(target_modules=["q_proj", "lm_head", "embed_tokens"])
    trainer = trainer_of(tmp_path, [sft()], base, peft_config=config, merge_adapter=True)
    run = trainer()
    truth = logits_of(trainer.unwrapped_model)
    torch.testing.assert_close(logits_of(read(run.folder / "merged")), truth, rtol=0, atol=1e-3)
    assert not torch.allclose(truth, logits_of(tiny("llama", VOCAB, tie_word_embeddings=True)))


def test_a_model_in_bfloat16_is_merged_within_its_rounding(tmp_path):
    model = adapted(ADAPTERS["both"], dtype=torch.bfloat16)
    check_merge(model)
    save_folder(MergedAdapter(model), tmp_path / "merged")
    assert read(tmp_path / "merged").dtype == torch.bfloat16


def test_products_that_torch_may_round_are_given_room(monkeypatch):
    """On a GPU float32 products are rounded to TF32 where the user says so."""
    model = adapted(ADAPTERS["layers"])
    assert merging.bound_of(model) == merging.EXACT
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert merging.bound_of(model) == merging.ROUNDED


def test_trying_a_merge_draws_no_random_numbers_of_others():
    model = adapted(ADAPTERS["layers"])
    state = torch.get_rng_state()
    check_merge(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(target_modules=["q_proj"], lora_bias=True), "cannot merge .*lora_bias=True"),
        (
            lora(target_modules=["lm_head"], trainable_token_indices=[3, 9]),
            "parts of it stay in the model .*TrainableTokensLayer",
        ),
    ],
    ids=["a bias for a layer without", "one adapter in another"],
)
def test_what_peft_cannot_merge_is_refused_when_the_trainer_is_made(config, words, tmp_path):
    base = tiny("llama", VOCAB, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=f"{words}.*Leave merge_adapter out"):
        trainer_of(tmp_path, [sft()], base, peft_config=config, merge_adapter=True)
    assert not list(tmp_path.iterdir())
    base = tiny("llama", VOCAB, tie_word_embeddings=True)
    trainer_of(tmp_path, [sft()], base, peft_config=config)


def test_a_merge_that_gives_other_logits_is_refused_when_the_trainer_is_made(monkeypatch):
    """Untrained, the adapter adds nothing, so that any merge of it would look right."""
    model = with_adapter(tiny("llama", VOCAB), lora())
    check_merge(model)
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", peft.LoraModel.unload, raising=False)
    with pytest.raises(ConfigError, match=r"gives other logits than beside the model \([0-9]+%"):
        check_merge(model)


def test_a_folder_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch):
    def read_other(kind, folder):
        return tiny("llama", VOCAB)

    trainer = trainer_of(tmp_path, [sft()], merge_adapter=True)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "read_pretrained", read_other)
        with pytest.raises(StoreError, match=r"read back .* gives other logits .* is not kept"):
            trainer()
    assert not (tmp_path / "merged").exists() and (tmp_path / "report.html").exists()
    run = trainer()
    assert run.is_done("sft") and (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_in_two_parameters_of_one_memory_is_refused(target, tmp_path):
    """They are two when the model moves, and one is lost when the adapter is saved."""
    config = lora(target_modules=["q_proj", target], ensure_weight_tying=True)
    base = tiny("llama", VOCAB, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"ensure_weight_tying .* parameters that share memory"):
        trainer_of(tmp_path, [sft()], base, peft_config=config)
    assert not list(tmp_path.iterdir())
    model = adapted(config)
    truth = logits_of(model)
    model.to(torch.float64).to(torch.float32)  # as a move to a GPU does
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.lora_A.default.weight").add_(0.3)
    moved = logits_of(model)
    model.save_pretrained(tmp_path)
    other = tiny("llama", VOCAB, tie_word_embeddings=True)
    again = logits_of(peft.PeftModel.from_pretrained(other, tmp_path))
    assert not torch.allclose(again, moved, atol=0.1) and not torch.allclose(again, truth)
    check_trainable(with_adapter(tiny("llama", VOCAB), lora(ensure_weight_tying=True)))
