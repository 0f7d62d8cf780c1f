"""Candidates that no pair could have are not judged, whoever judges, and pairs are as with them."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from self_rewarding_lm import (
    ConsistencyConfig,
    EnsembleJudge,
    FunctionJudge,
    MetaRewardDPOConfig,
    PairingConfig,
    PairwiseJudge,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardSFTConfig,
    ShuffledJudge,
    TemporalDPOConfig,
    VoteJudge,
)
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runs import resume
from self_rewarding_lm.stages.pair_maker import JudgedPrompt
from self_rewarding_lm.stages.pairing import DropCounts, learnable, pairable
from self_rewarding_lm.stages.temporal import AnchoredMaker
from tests.stages.test_pair_maker import (
    COMPARISON,
    JUDGES,
    JUDGING,
    letters,
    numerate,
)
from tests.support.models import ALPHABET
from tests.test_trainer import PROMPTS, QUICK, self_reward, trainer_of

ENDED = ALPHABET.index("7")
SAMPLED = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=5)


def ending():
    """A model that often ends its answers, not always in time."""
    module = numerate()
    with torch.no_grad():
        module.head.bias[ENDED] += 3.0
    return module


def first_letter(text):
    return text[:1] or None


class Vowels:
    """A judge with nothing but `judge`."""

    def judge(self, ctx, prompts, candidates_PG):
        judged = [c for group in candidates_PG for c in group]
        return FunctionJudge(letters).judge(ctx, prompts, candidates_PG) if judged else []


KINDS = {
    **JUDGES,
    "function": lambda: FunctionJudge(letters),
    "own": Vowels,
    "votes": lambda: VoteJudge(first_letter),
    "ensemble": lambda: EnsembleJudge([letters], filters=[(letters, 2.0)]),
    "ensemble with votes": lambda: EnsembleJudge([letters, VoteJudge(first_letter)]),
    "shuffled": lambda: ShuffledJudge(FunctionJudge(letters)),
    "shuffled votes": lambda: ShuffledJudge(VoteJudge(first_letter)),
}
NEED_ALL = {"votes", "ensemble with votes", "shuffled votes"}
MANY = [f"tell {i}" for i in range(16)]
SCORES_OF_OTHERS = {"compared", "shuffled", "shuffled votes"}
"""Judges whose scores of a candidate depend on which others are judged."""


def run_of(folder, kind=SelfRewardDPOConfig, **options):
    settings = dict(
        prompt_dataset=MANY,
        num_candidate_responses=4,
        prompts_per_block=4,
        generation=SAMPLED,
        dropout=0.0,
        optim=QUICK,
        min_parse_rate=0.0,
    )
    stage = kind(**{**settings, **options})
    trainer = trainer_of(folder, [stage], ending(), eos_id=ENDED)
    return trainer(rehearse=False)


def groups_of(run):
    groups = defaultdict(list)
    for candidate in run.candidates(0):
        groups[candidate.prompt_id].append(candidate)
    return list(groups.values())


def that_may_pair(group):
    """Told anew: whole answers of a prompt that has two different ones."""
    whole = [c for c in group if c.finished]
    return whole if len({c.text for c in whole}) > 1 else []


def judged_in(run):
    return {name for judgement in run.judgements(0) for name in judgement.candidate_ids}


def pairs_in(run):
    return [(p.chosen_id, p.rejected_id, p.chosen_score, p.rejected_score) for p in run.pairs(0)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_candidates_that_can_be_in_a_pair_are_judged(tmp_path, kind):
    run = run_of(tmp_path / "few", judge=KINDS[kind]())
    every = run_of(tmp_path / "all", judge=KINDS[kind](), judge_all=True)
    groups = groups_of(run)
    assert groups == groups_of(every)
    pairable_of = [that_may_pair(group) for group in groups]
    shown = [
        group if kind in NEED_ALL and some else some
        for group, some in zip(groups, pairable_of, strict=True)
    ]
    wanted = {c.id for some in shown for c in some}
    assert judged_in(run) == wanted
    assert judged_in(every) == {c.id for group in groups for c in group} > wanted
    metrics, of_all = run.summary(0)["metrics"], every.summary(0)["metrics"]
    assert metrics["judge/skipped"] == 4 * len(groups) - len(wanted) > 0
    assert "judge/skipped" not in of_all
    if kind not in SCORES_OF_OTHERS:
        assert pairs_in(run) == pairs_in(every) != []
        left = {j.id: j for j in every.judgements(0)}
        assert all(left[j.id] == j for j in run.judgements(0))
    assert all({p.chosen_id, p.rejected_id} <= wanted for p in run.pairs(0))


def test_a_run_of_format_1_judges_all(tmp_path, monkeypatch):
    new = run_of(tmp_path / "new", judge=FunctionJudge(letters), judge_all=True)
    monkeypatch.setattr(resume, "FORMAT", 1)
    old = run_of(tmp_path / "old", judge=FunctionJudge(letters))
    assert old.format == 1 and len(old.judgements(0)) == len(old.candidates(0))
    assert old.judgements(0) == new.judgements(0)
    metrics = [run.summary(0)["metrics"] for run in (old, new)]
    assert metrics[0] == metrics[1]


def test_what_was_not_judged_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "self_rewarding_lm")
    stage = self_reward(judge=FunctionJudge(letters), generation=SAMPLED)
    trainer = trainer_of(tmp_path, [stage], ending(), eos_id=ENDED, quiet=False)
    run = trainer(rehearse=False)
    skipped = run.summary(0)["metrics"]["judge/skipped"]
    assert skipped == len(run.candidates(0)) - len(run.judgements(0)) > 0
    assert f"({skipped} that no pair could have were not judged)" in caplog.text
    assert "judge/skipped" in caplog.text  # in the table at the stage's end


@pytest.mark.parametrize("by", ["judge", "implicit"])
def test_an_earlier_model_ranks_only_what_is_judged(tmp_path, by):
    judge = JUDGES["at once"]() if by == "judge" else FunctionJudge(letters)
    run = run_of(tmp_path, judge=judge, consistency=ConsistencyConfig(by=by))
    ranked = {j.candidate_ids[0] for j in run.judgements(0) if "/previous/" in j.id}
    assert ranked == judged_in(run) < {c.id for c in run.candidates(0)}


def test_all_whole_responses_are_judged_if_each_is_learnt_by_itself(tmp_path):
    run = run_of(
        tmp_path, SelfRewardSFTConfig, judge=FunctionJudge(letters), min_score=2.0, judging=JUDGING
    )
    assert judged_in(run) == {c.id for c in run.candidates(0) if c.finished}


def test_winners_of_the_start_losers_of_an_earlier_model(tmp_path):
    options = dict(judge=FunctionJudge(letters), chosen_from_next=False, num_candidate_responses=2)
    run = run_of(tmp_path / "few", TemporalDPOConfig, **options)
    every = run_of(tmp_path / "all", TemporalDPOConfig, **options, judge_all=True)
    of_start = [[c for c in group if "/anchor/" not in c.id] for group in groups_of(run)]
    wanted = {
        c.id
        for group, own in zip(groups_of(run), of_start, strict=True)
        for c in that_may_pair(group)
        if c in own or {w.text for w in own if w.finished} - {c.text}
        if any(c.finished for c in own)
    }
    repeated = [
        c for some in map(that_may_pair, groups_of(run)) for c in some if c.id not in wanted
    ]
    assert repeated and run.summary(0)["metrics"]["candidates/dropped_identical"] > 0
    assert judged_in(run) == wanted
    assert pairs_in(run) == pairs_in(every) != []


@pytest.mark.parametrize("winner, dropped", [("s/0/0/1", {}), ("s/0/0/anchor/1", {"unpaired": 1})])
def test_an_earlier_models_responses_alone_give_no_pair(winner, dropped):
    stage = TemporalDPOConfig(prompt_dataset=PROMPTS)
    anchor = replace(candidate(0), id="s/0/0/anchor/0")
    judged = JudgedPrompt(
        Prompt("s/0/0", 0, (1,)), [anchor, replace(candidate(1, "b"), id=winner)], []
    )
    drops = DropCounts()
    found = AnchoredMaker.learnable(SimpleNamespace(config=stage), judged, drops)
    assert found == ([] if dropped else judged.candidates) and drops.prompts == dropped


def test_winners_of_the_next_model_are_judged_if_they_are_whole(tmp_path):
    options = dict(judge=FunctionJudge(letters), num_candidate_responses=3)
    run = run_of(tmp_path / "few", TemporalDPOConfig, **options)
    every = run_of(tmp_path / "all", TemporalDPOConfig, **options, judge_all=True)
    assert pairs_in(run) == pairs_in(every) != []
    of_next = [c for c in run.candidates(0) if "/next/" in c.id]
    judged = judged_in(run)
    assert {c.id for c in of_next if c.finished} == {c.id for c in of_next if c.id in judged}
    assert any(not c.finished for c in of_next)


@pytest.mark.parametrize("train_judge", [True, False])
def test_judgements_that_are_trained_on_may_be_of_any_response(train_judge):
    stage = MetaRewardDPOConfig(prompt_dataset=PROMPTS, train_judge=train_judge)
    assert stage.judges_all(2) == train_judge and stage.judges_all(1)


def test_candidates_of_another_stage_are_judged_by_the_same_rule(tmp_path):
    stages = [
        self_reward(
            judge=FunctionJudge(letters), generation=SAMPLED, name="first", prompt_dataset=MANY
        ),
        self_reward(
            judge=PairwiseJudge(COMPARISON, JUDGING),
            candidates_from="first",
            min_parse_rate=0.0,
            prompt_dataset=MANY,
            num_generated_preference_pairs=None,
        ),
    ]
    run = trainer_of(tmp_path, stages, ending(), eos_id=ENDED)(rehearse=False)
    groups = [that_may_pair(group) for group in groups_of(run)]
    compared = {tuple(sorted(j.candidate_ids)) for j in run.judgements(1)}
    assert compared == {
        (one.id, other.id) for some in groups for one in some for other in some if one.id < other.id
    }


def candidate(number, text="a", finished=True, reason=None):
    return Candidate(f"p/{number}", "p", (number,), text, finished, 3, reason=reason)


@pytest.mark.parametrize(
    "given, left, prompts, dropped",
    [
        ([("a", True), ("b", True)], [0, 1], {}, {}),
        ([("a", None), ("b", None)], [0, 1], {}, {}),
        ([("a", True), ("b", False), ("c", None)], [0, 2], {}, {"unfinished": 1}),
        ([("a", True), ("b", False)], [], {"unfinished": 1}, {"unfinished": 1}),
        ([("a", True), (" a ", True)], [], {"identical": 1}, {}),
        ([("a", True), ("a", True), ("b", True)], [0, 1, 2], {}, {}),
        ([("a", "busy"), ("b", True), ("c", True)], [1, 2], {}, {"busy": 1}),
        ([("a", "busy"), ("b", True)], [], {"busy": 1}, {"busy": 1}),
        ([("a", "busy"), ("b", False)], [], {"busy": 1}, {"busy": 1}),
        ([("abc", True), ("abcd", True)], [], {"too_long_chosen": 1}, {}),
        ([("abc", True), ("ab", True)], [0, 1], {}, {}),
        ([("w", True), ("v", True)], [], {"unpaired": 1}, {}),
        ([("w", True), ("a", True), ("v", True)], [0, 1, 2], {}, {}),
        ([("w ", True), ("w", True), ("a", True)], [0, 1, 2], {}, {}),
        ([("a  ", True), ("bcd", True), ("a", True)], [1, 2], {}, {"identical": 1}),
        ([], [], {"unfinished": 1}, {}),
    ],
)
def test_candidates_that_can_be_in_a_pair(given, left, prompts, dropped):
    candidates = [
        candidate(k, text, *((None, how) if isinstance(how, str) else (how, None)))
        for k, (text, how) in enumerate(given)
    ]
    drops = DropCounts()
    found = pairable(
        candidates, drops, may_win=lambda c: c.text not in ("w", "v"), max_chosen_length=2
    )
    assert found == [candidates[k] for k in left]
    assert (drops.prompts, drops.candidates, drops.kept) == (prompts, dropped, 0)


def test_one_whole_response_can_be_learnt_alone():
    drops = DropCounts()
    one, other = candidate(0), candidate(1, finished=False)
    assert learnable([one, other], drops, least=1) == [one]
    assert learnable([other], drops, least=1) == []
    assert drops.prompts == {"unfinished": 1} and drops.candidates == {"unfinished": 2}


def test_a_stage_that_has_longest_winners_judges_no_prompt_without_a_short_one(tmp_path):
    pairing = PairingConfig(max_chosen_length=1)
    judge = FunctionJudge(letters)
    run = run_of(tmp_path / "few", judge=judge, pairing=pairing)
    every = run_of(tmp_path / "all", judge=judge, pairing=pairing, judge_all=True)
    wanted = {
        c.id
        for some in map(that_may_pair, groups_of(run))
        for c in some
        if min(len(other.text) for other in some) <= 1
    }
    assert judged_in(run) == wanted != set()
    assert pairs_in(run) == pairs_in(every)
