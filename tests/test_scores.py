"""Scores that are equal as fractions are equal, wherever they are made, ranked and compared."""

import math
from fractions import Fraction

import pytest

from self_rewarding_lm import EnsembleJudge, FunctionJudge, PairingConfig
from self_rewarding_lm.errors import NoPairError
from self_rewarding_lm.judges.consistency import ComparingJudge, ConsistencyConfig
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.runs import resume
from self_rewarding_lm.scores import candidate_scores, exact, rounding_each_step
from self_rewarding_lm.stages.eft import scores_of_ranks
from self_rewarding_lm.stages.meta_rewarding import most_varied
from self_rewarding_lm.stages.pairing import DropCounts, make_pairs, score_variances
from tests.support.models import Successor, context
from tests.test_trainer import external, model64, sft, trainer_of

PROMPT = Prompt("s/0/0", 0, (1,), "p")
TIED = [((1, 2, 2), (0, 0, 0)), ((1, 1, 2), (0, 0, 1)), ((0, 0, 0), (1, 2, 2))]
"""Of each candidate three judgements by each of two reward prompts: 5/6 on average."""


def candidates_of(*texts):
    return [
        Candidate(f"s/0/0/{i}", "s/0/0", (i + 2, 1), text, True, 9) for i, text in enumerate(texts)
    ]


def judgements_of(scores, label=""):
    """scores: of each candidate those by each of several judges."""
    return [
        Judgement(f"s/0/0/{i}/{label}j{j}{k}", (f"s/0/0/{i}",), f"{label}{j}", score)
        for i, judges in enumerate(scores)
        for j, own in enumerate(judges)
        for k, score in enumerate(own)
    ]


def paired(scores, *, variances=None, min_margin=0.0, **pairing):
    candidates, drops = candidates_of("a", "bb", "ccc", "dddd")[: len(scores)], DropCounts()
    found = make_pairs(
        PROMPT,
        candidates,
        {c.id: s for c, s in zip(candidates, scores, strict=True)},
        drops,
        pairing=PairingConfig(**pairing),
        variances=variances or {},
        min_margin=min_margin,
    )
    return [(int(p.chosen_id[-1]), int(p.rejected_id[-1])) for p in found], dict(drops.prompts)


@pytest.mark.parametrize(
    ("number", "fraction"),
    [
        (0.7, Fraction(7, 10)),
        (1 / 3, Fraction(1, 3)),
        (5 / 6, Fraction(5, 6)),
        (-2.25, Fraction(-9, 4)),
        (4, Fraction(4)),
        (math.pi, Fraction(math.pi)),
    ],
)
def test_a_number_stands_for_a_small_fraction_that_is_rounded_to_it(number, fraction):
    assert exact(number) == fraction and float(exact(number)) == number
    with rounding_each_step():
        assert exact(number) is number


def test_what_is_no_number_stays_what_it_is():
    assert exact(math.inf) == math.inf and math.isnan(exact(math.nan))
    scores = candidate_scores(candidates_of("a"), judgements_of([[(1.0, math.inf)]]))
    assert scores == {"s/0/0/0": math.inf}


def test_means_of_means_that_tie_are_a_tie():
    candidates = candidates_of("a", "b", "c")
    scores = list(candidate_scores(candidates, judgements_of(TIED)).values())
    assert scores == [5 / 6] * 3
    assert paired(scores) == ([], {"tie": 1})


def test_weighted_means_that_tie_are_a_tie():
    """0.7 * 3 + 0.3 * 0 and 0.7 * 0 + 0.3 * 7, which are 2.0999999999999996 and 2.1 in floats."""
    votes = {"a": (3, 0), "b": (0, 7), "c": (3, 0)}
    judges = [
        (FunctionJudge(lambda prompts, completions, n=n: [votes[c][n] for c in completions]), w)
        for n, w in enumerate((0.7, 0.3))
    ]
    candidates = candidates_of(*votes)
    for judge in (
        EnsembleJudge(judges),
        EnsembleJudge([EnsembleJudge(judges), (judges[0][0], 0.1)]),
    ):
        found = list(judge.judge(context(Successor()), [PROMPT], [candidates]))
        scores = judge.scores(candidates, found)
        assert scores["s/0/0/0"] == scores["s/0/0/2"]
    judge = EnsembleJudge(judges)
    found = list(judge.judge(context(Successor()), [PROMPT], [candidates]))
    assert list(judge.scores(candidates, found).values()) == [2.1] * 3


def test_margins_and_limits_are_those_of_the_fractions():
    assert 0.7 - 0.4 < 0.3 < 0.8 - 0.4
    assert paired([0.7, 0.4], min_margin=0.3) == ([(0, 1)], {})
    assert paired([0.4, 0.3], min_margin=0.1) == ([(0, 1)], {})
    # 0.7 over 0.4 and 0.4 over 0.1 are alike, in the order of the best; in floats they are not
    margins = dict(pick="all_margins", pairs_per_prompt=3)
    assert paired([0.1, 0.7, 0.4], **margins)[0] == [(1, 0), (1, 2), (2, 0)]
    # 1.3 less 0.1, 1.4 less 0.2 and 1.5 less 0.3
    penalty = dict(length_penalty=100.0, tie_break="shorter")
    assert paired([1.3, 1.4, 1.5], **penalty) == ([], {"tie": 1})


def test_variances_that_tie_are_broken_by_the_first():
    said = [(0.2, 0.3), (0.1, 0.2), (0.7, 0.8)]
    judgements = [
        Judgement(f"j{i}{k}", (f"s/0/0/{i}",), "it", score)
        for i, own in enumerate(said)
        for k, score in enumerate(own)
    ]
    variances = score_variances(judgements)
    assert set(variances.values()) == {Fraction(1, 400)}
    for order in ([0, 1, 2], [2, 1, 0]):
        assert most_varied([said[i] for i in order]) == 0
        varied = {f"s/0/0/{place}": variances[f"s/0/0/{i}"] for place, i in enumerate(order)}
        found, _ = paired([3.0, 3.0, 1.0], variances=varied, tie_break="variance")
        assert found == [(0, 2)]


@pytest.mark.parametrize("measure", ["kendall", "spearman"])
def test_rankings_with_ties_are_compared_as_such(measure):
    """By rounding the tied candidates had an order, and a correlation with the earlier model."""
    judge = ComparingJudge(
        FunctionJudge(lambda prompts, completions: []), ConsistencyConfig(measure=measure)
    )
    candidates = candidates_of("a", "b", "c")
    before = judgements_of([[(3,)], [(1,)], [(2,)]], "previous/")
    assert judge.smoothing(candidates, judgements_of(TIED) + before) is None
    lower = [*TIED[:2], ((0, 0, 0), (0, 0, 0))]
    tied = [[(1,)], [(1,)], [(0,)]]
    expected = judge.smoothing(candidates, judgements_of(tied) + before)
    assert judge.smoothing(candidates, judgements_of(lower) + before) == expected


def test_scores_between_ranks_round_halves_up():
    tenths = [k / 10 for k in range(8)]  # the middle of 0.2 and 0.5 is 0.35: 0.4
    assert scores_of_ranks([0, 1, 2], tenths[2:6]) == [0.5, 0.4, 0.2]
    assert scores_of_ranks([0, 1, 2], tenths) == [0.7, 0.4, 0.0]
    assert scores_of_ranks([0, 1, 2], tenths[1:7]) == [0.6, 0.4, 0.1]


class Twice:
    """Two judges by name, three judgements each, which tie."""

    num_judgements = 6

    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for candidate, judges in zip(candidates, TIED, strict=False):
                for name, own in zip("xy", judges, strict=True):
                    for k, score in enumerate(own):
                        record_id = f"{candidate.id}/{name}{k}"
                        yield Judgement(record_id, (candidate.id,), name, float(score))


def test_a_run_that_version_0_1_0_began_keeps_its_means(tmp_path, monkeypatch):
    def run_of(folder):
        stage = external(reward_model=Twice(), num_candidate_responses=2, max_prompt_passes=1)
        return trainer_of(tmp_path / folder, [sft(), stage], model64())(rehearse=False)

    monkeypatch.setattr(resume, "FORMAT", 1)
    pairs = run_of("earlier").pairs(1)
    assert {p.chosen_score - p.rejected_score for p in pairs} == {2**-53} and len(pairs) == 4
    monkeypatch.undo()
    with pytest.raises(NoPairError, match="10 tie"):
        run_of("now")
