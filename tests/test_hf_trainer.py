"""Whole runs of Hugging Face models: checkpoints, chat templates, resume, two processes.

As a program (`python -m tests.test_hf_trainer FOLDER`) it does the runs of the two-process test.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from self_rewarding_lm import (
    DPOConfig,
    ExternalRewardDPOConfig,
    LocalEngine,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    from_stage,
)
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.errors import DataError
from tests.data.test_chat import PICKY, said
from tests.data.test_tokens import DEFAULT_SYSTEM, ENDS_TWICE, NEWLINES, TRIMS, WITH_BOS, theirs
from tests.support.hf_models import VOCAB, only_letters, tiny, word_tokenizer
from tests.support.processes import two

QUICK = OptimConfig(batch_size=4, learning_rate=1e-2)
ROWS = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(5)]
PROMPTS = [
    "Who?",
    [said("system", "Be kind."), said("user", " Hi\n")],
    [said("user", "Hi"), said("assistant", "Hello."), said("user", "So?")],
]
JUDGE = RewardConfig(
    prompt_template="Rate {{ prompt }} by {{ response }}.",
    parse_reward=lambda text: float(len(text) + sum(map(ord, text)) % 7),
)


def count(prompts, completions):
    return [float(len(text) * 100 + sum(map(ord, text)) % 97) for text in completions]


def sampling_of(tokenizer, ends=(2, 4), new=6):
    letters = only_letters(tokenizer, ends)
    return SamplingConfig(temperature=50.0, top_p=None, max_new_tokens=new, filter_fn=letters)


def sft(rows=ROWS, **options):
    return SFTConfig(**{**dict(train_dataset=rows, dropout=0.0, optim=QUICK), **options})


def external(tokenizer, prompts=PROMPTS, **options):
    defaults = dict(
        reward_model=count,
        prompt_dataset=prompts,
        num_candidate_responses=6,
        generation=sampling_of(tokenizer),
        dropout=0.0,
        optim=QUICK,
    )
    return ExternalRewardDPOConfig(**{**defaults, **options})


def trainer_of(folder, stages, model=None, **options):
    settings = dict(
        tokenizer=word_tokenizer(),
        checkpoints_folder=folder,
        accelerate_kwargs=dict(cpu=True),
        self_reward_prompt_config=JUDGE,
        quiet=True,
    )
    if model is None:
        model = tiny("llama", VOCAB, max_position_embeddings=512)
    return SelfRewardingTrainer(model, finetune_configs=stages, **{**settings, **options})


@torch.no_grad()
def logits_of(module):
    return module.eval()(torch.tensor([[9, 20, 31, 42, 9], [7, 7, 8, 9, 10]])).logits


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], v) for k, v in other.items())


def messages_of(prompt):
    return [said("user", prompt)] if isinstance(prompt, str) else prompt


MODELS = {
    "llama": lambda: tiny("llama", VOCAB),
    "qwen3": lambda: tiny("qwen3", VOCAB),
    "gpt2": lambda: tiny("gpt2", VOCAB),
    "tied": lambda: tiny("llama", VOCAB, tie_word_embeddings=True),
    "bfloat16": lambda: tiny("gemma3", VOCAB, torch.bfloat16),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_stages_folder_is_what_from_pretrained_reads(kind, tmp_path):
    trainer = trainer_of(tmp_path, [sft()], MODELS[kind]())
    run = trainer()
    folder, module = run.weights("sft").parent, trainer.unwrapped_model
    assert {f.name for f in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert same(weights_of(read), weights_of(module)) and read.dtype == module.dtype
    atol = 0.05 if kind == "bfloat16" else 1e-4
    torch.testing.assert_close(logits_of(read), logits_of(module), rtol=0, atol=atol)
    assert not same(weights_of(read), weights_of(MODELS[kind]()))
    if kind in ("gpt2", "tied"):
        assert read.get_input_embeddings().weight is read.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("own", "given", "saved"),
    [
        (DEFAULT_SYSTEM, None, DEFAULT_SYSTEM),
        (DEFAULT_SYSTEM, "zephyr", TEMPLATES["zephyr"]),
        (DEFAULT_SYSTEM, NEWLINES, NEWLINES),
        (None, None, TEMPLATES["plain"]),
    ],
    ids=["own", "named", "text", "base model"],
)
def test_the_tokenizer_beside_the_weights_has_the_template_that_was_used(
    own, given, saved, tmp_path
):
    tokenizer = word_tokenizer(own)
    trainer = trainer_of(tmp_path, [sft()], tokenizer=tokenizer, chat_template=given)
    folder = trainer().weights("sft").parent
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == saved and tokenizer.chat_template == own
    (row, *_) = Run.open(tmp_path).rows("sft")
    prompt = theirs(read, [said("user", "say 0")], True)
    assert row.ids[: len(prompt)] == prompt


def test_a_run_goes_on_from_its_folder_as_a_model(tmp_path):
    first = trainer_of(tmp_path / "one", [sft()], chat_template="chatml")
    folder = first().weights("sft").parent
    second = trainer_of(tmp_path / "two", [sft()], folder, tokenizer=None)
    assert same(weights_of(second.unwrapped_model), weights_of(first.unwrapped_model))
    assert second.tokens.prompt("Who?") == first.tokens.prompt("Who?")


class Recording(LocalEngine):
    """An engine that keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate(self, model, requests, decoding):
        self.asked += [request.ids for request in requests]
        return LocalEngine().generate(model, requests, decoding)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(DEFAULT_SYSTEM, id="default system"),
        pytest.param(WITH_BOS, id="begin token", marks=pytest.mark.slow),
        pytest.param(NEWLINES, id="newlines", marks=pytest.mark.slow),
        pytest.param(TRIMS, id="trims", marks=pytest.mark.slow),
        pytest.param(ENDS_TWICE, id="ends twice", marks=pytest.mark.slow),
        pytest.param(None, id="base model"),
    ],
)
def test_trap_7_what_is_generated_from_is_judged_and_trained_on_by_one_template(template, tmp_path):
    tokenizer, engine = word_tokenizer(template, adds_bos=True), Recording()
    ends = (2,) if template in (NEWLINES, None) else (4,)  # what this template writes there
    stage = SelfRewardDPOConfig(
        prompt_dataset=PROMPTS,
        num_candidate_responses=6,
        judge_all=True,  # the cut-off ones too
        num_sampled_reward_responses=1,
        generation=sampling_of(tokenizer, ends),
        judging=sampling_of(tokenizer, ends),
        dropout=0.0,
        optim=QUICK,
    )
    trainer = trainer_of(tmp_path / "one", [stage], tokenizer=tokenizer, engine=engine)
    run, used = trainer(), trainer.tokens.template
    prompts, candidates = run.prompts(0), run.candidates(0)
    assert len(prompts) == 3 and len(candidates) == 18
    own = {p.id: (messages_of(PROMPTS[p.row]), p) for p in prompts}
    for messages, prompt in own.values():
        assert prompt.ids == theirs(tokenizer, messages, True, used)  # transformers' own ids
        assert [dict(m) for m in prompt.messages] == messages
        assert prompt.ids.count(1) == (template in (WITH_BOS, None))  # no begin token comes twice
        assert prompt.ids in engine.asked
    rows = []
    for candidate in candidates:
        messages, prompt = own[candidate.prompt_id]
        answered = [*messages, said("assistant", candidate.text)]
        whole = theirs(tokenizer, answered, False, used)
        sampled = (*prompt.ids, *candidate.ids)
        assert whole[: len(sampled)] == sampled
        shown = f"Rate {prompt.text} by {candidate.text}."
        assert theirs(tokenizer, [said("user", shown)], True, used) in engine.asked
        rows.append({"prompt": messages, "completion": candidate.text})
    for pair in run.pairs(0):
        by_id = {c.id: c for c in candidates}
        assert pair.prompt_ids == own[pair.id][1].ids
        for side in ("chosen", "rejected"):
            assert getattr(pair, f"{side}_ids") == by_id[getattr(pair, f"{side}_id")].ids
    assert len(run.pairs(0)) > 1
    trained = trainer_of(tmp_path / "two", [sft(rows)], tokenizer=tokenizer)().rows(0)
    for row, candidate in zip(trained, candidates, strict=True):
        prompt = own[candidate.prompt_id][1]
        ids = (*prompt.ids, *candidate.ids)
        ended = ids if candidate.finished else (*ids, trainer.tokens.eos_id)
        assert row.ids == ended
        assert row.targets == tuple(i >= len(prompt.ids) for i in range(len(ended)))
    assert {c.finished for c in candidates} == {True, False}


def test_later_stages_train_on_the_pairs_as_they_were_sampled(tmp_path):
    tokenizer = word_tokenizer(DEFAULT_SYSTEM)
    made = from_stage("external_reward")
    sampling = sampling_of(tokenizer, (4,))
    stages = [
        external(tokenizer, generation=sampling),
        DPOConfig(train_dataset=made, optim=QUICK),
        sft(made),
    ]
    run = trainer_of(tmp_path, stages, tokenizer=tokenizer)()
    pairs = run.pairs("external_reward")
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    for pair, again in zip(pairs, run.pairs("dpo"), strict=True):
        assert [getattr(pair, f) for f in fields] == [getattr(again, f) for f in fields]
    assert [r.ids for r in run.rows("sft")] == [(*p.prompt_ids, *p.chosen_ids) for p in pairs]
    for pair, row in zip(pairs, run.preference_rows("external_reward"), strict=True):
        tokens = trainer_of(tmp_path / "none", [sft()], tokenizer=tokenizer).tokens
        prompt = row["prompt"]
        assert tokens.prompt(prompt).ids == pair.prompt_ids  # what is exported renders the same
        chosen = row["chosen"]
        text = chosen if isinstance(chosen, str) else chosen[0]["content"]
        assert tokens.response(prompt, text) == pair.chosen_ids


def test_spin_answers_the_prompt_that_the_human_answer_is_trained_behind(tmp_path):
    tokenizer, engine = word_tokenizer(TRIMS), Recording()
    rows = [{"messages": [*messages_of(p), said("assistant", "It is so.")]} for p in PROMPTS]
    stage = SelfPlayConfig(
        train_dataset=rows, generation=sampling_of(tokenizer), dropout=0.0, optim=QUICK
    )
    trainer = trainer_of(tmp_path, [stage], tokenizer=tokenizer, engine=engine)
    run = trainer()
    for place, pair in enumerate(run.pairs(0)):
        messages = messages_of(PROMPTS[place])
        assert pair.prompt_ids == theirs(tokenizer, messages, True)
        assert pair.prompt_ids in engine.asked
        whole = theirs(tokenizer, [*messages, said("assistant", "It is so.")], False)
        assert whole[:-1] == (*pair.prompt_ids, *pair.chosen_ids)  # all but the last newline


@pytest.mark.parametrize("end", [2, 4, 9])
def test_each_end_token_finishes_a_candidate_and_is_left_out_of_its_text(end, tmp_path):
    tokenizer = word_tokenizer(TEMPLATES["chatml"])
    model = tiny("gpt2", VOCAB)
    model.generation_config.eos_token_id = [2, 9]
    stage = external(tokenizer, generation=sampling_of(tokenizer, (end,)), prompts=["Who?"] * 4)
    run = trainer_of(tmp_path, [stage], model, tokenizer=tokenizer)()
    finished = [c for c in run.candidates(0) if c.finished]
    assert finished and all(c.ids[-1] == end for c in finished)
    assert all(c.text == tokenizer.decode(c.ids[:-1]) for c in finished)
    cut = [c for c in run.candidates(0) if not c.finished]
    assert cut and all(c.finished is False and end not in c.ids for c in cut)
    for pair in run.pairs(0):
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == end


def test_a_row_that_the_template_refuses_is_named_before_any_work(tmp_path):
    tokenizer = word_tokenizer(PICKY)
    refused = [*ROWS, {"prompt": PROMPTS[1], "completion": "a"}]
    with pytest.raises(DataError, match=r"train_dataset, row 5: .*roles system, user.*alternate"):
        trainer_of(tmp_path, [sft(refused)], tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"prompt_dataset, row 1: .*alternate"):
        trainer_of(tmp_path, [external(tokenizer)], tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_template_that_changes_an_answered_prompt_is_named_before_any_work(tmp_path):
    changes = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    changes += "{% if add_generation_prompt %}[think]{% endif %}"
    with pytest.raises(DataError, match=r"(?s)row 0: .*'say 0\|\[think\]'.*'say 0\|i say 0\|'"):
        trainer_of(tmp_path, [sft()], tokenizer=word_tokenizer(changes))


def test_a_run_that_was_stopped_behind_a_stage_ends_as_one_that_was_not(tmp_path):
    class StopError(Exception):
        pass

    class StopHere:
        def on_stage_end(self, run, stage, model):
            if stage == "sft":
                raise StopError

    tokenizer = word_tokenizer()
    stages = [sft(), external(tokenizer)]
    straight = trainer_of(tmp_path / "one", stages)
    run = straight()
    with pytest.raises(StopError):
        trainer_of(tmp_path / "two", stages, callbacks=[StopHere()])()
    resumed = trainer_of(tmp_path / "two", stages)
    again = resumed()
    assert again.candidates(1) == run.candidates(1) and again.reference(1) == run.reference(1)
    assert same(weights_of(resumed.unwrapped_model), weights_of(straight.unwrapped_model))


def test_a_run_that_is_started_anew_leaves_no_files_of_the_earlier_one(tmp_path):
    trainer_of(tmp_path, [sft(init_from="initial"), sft(name="second")])()
    (tmp_path / "01-sft" / "model" / "notes.txt").write_text("mine")
    trainer_of(tmp_path, [sft(name="other")])(overwrite_checkpoints=True)
    left = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    kept = {"run.json", "files.json", "run.lock", "report.html", "01-sft/model/notes.txt"}
    assert {f for f in left if not f.startswith("01-other/")} == kept


@pytest.mark.parametrize("changed", [False, True])
def test_weights_of_another_chat_template_are_warned_of(changed, tmp_path, caplog):
    first = trainer_of(tmp_path / "one", [sft()], tokenizer=word_tokenizer(DEFAULT_SYSTEM))
    folder = first().weights("sft").parent
    other = word_tokenizer(DEFAULT_SYSTEM + "{# more #}" * changed)
    caplog.clear()
    trainer_of(tmp_path / "two", [sft(init_from=str(folder))], tokenizer=other)
    assert ("another chat template" in caplog.text) == changed


def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path):
    plain = trainer_of(tmp_path / "one", [sft()])
    plain()
    optim = sft().optim.model_copy(update={"gradient_checkpointing": True})
    again = trainer_of(tmp_path / "two", [sft(optim=optim)])
    again()
    assert same(weights_of(again.unwrapped_model), weights_of(plain.unwrapped_model))


def two_runs(folder: Path) -> None:
    """Full weights and an adapter; in float64, norms too (not so in Llama's), so that the order of
    sums changes nothing."""
    from peft import LoraConfig

    tokenizer = word_tokenizer(DEFAULT_SYSTEM)
    for name, config in (
        ("full", None),
        ("lora", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
    ):
        model = tiny("gpt2", VOCAB, torch.float64)
        stages = [sft(init_from="initial"), external(tokenizer)]
        trainer = trainer_of(
            folder / name,
            stages,
            model,
            tokenizer=tokenizer,
            peft_config=config,
            merge_adapter=config is not None,
        )
        trainer()
        torch.save(weights_of(model), folder / f"{name}.{trainer.runtime.rank}.pt")


@pytest.mark.slow
def test_two_processes_give_the_records_and_weights_of_one(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    two_runs(tmp_path / "one")
    two("-m", "tests.test_hf_trainer", tmp_path / "two")
    for name in ("full", "lora"):
        alone, together = Run.open(tmp_path / "one" / name), Run.open(tmp_path / "two" / name)
        for stage in alone.stages:
            for records in ("prompts", "candidates", "judgements", "pairs", "rows"):
                assert getattr(alone, records)(stage) == getattr(together, records)(stage)
            for mine, other in zip(alone.reference(stage), together.reference(stage), strict=True):
                torch.testing.assert_close(mine.chosen, other.chosen, rtol=0, atol=1e-9)
        files = ("one/{}.0.pt", "two/{}.0.pt", "two/{}.1.pt")
        one, first, second = (
            torch.load(tmp_path / file.format(name), weights_only=True) for file in files
        )
        assert same(first, second)
        for key, value in one.items():
            torch.testing.assert_close(first[key], value, rtol=1e-7, atol=1e-9)
        merged = [tmp_path / run / name / "merged" / "config.json" for run in ("one", "two")]
        assert [file.exists() for file in merged] == [name == "lora"] * 2


if __name__ == "__main__":
    two_runs(Path(sys.argv[1]))
