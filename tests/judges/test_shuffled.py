"""Scores that are moved by chance: the same numbers, whatever stops the run or shares its work."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from self_rewarding_lm import (
    ConsistencyConfig,
    Contrast,
    ContrastiveDPOConfig,
    EnsembleJudge,
    FunctionJudge,
    HeldOutReward,
    ImplicitJudge,
    PairingConfig,
    Run,
    SelfRewardSFTConfig,
    ShuffledJudge,
    TemporalDPOConfig,
    compare,
)
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.report.examples import examples
from self_rewarding_lm.report.terminal import show_run
from self_rewarding_lm.scores import candidate_scores
from tests.stages.test_pair_maker import (
    COMPARISON,
    JUDGING,
    REWARD,
    StopError,
    Stopping,
    numerate,
    records,
)
from tests.support.models import Successor, context
from tests.test_trainer import PROMPTS, QUICK, SHORT, external, model64, self_reward, trainer_of


def letters(prompts, completions):
    """A number of each text; None for some."""
    sums = [sum(map(ord, text)) for text in completions]
    return [None if n % 7 == 0 else n % 5 for n in sums]


def a_count(prompts, completions):
    return [text.count("a") for text in completions]


CONTEXT = context(Successor())


def block(*sizes, score=lambda row, i: 10.0 * row + i):
    """Candidates of several prompts, and a judge that knows their scores."""
    prompts = [Prompt(f"s/{row}/0", row, (1, 2), "p") for row in range(len(sizes))]
    candidates_PG = [
        [Candidate(f"{p.id}/{i}", p.id, (i + 1, 3), f"{i}", True, 9) for i in range(size)]
        for p, size in zip(prompts, sizes, strict=True)
    ]
    numbered = [
        (p.row, i, c) for p, g in zip(prompts, candidates_PG, strict=True) for i, c in enumerate(g)
    ]
    known = {c.id: score(row, i) for row, i, c in numbered}

    class Knows:
        name = "knows"

        def judge(self, ctx, prompts, candidates_PG):
            for group in candidates_PG:
                for c in group:
                    reason = "unread" if known[c.id] is None else None
                    yield Judgement(f"{c.id}/j0", (c.id,), "knows", known[c.id], reason)

    return prompts, candidates_PG, known, Knows()


def moved(prompts, candidates_PG, judge, seed=0):
    """What a ShuffledJudge of the judge adds to a block's judgements, by candidate id."""
    ctx, judge = replace(CONTEXT, seed=seed), ShuffledJudge(of=judge)
    said = list(judge.judge(ctx, prompts, candidates_PG))
    return {j.candidate_ids[0]: j for j in judge.judge_block(ctx, candidates_PG, said)}


def test_the_scores_of_a_block_are_the_same_numbers_and_the_missing_ones_move_too():
    prompts, candidates_PG, known, judge = block(
        4, 3, 4, 4, score=lambda row, i: None if i == 1 else float(row + i)
    )
    found = moved(prompts, candidates_PG, judge)
    assert Counter(j.score for j in found.values()) == Counter(known.values())
    assert any(found[name].score != score for name, score in known.items())
    for j in found.values():
        giver = (j.text or "").rsplit(" ", 1)[1]
        assert (j.judge, j.source, j.score) == ("shuffled", "moved", known[giver])
        assert j.reason == ("unread" if known[giver] is None else None)


def test_every_order_is_equally_likely():
    prompts, candidates_PG, _, judge = block(3)
    orders = Counter(
        tuple(int(j.score) for j in moved(prompts, candidates_PG, judge, seed).values())
        for seed in range(1200)
    )
    assert len(orders) == 6
    chi_squared = sum((n - 200) ** 2 / 200 for n in orders.values())
    assert chi_squared < 20.5  # 0.1 % of fair ones are over it, at five degrees of freedom


def test_the_order_of_work_changes_nothing_and_seed_and_block_do():
    prompts, candidates_PG, _, judge = block(4, 4, 4)
    first = moved(prompts, candidates_PG, judge)
    again = moved(prompts[::-1], [group[::-1] for group in candidates_PG[::-1]], judge)
    assert first == again
    assert first != moved(prompts, candidates_PG, judge, seed=1)
    alone = moved(prompts[:1], candidates_PG[:1], judge)
    assert {j.score for j in alone.values()} == {0.0, 1.0, 2.0, 3.0}


JUDGES = {
    "the stage's own": lambda: ShuffledJudge(),
    "a judge": lambda: ShuffledJudge(of=SelfJudge(REWARD, JUDGING, 2)),
    "a function": lambda: ShuffledJudge(of=letters),
    "comparisons": lambda: ShuffledJudge(of=PairwiseJudge(COMPARISON, JUDGING)),
}


def block_of(candidate_id):
    return int(candidate_id.split("/")[1]) // 5


def all_prompts(judge, **options):
    """A stage that judges all ten prompts, in two blocks of five."""
    options = dict(num_generated_preference_pairs=None, min_parse_rate=0) | options
    return self_reward(**{"judge": judge, "prompts_per_block": 5, **options})


@pytest.mark.parametrize("kind", JUDGES)
def test_a_stage_has_the_scores_of_the_inner_judge_on_other_candidates(kind, tmp_path):
    run = trainer_of(tmp_path, [all_prompts(JUDGES[kind]())], numerate())()
    candidates, judgements = run.candidates(0), run.judgements(0)
    counts = {j.candidate_ids[0]: j.score for j in judgements if j.is_moved}
    unmoved = candidate_scores(candidates, [j for j in judgements if not j.is_moved])
    assert counts.keys() == {c.id for c in candidates}
    for number in (0, 1):
        ids = [c.id for c in candidates if block_of(c.id) == number]
        assert Counter(counts[i] for i in ids) == Counter(unmoved[i] for i in ids)
        assert any(counts[i] != unmoved[i] for i in ids)
    for pair in run.pairs(0):
        assert pair.chosen_score == counts[pair.chosen_id]
        assert pair.rejected_score == counts[pair.rejected_id]
    shown = {r.candidate.id: r.score for e in examples(run, "self_reward") for r in e.responses}
    assert shown == counts
    assert "moved here by chance" in show_run(run)
    assert run.summary(0)["metrics"]["judge/parse_rate"] == pytest.approx(
        sum(j.score is not None for j in judgements if not j.is_moved)
        / sum(not j.is_moved for j in judgements)
    )
    if kind == "comparisons":
        assert all(pair.win_probability == pair.chosen_score for pair in run.pairs(0))


@pytest.mark.parametrize("kind", list(JUDGES)[1:])
def test_a_run_that_is_stopped_while_it_judges_goes_on_to_the_same_scores(kind, tmp_path):
    def run_of(folder, judgements):
        judge = JUDGES[kind]()
        judge = ShuffledJudge(of=Stopping(judge.member.inner, judgements))
        stage = all_prompts(judge, prompts_per_block=20)
        return trainer_of(tmp_path / folder, [stage], numerate())(rehearse=False)

    straight = run_of("straight", -1)
    few = 30 if kind == "a function" else 70
    with pytest.raises(StopError):
        run_of("stopped", few)
    assert not any(j.is_moved for j in Run.open(tmp_path / "stopped").judgements(0))
    assert records(run_of("stopped", -1)) == records(straight)


def test_a_run_that_is_stopped_while_scores_are_stored_goes_on_to_the_same(tmp_path, monkeypatch):
    def run_of(folder):
        stage = all_prompts(ShuffledJudge(of=letters))
        return trainer_of(tmp_path / folder, [stage], numerate())(rehearse=False)

    straight = run_of("straight")
    run_of("stopped")
    folder = tmp_path / "stopped/01-self_reward"
    for name in ("done.json", "files.json", "pairs.jsonl"):
        (folder / name).unlink()
    lines = (folder / "judgements.jsonl").read_text().splitlines(keepends=True)
    kept = [line for place, line in enumerate(lines) if '"moved"' not in line or place % 3]
    assert 0 < len(lines) - len(kept) < len(lines) / 2
    (folder / "judgements.jsonl").write_text("".join(kept))
    assert records(run_of("stopped")) == records(straight)


def test_a_shuffled_member_moves_its_part_of_an_ensembles_score(tmp_path):
    ensemble = EnsembleJudge([(ShuffledJudge(of=letters), 2), FunctionJudge(a_count)])
    run = trainer_of(tmp_path, [all_prompts(ensemble)], numerate())()
    parts = {(j.candidate_ids[0], j.judge): j.score for j in run.judgements(0)}
    assert {judge for _, judge in parts} == {"m0:shuffled", "m0:unmoved:letters", "m1:a_count"}
    for number in (0, 1):
        moved, unmoved = (
            Counter(s for (i, j), s in parts.items() if j == name and block_of(i) == number)
            for name in ("m0:shuffled", "m0:unmoved:letters")
        )
        assert moved == unmoved
    assert run.pairs(0)
    for pair in run.pairs(0):
        shuffled, own = parts[pair.chosen_id, "m0:shuffled"], parts[pair.chosen_id, "m1:a_count"]
        assert pair.chosen_score == pytest.approx((2 * shuffled + own) / 3)


def test_what_an_ensemble_with_a_shuffled_member_comes_to_can_be_moved_again(tmp_path):
    inner = EnsembleJudge([ShuffledJudge(of=letters), FunctionJudge(a_count)])
    run = trainer_of(tmp_path, [all_prompts(ShuffledJudge(of=inner))], numerate())()
    parts = {(j.candidate_ids[0], j.judge): j.score for j in run.judgements(0)}
    for number in (0, 1):
        ids = [c.id for c in run.candidates(0) if block_of(c.id) == number]
        names = ("unmoved:m0:shuffled", "unmoved:m1:a_count")
        both = [[parts[i, name] for name in names] for i in ids]
        means = [None if None in two else sum(two) / 2 for two in both]
        assert Counter(parts[i, "shuffled"] for i in ids) == Counter(means)


STAGES = {
    "SFT": lambda: SelfRewardSFTConfig(judge=ShuffledJudge(of=letters), min_score=4, **COMMON),
    "external": lambda: external(judge=ShuffledJudge(), **FEW),
    "external, its reward model": lambda: external(reward_model=ShuffledJudge(of=letters), **FEW),
    "rounds": lambda: all_prompts(ShuffledJudge(of=letters), rounds=2, prompts_per_round=5),
    "consistency": lambda: all_prompts(
        ShuffledJudge(of=SelfJudge(REWARD, JUDGING, 2)), consistency=ConsistencyConfig()
    ),
    "implicit": lambda: all_prompts(
        ShuffledJudge(of=ImplicitJudge(reference=None)),
        consistency=ConsistencyConfig(by="implicit"),
    ),
    "contrasts": lambda: ContrastiveDPOConfig(
        judge=ShuffledJudge(of=letters), confirm="reorder", contrasts=(PLAIN,), **COMMON
    ),
    "variance": lambda: all_prompts(
        ShuffledJudge(of=SelfJudge(REWARD, JUDGING, 2)), pairing=PairingConfig(tie_break="variance")
    ),
    "a comparison": lambda: all_prompts(ShuffledJudge(), comparison=COMPARISON),
}
PLAIN = Contrast(positive="be good", negative="be bad", kind="prefix")
FEW: dict[str, Any] = dict(
    num_generated_preference_pairs=None, prompts_per_block=5, min_parse_rate=0
)
COMMON: dict[str, Any] = dict(
    prompt_dataset=PROMPTS, generation=SHORT, judging=SHORT, dropout=0.0, optim=QUICK, **FEW
)


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_that_takes_a_judge_takes_a_shuffled_one(kind, tmp_path):
    run = trainer_of(tmp_path, [STAGES[kind]()], numerate())()
    judgements = run.judgements(0)
    counts = {j.candidate_ids[0]: j.score for j in judgements if j.judge == "shuffled"}
    own = [j for j in judgements if j.judge.startswith("unmoved:")]
    scores = candidate_scores(run.candidates(0), own)
    assert counts and Counter(counts.values()) == Counter(scores[i] for i in counts)
    for pair in run.pairs(0):
        assert pair.chosen_score == counts[pair.chosen_id]
    for learnt in run.demonstrations(0):
        assert counts[learnt.id] >= 4


def test_the_candidates_of_a_temporal_stage_are_moved_where_they_are_judged(tmp_path):
    stage = TemporalDPOConfig(judge=ShuffledJudge(of=letters), num_candidate_responses=2, **COMMON)
    run = trainer_of(tmp_path, [stage], numerate())()
    judgements = run.judgements(0)
    counts = {j.candidate_ids[0]: j.score for j in judgements if j.is_moved}
    own = candidate_scores(run.candidates(0), [j for j in judgements if not j.is_moved])
    for is_next in (False, True):
        ids = [i for i in counts if ("/next/" in i) == is_next]
        assert ids and Counter(counts[i] for i in ids) == Counter(own[i] for i in ids)


@pytest.mark.parametrize(
    "judge", [EnsembleJudge([ShuffledJudge()]), ShuffledJudge(ShuffledJudge())]
)
def test_only_a_stage_knows_its_own_judge(judge, tmp_path):
    with pytest.raises(JudgeError, match=r"ShuffledJudge\(of=...\)"):
        trainer_of(tmp_path, [self_reward(judge=judge)])


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda judge: HeldOutReward(["a"], judge),
        lambda judge: compare(model64(), model64(1), [(1, 2)], judge=judge),
        lambda judge: judge.scores_of_all(GROUPS, list(judge.judge(CONTEXT, PROMPTS_OF, GROUPS))),
    ],
    ids=["held-out reward", "comparison of models", "by hand"],
)
def test_an_evaluation_has_no_block_to_move_scores_in(evaluate):
    with pytest.raises(JudgeError, match="it is a judge for stages"):
        evaluate(EnsembleJudge([ShuffledJudge(of=letters)]))


PROMPTS_OF, GROUPS, _, _ = block(2)
