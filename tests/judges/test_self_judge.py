"""The pairwise judge: what it is shown, how it is read, what its verdicts come to."""

from itertools import permutations

import pytest

from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.judges.asking import MIN_ANSWER_TOKENS
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.self_judge import PairwiseJudge, check_comparison
from self_rewarding_lm.judges.tally import judge_metrics
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.scores import candidate_scores
from tests.judges.test_judges import Scripted, asked, judging_context
from tests.support.models import (
    ALPHABET,
    TEXT_VOCAB,
    Recurrent,
    ids_of,
    last_logits,
    lively,
    text_tokens,
)

COMPARISON = ComparisonConfig(
    prompt_template="which for <{{ prompt }}>? <{{ response_a }}> or <{{ response_b }}>\nreview:",
    labels=("a", "b"),
    verdict_prefix="better: ",
)
JUDGING = SamplingConfig(max_new_tokens=40)


def shown(prompt: str) -> tuple[str, str]:
    """The two responses in a judge prompt."""
    first, second = prompt.split("? ")[1].split("\n")[0].split(" or ")
    return first[1:-1], second[1:-1]


def longer_wins(prompt: str) -> str:
    first, second = shown(prompt)
    return f"i see. better: {'a' if len(first) > len(second) else 'b'}"


def judged(answer, *pairs, comparison=COMPARISON, seed=0):
    engine = Scripted(answer)
    prompts, candidates_PG = asked(*pairs)
    judge = PairwiseJudge(comparison, JUDGING)
    found = list(judge.judge(judging_context(engine, seed=seed), prompts, candidates_PG))
    return engine, candidates_PG, found


def test_each_two_candidates_of_a_prompt_are_shown_in_both_orders():
    engine, _, found = judged(
        longer_wins, ("q", ["x", "yy", "zzz"]), ("p", ["u", "v"]), ("o", ["t"])
    )
    pairs = [*permutations(["x", "yy", "zzz"], 2), *permutations(["u", "v"], 2)]
    assert sorted(map(shown, engine.prompts)) == sorted(pairs)
    assert engine.prompts[0] == "which for <q>? <x> or <yy>\nreview:"
    ids = {f"s/0/0/{i}/vs/{j}" for i, j in permutations(range(3), 2)}
    assert {j.id for j in found} == ids | {"s/1/0/0/vs/1", "s/1/0/1/vs/0"}


def test_a_judgement_names_both_in_the_order_shown_and_says_what_was_written():
    engine, _, found = judged(longer_wins, ("q", ["x", "yy"]), seed=3)
    by_id = {j.id: j for j in found}
    there, back = by_id["s/0/0/0/vs/1"], by_id["s/0/0/1/vs/0"]
    assert (there.candidate_ids, there.score) == (("s/0/0/0", "s/0/0/1"), 0.0)
    assert (back.candidate_ids, back.score) == (("s/0/0/1", "s/0/0/0"), 1.0)
    assert there.text == "i see. better: b" and back.text == "i see. better: a"
    assert {(j.source, j.judge, j.reason, j.score_mass) for j in found} == {
        ("compared", "self", None, None)
    }
    assert {r.key for r in engine.requests} == {stable_hash(3, j.id) for j in found}


def test_a_consistent_judge_ranks_by_the_share_of_comparisons_won():
    _, (candidates,), found = judged(longer_wins, ("q", ["xx", "x", "xxxx", "xxx"]))
    scores = candidate_scores(candidates, found)
    assert scores == pytest.approx(
        {"s/0/0/0": 1 / 3, "s/0/0/1": 0.0, "s/0/0/2": 1.0, "s/0/0/3": 2 / 3}
    )
    assert judge_metrics(candidates, found)["judge/position_agreement"] == 1.0


def test_a_judge_that_always_takes_the_first_says_only_ties():
    _, (candidates,), found = judged(lambda p: "better: a", ("q", ["x", "yy", "zzz"]))
    assert candidate_scores(candidates, found) == dict.fromkeys((c.id for c in candidates), 0.5)
    metrics = judge_metrics(candidates, found)
    assert metrics["judge/position_agreement"] == 0.0 and metrics["judge/tie_rate"] == 1.0


def test_a_verdict_that_cannot_be_read_leaves_the_comparison_out():
    def answer(prompt):
        return "dunno" if shown(prompt) == ("yy", "x") else longer_wins(prompt)

    _, (candidates,), found = judged(answer, ("q", ["x", "yy", "zzz"]))
    (unread,) = (j for j in found if j.score is None)
    assert (unread.id, unread.reason, unread.text) == ("s/0/0/1/vs/0", "no_verdict", "dunno")
    assert candidate_scores(candidates, found) == {"s/0/0/0": 0.0, "s/0/0/1": 0.0, "s/0/0/2": 1.0}


def test_a_judge_may_say_tie_where_it_has_a_word_for_it():
    answer = {("x", "yy"): "better: same", ("yy", "x"): "better: b"}
    tied = COMPARISON.model_copy(update={"tie_label": "same"})
    _, (candidates,), found = judged(
        lambda p: answer[shown(p)], ("q", ["x", "yy"]), comparison=tied
    )
    assert sorted(j.score for j in found) == [0.0, 0.5]
    assert candidate_scores(candidates, found) == {"s/0/0/0": 0.5, "s/0/0/1": 0.5}
    _, _, found = judged(lambda p: answer[shown(p)], ("q", ["x", "yy"]))
    assert {j.score for j in found} == {None, 0.0}


@pytest.mark.parametrize("way", ["stated", "forced", "at once"])
def test_the_probability_of_the_first_where_the_verdict_stands(way):
    module = lively(Recurrent(TEXT_VOCAB).double())
    module.head.bias.data[[ALPHABET.index(label) for label in "abc"]] += 6.0
    fields = {
        "stated": {"score_mode": "expected"},
        "forced": {"forced_ending": True},
        "at once": {"forced_ending": "at_once"},
    }[way]
    said = "hm.\nbetter: b" if way == "stated" else "hm."
    engine = Scripted(lambda p: said)
    judge = PairwiseJudge(COMPARISON.model_copy(update={"tie_label": "c", **fields}), JUDGING)
    ctx = judging_context(engine, module)
    found = list(judge.judge(ctx, *asked(("q", ["x", "yy"]))))
    assert len(found) == 2
    for judgement in found:
        texts = {"s/0/0/0": "x", "s/0/0/1": "yy"}
        first, second = (texts[i] for i in judgement.candidate_ids)
        before = f"which for <q>? <{first}> or <{second}>\nreview:"
        before += "\nbetter: " if way == "at once" else "hm.\nbetter: "
        chances = last_logits(module, list(ids_of(before))).softmax(dim=-1).tolist()
        a, b, c = (chances[ALPHABET.index(label)] for label in "abc")
        assert judgement.score_mass == pytest.approx(a + b + c, abs=1e-8)
        assert judgement.score == pytest.approx((a + c / 2) / (a + b + c), abs=1e-8)
        assert judgement.source == "compared"
        assert judgement.text == (None if way == "at once" else said)
    assert bool(engine.calls) == (way != "at once")


def test_the_ids_that_are_to_come_are_those_that_come():
    _, (candidates,), found = judged(longer_wins, ("q", ["x", "yy", "zzz"]))
    judge = PairwiseJudge()
    assert isinstance(judge, Judge)
    assert sorted(judge.judgement_ids(candidates)) == sorted(j.id for j in found)
    assert judge.judgement_ids(candidates[:1]) == []


def test_a_comparison_without_room_is_refused_before_any_work():
    empty = len("which for <>? <> or <>\nreview:")
    check_comparison(COMPARISON, text_tokens(), empty + MIN_ANSWER_TOKENS + 1)
    with pytest.raises(JudgeError, match=f"has {empty} tokens"):
        check_comparison(COMPARISON, text_tokens(), empty + MIN_ANSWER_TOKENS)
    broken = COMPARISON.model_copy(update={"prompt_template": "{{ prompt }}"})
    with pytest.raises(ConfigError, match="response_a"):
        check_comparison(broken, text_tokens(), None)
