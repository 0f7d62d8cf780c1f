"""Candidates of another stage: judged and paired again, never copied, whatever stops the run."""

import re
import shutil

import pytest

from self_rewarding_lm import (
    FunctionJudge,
    MetaRewardDPOConfig,
    Run,
    SelfRewardSFTConfig,
    ShuffledJudge,
    TemporalDPOConfig,
)
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.yaml_nodes import read_yaml
from self_rewarding_lm.report.examples import examples
from self_rewarding_lm.report.export import export_stage
from self_rewarding_lm.report.page import write_report
from self_rewarding_lm.report.terminal import show_run
from self_rewarding_lm.stages.ranges import Range
from self_rewarding_lm.stages.work import Counting
from tests.stages.test_pair_maker import StopError, Stopping, numerate
from tests.test_trainer import PROMPTS, QUICK, SHORT, external, self_reward, sft, trainer_of

WHOLE = dict(num_generated_preference_pairs=None, prompts_per_block=4, min_parse_rate=0)


def letters(prompts, completions):
    return [sum(map(ord, text)) % 5 for text in completions]


def other_letters(prompts, completions):
    return [sum(map(ord, text)) % 7 for text in completions]


def sampling(name="M2", **options):
    return external(name=name, reward_model=letters, **{**WHOLE, **options})


def again(name="again", which="M2", **options):
    defaults = dict(reward_model=other_letters, candidates_from=which, init_from="initial")
    return external(name=name, **{**WHOLE, **defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that sampled."""
    folder = tmp_path_factory.mktemp("own") / "run"
    trainer_of(folder, [sampling()], numerate())()
    return folder


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_candidates_of_another_stage_are_judged_and_paired_and_not_copied(
    elsewhere, folder, tmp_path
):
    stages = [again(which=f"{folder}:M2")] if elsewhere else [sampling(), again()]
    run = trainer_of(tmp_path / "run", stages, numerate())()
    source = Run.open(folder) if elsewhere else run
    files = run.stage("again")
    assert not list(files.path.glob("candidates*.jsonl"))
    assert not list(files.path.glob("prompts*.jsonl"))
    sampled = source.candidates("M2")
    assert len(sampled) == 4 * len(PROMPTS)
    assert run.candidates("again") == sampled and run.prompts("again") == source.prompts("M2")
    texts = {c.id: c.text for c in sampled}
    said = {j.candidate_ids[0]: j.score for j in run.judgements("again")}
    assert said == {
        i: float(n) for i, n in zip(texts, other_letters([], texts.values()), strict=True)
    }
    assert run.pairs("again")
    for pair in run.pairs("again"):
        assert re.fullmatch(r"again/\d/0", pair.id)
        assert pair.chosen == texts[pair.chosen_id] and pair.rejected == texts[pair.rejected_id]
        of_prompt = [said[i] for i in texts if i.startswith(f"M2/{pair.id.split('/')[1]}/")]
        assert pair.chosen_score == max(of_prompt) and pair.rejected_score == min(of_prompt)


def test_report_terminal_and_export_show_them(tmp_path):
    run = trainer_of(tmp_path / "run", [sampling(), again()], numerate())()
    shown = {r.candidate.id: r.score for e in examples(run, "again") for r in e.responses}
    ids, texts = zip(*((c.id, c.text) for c in run.candidates("M2")), strict=True)
    assert shown == dict(zip(ids, map(float, other_letters([], texts)), strict=True))
    pair = run.pairs("again")[0]
    assert f"M2/{pair.id.split('/')[1]}/0" in show_run(run, stage="again", prompts=20)
    page = write_report([run], tmp_path / "report.html").read_text()
    assert all(c.text in page for c in run.candidates("again") if c.text.isalpha())
    assert export_stage(run, "again", tmp_path / "rows.jsonl") == len(run.pairs("again"))


def test_the_same_judge_on_the_same_weights_says_the_same_again(tmp_path):
    m2 = self_reward(name="M2", **WHOLE)
    same = self_reward(name="same", candidates_from="M2", init_from="initial", **WHOLE)
    run = trainer_of(tmp_path, [m2, same], numerate())()
    assert run.judgements("same") == run.judgements("M2")
    assert [p.chosen_id for p in run.pairs("same")] == [p.chosen_id for p in run.pairs("M2")]


def test_a_taken_stage_can_be_taken_in_turn_and_its_pairs_mixed(tmp_path):
    third = again("third", "again", reward_model=letters, mix_pairs=("M2", "again"))
    run = trainer_of(tmp_path, [sampling(), again(), third], numerate())()
    assert run.candidates("third") == run.candidates("M2")
    ids = [row.id for row in run.reference("third")]
    assert len(ids) == len(set(ids))
    assert {i.split("/")[0] for i in ids} == {"M2", "again", "third"}


def test_a_shuffle_and_top_scored_responses_of_what_another_stage_sampled(tmp_path):
    shuffled = again("shuffled", judge=ShuffledJudge(), prompts_per_block=10)
    options = dict(prompt_dataset=PROMPTS, generation=SHORT, judging=SHORT, dropout=0.0)
    top = SelfRewardSFTConfig(
        name="top",
        candidates_from="M2",
        judge=FunctionJudge(letters),
        min_score=3,
        optim=QUICK,
        **options,
        **WHOLE,
    )
    run = trainer_of(tmp_path, [sampling(), shuffled, top], numerate())()
    assert {j.candidate_ids[0] for j in run.judgements("shuffled") if j.is_moved} == {
        c.id for c in run.candidates("M2")
    }
    learnt = {row.id for row in run.demonstrations("top")}
    assert learnt and learnt <= {j.candidate_ids[0] for j in run.judgements("M2") if j.score >= 3}


def test_a_stage_that_comes_after_goes_on_behind_the_prompts_that_were_sampled(tmp_path):
    few = dict(num_generated_preference_pairs=2, prompts_per_block=2)
    after = sampling("after", **few)
    stages = [sampling(**few), again(reuse_prompts=True), after]
    plain = trainer_of(tmp_path / "plain", [sampling(**few), after], numerate())()
    run = trainer_of(tmp_path / "run", stages, numerate())()
    rows = [[p.row for p in it.prompts("after")] for it in (run, plain)]
    assert rows[0] == rows[1] and rows[0][0] > 0


def test_a_run_that_is_stopped_while_it_judges_goes_on(folder, tmp_path):
    def run_of(name, judgements):
        judge = Stopping(FunctionJudge(other_letters), judgements)
        stage = again(which=f"{folder}:M2", judge=judge, prompts_per_block=20)
        return trainer_of(tmp_path / name, [stage], numerate())(rehearse=False)

    straight = run_of("straight", -1)
    with pytest.raises(StopError):
        run_of("stopped", 30)
    assert len(Run.open(tmp_path / "stopped").judgements(0)) == 30
    resumed = run_of("stopped", -1)
    assert resumed.judgements(0) == straight.judgements(0)
    assert resumed.pairs(0) == straight.pairs(0)


def test_runs_that_are_moved_together_or_without_each_other(folder, tmp_path):
    trainer_of(tmp_path / "run", [sampling(), again()], numerate())()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run = Run.open(tmp_path / "moved")
    assert run.candidates("again") == run.candidates("M2")
    shutil.copytree(folder, tmp_path / "own")
    trainer_of(tmp_path / "control", [again(which=f"{tmp_path}/own:M2")], numerate())()
    control = Run.open(tmp_path / "control")
    lines = (tmp_path / "own/01-M2/candidates.jsonl").read_text()
    shutil.rmtree(tmp_path / "own/01-M2")
    with pytest.raises(StoreError, match=r"own/01-M2, and these are not there any more"):
        list(control.candidates(0))
    with pytest.raises(StoreError, match="not there any more"):
        show_run(control)
    (tmp_path / "own/01-M2").mkdir()
    (tmp_path / "own/01-M2/candidates.jsonl").write_text(lines[:-10])
    with pytest.raises(StoreError, match="are others than it began with"):
        list(control.candidates(0))


def test_what_cannot_be_taken_is_told_before_long_work(folder, tmp_path):
    def told(*stages):
        with pytest.raises(ConfigError) as error:
            trainer_of(tmp_path / "new", stages)
        return str(error.value)

    assert "must be the name of an earlier stage (M2), or FOLDER:STAGE" in told(
        sampling(), again(which="M3")
    )
    assert "holds no run" in told(again(which=f"{tmp_path}:M2"))
    assert "the run has no stage 'M3'; it has: M2" in told(again(which=f"{folder}:M3"))
    trainer_of(tmp_path / "trained", [sft()])()
    assert "has no candidates" in told(again(which=f"{tmp_path}/trained:sft"))
    shutil.copytree(folder, tmp_path / "begun")
    (tmp_path / "begun/01-M2/done.json").unlink()
    assert "has not finished" in told(again(which=f"{tmp_path}/begun:M2"))
    with pytest.raises(ConfigError, match="every round would need new ones"):
        again(rounds=2)
    with pytest.raises(ConfigError, match="leave out candidates_from"):
        TemporalDPOConfig(prompt_dataset=PROMPTS, candidates_from="M2")
    with pytest.raises(ConfigError, match="candidates_from: train_judge"):
        MetaRewardDPOConfig(prompt_dataset=PROMPTS, candidates_from="M2")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (PROMPTS[:3], "has candidates for 'tell 3' in row 3, and prompt_dataset has 3 rows"),
        ([*PROMPTS[:-1], "else"], "for 'tell 9' in row 9, and prompt_dataset has 'else' there"),
    ],
)
def test_other_prompts_than_those_that_were_answered_are_refused(prompts, words, folder, tmp_path):
    stage = again(which=f"{folder}:M2", prompt_dataset=prompts)
    with pytest.raises(ConfigError, match=words):
        trainer_of(tmp_path, [stage], numerate())()
    assert not list(tmp_path.glob("*/judgements*"))


def test_columns_come_from_the_stages_own_dataset(folder, tmp_path):
    def wanted(prompts, completions, length):
        return [n + m / 10 for n, m in zip(length, letters(prompts, completions), strict=True)]

    rows = [{"prompt": text, "length": 10 * i} for i, text in enumerate(PROMPTS)]
    stage = again(which=f"{folder}:M2", prompt_dataset=rows, reward_model=wanted)
    run = trainer_of(tmp_path, [stage], numerate())()
    said = {j.candidate_ids[0]: j.score for j in run.judgements(0)}
    assert said and all(score // 10 == int(i.split("/")[1]) for i, score in said.items())


def test_a_plan_counts_no_sampling(folder):
    counting = Counting({}, None, 64)
    m2 = counting.work(sampling(), "M2")
    for stage in (again(), again(which=f"{folder}:M2")):
        work = counting.work(stage, stage.name)
        assert work.candidates.count == Range.of(0)
        assert work.prompts == m2.prompts == Range.of(10)
        assert work.judgements.count == m2.candidates.count == Range.of(40)


def test_a_recipe_names_the_folder_of_a_run_from_its_own_place(tmp_path):
    lines = ["model: HuggingFaceTB/SmolLM2-135M-Instruct", "out: run", "stages:"]
    for name, which in (("again", '"own:M2"'), ("third", "again"), ("last", "nobody")):
        settings = f"name: {name}, prompt_dataset: prompts.jsonl, candidates_from: {which}"
        settings += ", judge: self_rewarding_lm:ShuffledJudge"
        lines.append(f"  - {{stage: self_reward, {settings}}}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"one value is wrong:\n.*\(again, third\).*'nobody'"):
        read_recipe(read_yaml(recipe))
    recipe.write_text("\n".join(lines[:-1]))
    stages = read_recipe(read_yaml(recipe)).stages
    assert [s.candidates_from for s in stages] == [f"{tmp_path}/own:M2", "again"]
    assert all(isinstance(s.judge, ShuffledJudge) and s.judge.of is None for s in stages)
    recipe.write_text("\n".join(lines[:-1]).replace("ShuffledJudge", "EnsembleJudge"))
    with pytest.raises(ConfigError, match="EnsembleJudge needs settings"):
        read_recipe(read_yaml(recipe))
