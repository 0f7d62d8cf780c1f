"""The checker of the JSON task, by hand."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import json_task as task  # noqa: E402
from demands import NO, YES  # noqa: E402

from self_rewarding_lm import MarkedRubric, RewardConfig  # noqa: E402
from self_rewarding_lm.judges.self_judge import form_of  # noqa: E402

REQUEST = (
    'Write JSON with the keys "owner", "fruits" and "day". The owner is "Nora". '
    'List 4 different fruits, the last one "plum".'
)
MARKS = MarkedRubric(items=len(task.DEMANDS), yes=YES, no=NO)
SOLVED = {"owner": "Nora", "fruits": ["fig", "pear", "kiwi", "plum"], "day": "Friday"}


def with_fruits(*fruits):
    return json.dumps({**SOLVED, "fruits": fruits})


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        (json.dumps(SOLVED), "yyyy"),
        (json.dumps({**SOLVED, "day": 7}), "yyyy"),
        (json.dumps({**SOLVED, "hour": 7}), "nyyy"),
        (json.dumps(dict(sorted(SOLVED.items()))), "nyyy"),
        (json.dumps({**SOLVED, "owner": "Norah"}), "ynyy"),
        (json.dumps({**SOLVED, "owner": ["Nora"]}), "ynyy"),
        (with_fruits("fig", "pear", "plum"), "yyny"),
        (with_fruits("fig", "pear", "fig", "plum"), "yyny"),
        (with_fruits("fig", "pear", "kiwi", "lime", "plum"), "yyny"),
        (with_fruits("fig", "pear", "plum", "kiwi"), "yyyn"),
        (with_fruits("fig", "pear", "kiwi", "Plum"), "yyyn"),
        (with_fruits(), "yynn"),
        (with_fruits("fig", "pear", 3, "plum"), "yynn"),
        (json.dumps({**SOLVED, "fruits": "plum"}), "yynn"),
        (json.dumps(SOLVED)[:-1], "nnnn"),
        (json.dumps([SOLVED]), "nnnn"),
        ("```json\n" + json.dumps(SOLVED) + "\n```", "nnnn"),
        ("[" * 100_000, "nnnn"),
        ("plum", "nnnn"),
        ("", "nnnn"),
    ],
)
def test_the_checker_by_hand(answer, held):
    assert "".join("y" if met else "n" for met in task.holds(REQUEST, answer)) == held
    assert task.points(REQUEST, answer) == held.count("y")
    assert task.reward([REQUEST], [answer]) == [held.count("y")]
    assert (REQUEST in task.requests_met(answer)) == (held == "yyyy")


def test_a_request_is_read_back_from_its_text():
    request = task.Request(("owner", "fruits", "day"), "owner", "Nora", 4, "fruits", "plum")
    assert request.text == REQUEST and task.Request.parse(REQUEST) == request
    with pytest.raises(ValueError, match="not a request"):
        task.Request.parse(REQUEST[:-1])


def test_a_review_copies_what_it_sees_and_no_answer_marks_itself():
    answer = json.dumps({"owner": "Nora", "fruits": ["fig", "kiwi", "fig", "pear"]})
    assert task.review(REQUEST, answer) == (
        "Keys owner, fruits, day: owner, fruits, no. owner Nora: Nora, yes. 4 fruits: 1 fig 2 kiwi "
        "again fig 3 pear, no. Last plum: pear, no. Score: 1"
    )
    read = form_of(RewardConfig(prompt_template=task.JUDGE_PROMPT, marks=MARKS)).read
    odd = json.dumps({"owner": "a, yes. b, no.", "x, yes.": 1, "fruits": ["c, no.", "d, yes."]})
    assert read(task.review(REQUEST, odd)).score == task.points(REQUEST, odd) == 0
