"""LoRA adapters of peft: what is trained, saved, loaded, merged and refused."""

import logging

import pytest
import torch

pytest.importorskip("peft")
import peft
import transformers

from self_rewarding_lm import (
    DPOConfig,
    FinetuneConfig,
    OptimConfig,
    SelfRewardingTrainer,
    SFTConfig,
)
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.loading import Loading, open_model, with_adapter
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.runs.pretrained import load_into
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE, MODEL_FILE
from self_rewarding_lm.runs.weights import save_folder
from tests.models.test_hugging_face import ragged_error
from tests.support.hf_models import VOCAB, tiny, word_tokenizer
from tests.support.models import Recurrent

ROWS = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(5)]
PAIRS = [{"prompt": f"tell {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(4)]
QUICK = OptimConfig(batch_size=2, learning_rate=1e-2)
IDS = torch.tensor([[9, 20, 31, 42, 9], [7, 7, 8, 9, 10]])


def lora(**options):
    defaults = dict(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.LoraConfig(**{**defaults, **options})


def sft(**options):
    return SFTConfig(**{**dict(train_dataset=ROWS, dropout=0.0, optim=QUICK), **options})


def dpo(**options):
    return DPOConfig(**{**dict(train_dataset=PAIRS, dropout=0.0, optim=QUICK), **options})


def trainer_of(folder, stages, model=None, **options):
    settings = dict(
        tokenizer=word_tokenizer(),
        peft_config=lora(),
        checkpoints_folder=folder,
        accelerate_kwargs=dict(cpu=True),
        quiet=True,
    )
    if model is None:
        model = tiny("llama", VOCAB)
    return SelfRewardingTrainer(model, finetune_configs=stages, **{**settings, **options})


@torch.no_grad()
def logits_of(module):
    training = module.training
    logits = module.eval()(IDS).logits
    module.train(training)
    return logits


def base_weights(module):
    """The weights that no adapter is, by their names without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in module.state_dict().items()
        if "lora_" not in name
    }


def adapter_weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if "lora_" in n}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], v) for k, v in other.items())


@torch.no_grad()
def response_logprobs(module, pair: PreferencePair, response: tuple[int, ...]) -> torch.Tensor:
    """The oracle: log p of each response token, by a whole forward of one row."""
    ids = torch.tensor([(*pair.prompt_ids, *response)])
    scores = module.eval()(ids).logits[0].log_softmax(-1)
    places = range(len(pair.prompt_ids), ids.shape[1])
    return torch.tensor([scores[i - 1, ids[0, i]].item() for i in places])


def assert_reference_is_of(run, stage, module):
    pairs = {pair.id: pair for pair in run.pairs(stage)}
    records = run.reference(stage)
    assert len(records) == len(PAIRS)
    for record in records:
        pair = pairs[record.id.rsplit("/", 1)[0]]
        for got, response in (
            (record.chosen, pair.chosen_ids),
            (record.rejected, pair.rejected_ids),
        ):
            truth = response_logprobs(module, pair, response)
            torch.testing.assert_close(torch.tensor(got), truth, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SFT and DPO of an adapter, with the merged model; nothing below changes it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder, [sft(), dpo()], merge_adapter=True)
    first = adapter_weights(trainer.unwrapped_model)
    return trainer, trainer(), first


def test_the_base_is_bit_for_bit_as_before_and_the_adapter_is_trained(trained):
    trainer, _, first = trained
    module = trainer.unwrapped_model
    assert same(base_weights(module), dict(tiny("llama", VOCAB).state_dict()))
    last = adapter_weights(module)
    assert trainer.token_model.state().keys() == last.keys()  # what is kept while others are in
    assert len(last) == 28 and all(not torch.equal(first[k], last[k]) for k in last)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == last.keys()


def test_a_stages_folder_holds_the_adapter_alone_and_is_read_by_peft(trained):
    trainer, run, _ = trained
    folder = run.weights("dpo").parent
    assert run.weights("dpo").name == ADAPTER_FILE
    assert {f.name for f in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        ADAPTER_FILE,
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    read = peft.PeftModel.from_pretrained(tiny("llama", VOCAB), folder)
    assert same(adapter_weights(read), adapter_weights(trainer.unwrapped_model))
    truth = logits_of(trainer.unwrapped_model)
    torch.testing.assert_close(logits_of(read), truth, rtol=0, atol=1e-5)
    assert not torch.allclose(truth, logits_of(tiny("llama", VOCAB)), atol=1e-2)


def test_the_reference_is_the_adapter_as_the_stage_started(trained):
    _, run, _ = trained
    start = peft.PeftModel.from_pretrained(tiny("llama", VOCAB), run.weights("sft").parent)
    assert_reference_is_of(run, "dpo", start)


def test_the_merged_model_is_read_by_transformers_without_peft_and_says_the_same(trained):
    trainer, run, _ = trained
    merged = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "merged")
    assert type(merged) is transformers.LlamaForCausalLM
    truth = logits_of(trainer.unwrapped_model)
    torch.testing.assert_close(logits_of(merged), truth, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder / "merged")
    assert tokenizer.chat_template == trainer.tokens.template
    assert adapter_weights(trainer.unwrapped_model)  # the model in hand keeps its adapter


def test_a_run_that_was_stopped_behind_a_stage_goes_on_in_a_new_trainer(trained, tmp_path):
    straight, _, _ = trained

    class StopError(Exception):
        pass

    class StopHere:
        def on_stage_end(self, run, stage, model):
            if stage == "sft":
                raise StopError

    with pytest.raises(StopError):
        trainer_of(tmp_path, [sft(), dpo()], callbacks=[StopHere()])()
    assert not (tmp_path / "02-dpo").exists()
    torch.manual_seed(5)  # the first weights of an adapter are the seed's, whatever this is
    resumed = trainer_of(tmp_path, [sft(), dpo()])
    run = resumed()
    last = adapter_weights(straight.unwrapped_model)
    assert same(adapter_weights(resumed.unwrapped_model), last)
    assert same(base_weights(resumed.unwrapped_model), dict(tiny("llama", VOCAB).state_dict()))
    assert run.reference("dpo") == straight._run.reference("dpo")


def test_a_run_that_is_done_loads_its_last_adapter(trained):
    trainer, run, _ = trained
    again = trainer_of(run.folder, [sft(), dpo()])
    assert not same(adapter_weights(again.unwrapped_model), adapter_weights(trainer.model))
    again()
    assert same(adapter_weights(again.unwrapped_model), adapter_weights(trainer.model))


def test_init_from_initial_is_the_adapter_before_it_was_trained(tmp_path):
    run = trainer_of(tmp_path, [sft(), dpo(init_from="initial")])()
    assert run.weights("initial").name == ADAPTER_FILE
    assert_reference_is_of(run, "dpo", tiny("llama", VOCAB))  # an untrained adapter adds nothing


class Swaps(FinetuneConfig):
    """Looks at other weights, twice, one within the other."""

    folder_name = "swaps"
    seen: object = None

    def run(self, ctx, out):
        module = ctx.model.module
        now = logits_of(module)
        with ctx.weights("initial"):
            initial = logits_of(module)
            with ctx.weights("sft"):
                within = logits_of(module)
            assert torch.equal(logits_of(module), initial)
        self.seen.update(now=now, initial=initial, within=within, after=logits_of(module))


@pytest.mark.parametrize("adapter", [True, False])
def test_other_weights_are_swapped_in_and_the_present_ones_back(adapter, tmp_path):
    seen = {}
    stages = [sft(init_from="initial"), dpo(), Swaps(seen=seen)]
    trainer = trainer_of(tmp_path, stages, peft_config=lora() if adapter else None)
    run = trainer()
    base = logits_of(tiny("llama", VOCAB))
    torch.testing.assert_close(seen["initial"], base, rtol=0, atol=1e-5)
    assert torch.equal(seen["now"], seen["after"])
    other = tiny("llama", VOCAB)
    if adapter:
        other = peft.PeftModel.from_pretrained(other, run.weights("sft").parent)
    else:
        run.load_weights(other, "sft")
    torch.testing.assert_close(seen["within"], logits_of(other), rtol=0, atol=1e-5)
    assert not torch.allclose(seen["within"], seen["now"], atol=1e-3)
    assert not torch.allclose(seen["within"], seen["initial"], atol=1e-3)


def test_a_folder_with_an_adapter_is_a_model_that_is_trained_on(tmp_path):
    base = tmp_path / "base"
    tiny("llama", VOCAB).save_pretrained(base)
    word_tokenizer(TEMPLATES["chatml"]).save_pretrained(base)
    first = trainer_of(tmp_path / "one", [sft()], base, tokenizer=None)
    run = first()
    folder = run.weights("sft").parent
    second = trainer_of(tmp_path / "two", [dpo()], folder, peft_config=None, tokenizer=None)
    module = second.unwrapped_model
    start = adapter_weights(module)
    assert same(start, adapter_weights(first.unwrapped_model))
    assert second.tokens.source.chat_template == TEMPLATES["chatml"]
    second()
    assert not same(adapter_weights(module), start)
    assert same(base_weights(module), dict(tiny("llama", VOCAB).state_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    third, tokenizer = open_model(folder, Loading())
    assert tokenizer.chat_template == TEMPLATES["chatml"]  # the base's
    assert same(adapter_weights(third), start)


def test_an_adapter_that_names_no_base_is_an_error_that_says_what_to_do(trained, tmp_path):
    _, run, _ = trained
    with pytest.raises(ConfigError, match=r"names no base model\. Load that"):
        open_model(run.weights("sft").parent, Loading())


def test_the_first_weights_of_an_adapter_are_the_seeds():
    drawn = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        drawn.append(adapter_weights(with_adapter(tiny("gpt2"), lora(), seed=seed)))
        assert torch.equal(torch.get_rng_state(), state)
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


def test_modules_to_save_are_trained_and_saved_with_the_adapter(tmp_path):
    config = lora(modules_to_save=["lm_head"], target_modules=["q_proj"])
    trainer = trainer_of(tmp_path, [sft(init_from="initial")], peft_config=config)
    module = trainer.unwrapped_model
    head = module.base_model.model.lm_head
    run = trainer()
    first = tiny("llama", VOCAB).lm_head.weight
    assert torch.equal(head.original_module.weight, first)
    assert not torch.equal(head.modules_to_save["default"].weight, first)
    read = peft.PeftModel.from_pretrained(tiny("llama", VOCAB), run.weights("sft").parent)
    torch.testing.assert_close(logits_of(read), logits_of(module), rtol=0, atol=1e-5)
    trainer.token_model.load(run.weights("initial"))
    assert torch.equal(head.modules_to_save["default"].weight, first)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_model_with_an_adapter_is_decoded_with_its_cache(kind):
    module = with_adapter(tiny(kind), lora())
    with torch.no_grad():
        for parameter in adapter_weights(module):
            module.get_parameter(parameter).normal_(std=0.2)
    assert adapt(module).caches
    assert ragged_error(module) < 1e-4


def test_an_adapter_on_a_base_in_bfloat16_is_in_float32_and_does_not_warn(caplog):
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        module, _ = open_model(tiny("llama", dtype=torch.bfloat16), Loading(peft_config=lora()))
    assert {p.dtype for p in adapter_weights(module).values()} == {torch.float32}
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(r=2), r"must be a configuration of peft.*got \{'r': 2\}"),
        (lora(task_type="SEQ_CLS"), "task_type 'CAUSAL_LM'; got LoraConfig"),
        (lora(target_modules=["nothing"]), "does not fit the model: .*nothing"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "a kind that changes layers.*PromptTuningConfig",
        ),
    ],
    ids=["dict", "task", "target", "prompt"],
)
def test_a_peft_config_that_does_not_fit_is_refused_before_any_work(config, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        trainer_of(tmp_path, [sft()], peft_config=config)
    assert not list(tmp_path.iterdir())


def test_wrong_combinations_are_refused_before_any_work(tmp_path):
    adapted = with_adapter(tiny("llama", VOCAB), lora())
    wrong = [
        (dict(model=Recurrent(VOCAB)), "needs a Hugging Face causal LM; the model is a Recurrent"),
        (dict(model=adapted), "has an adapter already; leave peft_config out"),
        (dict(peft_config=None, merge_adapter=True), "merge_adapter needs a model with an adapter"),
    ]
    for options, words in wrong:
        with pytest.raises(ConfigError, match=words):
            trainer_of(tmp_path, [sft()], **options)
    frozen = with_adapter(tiny("llama", VOCAB), lora(inference_mode=True))
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        trainer_of(tmp_path, [sft()], frozen, peft_config=None)
    named = peft.get_peft_model(tiny("llama", VOCAB), lora(), adapter_name="other")
    with pytest.raises(ConfigError, match=r"named 'default'.*got other"):
        trainer_of(tmp_path, [sft()], named, peft_config=None)
    theirs = peft.inject_adapter_in_model(lora(), tiny("llama", VOCAB))
    theirs._hf_peft_config_loaded = True  # as its add_adapter does, which asks for a later peft
    with pytest.raises(ConfigError, match=r"adapter that transformers loaded.*peft\.PeftModel"):
        trainer_of(tmp_path, [sft()], theirs, peft_config=None)
    assert not list(tmp_path.iterdir())


def test_an_adapter_and_a_whole_model_are_not_taken_for_each_other(tmp_path):
    whole, adapted = tiny("llama"), with_adapter(tiny("llama"), lora())
    save_folder(adapt(whole), tmp_path / "whole")
    save_folder(adapt(adapted), tmp_path / "adapter")
    with pytest.raises(StoreError, match="holds an adapter, and the model is one without"):
        load_into(whole, tmp_path / "adapter" / ADAPTER_FILE)
    with pytest.raises(StoreError, match="holds a whole model, and the model is one with an"):
        load_into(adapted, tmp_path / "whole" / MODEL_FILE)
    larger = with_adapter(tiny("llama"), lora(r=3))
    with pytest.raises(StoreError, match="the adapter in"):
        load_into(larger, tmp_path / "adapter" / ADAPTER_FILE)
    deeper = with_adapter(tiny("llama", num_hidden_layers=1), lora())
    with pytest.raises(StoreError, match="another model, or to another adapter"):
        load_into(deeper, tmp_path / "adapter" / ADAPTER_FILE)
