"""Named checks: each fires on what it is for, stays silent on what is well, warns, stops or is off."""

import json
import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import EMAReference, Run, SamplingConfig, SelfPlayConfig
from self_rewarding_lm.checks import ALWAYS, OFF, Check, Checker, ChecksConfig
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import (
    AdapterError,
    ConfigError,
    DataError,
    JudgeError,
    NoPairError,
    PairingError,
    TrainingError,
)
from self_rewarding_lm.generation.candidates import generate
from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.self_judge import PairwiseJudge
from self_rewarding_lm.judges.tally import JudgeTally, JudgeWatcher
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Judgement, PreferencePair, ReferenceLogprobs, TrainingRow
from self_rewarding_lm.runs.stage_folder import write_json
from self_rewarding_lm.scores import score_of
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import PreferenceObjective, SupervisedObjective
from self_rewarding_lm.training.reference import PairSums, StoredReference
from self_rewarding_lm.training.watch import WINDOW, Watcher
from tests.support.models import TEXT_VOCAB, VOCAB, Recurrent, adapt, context, stage_dir
from tests.test_trainer import (
    QUICK,
    external,
    model64,
    same,
    self_reward,
    sft,
    trainer_of,
    weights_of,
)

NAMES = list(ChecksConfig.model_fields)
LN2 = math.log(2)
PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()


@pytest.fixture
def said(caplog):
    """Names of the checks that warned."""
    caplog.set_level(logging.WARNING, "self_rewarding_lm")
    pattern = re.compile(r"\(check (\w+): ")
    return lambda: [n for r in caplog.records for n in pattern.findall(r.getMessage())]


def only(name: str, **values) -> ChecksConfig:
    """One check as given, the others off."""
    return OFF.model_copy(update={name: Check(**values)})


@dataclass(frozen=True)
class Prefers:
    """Compares for a judge: by the place where a response is shown, or by when it was sampled."""

    what: str

    def ask(self, ctx, questions):
        for question in questions:
            one, other = (int(name.split("/")[-1]) for name in question.candidate_ids)
            wins = 1.0 if self.what == "the first shown" else float(one < other)
            yield Judgement(question.id, question.candidate_ids, "first", wins)


def comparing(prefers: str, **options):
    """A stage whose judge compares any two of five responses to each prompt in both orders."""
    judge = PairwiseJudge(asker=Prefers(prefers))
    settings = dict(num_candidate_responses=5, num_generated_preference_pairs=None)
    return self_reward(judge=judge, **{**settings, **options})


# Settings


def test_every_check_has_a_line_of_its_own_in_the_docs_and_no_other_has():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted([*NAMES, *ALWAYS])  # each once
    assert not set(NAMES) & set(ALWAYS)


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_say_the_defaults(name):
    limit, action = ChecksConfig().of(name)
    (told,) = re.findall(rf"^\| `{name}` \| (\w+) (?:over|under) ([\d.]+)", PAGE, re.MULTILINE)
    assert (told[0], float(told[1])) == ({"warn": "warning"}.get(action, action), limit)


def test_what_is_not_given_keeps_its_default():
    checks = ChecksConfig(ties=Check(action="error"), one_score={"limit": 0.5})  # type: ignore[arg-type]
    assert checks.of("ties") == (0.9, "error") and checks.of("one_score") == (0.5, "warn")
    assert checks.of("few_pairs") == (1.0, "warn")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tied": Check()}, "'tied' is not a setting; did you mean 'ties'"),
        ({"ties": Check(limit=50)}, "ties: its limit is a share"),
        ({"ties": {"limit": -1}}, "ties.*limit: Input"),
        ({"ties": {"action": "stop"}}, "ties.*action: Input"),
    ],
    ids=str,
)
def test_checks_that_do_not_exist_or_cannot_be_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        ChecksConfig(**given)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_warns_once_stops_or_is_off_beyond_its_limit_alone(name, said):
    under = name in ("few_pairs", "pairs_per_prompt", "few_steps", "follows_position")
    limit = 0.5
    good, bad = (0.5, 0.4) if under else (0.5, 0.6)
    Checker(only(name, limit=limit, action="error"), "dpo").see(name, good, "well.")
    Checker(only(name, limit=limit, action="off"), "dpo").see(name, bad, "off.")
    Checker(only(name, limit=limit, action="warn"), "dpo", warns=False).see(name, bad, "other.")
    assert said() == []
    checker = Checker(only(name, limit=limit, action="warn"), "dpo")
    for _ in range(3):
        checker.see(name, bad, "bad.")
    assert said() == [name]
    with pytest.raises((JudgeError, PairingError, DataError, TrainingError)) as caught:
        Checker(only(name, limit=limit, action="error"), "dpo").see(name, bad, "bad.")
    side = "at least" if under else "at most"
    assert str(caught.value) == (
        f"dpo: bad. (check {name}: {bad}, and {side} 0.5 is expected; set by checks.{name}, "
        "explained in docs/troubleshooting.md.)"
    )


# Training


def step(margin: float = 0.0, **more: float) -> dict[str, float]:
    """Metrics of a step in which all pairs have this margin, half of it won by the chosen."""
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": margin / 2,
        "rewards/rejected": -margin / 2,
        "rewards/margins": margin,
        "rewards/accuracies": float(margin > 0),
        **more,
    }


def watch(name: str, steps: list[dict[str, float]], **values) -> None:
    watcher = Watcher(Checker(only(name, **values), "dpo"))
    for number, metrics in enumerate(steps, 1):
        watcher.see(metrics, step=number, rows=16)


def test_a_loss_at_ln_2_for_more_steps_than_the_limit(said):
    watch("loss_stuck", [step()] * 5, limit=5)
    watch("loss_stuck", [step()] * 5 + [step(0.01)] + [step()] * 5, limit=5)
    watch("loss_stuck", [step(0.01)] * 50, limit=5)
    watch("loss_stuck", [step(loss=LN2 + 0.01)] * 50, limit=5)  # margins cancel out
    watch("loss_stuck", [{"loss": LN2}] * 50, limit=5)  # supervised
    assert said() == []
    watch("loss_stuck", [step()] * 6, limit=5)
    watch("loss_stuck", [step(1e-4)] * 6, limit=5)
    watch("loss_stuck", [step(loss=3.0, nll=2.3)] * 6, limit=5)
    assert said() == ["loss_stuck"] * 3
    with pytest.raises(TrainingError, match=r"for 6 steps the loss has been 0.693"):
        watch("loss_stuck", [step()] * 6, limit=5, action="error")


def pairs(count: int = 12) -> list[dict[str, list[int]]]:
    return [{"prompt": [i, 1], "chosen": [i, 2, 3], "rejected": [i, 4]} for i in range(count)]


def dpo(**options) -> DPOConfig:
    return DPOConfig(**{**dict(train_dataset=pairs(), dropout=0.0, optim=QUICK), **options})


def test_training_that_moves_no_weight_is_seen_and_one_that_does_is_not(tmp_path, said):
    checks = only("loss_stuck", limit=5)
    still = OptimConfig(batch_size=4, learning_rate=1e-12, epochs=3)
    learns = OptimConfig(batch_size=4, learning_rate=1e-2, epochs=3)
    run = trainer_of(tmp_path / "still", [dpo(checks=checks, optim=still)])()
    assert said() == ["loss_stuck"]
    assert {round(line["loss"], 3) for line in run.metrics(0)[1:]} == {0.693}
    trainer_of(tmp_path / "learns", [dpo(checks=checks, optim=learns)])()
    assert said() == ["loss_stuck"]


def test_chosen_and_rejected_that_fall_together_can_stop_a_stage():
    falls = step(1.0, **{"rewards/chosen": -1.0, "rewards/rejected": -2.0})
    watch("both_fall", [falls] * (WINDOW - 1), action="error")
    watch("both_fall", [falls] * WINDOW, limit=1.0, action="error")  # it lost as much: not more
    watch("both_fall", [step(1.0)] * WINDOW, action="error")
    words = r"few dozen steps of an adapter.*better.*If they get worse.*nll_weight.*check both_fall"
    with pytest.raises(TrainingError, match=words):
        watch("both_fall", [falls] * WINDOW, action="error")


def test_all_pairs_right_at_the_first_step_can_stop_a_stage():
    watch("accuracy_at_start", [step(), step(1.0)], action="error")
    with pytest.raises(TrainingError, match="check accuracy_at_start"):
        watch("accuracy_at_start", [step(1.0)], action="error")


def test_updates_that_a_type_rounds_away_can_stop_a_stage(tmp_path):
    small = OptimConfig(batch_size=4, learning_rate=1e-6)
    stage = sft(optim=small, checks=only("lost_updates", action="error"))
    module = model64().bfloat16()
    with pytest.raises(TrainingError, match="check lost_updates"):
        trainer_of(tmp_path / "bf16", [stage], module)()
    trainer_of(tmp_path / "fp64", [stage])()


class Breaking(SupervisedObjective):
    """The loss of some rows is not finite."""

    bad, value = frozenset({"sft/1", "sft/4"}), math.nan

    def loss(self, rows, logprobs, targets):
        found = super().loss(rows, logprobs, targets)
        factor = [self.value if self.name(row) in self.bad else 1.0 for row in rows]
        return replace(found, losses=found.losses * torch.tensor(factor))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("micro", [1, 2, None], ids=str)
def test_a_loss_that_is_not_finite_names_the_rows_whose_loss_it_is(tmp_path, value, micro):

    rows = [TrainingRow(f"sft/{i}", (i, 1, 2), (False, True, True)) for i in range(6)]
    module = Recurrent()
    before = weights_of(module)
    ctx = context(module, stage="sft")
    out = stage_dir(ctx, tmp_path)
    optim = OptimConfig(batch_size=6, micro_batch_size=micro).completed(0.1, 0.1, 1)
    objective = type("Given", (Breaking,), {"value": value})(rows)
    with pytest.raises(TrainingError) as caught:
        Fit(ctx, out, objective, optim).run()
    found = str(caught.value)
    assert f"stage 'sft', step 1 of 1: the loss is {value}" in found
    assert set(re.findall(r"sft/\d", found)) == {"sft/1", "sft/4"}
    assert "check not_finite" in found and same(weights_of(module), before)


def test_an_implicit_reward_that_is_infinite_stops_though_the_loss_is_finite(tmp_path):
    """A rejected response without any probability: the loss is 0, and nothing would be said."""

    class Never(Recurrent):
        banned = False

        def forward(self, ids):
            logits = super().forward(ids)
            if self.banned:
                hidden = torch.zeros(VOCAB).index_fill(0, torch.tensor(4), -math.inf)
                logits = logits + hidden
            return logits

    module = Never()
    ctx = context(module, stage="dpo")
    out = stage_dir(ctx, tmp_path)
    one = PreferencePair("dpo/0", (1, 2), (3, 5), (4, 5))
    objective = PreferenceObjective([one], [PairSums(-3.0, -3.0)], 0.1)
    module.banned = True
    optim = OptimConfig(batch_size=1).completed(0.1, 0.1, 1)
    with pytest.raises(
        TrainingError, match=r"step 1 of 1: the (rewards|logps)/\w+ is -?inf.*In: dpo/0\."
    ):
        Fit(ctx, out, objective, optim).run()


def test_a_reference_that_is_not_finite_stops_before_the_first_step(tmp_path):
    module = Recurrent(TEXT_VOCAB).double()
    with torch.no_grad():
        module.embed.weight[7] = math.nan  # one token of the model is broken
    with pytest.raises(TrainingError, match=r"reference log-probs are not finite.*In: dpo/7\."):
        trainer_of(tmp_path, [dpo()], module)(rehearse=False)


@pytest.mark.parametrize("reference", ["start", "initial"])
def test_a_reference_that_was_not_finite_once_is_blamed_and_nothing_of_it_is_stored(
    reference, tmp_path, monkeypatch
):
    """The record is named; the run goes on to the end to which it comes undisturbed."""
    optim = QUICK.model_copy(update={"micro_batch_tokens": 16})
    asked, bad = [], []

    def of_one_bad(policy, sequences):
        asked.append(sequences)
        found = response_logprobs(policy, sequences)
        if len(asked) == 2:
            bad.append(sequences[0])
            found[0] = (math.nan, *found[0][1:])
        return found

    stage = dpo(optim=optim, reference=reference)
    straight, stopped = model64(), model64()
    expected = trainer_of(tmp_path / "straight", [stage], straight)(rehearse=False)
    words = {"start": "its present weights", "initial": "the weights 'initial'"}[reference]
    with monkeypatch.context() as patched:
        patched.setattr("self_rewarding_lm.training.reference.response_logprobs", of_one_bad)
        with pytest.raises(
            TrainingError,
            match=rf"reference \({words}\)\. In: dpo/\d+\. Nothing of them was stored",
        ) as error:
            trainer_of(tmp_path / "stopped", [stage], stopped)(rehearse=False)
    halted = Run.open(tmp_path / "stopped")
    (named,) = re.findall(r"In: (dpo/\d+)\.", str(error.value))
    (broken,) = [p for p in halted.pairs(0) if p.id == named]
    assert bad == [(broken.prompt_ids, broken.chosen_ids)]
    stored = halted.reference(0)
    assert stored and all(math.isfinite(sum(r.chosen) + sum(r.rejected)) for r in stored)
    run = trainer_of(tmp_path / "stopped", [stage], stopped)(rehearse=False)
    assert run.reference(0) == expected.reference(0)
    assert same(weights_of(straight), weights_of(stopped))


def test_a_reference_that_an_earlier_version_stored_is_named_with_its_file(tmp_path):
    ctx = context(Recurrent(TEXT_VOCAB), stage="dpo")
    out = stage_dir(ctx, tmp_path)
    out.append([ReferenceLogprobs("dpo/0/r0", (math.nan,), (-1.0,))])
    asked = StoredReference(ctx, out, token_budget=64)
    with pytest.raises(
        TrainingError, match=r"In: dpo/0\. They are in reference.jsonl in .* delete"
    ):
        asked.sums([PreferencePair("dpo/0", (1, 2), (3,), (4,))])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_moving_reference_that_is_not_finite_is_blamed(value, tmp_path, monkeypatch):
    asked = []

    def one_bad(objective, batches):
        given = list(batches)
        asked.append(given)
        if len(asked) == 2:
            given[0][1][0] = value
        set_reference(objective, given)

    set_reference = PreferenceObjective.set_reference
    monkeypatch.setattr(PreferenceObjective, "set_reference", one_bad)
    model = model64()
    with pytest.raises(
        TrainingError, match=r"step 2 of \d: log-probs of the moving reference .* In: dpo/\d+\. The"
    ):
        trainer_of(tmp_path, [dpo(reference=EMAReference())], model)(rehearse=False)
    assert all(p.isfinite().all() for p in model.parameters())


# Generating


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_logits_that_are_not_finite_stop_generation_and_name_the_records(value, how):
    """Token 7 as the input breaks the logits; prompts without it are answered."""

    class Broken(Recurrent):
        def forward(self, ids):
            bad = torch.where(ids == 7, value, 0.0)[..., None]
            logits = super().forward(ids) + bad
            return logits.index_fill(-1, torch.tensor([7]), -100.0)

    prompts = [torch.tensor([1, 2]), torch.tensor([3, 7]), torch.tensor([4, 5])]
    sampling = SamplingConfig(**{"top_p": None, "max_new_tokens": 3, **how})
    assert len(generate(Broken(), prompts[::2], sampling=sampling)) == 2
    if value == -math.inf:
        return  # token 7 keeps its -100: one token can be sampled, and -inf bars the others
    with pytest.raises(TrainingError) as caught:
        generate(Broken(), prompts, sampling=sampling, num_samples=2)
    found = str(caught.value)
    assert set(re.findall(r"generate/\d+/\d+", found)) == {"generate/1/0", "generate/1/1"}
    assert "0 tokens after the prompt" in found and "check not_finite" in found


def test_a_filter_that_leaves_no_token_is_not_taken_for_a_diverged_model():
    decoding = Decoding(filter_fn=lambda logits: torch.full_like(logits, -math.inf))
    asked = [Request((1, 2), 5, 3, "sft/0/0/0")]
    with pytest.raises(AdapterError, match="filter_fn left no token to sample for sft/0/0/0"):
        list(LocalEngine().generate(adapt(Recurrent()), asked, decoding))
    broken = Recurrent()
    with torch.no_grad():
        broken.head.bias[3] = math.nan
    with pytest.raises(TrainingError, match=r"the model's logits have NaN.*sft/0/0/0"):
        list(LocalEngine().generate(adapt(broken), asked, decoding))


def test_a_stage_whose_model_diverged_names_its_candidates(tmp_path):
    module = Recurrent(TEXT_VOCAB).double()
    with torch.no_grad():
        module.head.bias[3] = math.nan
    with pytest.raises(TrainingError, match=r"external_reward/\d/0/\d"):
        trainer_of(tmp_path, [external()], module)(rehearse=False)
    assert not Run.open(tmp_path).is_done(0)


# Judging


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "int"]
)
def test_a_number_that_is_not_finite_is_no_score(value):
    assert (score_of(value).score, score_of(value).reason) == (None, "not_finite")


class Judges:
    """A judge of the user's own that gives its numbers in turn."""

    name = "own"

    def __init__(self, numbers: list[float]) -> None:
        self.numbers, self.given = numbers, 0

    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for candidate in candidates:
                score = self.numbers[self.given % len(self.numbers)]
                self.given += 1
                yield Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score)


def judged(folder, numbers: list[float], **options) -> Run:
    stage = external(reward_model=Judges(numbers), num_generated_preference_pairs=None, **options)
    return trainer_of(folder, [stage])(rehearse=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_reward_that_is_not_finite_stops_the_stage_and_is_judged_again(tmp_path, value, said):
    numbers = [1.0, value, 3.0, 2.0]
    with pytest.raises(JudgeError, match=r"10 of 40 judgements.*external_reward/0/0/1/j0") as e:
        judged(tmp_path, numbers)
    assert "check scores_not_finite" in str(e.value)
    assert not Run.open(tmp_path).judgements(0)
    run = judged(tmp_path, [1.0, 4.0, 3.0, 2.0])  # the function was mended; the run goes on
    assert len(run.judgements(0)) == 40 and {p.chosen_score for p in run.pairs(0)} == {4.0}
    run = judged(tmp_path / "warned", numbers, checks=only("scores_not_finite", action="warn"))
    assert said().count("scores_not_finite") == 1
    found = {(j.score, j.reason) for j in run.judgements(0)}
    assert found == {(1.0, None), (None, "not_finite"), (3.0, None), (2.0, None)}
    assert {p.chosen_score for p in run.pairs(0)} == {3.0}


def test_a_judge_with_one_score_for_nearly_all_is_seen_while_it_judges(tmp_path, said):
    wide = {"num_candidate_responses": 8, "checks": only("one_score", limit=0.8)}
    judged(tmp_path / "well", [1.0, 2.0, 3.0], **wide)
    judged(tmp_path / "border", [5.0] * 4 + [1.0], **wide)  # 0.8, and not more
    assert said() == []
    run = judged(tmp_path / "one", [5.0] * 9 + [1.0], **wide)
    assert said() == ["one_score"] and run.summary(0)["metrics"]["judge/modal_share"] == 0.9
    strict = {**wide, "checks": only("one_score", limit=0.8, action="error")}
    with pytest.raises(JudgeError, match=r"are 5 .rounded.*check one_score: 0.9"):
        judged(tmp_path / "error", [5.0] * 9 + [1.0], **strict)
    few = {**wide, "num_candidate_responses": 4}  # 40 judgements say too little
    judged(tmp_path / "few", [5.0] * 9 + [1.0], **few)
    assert said() == ["one_score"]


def test_prompts_whose_responses_all_tie_are_seen():
    def tallied(ties: int, prompts: int = 64) -> JudgeTally:
        tally = JudgeTally()
        tally.tie.add(ties, prompts)
        return tally

    def see(tally: JudgeTally) -> str | None:
        checker = Checker(only("ties", limit=0.5, action="error"), "dpo")
        return JudgeWatcher(checker, min_parse_rate=0.2).see_scores(tally)

    assert see(tallied(32)) is None and see(tallied(63, 63)) is None
    assert "of 64 prompts 52% have the same score" in (see(tallied(33)) or "")


def test_comparisons_that_turn_with_the_order_are_seen_and_their_ties_not_blamed():
    def tallied(agreed: int, compared: int = 64) -> JudgeTally:
        tally = JudgeTally()
        tally.tie.add(64, 64)
        tally.position_agreement.add(agreed, compared)
        return tally

    def see(tally: JudgeTally, action="error") -> str:
        checks = ChecksConfig(
            follows_position=Check(action=action), ties=Check(limit=0.5, action="error")
        )
        watcher = JudgeWatcher(Checker(checks, "dpo"), min_parse_rate=0.2)
        return watcher.see_scores(tally) or ""

    seen = see(tallied(6))
    assert "of 64 comparisons in both orders 9% have one verdict" in seen
    assert "(check follows_position: 0.09375, and at least 0.1 is expected" in seen
    assert "check ties" in see(tallied(7)) and "check ties" in see(tallied(0, 63))
    assert "check ties" in see(tallied(0), action="off") and see(tallied(0), action="warn") == ""


@pytest.mark.parametrize("prefers", ["the first shown", "the first sampled"])
def test_a_judge_that_prefers_the_first_shown_is_told_apart_from_ties(tmp_path, said, prefers):
    stage = comparing(prefers, checks=ChecksConfig())
    trainer = trainer_of(tmp_path, [stage])
    if prefers == "the first shown":
        with pytest.raises(NoPairError, match="comparisons follow the position, for another judge"):
            trainer(rehearse=False)
    else:
        trainer(rehearse=False)
    assert ("follows_position" in said()) == (prefers == "the first shown")
    assert "ties" not in said()


def test_a_parse_rate_under_the_limit_names_its_check():
    watcher = JudgeWatcher(Checker(None, "dpo"), min_parse_rate=0.25)
    none = Judgement("a/j0", ("a",), "self", None, "no_score", "hm")
    one = Judgement("b/j0", ("b",), "self", 3.0)
    watcher.count([none] * 48 + [one] * 15)
    assert watcher.see_parsed("dpo", "folder") is None  # 63
    watcher.count([one])
    assert watcher.see_parsed("dpo", "folder") is None  # 16 of 64
    watcher.count([none])
    assert "(check min_parse_rate, " in (watcher.see_parsed("dpo", "folder") or "")


# Pairs and rows


def test_fewer_pairs_than_were_asked_for_and_few_of_many_prompts(tmp_path, said):
    def run(folder, wanted, limit, name, action="warn"):
        reward = Judges([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0])  # every second prompt ties
        stage = external(
            reward_model=reward,
            num_generated_preference_pairs=wanted,
            max_prompt_passes=1,
            checks=only(name, limit=limit, action=action),
        )
        return trainer_of(tmp_path / folder, [stage])(rehearse=False)

    assert len(run("enough", 5, 1.0, "few_pairs").pairs(0)) == 5
    run("half", None, 0.5, "pairs_per_prompt")
    run("surplus", 1, 0.5, "pairs_per_prompt")  # what was made counts, not what was asked for
    assert said() == []
    assert len(run("six", 6, 1.0, "few_pairs").pairs(0)) == 5
    run("few", None, 0.51, "pairs_per_prompt")
    assert said() == ["few_pairs", "pairs_per_prompt"]
    with pytest.raises(
        PairingError, match=r"5 pairs instead of 6.*dropped: 5 tie.*few_pairs: 0.83"
    ):
        run("six, strictly", 6, 1.0, "few_pairs", "error")


def test_pairs_that_are_equal_once_cut(tmp_path, said):
    rows = [{"prompt": [1], "chosen": [2, 3, i], "rejected": [2, 3, 9]} for i in (4, 5)]
    rows += [{"prompt": [1], "chosen": [i, 3], "rejected": [9, 3]} for i in (4, 5)]

    def run(folder, length, limit, action="warn"):
        checks = only("equal_after_cut", limit=limit, action=action)
        stage = dpo(train_dataset=rows, max_seq_len=length, checks=checks)
        trainer_of(tmp_path / folder, [stage])(rehearse=False)

    run("whole", 5, 0.0)
    run("half", 3, 0.5)
    assert said() == []
    run("cut", 3, 0.4)
    assert said() == ["equal_after_cut"]
    with pytest.raises(PairingError, match=r"2 of 4 pairs left out.*check equal_after_cut: 0.5"):
        run("error", 3, 0.4, "error")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_that_lose_their_end(tmp_path, said, kind):
    """Of 4 rows of 3 and 4 rows of 5 tokens, half are cut to 4."""

    def run(folder, length, limit, action="warn"):
        checks = only("rows_truncated", limit=limit, action=action)
        shared = {"max_seq_len": length, "checks": checks}
        short, long = [3, 4], [3, 4, 5, 6]
        if kind == "sft":
            rows = [([1, *body], 1) for body in (short, long) for _ in range(4)]
            stage = sft(train_dataset=rows, **shared)
        else:
            rows = [{"prompt": [1], "chosen": short, "rejected": long}] * 4
            stage = dpo(train_dataset=rows, **shared)
        return trainer_of(tmp_path / folder, [stage])(rehearse=False)

    run("whole", 5, 0.0)
    run("allowed", 4, 0.5)
    assert said() == []
    assert {"step": 0, "rows/truncated": 4} in run("cut", 4, 0.4).metrics(0)
    assert said() == ["rows_truncated"]
    for _ in range(2):  # also when the stage goes on
        with pytest.raises(DataError, match="4 of 8 sequences cut at 4 tokens"):
            run("error", 4, 0.4, "error")
    if kind == "sft":
        assert not Run.open(tmp_path / "error").rows(0)  # so that other rows can be given


def test_self_play_whose_own_answers_are_the_human_ones(tmp_path, said):
    module = model64()
    prompts = [torch.tensor([i, 1]) for i in range(4)]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=3)
    own = [found[0].ids for found in generate(module, prompts, sampling=greedy)]

    def run(folder, same_rows):
        rows = [
            ([*p.tolist(), *(ids if i < same_rows else (5, 6, 5))], 2)
            for i, (p, ids) in enumerate(zip(prompts, own, strict=True))
        ]
        stage = SelfPlayConfig(
            train_dataset=rows,
            generation=greedy,
            dropout=0.0,
            optim=QUICK,
            checks=only("pairs_per_prompt", limit=0.5),
        )
        trainer_of(tmp_path / folder, [stage], model64())(rehearse=False)

    run("half", 2)
    assert said() == []
    run("most", 3)
    assert said() == ["pairs_per_prompt"]


# A run that goes on


def test_a_run_goes_on_with_other_checks_and_with_settings_as_they_were_written_before(tmp_path):
    run = trainer_of(tmp_path, [external()])()
    path = run.stage(0).path / "config.json"
    assert "checks" not in json.loads(path.read_text())["settings"]
    before = json.loads(path.read_text())
    before["settings"]["min_parse_rate"] = 0.2  # as versions did that compared it
    write_json(path, before)
    loose = external(checks=only("ties", action="error"), min_parse_rate=0.5)
    again = trainer_of(tmp_path, [loose])()
    assert again.is_done(0)


def test_a_healthy_run_is_silent(tmp_path, said):
    fast = OptimConfig(batch_size=4, learning_rate=1e-3, epochs=10)
    trainer_of(tmp_path, [sft(optim=fast), external(optim=fast), dpo(optim=fast)])()
    assert said() == []
