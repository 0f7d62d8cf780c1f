"""Early stopping by held-out responses, and the anchor after every stage: values made by hand."""

import json
import logging
import sys
from dataclasses import replace

import pytest

from self_rewarding_lm import (
    EnsembleJudge,
    HeldOutReward,
    JudgeAnchor,
    OptimConfig,
    RewardConfig,
    Run,
    VerifierAccuracy,
    WinRateOverLast,
)
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError
from self_rewarding_lm.evaluation.judge_quality import judge_ranked
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.records import Judgement
from self_rewarding_lm.runs.weights import weights_hash
from tests.runs.test_resume import Killed
from tests.support.models import (
    END,
    TEXT_VOCAB,
    Recurrent,
    context,
    ids_of,
    run_of_format_1,
    text_tokens,
)
from tests.support.processes import two
from tests.test_trainer import JUDGE, SHORT, model64, self_reward, sft, trainer_of

HELD_OUT = ["one", "two", "six"]
RANKED = [
    {"prompt": "one", "replies": ["a b c d", "a"]},
    {"prompt": "two", "replies": ["e f g", "eee"]},
    {"prompt": "six", "replies": ["h", "hijk"]},
]


def longer(prompts, completions):
    return [float(len(text)) for text in completions]


def various(prompts, completions):
    return [float(sum(map(ord, text))) for text in completions]


def told_by(texts):
    """A context whose model's responses are `texts`, whatever is asked: one list a check."""

    checks = iter(texts)

    class Saying(LocalEngine):
        def generate(self, model, requests, decoding):
            own = next(checks)
            for i in reversed(range(len(requests))):
                yield i, Completion((*ids_of(own[i]), END), True)

    return context(model64(), tokens=text_tokens(), engine=Saying())


def begun(evaluation, ctx):
    evaluation.check(ctx)
    evaluation.begin(ctx)
    return evaluation


def test_the_held_out_reward_is_the_mean_of_what_the_judge_says():
    ctx = told_by([["a", "bb", "ccccc"], ["", "b", ""]])
    evaluation = begun(HeldOutReward(HELD_OUT, longer), ctx)
    assert evaluation.measure(ctx) == {"score": 8 / 3}
    assert evaluation.measure(ctx) == {"score": 1 / 3}


def test_responses_without_a_score_are_left_out_and_none_at_all_is_an_error():
    ctx = told_by([["a", "bb", ""], ["", "", ""]])
    judge = lambda prompts, completions: [len(t) or None for t in completions]  # noqa: E731
    evaluation = begun(HeldOutReward(HELD_OUT, judge), ctx)
    assert evaluation.measure(ctx) == {"score": 3 / 2}
    with pytest.raises(JudgeError, match="no score to any response to 3 held-out prompts"):
        evaluation.measure(ctx)


def weighted():
    """Three quarters by length and one by the number of a's; at least two characters."""
    of_a = lambda prompts, completions: [float(t.count("a")) for t in completions]  # noqa: E731
    return EnsembleJudge([(longer, 3), of_a], filters=[(longer, 2)])


def in_format_1(ctx):
    return replace(ctx, run=run_of_format_1())


def test_the_weights_and_filters_of_an_ensemble_count():
    texts = [["aa", "bbb", "c"], ["aa", "bb", "cc"]]  # 8/4, 9/4, None; 8/4, 6/4, 6/4
    evaluation = begun(HeldOutReward(HELD_OUT, weighted()), ctx := told_by(texts))
    assert [evaluation.measure(ctx)["score"] for _ in texts] == [17 / 8, 5 / 3]
    evaluation = begun(WinRateOverLast(HELD_OUT, weighted()), ctx := told_by(texts))
    found = [evaluation.measure(ctx)["win_rate"] for _ in texts]
    assert found == [0.5, 0.25]  # a tie, a loss, and what is not known


def test_a_run_of_format_1_counts_all_judgements_alike():
    ctx = in_format_1(told_by([["aa", "bbb", "c"]]))
    evaluation = begun(HeldOutReward(HELD_OUT, weighted()), ctx)
    assert evaluation.measure(ctx) == {"score": (2.0 + 1.5 + 0.5) / 3}


def test_equal_means_are_equal_in_whatever_order_responses_come():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in floats, and early stopping would see a gain."""
    texts = [["a", "bb", "ccc"], ["ccc", "bb", "a"]]
    tenths = lambda prompts, completions: [len(t) / 10 for t in completions]  # noqa: E731
    evaluation = begun(HeldOutReward(HELD_OUT, tenths), ctx := told_by(texts))
    assert [evaluation.measure(ctx) for _ in texts] == [{"score": 0.2}] * 2


def test_what_was_won_and_lost_again_is_nothing():
    texts = [["a", "b", "c"], ["aa", "bb", "c"], ["a", "b", "c"], ["aa", "bb", "c"]]
    evaluation = begun(WinRateOverLast(HELD_OUT, longer), ctx := told_by(texts))
    found = [evaluation.measure(ctx)["score"] for _ in texts]
    assert found == [0.5, 5 / 6, 0.5, 5 / 6]


def test_a_verifiers_accuracy_counts_ones_alone():
    ctx = told_by([["x", "xx", "y"]])
    scores = {"x": 1.0, "xx": 0.9, "y": 7.0}
    verifier = lambda prompts, completions: [scores[text] for text in completions]  # noqa: E731
    assert begun(VerifierAccuracy(HELD_OUT, verifier), ctx).measure(ctx) == {"score": 2 / 3}


def test_the_win_rate_over_the_last_check_adds_up():
    texts = [["a", "b", "c"], ["aa", "bb", "c"], ["a", "b", "c"], ["aaaa", "b", "c"]]
    ctx = told_by(texts)
    evaluation = begun(WinRateOverLast(HELD_OUT, longer), ctx)
    # wins, ties, losses against the check before: -, 2 1 0, 0 1 2, 1 2 0
    rates = [0.5, 5 / 6, 1 / 6, 4 / 6]
    found = [evaluation.measure(ctx) for _ in texts]
    assert [one["win_rate"] for one in found] == pytest.approx(rates)
    assert [one["score"] for one in found] == pytest.approx([0.5, 5 / 6, 0.5, 4 / 6])


def test_what_it_knows_of_the_last_check_passes_through_json():
    texts = [["a", "b", "c"], ["aa", "bb", "c"], ["a", "b", "c"]]
    ctx = told_by(texts)
    straight = begun(WinRateOverLast(HELD_OUT, longer), ctx)
    found = [straight.measure(ctx) for _ in texts]
    ctx = told_by(texts)
    first = begun(WinRateOverLast(HELD_OUT, longer), ctx)
    again = [first.measure(ctx), first.measure(ctx)]
    kept = json.loads(json.dumps(first.standing()))
    second = begun(WinRateOverLast(HELD_OUT, longer), ctx)
    second.resume(kept)
    assert [*again, second.measure(ctx)] == found
    second.begin(ctx)  # another training: nothing of this one counts
    assert second.standing() == {"total": 0.5, "last": {}}


def stopping(how=None, **saving):
    """SFT of nine steps with a check after each; `how` is called before the judge judges."""
    calls = []

    def judge(prompts, completions):
        calls.append(1)
        if how is not None:
            how(len(calls))
        return [float(len(set(text))) for text in completions]

    return sft(
        optim=OptimConfig(batch_size=4, learning_rate=3e-2, eval_every=1, **saving),
        num_train_steps=9,
        early_stopper_eval_module=WinRateOverLast(HELD_OUT, judge, sampling=SHORT),
        early_stopper_patience=99,
    )


def scores_of(run):
    return [
        (m["step"], m["early_stopping/score"], m["early_stopping/win_rate"])
        for m in run.metrics(0)
        if "early_stopping/score" in m
    ]


def test_early_stopping_by_win_rate_goes_on_to_the_same_bits_after_a_kill(tmp_path):
    straight, resumed = model64(), model64()
    before = trainer_of(tmp_path / "a", [stopping()], straight)()

    def kill(call):
        if call == 6:
            raise Killed

    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [stopping(kill, save_state_every=2)])()
    after = trainer_of(tmp_path / "b", [stopping(save_state_every=2)], resumed)()
    found = scores_of(before)
    assert found[0] == (0, 0.5, 0.5) and [step for step, *_ in found] == list(range(10))
    assert len({rate for *_, rate in found}) > 1
    assert scores_of(after) == found
    assert weights_hash(straight) == weights_hash(resumed)
    best = max(found, key=lambda one: one[1])
    assert after.summary(0)["early_stopping"] == {"best_step": best[0], "score": best[1]}


def test_the_responses_are_those_of_the_present_weights(tmp_path):
    held_out = HeldOutReward(HELD_OUT, various, sampling=SHORT)
    stage = sft(early_stopper_eval_module=held_out, num_train_steps=1, early_stopper_mode="min")
    model = model64()
    trainer = trainer_of(tmp_path, [stage], model)
    run = trainer()
    scores = [m["early_stopping/score"] for m in run.metrics(0) if "early_stopping/score" in m]
    assert len(scores) == 2 and scores[0] != scores[1]
    for weights, score in ((model64(), scores[0]), (model, min(scores))):
        ctx = context(weights, stage="sft", tokens=trainer.tokens)
        assert begun(held_out, ctx).measure(ctx) == {"score": score}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: HeldOutReward([], longer), DataError, "prompts is empty"),
        (lambda: HeldOutReward(HELD_OUT, "long"), ConfigError, "a judge is a RewardConfig"),
        (lambda: HeldOutReward(HELD_OUT, longer, num_samples=0), ConfigError, "num_samples"),
        (
            lambda: HeldOutReward(HELD_OUT, longer, judge_model=Recurrent(TEXT_VOCAB)),
            ConfigError,
            "Leave judge_model out",
        ),
        (lambda: VerifierAccuracy(HELD_OUT, 5), ConfigError, "a verifier is a text function"),
        (lambda: JudgeAnchor([{"prompt": "one", "replies": ["a"]}]), DataError, "at least two"),
    ],
)
def test_what_cannot_be_measured_is_named_at_once(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_held_out_prompts_and_reward_prompts_are_tried_before_stage_one(tmp_path):
    wrong = RewardConfig(prompt_template="{{ prompt }}", parse_reward=len)
    with pytest.raises(ConfigError, match="response"):
        HeldOutReward(HELD_OUT, wrong)
    bad = HeldOutReward([{"text": 3}], longer)
    with pytest.raises(DataError, match="prompts, row 0"):
        trainer_of(tmp_path, [sft(early_stopper_eval_module=bad)])
    with pytest.raises(ConfigError, match="response"):
        trainer_of(tmp_path, [sft()], callbacks=[JudgeAnchor(RANKED, wrong)])
    assert not any(tmp_path.iterdir())


def test_the_anchor_is_measured_after_every_stage_with_its_weights(tmp_path):
    anchor = JudgeAnchor(RANKED, judging=SHORT)
    trainer = trainer_of(tmp_path, [sft(), self_reward()], callbacks=[anchor])
    run = trainer()
    for stage in run.stages:
        [line] = [m for m in run.metrics(stage) if "anchor/accuracy_ties_half" in m]
        summary = run.summary(stage)
        assert line == {"step": summary["steps"], **summary["anchor"]}
        assert {"anchor/parse_rate", "anchor/tie_rate"} <= line.keys()
    assert run.summary("sft")["anchor"] != run.summary("self_reward")["anchor"]
    judged = model64()
    for stage in run.stages:
        run.load_weights(judged, stage)
        ctx = context(judged, stage="anchor", tokens=trainer.tokens)
        found = judge_ranked(ctx, anchor.rows, make_judge(JUDGE, judging=SHORT))
        assert {f"anchor/{k}": v for k, v in found.metrics().items()} == run.summary(stage)[
            "anchor"
        ]


def test_it_warns_where_the_loop_is_pleased_and_people_are_not(tmp_path, caplog):
    """Judges whose agreement is known: the first is right, the second wrong about all."""

    class Turning(JudgeAnchor):
        def on_stage_trained(self, ctx, out):
            sign = 1 if ctx.stage == "self_reward" else -1
            self.judge = lambda prompts, completions: [sign * len(text) for text in completions]
            super().on_stage_trained(ctx, out)

    def pleased(stage):
        level = 1.0 if stage == "self_reward" else 2.0

        class Judge:
            def judge(self, ctx, prompts, groups):
                for group in groups:
                    for place, candidate in enumerate(group):
                        yield Judgement(f"{candidate.id}/j0", (candidate.id,), "j", level + place)

        return Judge()

    rows = [{"prompt": "one", "replies": ["aaa", "a"]}]
    names = ("self_reward", "self_reward-2")
    stages = [self_reward(rewarding_model=pleased(name)) for name in names]
    with caplog.at_level(logging.WARNING, logger="self_rewarding_lm"):
        run = trainer_of(tmp_path, stages, callbacks=[Turning(rows, longer)])()
    [told] = [r.getMessage() for r in caplog.records if "no longer a sign" in r.getMessage()]
    assert told.startswith("self_reward-2: the loop's own mean score rose")
    assert "from 1.000 to 0.000" in told and "go back to stage self_reward." in told
    assert [run.summary(n)["anchor"]["anchor/accuracy"] for n in names] == [1.0, 0.0]


def test_two_processes_measure_what_one_measures(tmp_path):
    script = ("-m", "tests.evaluation.test_held_out")
    two(*script, str(tmp_path / "two"))
    main(str(tmp_path / "one"))
    runs = [Run.open(tmp_path / name) for name in ("one", "two")]
    found = [(scores_of(run), run.summary(0)["anchor"]) for run in runs]
    assert found[0] == found[1] and len(found[0][0]) == 4


def main(folder):
    stage = stopping().model_copy(update={"num_train_steps": 3})
    anchor = JudgeAnchor(RANKED, judging=SHORT)
    trainer_of(folder, [stage], callbacks=[anchor], accelerate_kwargs=dict(cpu=True))()


if __name__ == "__main__":
    main(sys.argv[1])
