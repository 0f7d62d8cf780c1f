"""What is said of a run in a few sentences, and of a prompt that gave no pair."""

import logging
from dataclasses import replace

import pytest
import torch

from self_rewarding_lm import FunctionJudge, OptimConfig, Run, ShuffledJudge
from self_rewarding_lm.checks import Check, ChecksConfig
from self_rewarding_lm.errors import NoPairError, PairingError, TrainingError
from self_rewarding_lm.report.page import write_report
from self_rewarding_lm.report.terminal import show_run
from self_rewarding_lm.report.verdict import percent, verdict
from tests.stages.test_pair_maker import rising
from tests.support.models import END
from tests.test_checks import comparing
from tests.test_trainer import external, model64, sft, trainer_of

TOO_LITTLE = "give more prompts, pairs or epochs for more steps"


def warned(run, stage=0):
    return {e["check"] for e in run.events(stage) if e.get("event") == "warning"}


def test_a_run_of_one_step_shows_nothing_and_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("SELF_REWARDING_LM_QUIET", raising=False)
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    stage = external(reward_model=rising(), prompts_per_block=4)
    run = trainer_of(tmp_path, [stage], quiet=False)(rehearse=False)
    said = verdict(run)
    assert said == [
        "external_reward: 4 pairs from 4 prompts, 0 % of the responses were cut off, 1 step.",
        "The judge tells responses apart: 100 % of its judgements have a score, its commonest is 6.2 "
        "% of all, best and worst tie in 0 %.",
        f"Nothing can be concluded from external_reward: {TOO_LITTLE}.",
    ]
    assert " ".join(said) in [record.getMessage() for record in caplog.records]
    assert " ".join(said) in " ".join(show_run(run).split())
    assert " ".join(said) in " ".join(write_report([run]).read_text(encoding="utf-8").split())
    assert warned(run) == {"few_steps"}
    caplog.clear()
    trainer_of(tmp_path, [stage], quiet=False)(rehearse=False)
    assert "pairs from" not in caplog.text  # it was done


def test_ten_steps_are_enough_to_speak_of(tmp_path):
    run = trainer_of(tmp_path, [external(reward_model=rising(), num_train_steps=10)])()
    assert warned(run) == set()
    assert verdict(run)[0].endswith(", 10 steps.") and "concluded" not in " ".join(verdict(run))
    strict = ChecksConfig(few_steps=Check(limit=11, action="error"))
    with pytest.raises(TrainingError, match="the stage took 10 optimiser steps"):
        trainer_of(tmp_path / "strict", [sft(num_train_steps=10, checks=strict)])(rehearse=False)


def test_answers_that_are_cut_off_are_told_with_what_to_do(tmp_path):
    stage = external(reward_model=rising(), num_generated_preference_pairs=None, num_train_steps=12)
    run = trainer_of(tmp_path, [stage], ending(), eos_id=END)(rehearse=False)
    candidates = run.candidates(0)
    cut = sum(c.finished is False for c in candidates) / len(candidates)
    assert 0.3 < cut < 1 and "cut_off" in warned(run)
    first, *_, last = verdict(run)
    assert f"{percent(cut)} of the responses were cut off" in first and "from 10 prompts" in first
    assert last == "This can be better: raise max_new_tokens, so that responses end."
    # a prompt with fewer than two whole answers has no pair, and the text says so
    whole = {
        prompt.id: sum(c.finished for c in candidates if c.prompt_id == prompt.id)
        for prompt in run.prompts(0)
    }
    poor = [name for name, number in whole.items() if number < 2]
    assert poor and not {pair.id for pair in run.pairs(0)} & set(poor)
    parts = show_run(run, prompts=10).split("\n\n")
    for name in poor:
        [part] = [part for part in parts if part.startswith(f"{name}\n")]
        told = (
            f"no pair: {4 - whole[name]} of 4 were cut off, and a pair needs two that are complete"
        )
        assert told in " ".join(part.split())
    strict = ChecksConfig(cut_off=Check(action="error"))
    stage = external(reward_model=rising(), checks=strict)
    with pytest.raises(PairingError, match=r"responses? cut off before the end"):
        trainer_of(tmp_path / "strict", [stage], ending(), eos_id=END)(rehearse=False)


def ending():
    """A model of which about half of the answers end within six tokens."""
    module = model64()
    with torch.no_grad():
        module.head.bias[END] += 1.5
    return module


def test_a_run_that_stopped_without_a_pair_says_why(tmp_path):
    stage = external(reward_model=lambda completions, **_: [1.0 for _ in completions])
    with pytest.raises(NoPairError):
        trainer_of(tmp_path, [stage])(rehearse=False)
    run = Run.open(tmp_path)
    text = " ".join(show_run(run).split())
    assert "no pair: the best and the worst have the same score, 1 (tie)" in text
    assert "external_reward: 0 pairs from 40 prompts (10 different)" in text
    assert "The judge gave one score, rounded to one decimal, to 100 % of the responses." in text
    assert "use another judge, or score_mode: expected if it writes its scores" in text
    assert "external_reward stopped: no preference pair could be made from 40 prompts" in text


def test_a_judge_that_ties_in_most_prompts_is_not_said_to_tell_responses_apart(tmp_path):
    def seldom(prompts, completions, **_):
        """Scores that differ within one prompt of those that are asked about together."""
        return [k * (prompt == prompts[0]) + 1.0 for k, prompt in enumerate(prompts)]

    stage = external(reward_model=seldom, num_generated_preference_pairs=None, prompts_per_block=5)
    run = trainer_of(tmp_path, [stage])(rehearse=False)
    tied = run.metrics(0)[0]["judge/tie_rate"]
    text = " ".join(verdict(run))
    assert tied > 0.5 and f"best and worst tie in {percent(tied)}." in text
    assert "The judge gives the responses to most prompts one score: 100 % of its " in text
    assert "apart" not in text


def test_the_verdict_on_a_control_says_that_its_scores_were_shuffled(tmp_path):
    stage = external(judge=ShuffledJudge(of=FunctionJudge(rising())), num_train_steps=10)
    text = " ".join(verdict(trainer_of(tmp_path, [stage])(rehearse=False)))
    assert "The judge's scores were shuffled among the responses (a control): 100 % of its" in text
    assert "apart" not in text


class Limited(FunctionJudge):
    """The first response of each prompt is too long for it."""

    def judge(self, ctx, prompts, candidates_PG):
        first = {candidates[0].id for candidates in candidates_PG}
        for judgement in super().judge(ctx, prompts, candidates_PG):
            is_first = judgement.candidate_ids[0] in first
            yield replace(judgement, score=None, reason="too_long") if is_first else judgement


def test_judge_prompts_that_are_too_long_are_told(tmp_path):
    stage = external(judge=Limited(rising()), num_train_steps=10)
    run = trainer_of(tmp_path, [stage])(rehearse=False)
    share = run.metrics(0)[0]["judge/too_long"]
    assert 0 < share < 1
    told = f"For {percent(share)} of its judgements the judge had more to read than its model takes"
    assert told in " ".join(verdict(run)) and told in " ".join(show_run(run).split())


def test_a_judge_that_prefers_a_place_is_said_to(tmp_path):
    stage = comparing("the first shown")
    with pytest.raises(NoPairError):
        trainer_of(tmp_path, [stage])(rehearse=False)
    text = " ".join(verdict(Run.open(tmp_path)))
    assert "The judge prefers a place, whichever response is shown there: 0 % of its comp" in text
    assert "train the model to compare, or let it score each response by itself" in text
    assert "apart" not in text and "one score" not in text


def test_a_run_without_pairs_of_its_own_tells_its_loss(tmp_path):
    run = trainer_of(tmp_path, [sft(optim=OptimConfig(batch_size=2, learning_rate=1e-2))])()
    losses = [line["loss"] for line in run.metrics(0) if "loss" in line]
    assert verdict(run) == [f"sft: 9 steps, loss {losses[0]:.3g} -> {losses[-1]:.3g}."]


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0 %"), (0.5, "50 %"), (0.0625, "6.2 %"), (0.208, "20.8 %"), (1, "100 %")],
)
def test_shares_are_told_in_percent(share, words):
    assert percent(share) == words


class Measuring:
    """A callback that says the same of each stage."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_stage_trained(self, ctx, out) -> None:
        out.log({"held_out/accuracy": self.accuracy})


@pytest.mark.parametrize(("accuracy", "words"), [(0.308, "30.8 %"), (30.84, "30.84")])
def test_an_accuracy_that_is_no_share_is_told_as_it_is(tmp_path, accuracy, words):
    stages = [sft(num_train_steps=10), sft(name="again", num_train_steps=10)]
    run = trainer_of(tmp_path, stages, callbacks=[Measuring(accuracy)])(rehearse=False)
    assert verdict(run)[-1] == f"Held out: accuracy {words} -> {words}."
