"""Answers at the end of a text, and the share of a prompt's candidates that give each."""

import time
from fractions import Fraction

import pytest

from self_rewarding_lm import VoteJudge
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.votes import last_choice, last_number
from self_rewarding_lm.records import Candidate, Prompt
from tests.support.models import Successor, context

NUMBERS = {
    "She has 3 + 4 = 7 apples.": 7,
    "It costs $1,234,567.50": Fraction("1234567.5"),
    "#### 12": 12,
    "x = 9\n#### 1,000\nI hope that helps, call 555.": 1000,
    r"so \boxed{12}, not 13": 12,
    r"\boxed{\frac{1}{2}} of 8": Fraction(1, 2),
    r"\boxed{x = \dfrac{-3}{4}}": Fraction(-3, 4),
    r"first \boxed{1}, then \boxed{2}": 2,
    r"1{,}000": 1000,
    "-3.5": Fraction(-7, 2),
    "\u22124": -4,
    "a debt of -$5": -5,
    "7-3": 3,  # a difference, whose last number is 3
    "1/2": Fraction(1, 2),
    "6 / 4": Fraction(3, 2),
    ".5": Fraction(1, 2),
    "2.5e3": 2500,
    "12.": 12,
    "1,23": 23,  # no thousands
    "1/0": None,
    "no idea": None,
    r"\boxed{x} though 3": None,
    "": None,
}
CHOICES = {
    "(B)": "B",
    "Answer: B": "B",
    "**Answer:** **D**": "D",
    "The answer is (c).": "C",
    "The correct option is B because (A) is wrong": "B",
    "A. Rome\nB. Paris\nThe answer is\nB": "B",
    r"\boxed{C}": "C",
    r"\boxed{\text{E}} or (A)": "E",
    "B.": "B",
    "**A**": "A",
    "B. Paris": "B",
    "first (A), no, (C)": "C",
    "the answer is a matter of taste": None,
    "I think so": None,
    "Answer: Because": None,
    r"\boxed{12}": None,
    "": None,
}


UNITS = (
    *("1", "1,111", "1.", "1/", "-", "(", "A ", "answer is ", "#### ", "\\boxed{", "\\boxed{1 "),
    *("{", "{{}", "\\frac{1}{", "*", " \n", "$", "A\n"),
)


@pytest.mark.parametrize("text", NUMBERS, ids=repr)
def test_the_last_number_of_a_text(text):
    assert last_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", CHOICES, ids=repr)
def test_the_letter_that_a_text_chooses(text):
    assert last_choice(text) == CHOICES[text]


@pytest.mark.parametrize("extract", [last_number, last_choice])
@pytest.mark.parametrize("unit", UNITS)
def test_no_text_takes_long(extract, unit):
    begin = time.perf_counter()
    extract(unit * (200_000 // len(unit)))
    assert time.perf_counter() - begin < 2


def judged(judge, *texts):
    prompt = Prompt("s/0/0", 0, (0,), "p")
    candidates = [
        Candidate(f"s/0/0/{i}", "s/0/0", (1,), text, True, 9) for i, text in enumerate(texts)
    ]
    return list(judge.judge(context(Successor()), [prompt], [candidates]))


def test_a_score_is_the_share_of_all_candidates_with_that_answer():
    found = judged(VoteJudge(), "so 12", "12.0", "24/2 is it", "7", "no idea")
    assert [j.score for j in found] == [3 / 5, 3 / 5, 3 / 5, 1 / 5, None]
    assert [j.reason for j in found] == [None] * 4 + ["no_answer"]
    assert [j.text for j in found] == ["12", "12", "12", "7", None]
    assert [j.id for j in found] == [f"s/0/0/{i}/j0" for i in range(5)]


def test_prompts_vote_apart_and_an_extractor_may_be_ones_own():
    judge = VoteJudge(lambda text: tuple(sorted(text)) or None)
    prompts = [Prompt(f"s/{row}/0", row, (0,), "p") for row in range(2)]
    groups = [
        [Candidate(f"{p.id}/{i}", p.id, (1,), t, True, 9) for i, t in enumerate(texts)]
        for p, texts in zip(prompts, (["ab", "ba"], ["ab", ""]), strict=True)
    ]
    scores = [j.score for j in judge.judge(context(Successor()), prompts, groups)]
    assert scores == [1.0, 1.0, 0.5, None]


def test_what_is_no_answer_or_no_extractor_is_told():
    assert [j.score for j in judged(VoteJudge(lambda text: float("nan")), "a", "b")] == [None] * 2
    with pytest.raises(JudgeError, match="can be hashed"):
        judged(VoteJudge(lambda text: [text]), "a")
    with pytest.raises(JudgeError, match="'number', 'choice'"):
        VoteJudge("letters")
    with pytest.raises(JudgeError, match="reads texts"):
        judged(VoteJudge(), None)
