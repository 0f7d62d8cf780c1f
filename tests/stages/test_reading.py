"""What stages keep of many rows: what they need at once, and places of the rest."""

import json
import re
import shutil
import weakref
from dataclasses import replace

import pytest

from self_rewarding_lm import DPOConfig, Run, SelfPlayConfig
from self_rewarding_lm.errors import DataError, PairingError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Candidate, PreferencePair, Prompt, TrainingRow
from self_rewarding_lm.runs.stored import Stored
from self_rewarding_lm.stages import preference
from self_rewarding_lm.stages.base import read_once
from self_rewarding_lm.stages.pair_maker import PairMaker
from self_rewarding_lm.stages.preference import cut_pairs
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.training.reference import StoredReference
from tests.data.test_datasets import lines, opened
from tests.support.models import Recurrent, Successor, context, stage_dir
from tests.support.sealed import write_sealed
from tests.test_trainer import (
    QUICK,
    SHORT,
    StopError,
    external,
    model64,
    same,
    trainer_of,
    weights_of,
)


def stage_of(tmp_path, module=None):
    ctx = context(module or Successor())
    return ctx, stage_dir(ctx, tmp_path)


def row_of(_, record_id):
    return TrainingRow(record_id, (1, 2), (False, True))


# Rows of a dataset


def test_rows_go_to_disk_one_by_one_and_are_read_from_there(tmp_path):
    ctx, out = stage_of(tmp_path / "stage")
    path = lines(tmp_path / "rows.jsonl", list(range(20)))
    seen = []

    def make(row, record_id):
        seen.append(len((out.path / "rows.0.jsonl").read_bytes()) if row else 0)
        return TrainingRow(record_id, (1, 2) * 4000, (False, True) * 4000)

    found = read_once(ctx, out, opened(path), TrainingRow, "stage", make)
    assert isinstance(found, Stored)
    assert [row.id for row in found] == [f"stage/{i}" for i in range(20)]
    size = (out.path / "rows.jsonl").stat().st_size / 20
    assert all(size * row - written <= size for row, written in enumerate(seen))


def test_a_bad_row_far_in_a_dataset_leaves_nothing_of_those_before(tmp_path):
    ctx, out = stage_of(tmp_path)

    def make(row, record_id):
        if row == 3:
            raise DataError("row 3 is bad")
        return row_of(row, record_id)

    with pytest.raises(DataError, match="row 3 is bad"):
        read_once(ctx, out, opened([0, 1, 2, 3]), TrainingRow, "stage", make)
    assert out.read(TrainingRow) == []
    found = read_once(ctx, out, opened([0, 1, 2]), TrainingRow, "stage", row_of)
    assert [row.id for row in found] == ["stage/0", "stage/1", "stage/2"]


def test_rows_stay_those_of_their_dataset_when_others_are_stored_beside_them(tmp_path):
    ctx, out = stage_of(tmp_path)
    train = read_once(ctx, out, opened([0, 1]), TrainingRow, "stage", row_of)
    valid = read_once(ctx, out, opened([0, 1, 2]), TrainingRow, "stage/valid", row_of)
    assert [row.id for row in train] == ["stage/0", "stage/1"]
    assert [row.id for row in valid] == [f"stage/valid/{i}" for i in range(3)]


# Pairs that are cut


def pair(number, prompt, chosen, rejected):
    return PreferencePair(f"stage/{number}", (1,) * prompt, tuple(chosen), tuple(rejected))


CUT = [
    pair(0, 2, [2, 3], [4]),
    pair(1, 2, [2, 3, 4, 5], [2, 3, 4, 6]),  # equal in four tokens
    pair(2, 3, [2, 3, 4], [5, 6]),
    pair(3, 1, [2, 3, 4, 5, 6], [2, 3, 4, 7, 8, 9]),
]


def test_pairs_are_cut_when_they_are_asked_for_and_equal_ones_left_out(tmp_path, monkeypatch):
    ctx, out = stage_of(tmp_path)
    cut = cut_pairs(ctx, out, CUT, 4)
    assert cut == [
        pair(0, 2, [2, 3], [4]),
        pair(2, 3, [2], [5]),
    ]
    assert [line["rows/truncated"] for line in metrics_of(out)] == [2 + 2 + 2]
    asked = []

    def cutting(one, limit):
        asked.append(one.id)
        return one, 0

    monkeypatch.setattr(preference, "_cut", cutting)
    assert cut[1] == CUT[2] and asked == ["stage/2"]


def metrics_of(out):
    return [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]


def test_pairs_that_need_no_cut_are_taken_as_they_are(tmp_path):
    ctx, out = stage_of(tmp_path)
    assert cut_pairs(ctx, out, CUT, None) is CUT
    assert cut_pairs(ctx, out, CUT, 7) is CUT
    with pytest.raises(PairingError, match="no pair is left"):
        cut_pairs(ctx, out, CUT[1:2], 4)


# Reference log-probs


def test_reference_log_probs_of_many_pairs_are_computed_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("self_rewarding_lm.training.reference.PAIRS_AT_ONCE", 2)
    ctx, out = stage_of(tmp_path, Recurrent().double())
    forwards = []
    ctx.policy.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    some = [replace(one, id=f"stage/{i}") for i, one in enumerate([CUT[2], CUT[0], CUT[1]])]
    first = StoredReference(ctx, out, token_budget=1000).sums(some)
    assert forwards == [4, 2]  # two pairs, then one
    more = [CUT[3], *some]
    sums = StoredReference(ctx, out, token_budget=1000).sums(more)
    # of those that go through the model together with a new one the known ones go again
    assert forwards == [4, 2, 4] and list(sums[1:]) == list(first)
    for one, found in zip(more, sums, strict=True):
        alone = response_logprobs(
            ctx.policy, [(one.prompt_ids, one.chosen_ids), (one.prompt_ids, one.rejected_ids)]
        )
        assert (found.chosen, found.rejected) == pytest.approx(tuple(map(sum, alone)), abs=1e-12)


# Sampling


class Noting(LocalEngine):
    """Notes how many requests come at once."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def generate(self, model, requests, decoding):
        self.requests.append(len(requests))
        return super().generate(model, requests, decoding)


def test_many_prompts_are_sampled_some_at_a_time_and_give_what_all_at_once_give(monkeypatch):
    prompts = [Prompt(f"stage/{i}/0", i, (i % 7 + 1,)) for i in range(7)]
    found = []
    for at_once in (100, 3):
        monkeypatch.setattr("self_rewarding_lm.generation.candidates.PROMPTS_AT_ONCE", at_once)
        ctx = context(Recurrent().double(), engine=Noting())
        found.append({c.id: c for c in ctx.sample(prompts, SHORT, 2)})
        assert ctx.engine.requests == {100: [14], 3: [6, 6, 2]}[at_once]
    assert found[0] == found[1]


# Pairs that a stage makes


def maker_of(tmp_path, monkeypatch, **options):
    """The PairMaker of a stage that has run, which notes the prompts in memory, and the run."""
    made = []

    class Kept(PairMaker):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.in_memory, self.most = weakref.WeakSet(), 0

        def pair(self, judged, drops):
            self.in_memory.add(judged)
            self.most = max(self.most, len(self.in_memory))
            return super().pair(judged, drops)

    monkeypatch.setattr(SampledPreferenceConfig, "maker", Kept)
    run = trainer_of(tmp_path, [external(**options)])(rehearse=False)
    return made[0], run


def test_of_a_block_that_is_done_no_record_is_kept(tmp_path, monkeypatch):
    options = dict(num_generated_preference_pairs=None, prompts_per_block=4)
    maker, run = maker_of(tmp_path, monkeypatch, **options)
    assert not maker.in_memory and maker.most == 4
    assert len(run.prompts(0)) == 10 and len(run.candidates(0)) == maker.tally.candidates == 40


def test_pairs_of_several_passes_are_trained_in_the_order_in_which_they_were_made(
    tmp_path, monkeypatch
):
    trained = []
    inner = external.__globals__["ExternalRewardDPOConfig"].objective

    def objective(self, ctx, out, pairs, **options):
        trained.append([one.id for one in pairs])
        return inner(self, ctx, out, pairs, **options)

    monkeypatch.setattr("self_rewarding_lm.stages.preference.PreferenceConfig.objective", objective)
    stage = external(prompt_dataset=["a", "b", "c"], num_generated_preference_pairs=7)
    run = trainer_of(tmp_path, [stage])(rehearse=False)
    by_pass = [f"external_reward/{row}/{i}" for i in range(9) for row in range(3)]
    kept = {one.id for one in run.pairs(0)}
    assert trained == [[name for name in by_pass if name in kept]] and len(kept) == 7
    assert [one.id for one in run.pairs(0)] != trained[0]  # on disk they are ordered by id


def test_pairs_are_on_disk_as_soon_as_their_block_is_done(tmp_path):
    stops, asked = [], []

    def reward(ids):
        asked.append(len(ids))
        if stops and sum(asked) > 24:
            raise StopError
        return ids.double().sum(dim=-1)

    def stage():
        options = dict(num_generated_preference_pairs=None, prompts_per_block=2)
        return external(reward_model=reward, **options)

    straight, resumed = model64(), model64()
    run = trainer_of(tmp_path / "straight", [stage()], straight)()
    asked.clear(), stops.append(True)
    with pytest.raises(StopError):
        trainer_of(tmp_path / "halted", [stage()])()
    before = {one.id: one for one in Run.open(tmp_path / "halted").pairs(0)}
    assert 0 < len(before) < len(run.pairs(0))
    stops.clear()
    again = trainer_of(tmp_path / "halted", [stage()], resumed)()
    assert again.pairs(0) == run.pairs(0) and same(weights_of(straight), weights_of(resumed))
    assert all(before[one.id] == one for one in run.pairs(0) if one.id in before)


def test_a_tie_for_the_best_is_broken_alike_when_candidates_lie_on_disk_in_another_order(tmp_path):
    """They are written as they finish, so that those of a stage that was stopped lie in any."""

    def stage():
        return external(reward_model=lambda ids: (ids[:, -1] % 2).double())

    run = trainer_of(tmp_path / "straight", [stage()])()
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "straight", folder)
    out = folder / "01-external_reward"
    for name in ("done.json", "judgements.jsonl", "pairs.jsonl", "reference.jsonl"):
        (out / name).unlink()
    held = (out / "candidates.jsonl").read_text().splitlines(keepends=True)
    (out / "candidates.jsonl").unlink()
    write_sealed(out / "candidates.0.jsonl", reversed(held))
    again = trainer_of(folder, [stage()])()
    assert again.pairs(0) == run.pairs(0)
    scores = {j.candidate_ids[0]: j.score for j in run.judgements(0)}
    tied = [[scores[c.id] for c in run.candidates(0) if c.prompt_id == p.id] for p in run.pairs(0)]
    assert any(sorted(own).count(max(own)) > 1 for own in tied)


# SPIN

FIRST_ITERATION = re.compile(r"spin/(valid/)?\d+/0(/0|/r0)?$")  # of a pair, an answer, log-probs


def test_spin_goes_on_over_two_iterations_that_are_mixed(tmp_path):
    """With the records of the first iteration on disk already, some of them not yet merged."""
    rows = [{"prompt": f"say {i}", "completion": "x" * (i + 1)} for i in range(6)]
    path = lines(tmp_path / "rows.jsonl", rows)

    def stage():
        return SelfPlayConfig(
            train_dataset=path,
            valid_dataset=path,
            generation=SHORT,
            iterations=2,
            mix_previous=True,
            dropout=0.0,
            optim=QUICK,
        )

    models = model64(), model64()
    straight = trainer_of(tmp_path / "straight", [stage()], models[0])()
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "straight", folder)
    out = folder / "01-spin"
    shutil.rmtree(out / "model")
    (out / "done.json").unlink()
    for kind in ("candidates", "pairs", "reference"):
        held = (out / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        first = [line for line in held if FIRST_ITERATION.match(json.loads(line)["id"])]
        (out / f"{kind}.jsonl").unlink()
        write_sealed(out / f"{kind}.0.jsonl", reversed(first[2:]), torn='{"id": "spin/')
    again = trainer_of(folder, [stage()], models[1])()
    for read in (Run.prompts, Run.candidates, Run.pairs, Run.reference):
        assert read(again, 0) == read(straight, 0)
    assert len(straight.candidates(0)) == 2 * 12
    assert same(weights_of(models[0]), weights_of(models[1]))


def test_a_dpo_stage_takes_pairs_of_an_earlier_one_as_they_lie_on_disk(tmp_path):
    stages = [
        external(),
        DPOConfig(train_dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}], optim=QUICK),
    ]
    run = trainer_of(tmp_path, stages)()
    assert isinstance(run.training_data(0), Stored) and run.training_data(0) == run.pairs(0)
    assert run.preference_rows(1) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert Candidate.kind not in [file.stem for file in run.stage(1).path.iterdir()]
