"""Groups of responses and the policy gradient: advantages, whole runs by hand, judges, stops."""

import copy
from dataclasses import replace
from itertools import permutations
from statistics import mean, stdev

import pytest
import torch

from self_rewarding_lm import (
    ComparisonConfig,
    EnsembleJudge,
    FunctionJudge,
    MixedReference,
    OptimConfig,
    PairwiseJudge,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfRewardGRPOConfig,
    ShuffledJudge,
    VoteJudge,
)
from self_rewarding_lm.checks import Check, ChecksConfig
from self_rewarding_lm.errors import ConfigError, PairingError
from self_rewarding_lm.records import Candidate, Judgement, Prompt, prompt_id_of
from self_rewarding_lm.report.page import write_report
from self_rewarding_lm.report.terminal import show_run
from self_rewarding_lm.runs.weights import weights_hash
from self_rewarding_lm.stages.grpo import (
    GroupMaker,
    consistency,
    group_advantages,
    wins_of_like_length,
)
from self_rewarding_lm.stages.pair_maker import JudgedPrompt
from self_rewarding_lm.stages.pairing import DropCounts
from self_rewarding_lm.text import number
from self_rewarding_lm.training import policy_gradient
from tests.report.test_report import Page
from tests.report.test_verdict import ending
from tests.runs.test_resume import Killed
from tests.stages.test_rehearsal import COMPARISON, TAUGHT
from tests.support.hf_models import tiny
from tests.support.models import END, TEXT_VOCAB, Recurrent, context, stage_dir, text_tokens
from tests.test_trainer import PROMPTS, SHORT, model64, trainer_of

RATE = 0.05
EPSILON = 1e-4


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def letters(prompts, completions):
    return [float(len(set(text))) for text in completions]


def grpo(**options):
    optim = OptimConfig(
        batch_size=64, epochs=2, optimizer=sgd, learning_rate=RATE, schedule="constant",
        max_grad_norm=None,
    )  # fmt: skip
    defaults = dict(
        prompt_dataset=PROMPTS,
        judge=FunctionJudge(letters),
        generation=SHORT,
        judging=SHORT,
        num_candidate_responses=4,
        prompts_per_block=2,
        optim=optim,
    )
    return SelfRewardGRPOConfig(**{**defaults, **options})


def rounds(**options):
    return grpo(**{**dict(rounds=3, prompts_per_round=3), **options})


# -- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "baseline", "expected"),
    [
        ("none", "mean", [-2.0, -1.0, 3.0]),
        ("batch", "mean", [-2.0, -1.0, 3.0]),
        ("none", "others", [1 - 4.0, 2 - 3.5, 6 - 1.5]),
        ("std", "mean", [x / (7**0.5 + EPSILON) for x in (-2, -1, 3)]),
        ("std", "others", [x / (7**0.5 + EPSILON) for x in (-3, -1.5, 4.5)]),
    ],
)
def test_advantages_by_hand(scale, baseline, expected):
    found = group_advantages([1.0, 2.0, 6.0], scale=scale, baseline=baseline)
    assert found == pytest.approx(expected, abs=1e-12)


def group(tmp_path, answers, **options):
    """The advantages of a prompt by the numbers of its answers, and what was dropped.

    answers: (text, whether it ended, its score).
    """
    ctx = context(Recurrent(40))
    maker = GroupMaker(grpo(scale="none", **options), ctx, stage_dir(ctx, tmp_path))
    prompt = Prompt("stage/0/0", 0, (1, 2), "say")
    candidates = [
        Candidate(f"stage/0/0/{k}", prompt.id, (k + 1, 3), text, ended, 8)
        for k, (text, ended, _) in enumerate(answers)
    ]
    shown = {c.id for c in maker.shown_to_judge(JudgedPrompt(prompt, candidates, []))}
    judgements = [
        Judgement(f"{c.id}/j0", (c.id,), "letters", score)
        for c, (_, _, score) in zip(candidates, answers, strict=True)
        if c.id in shown
    ]
    drops = DropCounts()
    made = maker.pair(JudgedPrompt(prompt, candidates, judgements), drops)
    assert drops.kept == len(made)
    for record in made:
        candidate = candidates[int(record.id.split("/")[-1])]
        assert (record.candidate_id, record.completion_ids) == (candidate.id, candidate.ids)
        assert record.prompt_ids == prompt.ids
    numbers = {int(r.id.split("/")[-1]): r.advantage for r in made}
    return numbers, dict(drops.prompts), dict(drops.candidates)


def test_answers_without_an_end_or_a_score_are_no_part_of_a_group(tmp_path):
    answers = [("a", True, 1.0), ("b", False, 9.0), ("c", None, 4.0), ("d", True, None)]
    numbers, prompts, candidates = group(tmp_path, answers)
    assert numbers == {0: -1.5, 2: 1.5} and not prompts
    assert candidates == {"unfinished": 1, "unscored": 1}


def test_answers_that_were_cut_off_may_get_the_lowest_score(tmp_path):
    answers = [("a", True, 2.0), ("b", False, 9.0), ("c", None, 5.0)]
    numbers, _, candidates = group(tmp_path / "group", answers, cut_off="lowest")
    assert numbers == pytest.approx({0: 2 - 3, 1: 2 - 3, 2: 5 - 3}) and not candidates
    # with a comparison the lowest is 0; one answer that ended makes a group with one that did not
    options = dict(judge=None, comparison=COMPARISON, cut_off="lowest")
    numbers, _, _ = group(tmp_path / "scale", answers[:2], **options)
    assert numbers == {0: 1.0, 1: -1.0}
    assert group(tmp_path / "none", [("b", False, 9.0)] * 3, cut_off="lowest")[1] == {
        "unfinished": 1
    }


@pytest.mark.parametrize(
    ("cut_off", "words"),
    [("drop", "they are left out of their groups"), ("lowest", "they get the lowest score")],
)
def test_the_check_of_cut_off_answers_says_what_becomes_of_them(cut_off, words, tmp_path):
    module = model64()
    with torch.no_grad():
        module.head.bias[END] += 1.5  # about half of the answers end within six tokens
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, top_p=None)
    checks = ChecksConfig(cut_off=Check(limit=0.1, action="warn"))
    stage = grpo(generation=sampling, cut_off=cut_off, checks=checks)
    run = trainer_of(tmp_path, [stage], model=module, eos_id=END)(rehearse=False)
    [told] = [e for e in run.events(0) if e.get("check") == "cut_off"]
    assert f"{words}. Raise generation.max_new_tokens" in str(told)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([("a", True, 2.0), ("b", True, 2.0), ("c", True, 2.0)], "tie"),
        ([("a", True, 2.0), ("a ", True, 3.0)], "identical"),
        ([("a", True, 2.0), ("b", False, 3.0)], "unfinished"),
        ([("a", True, 2.0), ("b", True, None)], "unscored"),
        ([("a", True, 2.0), ("b", True, 3.0)], "invalid_score"),
    ],
)
def test_groups_that_teach_nothing_are_dropped_and_counted(answers, reason, tmp_path):
    valid = {"is_valid_reward": lambda s: s > 2} if reason == "invalid_score" else {}
    assert group(tmp_path, answers, **valid)[:2] == ({}, {reason: 1})


def test_a_stage_in_which_no_group_differs_says_what_to_change(tmp_path):
    judge = FunctionJudge(lambda prompts, completions: [1.0] * len(completions))
    with pytest.raises(PairingError, match=r"none has responses with different .* 10 tie"):
        trainer_of(tmp_path, [grpo(judge=judge)])()


# -- judgements that are learnt from (SERL) -------------------------------------------------------

SAID = ComparisonConfig(
    prompt_template="{{ prompt }} {{ response_a }} {{ response_b }}",
    labels=("a", "b"),
    verdict_prefix="best ",
)
SERL = dict(
    judge=None, comparison=SAID, judge_reward=True, num_sampled_reward_responses=2, scale="none"
)


@pytest.mark.parametrize(
    ("verdict", "scores", "reward"),
    [(1.0, (0.5, 0.2), 1), (1.0, (0.2, 0.5), -1), (0.0, (0.2, 0.5), 1), (0.5, (0.2, 0.5), 0),
     (1.0, (0.2, 0.2), 0), (None, (0.2, 0.2), -1)],
)  # fmt: skip
def test_a_judgement_is_rewarded_for_agreeing_with_the_ranking(verdict, scores, reward):
    assert consistency(verdict, *scores) == reward


def compared(verdicts, texts):
    """Candidates with these texts, and their judgements by (first, second): a score each."""
    candidates = [
        Candidate(f"stage/0/0/{k}", "stage/0/0", (k + 1, 3), text, True, 8)
        for k, text in enumerate(texts)
    ]
    judgements = [
        Judgement(
            f"{candidates[a].id}/vs/{b}/j{k}",
            (candidates[a].id, candidates[b].id),
            "self",
            score,
            text="best a" if score else "best b",
            finished=True,
        )
        for (a, b), scores in verdicts.items()
        for k, score in enumerate(scores)
    ]
    return candidates, judgements


def test_wins_count_by_how_much_shorter_the_winner_is_and_only_among_like_lengths():
    verdicts = {
        (0, 1): [1.0], (1, 0): [0.0],  # 0 wins against 1, which is a quarter longer
        (0, 2): [1.0], (2, 0): [1.0],  # a tie
        (1, 2): [1.0], (2, 1): [0.0],  # 1 wins and is too long
    }  # fmt: skip
    candidates, judgements = compared(verdicts, ["a" * 8, "b" * 10, "c" * 4])
    found = wins_of_like_length(candidates, judgements, 0.2)
    assert found == {"stage/0/0/0": (10 / 8) / 2, "stage/0/0/1": 0.0, "stage/0/0/2": 0.0}
    without = {k: v for k, v in verdicts.items() if k not in [(1, 2), (2, 1), (2, 0)]}
    candidates, judgements = compared(without, ["a" * 8, "b" * 10, "c" * 4])
    found = wins_of_like_length(candidates, judgements, 0.1)
    assert found == {"stage/0/0/0": 0.0, "stage/0/0/1": 0.0, "stage/0/0/2": None}


def test_responses_and_judgements_of_a_prompt_are_two_kinds_of_groups(tmp_path):
    ctx = context(Recurrent(TEXT_VOCAB), tokens=text_tokens())
    maker = GroupMaker(grpo(**SERL), ctx, stage_dir(ctx, tmp_path))
    verdicts = {(0, 1): [1.0, 1.0], (1, 0): [0.0, 1.0]}
    candidates, judgements = compared(verdicts, ["abc", "abd"])
    judgements[3] = replace(judgements[3], score=None, text="no idea")
    judged = JudgedPrompt(Prompt("stage/0/0", 0, (1, 2), "say"), candidates, judgements)
    made, drops = maker.pair(judged, DropCounts()), DropCounts()
    assert [(r.id, r.score, r.advantage) for r in made] == [
        ("stage/0/0/0", 1.0, 0.5),
        ("stage/0/0/1", 0.0, -0.5),
        ("stage/0/0/1/vs/0/j0", 1.0, 1.0),  # those of 0 against 1 all agree
        ("stage/0/0/1/vs/0/j1", -1.0, -1.0),
    ]
    question = "say abd abc"
    assert made[2].prompt_ids == ctx.tokens.prompt(question).ids
    assert made[2].completion_ids == ctx.tokens.response(question, "best b")
    assert made[3].completion_ids == ctx.tokens.response(question, "no idea")
    judgements[3] = replace(judgements[3], finished=False)
    assert len(maker.pair(judged, drops)) == 2 and drops.kept == 2  # no group of one


def test_judgements_are_trained_beside_responses_in_one_step(tmp_path, monkeypatch):
    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for a, b in permutations(candidates, 2):
                for name in self._ids(a, b):
                    wins = (len(set(a.text)) > len(set(b.text))) != name.endswith("vs/0/j1")
                    text = "best a" if wins else "best b"
                    yield Judgement(name, (a.id, b.id), "self", float(wins), text=text)

    monkeypatch.setattr(PairwiseJudge, "judge", judge)
    run = trainer_of(tmp_path, [rounds(**SERL, length_window=0.9)])()
    kinds = ["/vs/" in r.candidate_id for r in run.advantages(0)]
    assert any(kinds) and not all(kinds)
    assert len([m for m in run.metrics(0) if "loss" in m]) == 6
    assert len(run.judgements(0)) == 9 * 12 * 2


# -- whole runs -----------------------------------------------------------------------------------


def logprobs_of(module, record):
    """Of each token of a response, with a gradient."""
    ids, start = (*record.prompt_ids, *record.completion_ids), len(record.prompt_ids)
    scores = module(torch.tensor([ids]))[0].log_softmax(dim=-1)
    return torch.stack([scores[i - 1, ids[i]] for i in range(start, len(ids))])


def by_hand(run, *, beta, batch=False):
    """The rounds of a run in plain torch, on the responses that it recorded."""
    module, first = model64(), model64()
    scores = {j.candidate_ids[0]: j.score for j in run.judgements(0)}
    for round in range(3):
        numbers = range(3 * round, 3 * round + 3)
        rows = [r for r in run.advantages(0) if int(r.id.split("/")[1]) in numbers]
        groups = {}
        for candidate, score in scores.items():
            if int(candidate.split("/")[1]) in numbers:
                groups.setdefault(prompt_id_of(candidate), []).append(score)
        groups = {k: v for k, v in groups.items() if len(set(v)) > 1}
        assert {prompt_id_of(r.id) for r in rows} == groups.keys() and groups
        assert len(rows) == sum(map(len, groups.values()))
        whole = stdev(s for group in groups.values() for s in group)
        old = copy.deepcopy(module)
        for _ in range(2):
            total, tokens = 0.0, 0
            for row in rows:
                group = groups[prompt_id_of(row.id)]
                advantage = (scores[row.candidate_id] - mean(group)) / (
                    (whole if batch else stdev(group)) + EPSILON
                )
                now = logprobs_of(module, row)
                with torch.no_grad():
                    before, reference = logprobs_of(old, row), logprobs_of(first, row)
                ratio = (now - before).exp()
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                apart = reference - now
                total = total - gain.sum() + beta * (apart.exp() - apart - 1).sum()
                tokens += len(now)
            module.zero_grad()
            (total / tokens).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= RATE * parameter.grad
    return module


def close(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in pairs)


@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"scale": "batch"}], ids=str)
def test_rounds_with_inner_epochs_are_those_of_plain_torch(options, tmp_path):
    """The old log-probs are those of each round's first weights, the reference's of the stage's."""
    model = model64()
    run = trainer_of(tmp_path, [rounds(**options)], model)()
    beta, batch = options.get("beta", 0.0), options.get("scale") == "batch"
    assert close(model, by_hand(run, beta=beta, batch=batch))
    assert not close(model, by_hand(run, beta=beta, batch=not batch))
    if beta:
        assert not close(model, by_hand(run, beta=0.0))
    steps = [m for m in run.metrics(0) if "loss" in m]
    ratios = [m["policy/ratio"] for m in steps]
    assert ratios[::2] == pytest.approx([1.0] * 3, abs=1e-12)
    assert all(abs(ratio - 1) > 1e-6 for ratio in ratios[1::2])
    assert run.summary(0)["responses"] == len(run.advantages(0)) and "pairs" not in run.summary(0)
    gaps = [m["policy/sampler_gap"] for m in steps]
    assert max(gaps) < 1e-4  # what the digits of the records leave
    assert sum(m.get("responses/kept", 0) for m in run.metrics(0)) == len(run.advantages(0))
    ties = len(run.prompts(0)) - len({prompt_id_of(r.id) for r in run.advantages(0)})
    assert sum(m.get("groups/dropped_tie", 0) for m in run.metrics(0)) == ties
    assert not len(run.pairs(0))


def test_a_single_step_a_round_asks_for_no_other_log_probs(tmp_path):
    optim = grpo().optim.model_copy(update={"epochs": None})
    run = trainer_of(tmp_path, [rounds(optim=optim)])()
    assert [m["policy/ratio"] for m in run.metrics(0) if "loss" in m] == [1.0] * 3
    assert not list(tmp_path.glob("*/logprobs*.jsonl"))
    small = optim.model_copy(update={"batch_size": 3})
    trainer_of(tmp_path / "several", [rounds(optim=small)])()
    assert list((tmp_path / "several").glob("*/logprobs.jsonl"))


def test_a_longer_training_raises_the_score(tmp_path):
    def early(prompts, completions):
        return [float(sum(c in "abcdefghijklm" for c in text)) for text in completions]

    optim = OptimConfig(batch_size=64, learning_rate=3e-2)
    stage = rounds(
        rounds=10,
        prompts_per_round=5,
        num_candidate_responses=8,
        judge=FunctionJudge(early),
        optim=optim,
    )
    run = trainer_of(tmp_path, [stage])()
    means = [m["judge/score_mean"] for m in run.metrics(0) if "judge/score_mean" in m]
    assert mean(means[-3:]) > mean(means[:3]) + 1


class FirstIsBest:
    """Prefers the candidate that was sampled first, whichever is shown first."""

    def ask(self, ctx, questions):
        for question in questions:
            one, other = (int(i.split("/")[-1]) for i in question.candidate_ids)
            wins = float(one < other)
            yield Judgement(question.id, question.candidate_ids, "first", wins)


JUDGES = {
    "words": dict(judge=None, num_sampled_reward_responses=2),
    "expected": dict(judge=None, self_reward_config_keyname="expected"),
    "comparison": dict(judge=PairwiseJudge(asker=FirstIsBest())),
    "votes": dict(judge=VoteJudge(extract=lambda text: text[:1])),
    "shuffled": dict(judge=ShuffledJudge(FunctionJudge(letters))),
    "ensemble": dict(
        judge=EnsembleJudge([FunctionJudge(letters), VoteJudge(extract=lambda text: text[:1])])
    ),
}
EXPECTED = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    reward_regex_template="{{ reward }}",
    score_mode="expected",
    forced_ending="at_once",
    allowed_scores=(0, 1, 2),
)


@pytest.mark.parametrize("kind", JUDGES)
def test_any_judge_of_the_library_scores(kind, tmp_path):
    rewards = {"default": RewardConfig(**WORDS), "taught": TAUGHT, "expected": EXPECTED}
    stage = grpo(**JUDGES[kind], min_parse_rate=0.0)
    run = trainer_of(tmp_path, [stage], self_reward_prompt_config=rewards)()
    by_prompt = {}
    for record in run.advantages(0):
        by_prompt.setdefault(prompt_id_of(record.id), []).append(record)
    assert by_prompt
    for records in by_prompt.values():
        scores = [r.score for r in records]
        assert len(set(scores)) > 1
        wanted = group_advantages(scores, scale="std", baseline="mean")
        assert [r.advantage for r in records] == wanted
    if kind == "comparison":  # the share of the three others that each wins against
        assert {r.score for r in run.advantages(0)} == {0.0, 1 / 3, 2 / 3, 1.0}
    if kind == "votes":
        assert all(0 <= r.score <= 1 for r in run.advantages(0))


WORDS = dict(
    prompt_template="{{ prompt }}>{{ response }}:",
    parse_reward=lambda text: float(len(set(text))),
)


def test_what_another_stage_sampled_is_judged_and_learnt_from(tmp_path):
    stages = [grpo(name="first"), grpo(name="second", candidates_from="first")]
    run = trainer_of(tmp_path, stages)()
    first, second = list(run.advantages("first")), list(run.advantages("second"))
    assert [r.candidate_id for r in second] == [r.id for r in first]
    assert all(r.id.startswith("second/") for r in second)


# -- stops ----------------------------------------------------------------------------------------

STOPPED = dict(beta=0.2, dropout=0.1, scale="batch")


def saving(every):
    return grpo().optim.model_copy(update={"save_state_every": every, "batch_size": 8})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("straight"), model64()
    trainer_of(folder, [rounds(**STOPPED, optim=saving(1))], model)(rehearse=False)
    return Run.open(folder), weights_hash(model)


@pytest.mark.parametrize(
    ("where", "call", "every"),
    [
        ("policy_gradient_loss", 5, 1),
        pytest.param("policy_gradient_loss", 1, 1, marks=pytest.mark.slow),
        pytest.param("policy_gradient_loss", 8, None, marks=pytest.mark.slow),
        ("record", 40, 1),
        pytest.param("record", 2, None, marks=pytest.mark.slow),
        ("reward", 5, None),
        pytest.param("reward", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_any_moment_it_goes_on_to_the_same_bits(
    where, call, every, straight, tmp_path, monkeypatch
):
    owner, name = {
        "policy_gradient_loss": (policy_gradient, "policy_gradient_loss"),
        "record": (policy_gradient.StoredResponses, "record"),
        "reward": (FunctionJudge, "judge"),
    }[where]
    function, calls = getattr(owner, name), []

    def ending(*args, **options):
        calls.append(0)
        if len(calls) == call:
            raise Killed
        return function(*args, **options)

    stage = rounds(**STOPPED, optim=saving(every))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, ending)
        trainer_of(tmp_path, [stage])(rehearse=False)
    model = model64()
    after = trainer_of(tmp_path, [stage], model)(rehearse=False)
    before, weights = straight
    assert weights_hash(model) == weights
    for kind in ("metrics", "candidates", "judgements", "advantages"):
        assert list(getattr(before, kind)(0)) == list(getattr(after, kind)(0)), kind
    assert before.summary(0) == after.summary(0)
    stored = [run.stage(0).read(policy_gradient.ResponseLogprobs) for run in (before, after)]
    assert stored[0] == stored[1] and stored[0]


def test_an_adapter_begins_each_round_at_the_ratio_1_whatever_its_own_dropout(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny("llama", vocab=TEXT_VOCAB, dtype=torch.float64)
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = trainer_of(tmp_path, [rounds(rounds=2)], model)()
    ratios = [m["policy/ratio"] for m in run.metrics(0) if "loss" in m]
    assert ratios[::2] == pytest.approx([1.0] * 2, abs=1e-9)
    assert all(abs(ratio - 1) > 1e-9 for ratio in ratios[1::2])
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == ("lora_" not in name)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dpo_beta=0.1), "dpo_beta: for pairs only"),
        (dict(num_generated_preference_pairs=3), "for pairs only"),
        (dict(reference="initial"), "beta is 0, so no reference is read"),
        (dict(beta=0.1, reference="none"), "must have fixed weights"),
        (dict(beta=0.1, reference=MixedReference()), "must have fixed weights"),
        (dict(clip_low=0.0), "clip_low"),
        (dict(judge_reward=True), "give comparison, and no judge"),
        (dict(length_window=0.2, judge=None), "give comparison, and no judge"),
        ({**SERL, "comparison": COMPARISON}, "leave out rewarding_model"),
        ({**SERL, "num_sampled_reward_responses": 1}, "must be 2 or more"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        grpo(**options)


def test_the_reference_may_be_that_of_the_round_or_of_another_stage(tmp_path):
    stages = [
        rounds(beta=0.2, reference="round"),
        rounds(name="later", beta=0.2, reference="initial", ratio="sequence", baseline="others"),
    ]
    run = trainer_of(tmp_path, stages)()
    labels = [
        {r.id.split("/")[-1] for r in run.stage(n).read(policy_gradient.ResponseLogprobs)}
        for n in (0, 1)
    ]
    assert labels == [{"r0", "r1", "r2"}, {"r0", "r1", "r2", "initial"}]
    kl = [m["policy/kl"] for m in run.metrics(0) if "loss" in m]
    assert kl[::2] == pytest.approx([0.0] * 3, abs=1e-12) and min(kl[1::2]) > 0
    assert min(m["policy/kl"] for m in run.metrics(1) if "loss" in m) > 0


# -- as it is shown --------------------------------------------------------------------------------


def test_each_response_is_shown_with_its_advantage(tmp_path):
    def of_some(prompts, completions):
        """Prompts with an even number have one score, the others several."""
        return [
            float(len(set(text))) if int(prompt.split()[-1]) % 2 else 2.0
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, top_p=None)
    stage = grpo(judge=FunctionJudge(of_some), generation=sampling)
    run = trainer_of(tmp_path, [stage])(rehearse=False)
    made = {record.candidate_id: record.advantage for record in run.advantages(0)}
    assert made and any(advantage < 0 for advantage in made.values())
    # in the terminal: prompts that were learnt from first
    text = show_run(run)
    shown = [line for line in text.splitlines() if "advantage" in line]
    assert len(shown) == 3 * 4 and all(", advantage +" in s or ", advantage -" in s for s in shown)
    # in the page
    examples = Page(write_report([run])).examples
    found = {f"{e['id']}/{c['n']}": c["a"] for e in examples for c in e["c"] if "a" in c}
    assert found == {name: f"{advantage:+.3g}" for name, advantage in made.items()}
    assert {c["l"] for e in examples for c in e["c"]} == {"learnt", None}


def test_what_rounds_logged_is_shown_from_the_first_to_the_last(tmp_path):
    stage = rounds(cut_off="lowest")
    run = trainer_of(tmp_path, [stage], ending(), eos_id=END)(rehearse=False)
    key = "completions/mean_length"
    lengths = [line[key] for line in run.metrics(0) if key in line]
    assert len(lengths) == 3 and lengths[0] != lengths[-1]
    text = " ".join(show_run(run).split())
    assert f"{key} {number(lengths[0])} -> {number(lengths[-1])}" in text


def test_a_prompt_without_a_group_says_why(tmp_path):
    judge = FunctionJudge(lambda prompts, completions: [2.0] * len(completions))
    with pytest.raises(PairingError) as found:
        trainer_of(tmp_path, [grpo(judge=judge)])(rehearse=False)
    assert "or cut_off='lowest'" in str(found.value)
    with pytest.raises(PairingError) as found:
        lowest = grpo(judge=judge, cut_off="lowest")
        trainer_of(tmp_path / "lowest", [lowest])(rehearse=False)
    assert "cut_off" not in str(found.value)
    text = show_run(Run.open(tmp_path))
    assert "no group: the best and the worst have the same score, 2 (tie)" in text
