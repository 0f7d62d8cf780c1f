"""Which candidates become a pair, and what is counted of those that do not."""

from collections import Counter

import pytest

from self_rewarding_lm.pair_settings import PairingConfig
from self_rewarding_lm.pairing import DropCounts, make_pairs
from self_rewarding_lm.records import Candidate, Prompt

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
