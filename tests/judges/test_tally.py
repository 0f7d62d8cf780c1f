"""Measures counted prompt by prompt, against those of all records at once."""

import math
from itertools import combinations
from random import Random

import pytest

from self_rewarding_lm.judges.tally import JudgeTally, StageTally, judge_metrics, together
from self_rewarding_lm.records import Candidate, Judgement
from self_rewarding_lm.scores import candidate_scores

KINDS = ["rated", "two judges", "compared", "forced", "weighed", "unread"]


def candidates_of(prompt, random):
    return [
        Candidate(
            f"{prompt}/{i}",
            prompt,
            (1,) * random.randint(0, 9),
            "t",
            random.choice([True, False, None]),
            9,
            random.choice([None, "re-encoded"]),
            random.choice([None, None, None, "refused"]),
        )
        for i in range(random.randint(1, 4))
    ]


def judgements_of(kind, candidates, random):
    def score():
        return random.choice([None, 0.1, 0.25, 0.3, 1.0, 1e-9, 1 / 3])

    def made(name, ids, said, **fields):
        return Judgement(name, ids, fields.pop("judge", "self"), said, **fields)

    if kind == "compared":
        twos = [(a, b) for a in candidates for b in candidates if a is not b]
        verdicts = (random.choice([None, 0.0, 0.5, 1.0]) for _ in twos)
        return [
            made(f"{a.id}/vs/{b.id}", (a.id, b.id), verdict)
            for (a, b), verdict in zip(twos, verdicts, strict=True)
        ]
    fields = {
        "forced": {"source": "forced"},
        "weighed": {"score_mass": random.random()},
    }.get(kind, {})
    judges = ["one", "other"] if kind == "two judges" else ["self"]
    return [
        made(
            f"{c.id}/j{k}",
            (c.id,),
            None if kind == "unread" else score(),
            judge=judges[k % len(judges)],
            **fields,
        )
        for c in candidates
        for k in range(4)
    ]


def stage_of(kind, seed=0, prompts=30):
    random = Random(seed)
    found = []
    for row in range(prompts):
        candidates = candidates_of(f"s/{row}/0", random)
        found.append((candidates, judgements_of(kind, candidates, random)))
    return found


def told(kind, stage):
    """The measures by their definitions, over all records in memory."""
    candidates = [c for own, _ in stage for c in own]
    judgements = [j for _, own in stage for j in own]
    singles = {}
    for j in judgements:
        if kind != "compared" and j.score is not None:
            singles.setdefault((j.candidate_ids[0], j.judge), []).append(j.score)
    scores = [score for own in singles.values() for score in own]
    rounded = [round(score, 1) for score in scores]
    twos = [round(a, 1) == round(b, 1) for own in singles.values() for a, b in combinations(own, 2)]
    known = candidate_scores(candidates, judgements)
    by_prompt = [[known[c.id] for c in own if known[c.id] is not None] for own, _ in stage]
    ranked = [own for own in by_prompt if len(own) > 1]
    shown = {j.candidate_ids: j.score for j in judgements if kind == "compared"}
    orders = [
        (score, 1 - shown[b, a])
        for (a, b), score in shown.items()
        if a < b and None not in (score, shown[b, a])
    ]
    masses = [j.score_mass for j in judgements if j.score_mass is not None]
    forced = sum(j.source == "forced" for j in judgements)
    measures = {
        "judge/parse_rate": ([j.score is not None for j in judgements], len(judgements)),
        "judge/score_mean": (scores, len(scores)),
        "judge/modal_share": ([max(map(rounded.count, rounded), default=0)], len(scores)),
        "judge/self_agreement": (twos, len(twos)),
        "judge/position_agreement": ([a == b for a, b in orders], len(orders)),
        "judge/tie_rate": ([max(own) == min(own) for own in ranked], len(ranked)),
        "judge/score_mass": (masses, len(masses)),
        "judge/forced_share": ([forced], len(judgements) if forced else 0),
    }
    return {name: math.fsum(parts) / whole for name, (parts, whole) in measures.items() if whole}


@pytest.mark.parametrize("kind", KINDS)
def test_the_measures_are_those_of_all_records_at_once(kind):
    stage = stage_of(kind)
    tally = JudgeTally()
    for candidates, judgements in stage:
        tally.add(candidates, judgements)
    found = tally.metrics()
    assert found == pytest.approx(told(kind, stage), rel=1e-14)
    assert found.keys() == told(kind, stage).keys()
    at_once = judge_metrics([c for own, _ in stage for c in own], [j for _, o in stage for j in o])
    assert at_once == found


@pytest.mark.parametrize("kind", KINDS)
def test_neither_order_nor_processes_change_a_bit_of_them(kind):
    stage = stage_of(kind)
    straight = StageTally()
    for own in stage:
        straight.add(*own)
    shuffled = [(c, Random(1).sample(j, len(j))) for c, j in stage]
    Random(2).shuffle(shuffled)
    shares = [StageTally() for _ in range(3)]
    for i, own in enumerate(shuffled):
        shares[i % 3].add(*own)
    assert together(shares) == straight == together([straight])
    assert together(shares).metrics() == straight.metrics()


def test_candidates_are_counted():
    def candidate(i, length, finished, tokens=None, reason=None):
        return Candidate(f"p/{i}", "p", (1,) * length, "t", finished, 9, tokens, reason)

    tally = StageTally()
    tally.add([candidate(0, 4, True), candidate(1, 9, False)], [])
    assert tally.metrics() == {
        "completions/mean_length": 6.5,
        "completions/clipped_ratio": 0.5,
    }
    tally.add([candidate(2, 2, None, "re-encoded"), candidate(3, 0, None, None, "refused")], [])
    assert tally.metrics() == {
        "completions/mean_length": 5.0,
        "completions/clipped_ratio": 1 / 3,
        "completions/re_encoded": 1,
    }
    assert (tally.prompts, tally.candidates, tally.judgements) == (2, 4, 0)


def test_a_score_that_is_not_finite_does_not_stop_a_stage():
    tally = JudgeTally()
    tally.add([Candidate("p/0", "p", (), "t", True, 1)], [Judgement("j", ("p/0",), "x", math.inf)])
    tally.add([Candidate("q/0", "q", (), "t", True, 1)], [Judgement("k", ("q/0",), "x", 1.0)])
    assert tally.metrics()["judge/score_mean"] == math.inf
