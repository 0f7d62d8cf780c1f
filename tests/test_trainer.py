"""Whole runs on tiny models: order, records, resume, weights, errors before work."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    DPOConfig,
    ExternalRewardDPOConfig,
    FinetuneConfig,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    create_mock_dataset,
    from_stage,
)
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import (
    AdapterError,
    ConfigError,
    DataError,
    JudgeError,
    PairingError,
    RunMismatchError,
    StoreError,
    TokenizerError,
    TrainingError,
)
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.generation.engine import Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import stable_hash
from tests.support.models import ALPHABET, END, TEXT_VOCAB, Recurrent, encode, lively

QUICK = OptimConfig(batch_size=4, learning_rate=1e-2)
SHORT = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=6)
JUDGE = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    parse_reward=lambda text: float(len(set(text))),
)
ROWS = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(6)]
PROMPTS = [f"tell {i}" for i in range(10)]


def decode(ids):
    """The end token, a token like any other where none is named, is read as a space."""
    return "".join((ALPHABET + " ")[i] for i in ids.tolist())


def model64(seed: int = 0) -> torch.nn.Module:
    return lively(Recurrent(TEXT_VOCAB).double(), seed)


def trainer_of(folder, stages, model=None, **options):
    settings = dict(
        tokenizer_encode=encode,
        tokenizer_decode=decode,
        self_reward_prompt_config=JUDGE,
        checkpoints_folder=folder,
        quiet=True,
    )
    if model is None:
        model = model64()
    return SelfRewardingTrainer(model, finetune_configs=stages, **{**settings, **options})


def sft(**options):
    return SFTConfig(**{**dict(train_dataset=ROWS, dropout=0.0, optim=QUICK), **options})


def self_reward(**options):
    defaults = dict(
        prompt_dataset=PROMPTS,
        num_generated_preference_pairs=4,
        prompts_per_block=4,
        generation=SHORT,
        judging=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    return SelfRewardDPOConfig(**{**defaults, **options})


def external(**options):
    defaults = dict(
        reward_model=lambda ids: ids.double().sum(dim=-1),
        prompt_dataset=PROMPTS,
        num_generated_preference_pairs=4,
        generation=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    return ExternalRewardDPOConfig(**{**defaults, **options})


def weights_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_each_stage_has_its_own_files_and_done_comes_with_each(tmp_path):
    run = trainer_of(tmp_path, [sft(), self_reward()])()
    files = {name: set(os.listdir(tmp_path / name)) for name in ("01-sft", "02-self_reward")}
    shared = {"config.json", "metrics.jsonl", "events.jsonl", "model", "done.json", "files.json"}
    assert files["01-sft"] == {"rows.jsonl", *shared}
    assert files["02-self_reward"] == {
        "prompts.jsonl",
        "candidates.jsonl",
        "judgements.jsonl",
        "pairs.jsonl",
        "reference.jsonl",
        *shared,
    }
    assert run.info["seed"] == 0 and run.info["versions"]["torch"] == version("torch")


def test_every_trained_pair_can_be_traced_to_its_prompt_candidates_and_judgements(tmp_path):
    run = trainer_of(tmp_path, [self_reward(num_sampled_reward_responses=2)])()
    prompts = {p.id: p for p in run.prompts(0)}
    candidates = {c.id: c for c in run.candidates(0)}
    judgements = run.judgements(0)
    assert len(run.pairs(0)) == 4
    for pair in run.pairs(0):
        assert pair.prompt == prompts[pair.id].text == PROMPTS[prompts[pair.id].row]
        for side in ("chosen", "rejected"):
            candidate = candidates[getattr(pair, f"{side}_id")]
            assert candidate.prompt_id == pair.id
            assert candidate.ids == getattr(pair, f"{side}_ids")
            scores = [j.score for j in judgements if j.candidate_ids == (candidate.id,)]
            assert len(scores) == 2
            assert sum(scores) / 2 == getattr(pair, f"{side}_score")
        assert pair.chosen_score > pair.rejected_score


def test_records_and_weights_do_not_depend_on_rows_in_flight_micro_batches_or_restarts(tmp_path):
    from self_rewarding_lm import LocalEngine

    finals, records = [], []
    for rows, micro in ((1, 1), (3, 2), (64, None)):
        folder = tmp_path / str(rows)
        optim = OptimConfig(batch_size=4, learning_rate=1e-2, micro_batch_size=micro)
        model = model64()
        stages = [sft(optim=optim), self_reward(optim=optim), self_reward(optim=optim)]
        run = trainer_of(folder, stages, model, engine=LocalEngine(max_rows=rows))()
        records.append([(run.candidates(i), run.judgements(i), run.pairs(i)) for i in (1, 2)])
        finals.append(weights_of(model))
    assert records[0] == records[1] == records[2]
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(finals[0][name], finals[2][name], rtol=1e-9, atol=1e-12)


def test_a_round_answers_with_the_weights_that_the_one_before_it_left_also_after_a_restart(
    tmp_path,
):
    """Those of its checkpoint, read into another model, with the noise of the candidates' ids."""
    stages = [self_reward(optim=QUICK), self_reward(optim=QUICK)]
    trainer_of(tmp_path / "halves", stages[:1])()
    folders = [tmp_path / "whole", tmp_path / "halves"]
    for folder in folders:
        run = trainer_of(folder, stages, model64(seed=7) if folder.name == "halves" else None)()
        checkpoint = adapt(model64(seed=5))
        checkpoint.load(run.weights("self_reward"))
        prompts = {p.id: p for p in run.prompts(1)}
        candidates = run.candidates(1)
        asked = [
            Request(prompts[c.prompt_id].ids, stable_hash(0, c.id), c.max_new_tokens)
            for c in candidates
        ]
        decoding = decoding_of(SHORT, trainer_of(tmp_path / "other", stages).tokens)
        found = dict(LocalEngine(max_rows=1).generate(checkpoint, asked, decoding))
        assert candidates and [found[i].ids for i in range(len(asked))] == [
            c.ids for c in candidates
        ]


def test_another_seed_gives_other_candidates(tmp_path):
    runs = [trainer_of(tmp_path / str(s), [self_reward()], seed=s)() for s in (0, 1)]
    assert runs[0].candidates(0) != runs[1].candidates(0)


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_its_records_to_the_same_weights(tmp_path):
    straight = model64()
    trainer_of(tmp_path / "straight", [sft(), self_reward(), self_reward()], straight)()

    calls = []

    def stopping(text):
        calls.append(text)
        if len(calls) == 30:
            raise StopError
        return JUDGE.parse_reward(text)

    def stages():
        return [sft(), self_reward(), self_reward()]

    stopped = RewardConfig(prompt_template=JUDGE.prompt_template, parse_reward=stopping)
    with pytest.raises(JudgeError, match="StopError"):
        trainer_of(tmp_path / "halted", stages(), self_reward_prompt_config=stopped)()
    halted = Run.open(tmp_path / "halted")
    assert [halted.is_done(i) for i in range(3)] == [True, False, False]
    before = {c.id: c for c in halted.candidates(1)}
    assert before
    resumed = model64(seed=5)  # its weights come from the first stage's checkpoint
    run = trainer_of(tmp_path / "halted", stages(), resumed, self_reward_prompt_config=stopped)()
    after = {c.id: c for c in run.candidates(1)}
    assert all(after[i] == c for i, c in before.items())
    assert same(weights_of(straight), weights_of(resumed))


def test_a_prompt_that_is_too_long_is_found_before_an_earlier_stage_trains(tmp_path):
    prompts = ["tell", "a" * 40]
    with pytest.raises(DataError, match="prompt_dataset, row 1: the prompt has 40 tokens"):
        trainer_of(tmp_path, [sft(), self_reward(prompt_dataset=prompts)], small_xt())


def test_a_warning_of_another_chat_template_comes_once_a_stage(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(
        Tokens, "compare_template", lambda _, stage, weights: compared.append(stage)
    )
    trainer_of(tmp_path, [sft(), sft()])(rehearse=False)
    assert compared == ["sft", "sft-2"]


def test_reference_log_probs_of_other_weights_are_not_taken_for_the_models_own(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(8)]

    def stop(model):
        raise StopError

    def stages():
        return [DPOConfig(train_dataset=rows, optim=QUICK, early_stopper_eval_module=stop)]

    with pytest.raises(StopError):
        trainer_of(tmp_path, stages())()
    with pytest.raises(RunMismatchError, match="other than the model's present"):
        trainer_of(tmp_path, stages(), model64(seed=1))()


def test_overwriting_leaves_a_users_file_in_a_stages_folder_and_runs(tmp_path):
    trainer_of(tmp_path, [sft()])()
    (tmp_path / "01-sft" / "notes.txt").write_text("mine")
    run = trainer_of(tmp_path, [sft()])(overwrite_checkpoints=True)
    assert run.is_done(0) and (tmp_path / "01-sft" / "notes.txt").read_text() == "mine"


def test_initial_weights_that_were_not_kept_are_not_made_up(tmp_path):
    trainer_of(tmp_path, [sft()])()
    other = model64(seed=1)
    with pytest.raises(StoreError, match="were not kept"):
        trainer_of(tmp_path, [sft(), sft(init_from="initial")], other)()


def test_pairs_of_an_earlier_stage_are_those_of_this_call(tmp_path):
    spin = SelfPlayConfig(train_dataset=ROWS, generation=SHORT, dropout=0.0, optim=QUICK)
    trainer = trainer_of(tmp_path, [spin, DPOConfig(train_dataset=from_stage("spin"), optim=QUICK)])
    trainer()
    run = trainer(overwrite_checkpoints=True)  # from the weights of the first call
    assert [p.rejected for p in run.pairs("dpo")] == [p.rejected for p in run.pairs("spin")]


def test_held_out_pairs_are_not_trained_on_by_a_later_stage(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    first = DPOConfig(train_dataset=rows[:2], valid_dataset=rows[2:], optim=QUICK)
    later = DPOConfig(train_dataset=from_stage("dpo"), optim=QUICK)
    run = trainer_of(tmp_path, [first, later])()
    assert len(run.pairs("dpo")) == len(run.pairs("dpo-2")) == 2


def test_another_source_stage_is_another_setting(tmp_path, monkeypatch):
    def stages(source):
        made = [external(name=name) for name in ("a", "b")]
        return [*made, DPOConfig(train_dataset=from_stage(source), optim=QUICK)]

    trainer_of(tmp_path, stages("a"))()
    # before the stages are tried in short, which may take long
    with monkeypatch.context() as patched, pytest.raises(RunMismatchError, match="from_stage"):
        patched.setattr(
            "self_rewarding_lm.trainer.rehearse_stages", lambda *_: pytest.fail("rehearsed")
        )
        trainer_of(tmp_path, stages("b"))()
    with pytest.raises(RunMismatchError, match=r"from_stage\(b\)"):
        trainer_of(tmp_path, stages("b"))()


def test_the_curve_of_a_stage_that_was_stopped_is_written_once(tmp_path):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 4:
            raise StopError
        return 0.0

    often = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=1)
    for _ in range(2):
        stage = sft(optim=often, early_stopper_eval_module=evaluate, early_stopper_patience=99)
        try:
            run = trainer_of(tmp_path, [stage])()
        except StopError:
            continue
    assert [m["step"] for m in run.metrics(0) if "loss" in m] == list(range(1, 7))
    scores = [m["step"] for m in run.metrics(0) if "early_stopping/score" in m]
    assert scores == list(range(7))
    assert len([m for m in run.metrics(0) if "rows/truncated" in m]) == 1


def test_responses_of_other_weights_are_not_taken_for_the_models_own(tmp_path):
    broken = RewardConfig(prompt_template=JUDGE.prompt_template, parse_reward=lambda text: 1 / 0)
    with pytest.raises(JudgeError, match="ZeroDivisionError"):
        trainer_of(tmp_path, [self_reward()], self_reward_prompt_config=broken)(rehearse=False)
    assert Run.open(tmp_path).candidates(0)
    other = model64(seed=1)
    with pytest.raises(RunMismatchError, match="other than the model's present"):
        trainer_of(tmp_path, [self_reward()], other, self_reward_prompt_config=broken)(
            rehearse=False
        )


def test_a_run_that_is_done_is_loaded_and_nothing_is_trained_again(tmp_path):
    first = model64()
    trainer_of(tmp_path, [sft()], first)()
    stamp = (tmp_path / "01-sft" / "done.json").stat().st_mtime_ns
    second = model64(seed=3)
    trainer_of(tmp_path, [sft()], second)()
    assert same(weights_of(first), weights_of(second))
    assert (tmp_path / "01-sft" / "done.json").stat().st_mtime_ns == stamp


def test_a_changed_configuration_of_a_started_stage_is_refused_with_the_difference(tmp_path):
    trainer_of(tmp_path, [sft()])()
    with pytest.raises(RunMismatchError) as error:
        trainer_of(tmp_path, [sft(optim=OptimConfig(batch_size=2, learning_rate=1e-2))])()
    assert '-   "batch_size": 4,' in str(error.value) and '+   "batch_size": 2,' in str(error.value)
    assert "overwrite_checkpoints=True" in str(error.value)


def test_micro_batches_and_stages_not_started_are_free_to_change(tmp_path):
    trainer_of(tmp_path, [sft()])()
    free = OptimConfig(batch_size=4, learning_rate=1e-2, micro_batch_tokens=64)
    run = trainer_of(tmp_path, [sft(optim=free), self_reward()])()
    assert run.is_done("self_reward")


def test_overwrite_starts_anew_and_removes_only_what_the_library_made(tmp_path, monkeypatch):
    first = model64()
    trainer_of(tmp_path, [sft(), self_reward()], first)()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "02-self_reward" / "notes.txt").write_text("mine")
    (tmp_path / "02-self_reward" / "model" / "notes.txt").write_text("mine")
    run = trainer_of(tmp_path, [sft()], model64(seed=1))(overwrite_checkpoints=True)
    assert run.stages == ["sft"]
    left = sorted(
        str(p.relative_to(tmp_path / "02-self_reward"))
        for p in (tmp_path / "02-self_reward").rglob("*")
    )
    assert left == ["model", "model/notes.txt", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    monkeypatch.setenv("SELF_REWARDING_LM_OVERWRITE", "1")
    changed = OptimConfig(batch_size=2, learning_rate=1e-2)
    trainer_of(tmp_path, [sft(optim=changed)])()


def test_files_that_are_not_ours_stop_a_run_before_any_training(tmp_path):
    (tmp_path / "01-sft").mkdir()
    (tmp_path / "01-sft" / "thesis.tex").write_text("mine")
    trained = []
    stage = sft(early_stopper_eval_module=lambda model: trained.append(1) or 0.0)
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="01-sft"):
            trainer_of(tmp_path, [stage])(overwrite_checkpoints=overwrite)
    assert not trained
    assert (tmp_path / "01-sft" / "thesis.tex").read_text() == "mine"


def test_save_refuses_an_existing_file_and_writes_safetensors(tmp_path):
    trainer = trainer_of(tmp_path, [sft()])
    trainer.save("now.safetensors")
    with pytest.raises(StoreError, match="overwrite=True"):
        trainer.save("now.safetensors")
    trainer.save("now.safetensors", overwrite=True)
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "now.safetensors"), weights_of(trainer.unwrapped_model))


def test_init_from_starts_at_the_initial_or_an_earlier_stages_weights(tmp_path):
    initial = weights_of(model64())
    seen = {}

    class Look(FinetuneConfig):
        folder_name = "look"

        def run(self, ctx, out):
            seen[ctx.stage] = weights_of(ctx.model.module)

    stages = [sft(), sft(), Look(init_from="initial"), Look(init_from="sft"), Look()]
    run = trainer_of(tmp_path, stages)()
    assert same(seen["look"], initial)
    from safetensors.torch import load_file

    assert same(seen["look-2"], load_file(run.weights("sft")))
    assert same(seen["look-3"], seen["look-2"])  # previous: as the stage before left it
    assert not same(load_file(run.weights("sft-2")), load_file(run.weights("sft")))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (None, ["sft", "sft-2", "sft-3", "sft-4"]),
        (1, ["sft-4"]),
        (2, ["sft-3", "sft-4"]),
        (9, ["sft", "sft-2", "sft-3", "sft-4"]),
    ],
)
def test_keep_stages_leaves_the_last_ones_weights_and_all_records(keep, left, tmp_path):
    run = trainer_of(tmp_path, [sft()] * 4, keep_stages=keep)()
    names = [f"sft{end}" for end in ("", "-2", "-3", "-4")]
    assert [name for name in names if (run.stage(name).path / "model").exists()] == left
    assert all(len(run.rows(name)) == 6 and run.is_done(name) for name in names)
    if keep == 1:
        with pytest.raises(StoreError, match="keep_stages deleted them"):
            run.weights("sft")


def test_weights_that_a_later_stage_asks_for_are_kept_until_it_is_done(tmp_path):
    kept = []

    class Look(FinetuneConfig):
        folder_name = "look"

        def run(self, ctx, out):
            kept.append([name for name in ("sft", "sft-2", "sft-3") if weighs(name)])

    def weighs(name):
        return any(tmp_path.glob(f"0?-{name}/model/*"))

    stages = [sft(), sft(), sft(), Look(init_from="sft"), Look()]
    trainer_of(tmp_path, stages, keep_stages=1)()
    assert kept == [["sft", "sft-3"], []]


def test_a_run_with_deleted_weights_goes_on_from_the_last(tmp_path):
    straight = trainer_of(tmp_path / "one", [sft()] * 3)
    straight()
    trainer_of(tmp_path / "two", [sft()] * 2, keep_stages=1)()
    again = trainer_of(tmp_path / "two", [sft()] * 3, keep_stages=1)
    again()
    assert same(weights_of(again.unwrapped_model), weights_of(straight.unwrapped_model))


def test_an_old_checkpoint_is_read_as_the_migration_page_says(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [code] = [text for text in blocks if "import_checkpoint" in text]
    monkeypatch.chdir(tmp_path)
    old, model = model64(seed=3), model64()
    torch.save({"model": old.state_dict()}, "1.sft.ckpt.pt")
    exec(code, {"model": model})
    assert same(weights_of(old), weights_of(model))


def test_the_context_swaps_earlier_weights_in_and_back(tmp_path):
    seen = {}

    class Look(FinetuneConfig):
        folder_name = "look"

        def run(self, ctx, out):
            before = weights_of(ctx.model.module)
            with ctx.weights("sft"):
                seen["sft"] = weights_of(ctx.model.module)
            seen["restored"] = same(before, weights_of(ctx.model.module))

    run = trainer_of(tmp_path, [sft(), self_reward(), Look()])()
    from safetensors.torch import load_file

    assert same(seen["sft"], load_file(run.weights("sft"))) and seen["restored"]


def test_stages_that_share_prompts_go_on_where_the_last_one_stopped(tmp_path):
    prompts = [f"p{i}" for i in range(12)]
    again = self_reward(prompt_dataset=prompts, reuse_prompts=True)
    stages = [self_reward(prompt_dataset=prompts), self_reward(prompt_dataset=prompts), again]
    run = trainer_of(tmp_path, stages)()
    rows = [[p.row for p in run.prompts(i)] for i in range(3)]
    assert rows[0][0] == 0 and rows[1][0] == rows[0][-1] + 1 and rows[2][0] == 0


def test_prompts_are_passed_several_times_with_new_noise_and_not_without_end(tmp_path):
    run = trainer_of(tmp_path, [external(prompt_dataset=["a", "b"])])()
    pairs = run.pairs(0)
    assert len(pairs) == 4 and len({p.id for p in pairs}) == 4
    assert (
        len({c.ids for c in run.candidates(0) if c.prompt_id.startswith("external_reward/0/")}) > 4
    )
    with pytest.raises(PairingError, match="tie"):
        same_score = external(reward_model=lambda ids: torch.zeros(len(ids)))
        trainer_of(tmp_path / "ties", [same_score])()
    asked = Run.open(tmp_path / "ties").prompts(0)
    assert len(asked) == 4 * len(PROMPTS)  # four times what four pairs of ten prompts need


def test_fewer_pairs_than_wanted_still_train_with_a_warning(tmp_path, caplog):
    stage = external(
        prompt_dataset=["a", "b"], num_generated_preference_pairs=9, max_prompt_passes=1
    )
    run = trainer_of(tmp_path, [stage])()
    assert len(run.pairs(0)) <= 2 and run.summary(0)["steps"] == 1
    assert "instead of 9" in caplog.text


def test_an_offline_dpo_stage_trains_on_an_earlier_stages_pairs(tmp_path):
    run = trainer_of(
        tmp_path, [self_reward(), DPOConfig(train_dataset=from_stage("self_reward"), optim=QUICK)]
    )()
    first, second = run.pairs("self_reward"), run.pairs("dpo")
    assert [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in first] == [
        (p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in second
    ]
    assert run.preference_rows("dpo")[0].keys() == {"prompt", "chosen", "rejected"}


def test_an_sft_stage_trains_on_an_earlier_stages_winners_beside_its_own_rows(tmp_path):
    stages = [
        self_reward(),
        sft(train_dataset=[create_mock_dataset(2, ROWS[0]), from_stage("self_reward")]),
    ]
    run = trainer_of(tmp_path, stages)()
    winners = {(*p.prompt_ids, *p.chosen_ids) for p in run.pairs("self_reward")}
    assert winners < {row.ids for row in run.rows("sft")}
    assert len(run.rows("sft")) == 2 + 4


def test_dpo_raises_the_chosen_against_the_rejected(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    stage = DPOConfig(train_dataset=rows, optim=QUICK, num_train_steps=20, dropout=0.0)
    metrics = trainer_of(tmp_path, [stage])().metrics(0)
    steps = [m for m in metrics if "loss" in m]
    assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-9)
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[-1]["rewards/margins"] > 0.5 and steps[-1]["rewards/accuracies"] == 1.0


def test_spin_plays_against_the_iterations_first_weights_and_mixes_earlier_pairs(tmp_path):
    model = model64()
    stage = SelfPlayConfig(
        train_dataset=ROWS,
        iterations=2,
        mix_previous=True,
        generation=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    run = trainer_of(tmp_path, [stage], model, eos_id=END)()
    pairs = {i: [p for p in run.pairs(0) if p.id.endswith(f"/{i}")] for i in (0, 1)}
    prompts = {p.id for p in run.prompts(0)}
    assert {c.prompt_id for c in run.candidates(0)} <= prompts
    assert run.summary(0)["pairs"] == len(run.pairs(0))
    assert [p.prompt for p in pairs[0]] == [row["prompt"] for row in ROWS]
    assert all(p.chosen == row["completion"] for p, row in zip(pairs[0], ROWS, strict=True))
    assert all(p.chosen_ids[-1] == END for p in pairs[0])
    references = {r.id: r for r in run.reference(0)}
    for pair in pairs[0]:  # trained in both iterations, each time against its own reference
        assert references[f"{pair.id}/r0"].chosen != references[f"{pair.id}/r1"].chosen
    assert set(references) == {f"{p.id}/r0" for p in pairs[0]} | {
        f"{p.id}/r1" for p in run.pairs(0)
    }
    steps = [m for m in run.metrics(0) if "rewards/margins" in m]
    assert [m["step"] for m in steps] == list(range(1, len(steps) + 1))
    # two epochs of 6 pairs, then two of 12, batch 4
    assert len(steps) == 2 * 2 + 2 * 3
    for first in (steps[0], steps[4]):  # at an iteration's first step policy equals opponent
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-9)
    assert not list((tmp_path / "01-spin").glob("iteration-*"))


def test_early_stopping_restores_the_best_weights_of_a_stage(tmp_path):
    scores = iter([1.0, 5.0, 3.0, 9.0])
    kept = []

    def evaluate(model):
        kept.append(weights_of(model))
        return torch.tensor(next(scores))

    model = model64()
    optim = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=2)
    stage = sft(num_train_steps=20, early_stopper_eval_module=evaluate, optim=optim)
    run = trainer_of(tmp_path, [stage], model)()
    assert same(weights_of(model), kept[1]) and len(kept) == 3
    assert run.summary(0)["early_stopping"] == {"best_step": 2, "score": 5.0}
    from safetensors.torch import load_file

    assert same(load_file(run.weights(0)), kept[1])


def test_evaluation_rows_are_measured_and_not_trained_on(tmp_path):
    held_out = [{"prompt": "say 9", "completion": "i say 9"}]
    optim = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=1)
    run = trainer_of(tmp_path, [sft(valid_dataset=held_out, optim=optim)])()
    losses = [m["eval/loss"] for m in run.metrics(0) if "eval/loss" in m]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [r.id for r in run.rows(0)] == [f"sft/{i}" for i in range(6)] + ["sft/valid/0"]


def test_callbacks_see_each_stage_with_its_weights(tmp_path):
    seen = []

    class Watch:
        def on_stage_end(self, run, stage, model):
            seen.append((stage, run.is_done(stage), same(weights_of(model), weights_of(trained))))

    trained = model64()
    trainer_of(tmp_path, [sft(), self_reward()], trained, callbacks=[Watch()])()
    assert seen == [("sft", True, True), ("self_reward", True, True)]


def test_a_custom_stage_runs_between_ours_and_resumes_like_them(tmp_path):
    ran = []

    class Halve(FinetuneConfig):
        folder_name = "halve"
        factor: float = 0.5

        def run(self, ctx, out):
            ran.append(ctx.stage)
            with torch.no_grad():
                for parameter in ctx.model.module.parameters():
                    parameter.mul_(self.factor)
            out.summary["factor"] = self.factor

    for _ in range(2):
        run = trainer_of(tmp_path, [sft(), Halve(), sft()])()
    assert ran == ["halve"] and run.summary("halve") == {"factor": 0.5}
    assert run.settings("halve")["settings"]["factor"] == 0.5


def test_a_stages_sampling_settings_reach_the_sampler(tmp_path):
    def only_five(logits):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([5]), 0.0)

    how = SamplingConfig(filter_fn=only_five, max_new_tokens=3)
    with pytest.raises(PairingError, match="tie"):
        trainer_of(tmp_path, [external(generation=how)])()
    assert {c.ids for c in Run.open(tmp_path).candidates(0)} == {(5, 5, 5)}


def test_hooks_have_the_ancestors_signatures(tmp_path):
    seen = []

    def pick(rewards):
        seen.append(rewards)
        return torch.stack((rewards.argmin(), rewards.argmax()))  # turned round

    def valid_pair(preferred, unpreferred):
        assert preferred.ndim == 0
        return (preferred != unpreferred).all()

    stage = self_reward(
        pick_paired_rewards_fn=pick,
        is_valid_reward_pair=valid_pair,
        is_valid_reward=lambda reward: reward >= 2,
    )
    run = trainer_of(tmp_path, [stage])()
    assert all(p.chosen_score < p.rejected_score for p in run.pairs(0))
    assert all(p.chosen_score >= 2 for p in run.pairs(0))
    assert all(isinstance(r, torch.Tensor) and r.ndim == 1 for r in seen)


def test_another_model_judges_where_one_is_given(tmp_path):
    judge = model64(seed=7)
    before = weights_of(judge)
    run = trainer_of(tmp_path, [self_reward(rewarding_model=judge)])()
    own = trainer_of(tmp_path / "own", [self_reward()])()
    assert {j.judge for j in run.judgements(0)} == {"Recurrent"}
    assert run.candidates(0)[:4] == own.candidates(0)[:4]
    assert [j.text for j in run.judgements(0)] != [j.text for j in own.judgements(0)]
    assert same(weights_of(judge), before)


def test_a_text_reward_function_gets_the_rows_other_columns(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(6)]

    def reward(prompts, completions, answer):
        assert all(prompt == f"p{a}" for prompt, a in zip(prompts, answer, strict=True))
        return [float(sum(map(ord, text))) if text else None for text in completions]

    run = trainer_of(tmp_path, [external(reward_model=reward, prompt_dataset=rows)])()
    by_id = {c.id: c for c in run.candidates(0)}
    for judgement in run.judgements(0):
        text = by_id[judgement.candidate_ids[0]].text
        assert judgement.score == (float(sum(map(ord, text))) if text else None)


def test_several_reward_prompts_by_name(tmp_path):
    other = RewardConfig(
        prompt_template="{{ response }}<{{ prompt }}", parse_reward=lambda t: sum(map(ord, t))
    )
    prompts = {"default": JUDGE, "length": other}
    stage = self_reward(self_reward_config_keyname="length")
    run = trainer_of(tmp_path, [stage], self_reward_prompt_config=prompts)()
    assert all(j.score == sum(map(ord, j.text)) for j in run.judgements(0))
    with pytest.raises(ConfigError, match="'default', 'length'"):
        missing = self_reward(self_reward_config_keyname="lenght")
        trainer_of(tmp_path / "b", [missing], self_reward_prompt_config=prompts)


def small_xt(**options):
    return TransformerWrapper(
        num_tokens=TEXT_VOCAB,
        max_seq_len=options.pop("max_seq_len", 32),
        attn_layers=Decoder(dim=16, depth=1, heads=2),
    )


class Nan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(TEXT_VOCAB))

    def forward(self, ids):
        return self.weight.expand(*ids.shape, -1) * float("nan")


TWO_COLUMNS = [{"prompt": "a", "answer": "b"}]
BAD = {
    "wrong field": (ConfigError, lambda p: SFTConfig(train_data=ROWS), "train_dataset"),
    "wrong type of a field": (ConfigError, lambda p: sft(dropout="much"), "dropout"),
    "a judge of another vocabulary": (
        ConfigError,
        lambda p: trainer_of(p, [self_reward(rewarding_model=Recurrent(5))]),
        "vocabulary of",
    ),
    "no stages": (ConfigError, lambda p: trainer_of(p, []), "at least one stage"),
    "empty dataset": (DataError, lambda p: trainer_of(p, [sft(train_dataset=[])]), "empty"),
    "no dataset": (DataError, lambda p: trainer_of(p, [sft(train_dataset=5)]), "train_dataset"),
    "missing file": (
        DataError,
        lambda p: trainer_of(p, [sft(train_dataset="no.jsonl")]),
        "no.jsonl",
    ),
    "missing column": (
        DataError,
        lambda p: trainer_of(p, [sft(train_dataset=TWO_COLUMNS)]),
        "completion",
    ),
    "prompt longer than the model": (
        DataError,
        lambda p: trainer_of(p, [self_reward(prompt_dataset=["a" * 40])], small_xt())(),
        "40 tokens",
    ),
    "prompt fills a row": (
        DataError,
        lambda p: trainer_of(p, [sft(max_seq_len=4)])(),
        "max_seq_len",
    ),
    "fractional token ids": (
        TokenizerError,
        lambda p: trainer_of(p, [sft()], tokenizer_encode=lambda text: torch.full((4,), 0.5)),
        "whole numbers",
    ),
    "ids outside the vocabulary": (
        TokenizerError,
        lambda p: trainer_of(p, [sft()], tokenizer_encode=lambda text: torch.tensor([999])),
        "999",
    ),
    "negative ids": (
        TokenizerError,
        lambda p: trainer_of(p, [sft(train_dataset=[(torch.tensor([3, -1]), 1)])]),
        "-1",
    ),
    "one tokenizer function": (
        ConfigError,
        lambda p: trainer_of(p, [sft()], tokenizer_decode=None),
        "go together",
    ),
    "texts without a tokenizer": (
        ConfigError,
        lambda p: trainer_of(p, [sft()], tokenizer_encode=None, tokenizer_decode=None),
        "needs a tokenizer",
    ),
    "template without its variables": (
        ConfigError,
        lambda p: trainer_of(
            p,
            [self_reward()],
            self_reward_prompt_config=RewardConfig(
                prompt_template="rate", reward_regex_template="S: {{ reward }}"
            ),
        ),
        "{{ prompt }}",
    ),
    "no way to read a score": (
        ConfigError,
        lambda p: RewardConfig(prompt_template="rate"),
        "reward_regex_template",
    ),
    "judge prompt longer than the model": (
        JudgeError,
        lambda p: trainer_of(
            p,
            [self_reward()],
            small_xt(),
            self_reward_prompt_config=RewardConfig(
                prompt_template="a" * 30 + "{{ prompt }}{{ response }}", parse_reward=len
            ),
        ),
        "takes 32",
    ),
    "logits of the wrong shape": (
        AdapterError,
        lambda p: trainer_of(
            p,
            [sft()],
            torch.nn.Embedding(4, 4).requires_grad_(False).apply(lambda m: None) and Flat(),
        ),
        "vocabulary",
    ),
    "num_train_steps 0": (ConfigError, lambda p: sft(num_train_steps=0), "num_train_steps"),
    "two lengths of training": (
        ConfigError,
        lambda p: sft(num_train_steps=5, optim=OptimConfig(epochs=1)),
        "give one of them",
    ),
    "eos outside the vocabulary": (
        ConfigError,
        lambda p: trainer_of(p, [sft()], eos_id=TEXT_VOCAB),
        "eos_id",
    ),
    "pad outside the vocabulary": (
        ConfigError,
        lambda p: trainer_of(p, [sft()], pad_id=TEXT_VOCAB),
        "pad_id",
    ),
    "from_stage of nothing": (
        ConfigError,
        lambda p: trainer_of(p, [DPOConfig(train_dataset=from_stage("sft"))]),
        "earlier stage",
    ),
    "keep_stages 0": (ConfigError, lambda p: trainer_of(p, [sft()], keep_stages=0), "at least 1"),
    "gradient_checkpointing": (
        AdapterError,
        lambda p: trainer_of(p, [sft(optim=OptimConfig(gradient_checkpointing=True))]),
        "gradient_checkpointing=True needs",
    ),
    "init_from of nothing": (ConfigError, lambda p: trainer_of(p, [sft(init_from="m7")]), "m7"),
    "two stages of one name": (
        ConfigError,
        lambda p: trainer_of(p, [sft(name="a"), sft(name="a-2"), sft(name="a")]),
        "a-2",
    ),
    "a name that leaves the run": (ConfigError, lambda p: sft(name="../../home"), "name"),
    "accelerate_kwargs unknown": (
        ConfigError,
        lambda p: trainer_of(p, [sft()], accelerate_kwargs=dict(gpu=True)),
        "accelerate",
    ),
    "early stopper is no function": (
        ConfigError,
        lambda p: trainer_of(p, [sft(early_stopper_eval_module=3)]),
        "early_stopper_eval_module",
    ),
    "reward model is no function": (
        ConfigError,
        lambda p: trainer_of(p, [external(reward_model=3)]),
        "reward_model",
    ),
    "judge without a method": (
        ConfigError,
        lambda p: trainer_of(p, [self_reward(judge=3)]),
        "judge",
    ),
}


def test_a_wrong_type_at_the_public_edge_is_an_error_of_ours():
    """In a process of its own, without the type hook of the tests, which would speak first."""
    code = """
from self_rewarding_lm import SelfRewardingTrainer, SFTConfig, SelfRewardingError
import torch
for model, seed in ((torch.nn.Linear(2, 2), "one"), (7, 0)):
    try:
        SelfRewardingTrainer(model, finetune_configs=[SFTConfig(train_dataset=[])], seed=seed)
    except TypeError as error:
        assert isinstance(error, SelfRewardingError)
        print(error)
for _ in range(8):  # the type checker looks at one item by chance
    try:
        SelfRewardingTrainer(
            torch.nn.Linear(2, 2), finetune_configs=[SFTConfig(train_dataset=[1]), {}]
        )
    except (TypeError, ValueError) as error:
        assert isinstance(error, SelfRewardingError)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "SelfRewardingTrainer: seed must be int; got 'one'.",
        "SelfRewardingTrainer: model must be Module | str | Path; got 7.",
    ]


class Flat(torch.nn.Module):
    def forward(self, ids):
        return ids.float()


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_a_clear_error_before_any_training(mistake, tmp_path):
    kind, make, said = BAD[mistake]
    with pytest.raises(kind) as error:
        make(tmp_path)
    assert said in str(error.value), str(error.value)
    assert not list(tmp_path.glob("*/metrics.jsonl")) or "()" in mistake


def test_a_loss_that_is_not_a_number_stops_the_stage_by_name(tmp_path):
    with pytest.raises(TrainingError, match=r"'sft', step 1 of .* the loss is nan. In: sft/"):
        trainer_of(tmp_path, [sft()], Nan())(rehearse=False)
    assert not Run.open(tmp_path).is_done("sft")


def test_fewer_rows_than_a_batch_train(tmp_path):
    run = trainer_of(tmp_path, [sft(optim=OptimConfig(batch_size=64))])()
    assert run.summary(0) == {"rows": 6, "steps": 3}


def test_a_second_trainer_of_a_process_may_have_other_accelerate_kwargs(tmp_path):
    trainer_of(tmp_path / "a", [sft()], accelerate_kwargs=dict(cpu=True))()
    run = trainer_of(
        tmp_path / "b",
        [sft()],
        model64().float(),
        accelerate_kwargs=dict(cpu=True, mixed_precision="bf16"),
    )()
    assert run.is_done(0)
    trainer_of(tmp_path / "c", [sft()], accelerate_kwargs=dict(cpu=True))()


def test_metrics_reach_an_accelerate_tracker_under_their_names(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer_of(
        tmp_path / "run",
        [sft()],
        accelerate_kwargs=dict(cpu=True, log_with="tensorboard", project_dir=str(tmp_path)),
    )()
    [folder] = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    found = EventAccumulator(str(folder)).Reload()
    steps = [line for line in run.metrics(0) if "loss" in line]
    for name in ("loss", "grad_norm", "learning_rate", "num_tokens", "padding_share"):
        events = found.Scalars(f"sft/{name}")
        assert [event.step for event in events] == [line["step"] for line in steps]
        assert [event.value for event in events] == pytest.approx([line[name] for line in steps])


def test_the_share_of_padding_is_that_of_the_rows_that_went_through_together(tmp_path):
    """Five rows of 11 characters and one of 12; a plain module's rows are padded."""
    rows = [{"prompt": "say", "completion": text} for text in ["12345678"] * 5 + ["123456789"]]
    run = trainer_of(tmp_path, [sft(train_dataset=rows, optim=OptimConfig(batch_size=6))])()
    found = [line["padding_share"] for line in run.metrics(0) if "loss" in line]
    lengths = [len(row.ids) for row in run.rows(0)]
    assert found == pytest.approx([1 - sum(lengths) / (6 * max(lengths))] * 3)
    assert 0 < found[0] < 0.1


def test_long_rows_are_cut_counted_and_warned_of_once(tmp_path, caplog):
    run = trainer_of(tmp_path, [sft(max_seq_len=8)], eos_id=END)()
    assert all(len(row.ids) == 8 and row.ids[-1] != END for row in run.rows(0))
    assert caplog.text.count("cut at 8 tokens") == 1
    assert {"step": 0, "rows/truncated": 6} in run.metrics(0)


def test_a_run_reads_back_while_it_is_not_finished(tmp_path):
    run = trainer_of(tmp_path, [self_reward()])()
    shutil.copytree(tmp_path / "01-self_reward", tmp_path / "copy")
    (tmp_path / "01-self_reward" / "done.json").unlink()
    unfinished = Run.open(tmp_path)
    assert not unfinished.is_done(0) and len(unfinished.pairs(0)) == 4
    assert "0 of 1 stage done" in repr(unfinished)
    assert json.loads((tmp_path / "run.json").read_text())["stages"] == ["01-self_reward"]
    assert run.settings(0)["settings"]["dpo_beta"] == 0.1
