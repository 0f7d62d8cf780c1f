"""Which candidates become a pair, and what is counted of those that do not."""

from collections import Counter

import numpy as np
import pytest

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.records import Candidate, Judgement, Prompt, stable_hash
from self_rewarding_lm.stages.pairing import DropCounts, PairingConfig, make_pairs, score_variances

PROMPT = Prompt("sr/3/0", row=3, ids=(7, 0), text="Say something")


def candidate(sample, *, prompt=PROMPT, ids=None, text="", finished=True):
    ids = (10 + sample, 2) if ids is None else ids
    return Candidate(f"{prompt.id}/{sample}", prompt.id, ids, text or f"{ids}", finished, 8)


def pairs_of(scores, *, candidates=None, drops=None, pairing=None, **settings):
    """The pairs and the counts of candidates with these scores, in order."""
    candidates = candidates or [candidate(i) for i in range(len(scores))]
    drops = DropCounts() if drops is None else drops
    by_id = {c.id: score for c, score in zip(candidates, scores, strict=True)}
    pairing = pairing or PairingConfig()
    return make_pairs(PROMPT, candidates, by_id, drops, pairing=pairing, **settings), drops


def pair_of(scores, **settings):
    """The same where there is one pair at most."""
    found, drops = pairs_of(scores, **settings)
    assert len(found) <= 1
    return (found[0] if found else None), drops


def sides(pair):
    return pair and (pair.chosen_id, pair.rejected_id)


def test_the_best_is_chosen_and_the_worst_rejected():
    pair, drops = pair_of([3.0, 1.5, 4.0, 2.0])
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/1")
    assert drops.metrics() == {"pairs/kept": 1}


def test_trap_5_a_pair_holds_its_prompt_its_candidates_and_their_scores():
    """Whatever else is scored: scores are found by candidate id, never by place."""
    other = Prompt("sr/4/0", row=4, ids=(9,), text="Say another thing")
    candidates = [candidate(0), candidate(1)]
    scores = {candidate(k, prompt=other).id: 5.0 - 5 * k for k in range(2)}
    scores |= {candidates[0].id: 1.0, candidates[1].id: 3.0}
    (pair,) = make_pairs(PROMPT, candidates, scores, DropCounts(), pairing=PairingConfig())
    assert (pair.id, pair.prompt, pair.prompt_ids) == ("sr/3/0", "Say something", (7, 0))
    assert (pair.chosen_id, pair.chosen_ids, pair.chosen_score) == ("sr/3/0/1", (11, 2), 3.0)
    assert (pair.rejected_id, pair.rejected_ids, pair.rejected_score) == ("sr/3/0/0", (10, 2), 1.0)
    assert (pair.chosen, pair.rejected) == ("(11, 2)", "(10, 2)")


def test_of_several_best_or_worst_the_first_is_taken():
    assert sides(pair_of([2.0, 5.0, 0.0, 5.0, 0.0])[0]) == ("sr/3/0/1", "sr/3/0/2")


def test_a_tie_gives_no_pair():
    pair, drops = pair_of([3.0, 3.0, 3.0])
    assert pair is None
    assert drops.metrics() == {"pairs/kept": 0, "pairs/dropped_tie": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ids": (5, 6), "text": "a"}, {"ids": (5, 6), "text": "b"}),
        ({"ids": (5, 6), "text": "the same"}, {"ids": (5, 7), "text": " the same\n"}),
    ],
    ids=["ids", "text"],
)
def test_the_same_response_with_two_scores_gives_no_pair(one, other):
    pair, drops = pair_of([1.0, 4.0], candidates=[candidate(0, **one), candidate(1, **other)])
    assert pair is None
    assert drops.prompts == Counter(identical=1)


def test_responses_without_texts_are_compared_by_ids():
    candidates = [Candidate(f"{PROMPT.id}/{i}", PROMPT.id, (i,), None, None, 8) for i in range(2)]
    pair, _ = pair_of([1.0, 4.0], candidates=candidates)
    assert sides(pair) == ("sr/3/0/1", "sr/3/0/0")


def test_an_unfinished_candidate_is_never_chosen_or_rejected():
    candidates = [candidate(0, finished=False), candidate(1), candidate(2)]
    pair, drops = pair_of([5.0, 1.0, 2.0], candidates=candidates)
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/1")
    assert drops.metrics() == {"pairs/kept": 1, "candidates/dropped_unfinished": 1}


def test_a_candidate_of_which_nobody_knows_whether_it_finished_is_kept():
    candidates = [candidate(i, finished=None) for i in range(2)]
    pair, _ = pair_of([1.0, 2.0], candidates=candidates)
    assert sides(pair) == ("sr/3/0/1", "sr/3/0/0")


def test_trap_4_a_missing_score_is_never_the_worst_nor_a_zero():
    pair, drops = pair_of([None, -3.0, 4.0, None])
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/1")
    assert drops.candidates == Counter(unscored=2)


def test_a_score_of_zero_is_a_score():
    pair, _ = pair_of([0.0, 4.0])
    assert pair is not None and pair.rejected_score == 0.0


def test_a_candidate_that_the_scores_do_not_mention_is_unscored():
    candidates = [candidate(i) for i in range(3)]
    drops = DropCounts()
    scores = {candidates[0].id: 1.0, candidates[2].id: 2.0}
    (pair,) = make_pairs(PROMPT, candidates, scores, drops, pairing=PairingConfig())
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/0")
    assert drops.candidates == Counter(unscored=1)


def test_a_score_that_the_user_finds_invalid_is_left_out():
    pair, drops = pair_of([9.0, 1.0, 2.0], is_valid_score=lambda score: score <= 5)
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/1")
    assert drops.candidates == Counter(invalid_score=1)


@pytest.mark.parametrize(
    ("reason", "scores", "finished", "settings"),
    [
        ("unfinished", [1.0, 2.0], [True, False], {}),
        ("unscored", [1.0, None], [True, True], {}),
        ("invalid_score", [1.0, 2.0], [True, True], {"is_valid_score": lambda s: s > 1}),
    ],
)
def test_a_prompt_with_fewer_than_two_candidates_left_is_dropped_for_the_last_reason(
    reason, scores, finished, settings
):
    candidates = [candidate(i, finished=f) for i, f in enumerate(finished)]
    pair, drops = pair_of(scores, candidates=candidates, **settings)
    assert pair is None
    assert drops.prompts == drops.candidates == Counter({reason: 1})


def test_scores_nearer_than_the_margin_give_no_pair():
    assert pair_of([1.0, 2.0], min_margin=1.0)[0] is not None
    pair, drops = pair_of([1.0, 2.0], min_margin=1.5)
    assert pair is None
    assert drops.prompts == Counter(margin=1)


def test_a_pair_that_the_user_finds_invalid_is_dropped_and_he_sees_best_and_worst():
    seen = []

    def refuse(best, worst):
        seen.append((best, worst))
        return False

    pair, drops = pair_of([2.0, 5.0, 1.0], is_valid_pair=refuse)
    assert pair is None
    assert seen == [(5.0, 1.0)]
    assert drops.prompts == Counter(invalid_pair=1)


def test_a_pick_of_the_users_own_chooses_among_the_candidates_that_are_left():
    """Its indices are of the scores that it was given."""
    seen = []

    def second_against_last(rated):
        seen.append([one.score for one in rated])
        return [(rated[1], rated[-1])]

    candidates = [candidate(0, finished=False), *(candidate(i) for i in range(1, 5))]
    pair, _ = pair_of([9.0, 5.0, 4.0, None, 1.0], candidates=candidates, pick=second_against_last)
    assert seen == [[5.0, 4.0, 1.0]]
    assert sides(pair) == ("sr/3/0/2", "sr/3/0/4")


def test_trap_6_a_bad_prompt_does_not_stop_the_next():
    drops = DropCounts()
    cases = [[None, None], [1.0, 2.0], [3.0, 3.0], [], [4.0], [2.0, 1.0]]
    pairs = [pair_of(scores, drops=drops)[0] for scores in cases]
    assert [pair is not None for pair in pairs] == [False, True, False, False, False, True]
    assert drops.kept == 2
    assert sum(drops.prompts.values()) == 4


def test_what_is_dropped_is_counted_by_reason():
    drops = DropCounts()
    for scores in ([1.0, 1.0], [2.0, 2.0], [None, 1.0], [1.0, 2.0, None]):
        pair_of(scores, drops=drops)
    assert drops.metrics() == {
        "pairs/kept": 1,
        "pairs/dropped_tie": 2,
        "pairs/dropped_unscored": 1,
        "candidates/dropped_unscored": 2,
    }
    assert drops.in_words() == "2 tie, 1 unscored"
    assert DropCounts().in_words() == "none"


# Pickers


def sized(scores_and_lengths):
    """Candidates with texts of these lengths, and their scores."""
    candidates = [
        candidate(i, text=chr(ord("a") + i) * length)
        for i, (_, length) in enumerate(scores_and_lengths)
    ]
    return [score for score, _ in scores_and_lengths], candidates


def picked(scores_and_lengths, *, noise=None, variances=None, min_margin=0.0, **pairing):
    """The numbers of chosen and rejected of each pair, and why there is none."""
    scores, candidates = sized(scores_and_lengths)
    found, drops = pairs_of(
        scores,
        candidates=candidates,
        pairing=PairingConfig(**pairing),
        noise=noise,
        variances={f"{PROMPT.id}/{i}": v for i, v in (variances or {}).items()},
        min_margin=min_margin,
    )
    assert drops.kept == len(found) and drops.prompts.total() == (not found)
    assert [p.id for p in found] == ["sr/3/0", *(f"sr/3/0/p{k}" for k in range(1, len(found)))][
        : len(found)
    ]
    number = {c.id: i for i, c in enumerate(candidates)}
    return [(number[p.chosen_id], number[p.rejected_id]) for p in found], dict(drops.prompts)


# the table of docs/pairs.md: scores 5, 4.5, 4.5, 2, 1, 1 of lengths 900, 300, 600, 100, 50, 700
TABLE = [(5.0, 900), (4.5, 300), (4.5, 600), (2.0, 100), (1.0, 50), (1.0, 700)]


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [
        ({}, [(0, 4)]),
        ({"tie_break": "shorter"}, [(0, 5)]),
        ({"length_control": 0.2}, [(1, 5)]),  # 4.2 and more: 0, 1, 2; up to 1.8: 4, 5
        ({"length_control": 0.1}, [(0, 5)]),  # 4.6 and more: 0
        ({"length_control": 0.25}, [(1, 5)]),  # 2.0 is just within: 3 is shorter than 5
        ({"length_penalty": 1.0}, [(1, 5)]),  # 4.1, 4.2, 3.9, 1.9, 0.95, 0.3
        ({"pick": "top_bottom", "pairs_per_prompt": 9}, [(0, 4), (1, 5), (2, 3)]),
        ({"pick": "top_bottom", "pairs_per_prompt": 2}, [(0, 4), (1, 5)]),
        ({"pick": "all_margins", "pairs_per_prompt": 3}, [(0, 4), (0, 5), (1, 4)]),
    ],
    ids=str,
)
def test_pickers_on_the_table_of_the_documentation(pairing, pairs):
    assert picked(TABLE, **pairing) == (pairs, {})


def test_all_margins_are_all_two_with_another_score_the_greatest_margin_first():
    found, _ = picked([(1.0, 1), (3.0, 2), (2.0, 3)], pick="all_margins", pairs_per_prompt=9)
    assert found == [(1, 0), (1, 2), (2, 0)]
    far, _ = picked(
        [(1.0, 1), (3.0, 2), (2.0, 3)], pick="all_margins", pairs_per_prompt=9, min_margin=1.5
    )
    assert far == [(1, 0)]


def test_best_random_draws_by_noise_and_passes_over_ties():
    scores = [(1.0, 1), (5.0, 2), (5.0, 3), (2.0, 4)]
    order = {"sr/3/0/0": 3, "sr/3/0/1": 0, "sr/3/0/2": 1, "sr/3/0/3": 2}
    assert picked(scores, pick="best_random", noise=order.get) == ([(1, 3)], {})
    several, _ = picked(scores, pick="best_random", noise=order.get, pairs_per_prompt=4)
    assert several == [(1, 3), (1, 0)]


def test_best_random_draws_the_others_alike():
    counts = Counter(
        picked(
            [(5.0, 1), (1.0, 2), (2.0, 3), (3.0, 4)],
            pick="best_random",
            noise=lambda record_id, k=k: stable_hash(k, record_id),
        )[0][0]
        for k in range(600)
    )
    assert counts.keys() == {(0, 1), (0, 2), (0, 3)}
    assert all(150 < n < 250 for n in counts.values())  # 200 each, sd 11.5


def test_of_equal_scores_the_one_whose_judgements_vary_least_stands():
    scores = [(3.0, 1), (3.0, 2), (1.0, 3), (1.0, 4), (3.0, 5)]
    found, _ = picked(scores, tie_break="variance", variances={0: 0.5, 1: 0.25, 2: 0.2, 3: 0.0})
    assert found == [(1, 3)]  # of 4 nothing is known
    assert picked(scores, tie_break="variance")[0] == [(0, 2)]


def test_variances_are_of_what_judgements_say_of_a_candidate():
    said = [(("a",), 1.0), (("a",), 4.0), (("a",), None), (("b",), 2.0), (("a", "c"), 1.0)]
    said += [(("c", "a"), 1.0)]
    judgements = [Judgement(f"{k}", ids, "self", score) for k, (ids, score) in enumerate(said)]
    found = score_variances(judgements)  # of a: 1, 4, 1, 0; of c: 0, 1
    assert found.keys() == {"a", "c"}
    assert found["a"] == pytest.approx(np.var([1, 4, 1, 0])) == 2.25
    assert found["c"] == 0.25


@pytest.mark.parametrize(
    ("pairing", "reason"),
    [
        ({"max_chosen_length": 899}, "too_long_chosen"),
        ({"min_chosen_score": 5.5}, "low_score"),
        ({"length_control": 1.0}, "inverted"),  # the shortest of all is the second worst
    ],
    ids=str,
)
def test_a_winner_that_may_be_none_drops_the_prompt(pairing, reason):
    assert picked(TABLE, **pairing) == ([], {reason: 1})


def test_a_pair_that_cannot_be_is_passed_over_where_several_are_picked():
    found, _ = picked(TABLE, pick="top_bottom", pairs_per_prompt=2, max_chosen_length=899)
    assert found == [(1, 5), (2, 3)]
    allowed, _ = picked(TABLE, max_chosen_length=900, min_chosen_score=5.0)
    assert allowed == [(0, 4)]


def test_the_length_penalty_chooses_and_the_scores_stay_the_judges():
    scores, candidates = sized([(3.0, 1500), (2.0, 100), (1.75, 2000)])
    pairing = PairingConfig(length_penalty=1.0, weight_by_margin=True)
    pair, _ = pair_of(scores, candidates=candidates, pairing=pairing)
    assert (pair.chosen_score, pair.rejected_score) == (2.0, 1.75)  # 1.5, 1.9, -0.25
    assert pair.weight == pytest.approx(1.9 + 0.25)


def test_without_texts_lengths_are_counted_in_tokens():
    made = [
        Candidate(f"{PROMPT.id}/{i}", PROMPT.id, tuple(range(i, n)), None, None, 8)
        for i, n in enumerate((9, 4, 6, 9))
    ]
    pairing = PairingConfig(tie_break="shorter")
    pair, _ = pair_of([2.0, 2.0, 1.0, 1.0], candidates=made, pairing=pairing)
    assert sides(pair) == ("sr/3/0/1", "sr/3/0/3")


def test_scpo_weighs_a_pair_by_its_share_of_votes():
    """8 answers, 5 votes for the first and 1 for the last: w = 5/8 - 1/8 (arXiv:2411.04109)."""
    pairing = PairingConfig(min_chosen_score=0.5, weight_by_margin=True)
    pair, _ = pair_of([5 / 8, 2 / 8, 1 / 8], pairing=pairing)
    assert pair.weight == 0.5
    assert pair_of([3 / 8, 2 / 8, 1 / 8], pairing=pairing)[1].prompts == Counter(low_score=1)
    assert pair_of([5.0, 1.0])[0].weight is None


def test_a_length_control_of_each_round_the_last_goes_on():
    """0, 0.32, 0.32, 0.4 are those of arXiv:2407.19594."""
    pairing = PairingConfig(length_control=(0, 0.32, 0.32, 0.4), max_chosen_length=2500)
    found = [pairing.of_round(k) for k in range(6)]
    assert [one.length_control for one in found] == [0.0, 0.32, 0.32, 0.4, 0.4, 0.4]
    assert {one.max_chosen_length for one in found} == {2500}
    assert found[1].of_round(9) is found[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pairs_per_prompt": 2}, "best_worst gives one pair"),
        ({"pick": "best_random", "length_control": 0.3}, "a rule for pick best_worst"),
        ({"length_control": 1.2}, "length_control"),
        ({"length_control": (0.1, -0.1)}, "length_control"),
        ({"length_control": ()}, "length_control has no value"),
        ({"pick": "worst_best"}, "pick"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"tie_break": "longer"}, "tie_break"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PairingConfig(**settings)
