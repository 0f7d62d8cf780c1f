"""Agreement of a model with an earlier one: its limits by hand, and in whole runs."""

import math
import sys
from itertools import permutations

import pytest
import torch

from self_rewarding_lm import (
    ComparisonConfig,
    ConsistencyConfig,
    FunctionJudge,
    ImplicitJudge,
    PairwiseJudge,
    Run,
    VoteJudge,
)
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges.consistency import ComparingJudge, smoothed
from self_rewarding_lm.records import Candidate, Judgement, PreferencePair
from self_rewarding_lm.stats import kendall_tau_b
from self_rewarding_lm.training.objectives import PreferenceObjective
from self_rewarding_lm.training.reference import PairSums
from tests.judges.test_ensemble import naive
from tests.support.models import Successor, context, stage_dir
from tests.support.processes import two
from tests.test_trainer import (
    external,
    model64,
    same,
    self_reward,
    sft,
    trainer_of,
    weights_of,
)

NAMES = [f"s/0/0/{i}" for i in range(4)]
CANDIDATES = [Candidate(name, "s/0/0", (1,), "x", True, 9) for name in NAMES]


def smoothing(now, before, order=None, **settings):
    """1 - c where judgements come in any order."""
    judge = ComparingJudge(
        FunctionJudge(lambda prompts, completions: []), ConsistencyConfig(**settings)
    )
    found = [Judgement(f"{n}/j0", (n,), "f", s) for n, s in zip(NAMES, now, strict=False)]
    found += [
        Judgement(f"{n}/previous/j0", (n,), "previous:f", s)
        for n, s in zip(NAMES, before, strict=False)
    ]
    return judge.smoothing(CANDIDATES[: len(now)], found if order is None else order(found))


def loss_of(pair):
    objective = PreferenceObjective([pair], [PairSums(-1.0, -2.0)], beta=0.3)
    logprobs = torch.tensor([[0.0, -0.4, -0.8], [0.0, -1.7, -1.4]], dtype=torch.float64)
    targets = torch.tensor([[False, True, True]] * 2)
    return float(objective.loss([0], logprobs, targets).mean())


def test_identical_rankings_give_the_loss_of_dpo_and_reversed_ones_that_of_the_swapped_pair():
    margin = 0.3 * ((-1.2 - -1.0) - (-3.1 - -2.0))
    dpo, swapped = (math.log1p(math.exp(-m)) for m in (margin, -margin))
    for before, wanted in (([5, 6, 7, 8], dpo), ([4, 3, 2, 1], swapped), ([2, 1, 4, 3], None)):
        found = smoothing([1, 2, 3, 4], before)
        pair = PreferencePair("p", (1,), (2, 3), (3, 4), label_smoothing=found)
        if wanted is None:  # two of six pairs are turned round: tau = (4 - 2) / 6
            wanted = 2 / 3 * dpo + 1 / 3 * swapped
        assert loss_of(pair) == pytest.approx(wanted, rel=1e-12)


def test_random_rankings_agree_by_one_half_on_average():
    for measure in ("kendall", "spearman"):
        found = [smoothing(range(4), order, measure=measure) for order in permutations(range(4))]
        assert math.fsum(found) / 24 == pytest.approx(0.5, abs=1e-15)
        assert min(found) == 0 and max(found) == 1


def test_rankings_are_joined_by_candidate_whatever_the_order_of_the_records():
    now, before = [3.0, 1.0, 2.0, 9.0], [1.0, 2.0, None, 4.0]
    straight = smoothing(now, before)
    assert straight == pytest.approx((1 - 1 / 3) / 2)  # of the three that both have scored
    assert smoothing(now, before, order=lambda found: found[::-1]) == straight


def test_equal_scores_leave_the_correlation_undefined():
    assert smoothing([1, 2, 3, 4], [2, 2, 2, 2]) is None
    assert smoothing([1, None, None, None], [1, 2, 3, 4]) is None


def test_tau_b_is_that_of_scipy_and_of_the_definition():
    stats = pytest.importorskip("scipy.stats")
    for a in ([1, 2, 3, 4], [1, 1, 2, 3], [2, 1, 1, 1]):
        for b in permutations([1, 2, 2, 5]):
            mine = kendall_tau_b(a, b)
            assert mine == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


def pairs_of(*values, per_prompt=1):
    return [
        PreferencePair(f"s/{i}/0/{k}", (1,), (2,), (3,), chosen_id=f"s/{i}/0/1", label_smoothing=v)
        for i, v in enumerate(values)
        for k in range(per_prompt)
    ]


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_a_prompt_without_tau_takes_the_mean_and_all_do_with_over_mean(tmp_path, per_prompt):
    ctx = context(Successor())
    out = stage_dir(ctx, tmp_path)
    pairs = pairs_of(0.0, None, 0.5, per_prompt=per_prompt)
    found = smoothed(ctx, out, pairs, ConsistencyConfig(over="prompt"))
    wanted = [0.0, 0.25, 0.5]
    assert [p.label_smoothing for p in found] == [w for w in wanted for _ in range(per_prompt)]
    found = smoothed(ctx, out, pairs, ConsistencyConfig(over="mean"))
    assert {p.label_smoothing for p in found} == {0.25}
    measures = out.summary["consistency"]
    assert measures == {"consistency/tau_mean": 0.5, "consistency/undefined_share": 1 - 2 / 3}


def test_where_no_prompt_has_tau_pairs_are_trained_as_they_are(tmp_path, caplog):
    ctx = context(Successor())
    found = smoothed(ctx, stage_dir(ctx, tmp_path), pairs_of(None, None), ConsistencyConfig())
    assert [p.label_smoothing for p in found] == [None, None]
    assert "without label smoothing" in caplog.text


class Fails:
    """A judge that asks the model's log-probs, and fails once."""

    name = "fails"

    def __init__(self, at: int) -> None:
        self.inner, self.calls, self.at = ImplicitJudge(reference=None), 0, at

    def judge(self, ctx, prompts, candidates_PG):
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("once")
        return self.inner.judge(ctx, prompts, candidates_PG)


@torch.no_grad()
def expected(run, stage, now, before, length_mean):
    """1 - c of each prompt, naively; now and before: modules, or pairs of them for differences."""

    def score(modules, prompt, response):
        logs = [naive(m, prompt, response) for m in modules]
        return (logs[0] - sum(logs[1:])) / (len(response) if length_mean(modules) else 1)

    prompts, found = {p.id: p for p in run.prompts(stage)}, {}
    for prompt in prompts.values():
        own = [c for c in run.candidates(stage) if c.prompt_id == prompt.id]
        a, b = ([score(m, prompt.ids, c.ids) for c in own] for m in (now, before))
        twos = [(i, j) for i in range(len(own)) for j in range(i)]
        signs = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in twos]
        tau = sum((s > 0) - (s < 0) for s in signs) / len(twos)
        found[prompt.id] = (1 - tau) / 2
    return found


def loaded(run, stage):
    module = model64()
    run.load_weights(module, stage)
    return module


@pytest.mark.parametrize("by", ["judge", "implicit"])
def test_a_run_with_consistency_goes_on_to_the_same_weights(tmp_path, by):
    def stages(at):
        config = ConsistencyConfig(previous="initial", by=by, over="prompt")
        stage = external(
            reward_model=Fails(at), consistency=config, prompts_per_block=3, num_train_steps=2
        )
        return [sft(name="m1"), stage]

    models = [model64(), model64()]
    with pytest.raises(ValueError, match="once"):
        # in the second block; by="judge" the earlier weights are in the model then
        at = 4 if by == "judge" else 2
        trainer_of(tmp_path / "one", stages(at), models[0])(rehearse=False)
    if by == "judge":
        before = {**weights_of(models[0])}
        assert same(before, weights_of(loaded(Run.open(tmp_path / "one"), "m1")))
    trainer_of(tmp_path / "one", stages(0), models[0])(rehearse=False)
    run = trainer_of(tmp_path / "two", stages(0), models[1])()
    assert same(weights_of(models[0]), weights_of(models[1]))
    assert sorted(map(repr, run.judgements(1))) == sorted(
        map(repr, Run.open(tmp_path / "one").judgements(1))
    )
    m0, m1 = model64(), loaded(run, "m1")
    now, before = ([m1], [m0]) if by == "judge" else ([m1, m0], [m0])
    wanted = expected(run, 1, now, before, lambda modules: len(modules) == 1)
    assert len(run.pairs(1)) == 4
    for pair in run.pairs(1):
        assert pair.label_smoothing == pytest.approx(wanted[pair.id], abs=1e-9)
    assert len({p.label_smoothing for p in run.pairs(1)}) > 1
    mean = math.fsum(p.label_smoothing for p in run.pairs(1)) / 4
    assert run.summary(1)["consistency"]["consistency/tau_mean"] == pytest.approx(1 - 2 * mean)


def test_with_the_weights_that_it_has_a_sampling_judge_agrees_with_itself(tmp_path):
    """previous is the stage that it begins with; noise is the sample's, so all scores are equal."""
    config = ConsistencyConfig(previous="m1")
    plain = self_reward(name="dpo")
    compared = self_reward(name="dpo", consistency=config)
    models = [model64(), model64()]
    runs = [
        trainer_of(tmp_path / name, [sft(name="m1"), stage], model)()
        for name, stage, model in zip("ab", (plain, compared), models, strict=True)
    ]
    assert same(weights_of(models[0]), weights_of(models[1]))  # c = 1: DPO
    assert runs[1].summary(1)["consistency"]["consistency/tau_mean"] == 1
    judged = [{j.id: j for j in run.judgements(1)} for run in runs]
    assert judged[0].items() <= judged[1].items()
    added = {i: j for i, j in judged[1].items() if i not in judged[0]}
    assert len(added) == len(judged[0]) and all("/previous/j" in i for i in added)
    assert runs[0].summary(1)["metrics"] == runs[1].summary(1)["metrics"]  # of its own judgements


def test_a_comparison_is_compared_too():
    judge = ComparingJudge(PairwiseJudge(ComparisonConfig()), ConsistencyConfig())
    ids = judge.judgement_ids(CANDIDATES[:2])
    assert ids[:2] == ["s/0/0/0/vs/1", "s/0/0/1/vs/0"]
    assert ids[2:] == ["s/0/0/0/previous/vs/1", "s/0/0/1/previous/vs/0"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (lambda: external(reward_model=VoteJudge(), consistency=ConsistencyConfig()), "implicit"),
        (
            lambda: external(reward_model=ImplicitJudge(), consistency=ConsistencyConfig()),
            "all .*0",
        ),
        (
            lambda: external(
                reward_model=ImplicitJudge(), consistency=ConsistencyConfig(previous="m9")
            ),
            "got 'm9'",
        ),
        (
            lambda: self_reward(consistency=ConsistencyConfig(), loss="nll"),
            "would change nothing",
        ),
    ],
)
def test_a_consistency_that_says_nothing_is_refused_before_any_work(tmp_path, stage, words):
    with pytest.raises(ConfigError, match=words):
        trainer_of(tmp_path, [stage()])


def run_both(folder):
    """What one process runs, and each of two."""
    model = model64()
    by = [ConsistencyConfig(by=by) for by in ("judge", "implicit")]
    stages = [sft(), self_reward(consistency=by[0]), self_reward(consistency=by[1])]
    trainer_of(folder, stages, model, accelerate_kwargs=dict(cpu=True))(rehearse=False)


def test_two_processes_compare_as_one_does(tmp_path):
    run_both(tmp_path / "one")
    two("-m", "tests.judges.test_consistency", tmp_path / "two")
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for stage in ("self_reward", "self_reward-2"):
        for records in ("candidates", "judgements", "pairs"):
            mine, theirs = (
                sorted(getattr(r, records)(stage), key=lambda x: x.id) for r in (alone, together)
            )
            assert [x.id for x in mine] == [x.id for x in theirs]
            if records == "pairs":
                assert [x.label_smoothing for x in mine] == [x.label_smoothing for x in theirs]


if __name__ == "__main__":
    run_both(sys.argv[1])
