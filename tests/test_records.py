"""What several rooms ask of records: whose prompt, the same response, a number."""

import math

import pytest

from self_rewarding_lm.records import Candidate, is_number, prompt_id_of, same_text


@pytest.mark.parametrize("rest", ["", "/0", "/next/3", "/0/j1", "/0/j1/vs/j2", "/judge", "/1/r0"])
def test_ids_begin_with_the_id_of_their_prompt(rest):
    assert prompt_id_of(f"self_reward/12/0{rest}") == "self_reward/12/0"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (((1, 2), "a"), ((1, 2), "b"), True),
        (((1,), " a\n"), ((2,), "a"), True),
        (((1,), "a"), ((2,), "A"), False),
        (((1,), None), ((1,), None), True),
        (((1,), None), ((2,), None), False),
        (((1,), None), ((2,), ""), False),
        (((1,), ""), ((2,), None), True),
    ],
)
def test_two_responses_are_the_same_by_their_ids_or_by_their_texts(one, other, same):
    left, right = (
        Candidate(f"s/0/0/{i}", "s/0/0", *c, True, 8) for i, c in enumerate((one, other))
    )
    assert same_text(left, right) is same


@pytest.mark.parametrize("value", [0, -1.5, 10**308])
def test_numbers_that_a_float_holds_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, -math.inf, 10**400])
def test_others_are_none(value):
    assert not is_number(value)
