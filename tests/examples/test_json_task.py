"""The JSON task is sound: what it asks, checks, reviews and keeps apart."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import json_task as task  # noqa: E402
from demands import NO, YES  # noqa: E402

from self_rewarding_lm import MarkedRubric, RewardConfig  # noqa: E402
from self_rewarding_lm.judges.self_judge import form_of  # noqa: E402
from self_rewarding_lm.judges.templates import compile_prompt_template  # noqa: E402

REQUEST = (
    'Write JSON with the keys "owner", "fruits" and "day". The owner is "Nora". '
    'List 4 different fruits, the last one "plum".'
)
MARKS = MarkedRubric(items=len(task.DEMANDS), yes=YES, no=NO)
SOLVED = {"owner": "Nora", "fruits": ["fig", "pear", "kiwi", "plum"], "day": "Friday"}


@pytest.fixture(scope="module")
def data():
    return task.make_data(3)


@pytest.fixture(scope="module")
def judge_rows(data):
    """With first answers as a model could give them, some of which meet a held-out request."""
    rng = random.Random(3)
    answers = [task.altered(prompt, rng.randrange(5), rng) for prompt in data.first_prompts]
    answers[:40] = [task.solution(task.Request.parse(it), rng) for it in data.held_out_prompts[:40]]
    return task.make_judge_rows(data, answers, 3)


def asked_in(judge_row):
    """The request and the answer in a judge row's prompt."""
    _, _, asked = judge_row["prompt"].partition("Task: ")
    request, _, answer = asked.partition("\nJSON: ")
    return request, answer


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


def test_a_review_copies_what_it_sees_and_its_marks_are_the_points():
    answer = json.dumps({"owner": "Nora", "fruits": ["fig", "kiwi", "fig", "pear"]})
    assert task.review(REQUEST, answer) == (
        "Keys owner, fruits, day: owner, fruits, no. owner Nora: Nora, yes. 4 fruits: 1 fig 2 kiwi "
        "again fig 3 pear, no. Last plum: pear, no. Score: 1"
    )
    read = form_of(RewardConfig(prompt_template=task.JUDGE_PROMPT, marks=MARKS)).read
    odd = json.dumps({"owner": "a, yes. b, no.", "x, yes.": 1, "fruits": ["c, no.", "d, yes."]})
    assert read(task.review(REQUEST, odd)).score == task.points(REQUEST, odd) == 0
    rng = random.Random(0)
    for score in [*range(5)] * 20:
        request = task.random_request(rng).text
        text = task.altered(request, score, rng)
        assert read(task.review(request, text)).score == task.points(request, text) == score


def test_the_judge_prompt_is_what_the_library_renders():
    render = compile_prompt_template(task.JUDGE_PROMPT, auto_dedent=True)
    answer = json.dumps(SOLVED)
    assert render(REQUEST, answer) == task.judge_prompt(REQUEST, answer)


def test_instruction_rows_meet_their_requests(data):
    assert len(data.instruction_rows) >= 100
    assert all(task.points(row["prompt"], row["completion"]) == 4 for row in data.instruction_rows)


def test_no_judge_row_holds_a_solution_to_other_requests_than_those_of_instruction_rows(
    data, judge_rows
):
    known = {row["prompt"] for row in data.instruction_rows}
    solved = {
        prompt for prompt, text in map(asked_in, judge_rows) if task.points(prompt, text) == 4
    }
    assert solved and solved <= known


def test_held_out_requests_are_in_no_training_row_and_no_round(data, judge_rows):
    judged = [prompt for prompt, _ in data.judge_items]
    held_out = {*data.held_out_prompts, *judged}
    assert len(set(data.held_out_prompts)) == len(data.held_out_prompts) >= 500
    trained = {row["prompt"] for row in data.instruction_rows} | set(data.first_prompts)
    trained |= {prompt for prompt, _ in map(asked_in, judge_rows)}
    trained |= {prompt for prompts in data.round_prompts for prompt in prompts}
    assert not held_out & trained
    assert not set(data.held_out_prompts) & set(judged)


def test_no_object_of_a_training_row_meets_a_held_out_request(data, judge_rows):
    texts = {row["completion"] for row in data.instruction_rows}
    texts |= {text for _, text in map(asked_in, judge_rows)}
    assert not any(task.points(p, text) == 4 for p in data.held_out_prompts[:60] for text in texts)
    assert not any(task.requests_met(text) & set(data.held_out_prompts) for text in texts)


def test_judge_rows_are_balanced_and_right(judge_rows):
    scores = Counter(task.points(*asked_in(row)) for row in judge_rows)
    assert max(scores.values()) - min(scores.values()) <= 1 and len(scores) == 5
    assert all(row["completion"] == task.review(*asked_in(row)) for row in judge_rows)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    assert task.make_data(1, held_out=20) == task.make_data(1, held_out=20)
    assert task.make_data(1, held_out=20) != task.make_data(2, held_out=20)
