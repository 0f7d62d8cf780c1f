"""Folders that `from_pretrained` reads: what they say of the ends of responses, and keep."""

import json

import pytest
import torch

pytest.importorskip("peft")
import peft
import transformers

from self_rewarding_lm import OptimConfig, SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.models.loading import load_causal_lm
from self_rewarding_lm.runs.pretrained import GENERATION
from tests.models.test_peft import lora
from tests.support.hf_models import VOCAB, tiny, word_tokenizer

PROMPT, ANSWER = "say", "ok"
END, TEXT_END = 4, 2
"""<|im_end|> and </s> of `word_tokenizer`."""
LIMIT = 30
OWN = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_length": 77}


def base_model():
    model = tiny("llama", VOCAB)
    model.generation_config = transformers.GenerationConfig(eos_token_id=TEXT_END, **OWN)
    return model


def trained(folder, model, tokenizer, **options):
    settings = dict(chat_template="chatml", accelerate_kwargs=dict(cpu=True), quiet=True)
    stage = SFTConfig(
        train_dataset=[{"prompt": PROMPT, "completion": ANSWER}],
        num_train_steps=25,
        dropout=0.0,
        optim=OptimConfig(batch_size=1, learning_rate=1e-2),
    )
    return SelfRewardingTrainer(
        model,
        finetune_configs=[stage],
        tokenizer=tokenizer,
        checkpoints_folder=folder,
        report=False,
        **{**settings, **options},
    )()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole model, an adapter and a merged one, all trained on ChatML from a base model."""
    at = tmp_path_factory.mktemp("runs")
    base_model().save_pretrained(at / "base")
    word_tokenizer().save_pretrained(at / "base")
    whole = trained(at / "whole", str(at / "base"), None)
    config = lora(r=8, target_modules=["q_proj", "v_proj", "o_proj", "lm_head"])
    options = dict(peft_config=config, merge_adapter=True)
    adapter = trained(at / "adapter", str(at / "base"), None, **options)
    return {
        "whole": whole.weights("sft").parent,
        "adapter": adapter.weights("sft").parent,
        "merged": adapter.folder / "merged",
    }


def read(folder):
    if (folder / "adapter_config.json").exists():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def generated(model, tokenizer, **options):
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    settings = dict(max_new_tokens=LIMIT, do_sample=False, temperature=None, top_p=None)
    ids = model.generate(**asked, **{**settings, **options})
    return ids[0, asked["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["whole", "adapter", "merged"])
def test_what_is_loaded_stops_at_the_end_of_the_turn(name, folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    ids = generated(read(folders[name]), tokenizer)
    assert ids[-1] == END and len(ids) < LIMIT
    assert tokenizer.decode(ids, skip_special_tokens=True) == ANSWER
    by_tokenizer = dict(eos_token_id=tokenizer.eos_token_id)
    assert generated(read(folders[name]), tokenizer, **by_tokenizer) == ids


@pytest.mark.parametrize("name", ["whole", "adapter", "merged"])
def test_the_rest_of_the_generation_config_stays(name, folders):
    config = transformers.GenerationConfig.from_pretrained(folders[name])
    assert config.eos_token_id == [END, TEXT_END]
    assert {key: getattr(config, key) for key in OWN} == OWN


@pytest.mark.parametrize("name", ["whole", "adapter", "merged"])
def test_the_saved_tokenizer_reads_as_before(name, folders):
    saved, ours = transformers.AutoTokenizer.from_pretrained(folders[name]), word_tokenizer()
    assert saved.eos_token == "<|im_end|>" and saved.pad_token == ours.pad_token
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b </s>"}]
    text = saved.apply_chat_template(messages, tokenize=False)
    assert text == ours.apply_chat_template(
        messages, tokenize=False, chat_template=TEMPLATES["chatml"]
    )
    assert saved.encode(text) == ours.encode(text)
    assert saved.decode(saved.encode(text)) == text


def test_a_run_from_such_a_folder_ends_at_the_same_tokens(folders, tmp_path):
    for name in ("whole", "adapter"):
        model, tokenizer = load_causal_lm(folders[name])
        assert model.generation_config.eos_token_id == [END, TEXT_END]
        assert tokenizer.eos_token_id == END


def saved(tmp_path, tokenizer, generation=None, **options):
    """The folder's generation config and tokenizer after `Tokens.save`."""
    if generation is not None:
        (tmp_path / GENERATION).write_text(json.dumps(generation))
    settings = dict(eos_id=None, vocab=VOCAB, chat_template="chatml")
    Tokens(tokenizer, **{**settings, **options}).save(tmp_path)
    path = tmp_path / GENERATION
    return json.loads(path.read_text()) if path.exists() else None


def test_the_tokenizer_of_the_user_is_not_changed(tmp_path):
    tokenizer = word_tokenizer()
    assert saved(tmp_path, tokenizer) is None
    assert tokenizer.eos_token == "</s>" and tokenizer.chat_template is None


@pytest.mark.parametrize("template", ["plain", "zephyr", "{{ eos_token }}" + TEMPLATES["chatml"]])
def test_a_template_that_writes_the_tokenizers_end_token_keeps_it(template, tmp_path):
    config = saved(tmp_path, word_tokenizer(), {"eos_token_id": 9}, chat_template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == "</s>"
    ends = [TEXT_END, 9] if template in TEMPLATES else [END, TEXT_END, 9]
    assert config["eos_token_id"] == ends


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (None, [END, TEXT_END]),
        (TEXT_END, [END, TEXT_END]),
        (END, [END, TEXT_END]),
        ([9, TEXT_END], [END, TEXT_END, 9]),
        ([TEXT_END, 9, END], [TEXT_END, 9, END]),  # names them all, in an order of its own
    ],
)
def test_end_tokens_join_those_that_are_named(named, ends, tmp_path):
    assert saved(tmp_path, word_tokenizer(), {"eos_token_id": named})["eos_token_id"] == ends


def test_a_config_that_was_made_of_the_models_no_longer_says_so(tmp_path):
    """Transformers makes one that says so anew of the model's config, with its end token alone."""
    named = {"_from_model_config": True, "eos_token_id": TEXT_END}
    assert "_from_model_config" not in saved(tmp_path, word_tokenizer(), named)


@pytest.mark.parametrize(
    ("named", "of_tokenizer", "pad"),
    [(7, "<pad>", 7), (None, "<pad>", 0), (-1, "<pad>", 0), (VOCAB, "<pad>", 0), (-1, None, None)],
)
def test_the_padding_token_is_one_of_the_models_or_none(named, of_tokenizer, pad, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = of_tokenizer
    assert saved(tmp_path, tokenizer, {"pad_token_id": named})["pad_token_id"] == pad


def test_an_end_token_of_a_tokenizer_that_cannot_be_saved_is_named_too(tmp_path):
    class Bytes:
        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode()

    config = saved(tmp_path, Bytes(), {}, chat_template=None, eos_id=0)
    assert config["eos_token_id"] == [0]
    assert [file.name for file in tmp_path.iterdir()] == [GENERATION]


def test_a_given_end_token_that_is_a_plain_word_stays_one(tmp_path):
    """As the tokenizer's own end token it would be special, and lost when texts are decoded."""
    tokenizer = word_tokenizer()
    letter = tokenizer.encode("a", add_special_tokens=False)[0]
    options = dict(eos_id=letter, chat_template="raw")
    config = saved(tmp_path, tokenizer, {"eos_token_id": TEXT_END}, **options)
    assert config["eos_token_id"] == [letter, TEXT_END]
    read_back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert read_back.eos_token == "</s>"
    assert read_back.decode([letter], skip_special_tokens=True) == "a"


def test_every_named_template_ends_where_it_is_trained_to(tmp_path):
    tokenizer = word_tokenizer(special=("<|eot_id|>", "<end_of_turn>"))
    ends = {"llama-3": "<|eot_id|>", "gemma": "<end_of_turn>", "chatml": "<|im_end|>"}
    for name, end in ends.items():
        folder = tmp_path / name
        folder.mkdir()
        config = saved(folder, tokenizer, {}, chat_template=name, vocab=VOCAB + 2)
        read_back = transformers.AutoTokenizer.from_pretrained(folder)
        assert read_back.eos_token == end
        assert config["eos_token_id"][0] == read_back.eos_token_id
        torch.testing.assert_close(read_back.convert_tokens_to_ids(end), read_back.eos_token_id)
