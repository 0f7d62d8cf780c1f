"""Each task of sentences.py is sound: what it asks, reviews and keeps apart."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import json_task  # noqa: E402
import sentences_task  # noqa: E402
from demands import NO, YES  # noqa: E402

from self_rewarding_lm import MarkedRubric, RewardConfig  # noqa: E402
from self_rewarding_lm.judges.self_judge import form_of  # noqa: E402
from self_rewarding_lm.judges.templates import compile_prompt_template  # noqa: E402

TASKS = {"sentences": sentences_task, "json": json_task}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]


@pytest.fixture(scope="module")
def data(task):
    return task.make_data(3)


@pytest.fixture(scope="module")
def judge_rows(task, data):
    """With first answers as a model could give them, some of which meet a held-out request."""
    rng, top = random.Random(3), task.TOP_SCORE
    answers = [task.altered(prompt, rng.randrange(top + 1), rng) for prompt in data.first_prompts]
    answers[:40] = [task.altered(prompt, top, rng) for prompt in data.held_out_prompts[:40]]
    return task.make_judge_rows(data, answers, 3)


@pytest.fixture(scope="module")
def reviewed(task, judge_rows):
    """The request and the answer in each judge row's prompt."""
    before, rest = task.JUDGE_PROMPT.split("{{ prompt }}")
    between, after = rest.split("{{ response }}")
    asked = [row["prompt"].removeprefix(before).partition(between) for row in judge_rows]
    assert not after and all(part for _, part, _ in asked)
    return [(request, answer) for request, _, answer in asked]


def test_the_marks_of_a_review_are_the_points(task):
    assert len(task.DEMANDS) == task.TOP_SCORE
    marks = MarkedRubric(items=len(task.DEMANDS), yes=YES, no=NO)
    read = form_of(RewardConfig(prompt_template=task.JUDGE_PROMPT, marks=marks)).read
    rng = random.Random(0)
    for score in [*range(task.TOP_SCORE + 1)] * 20:
        request = task.random_request(rng).text
        text = task.altered(request, score, rng)
        assert task.points(request, text) == sum(task.holds(request, text)) == score
        assert read(task.review(request, text)).score == score
        assert task.review(request, text).endswith(f"Score: {score}")
        assert task.reward([request], [text], other=[1]) == [score]


def test_the_judge_prompt_is_what_the_library_renders(task):
    rng = random.Random(1)
    request = task.random_request(rng).text
    answer = task.altered(request, task.TOP_SCORE, rng)
    render = compile_prompt_template(task.JUDGE_PROMPT, auto_dedent=True)
    assert render(request, answer) == task.judge_prompt(request, answer)


def test_instruction_rows_meet_their_requests(task, data):
    rows = data.instruction_rows
    assert len(rows) >= 100
    assert all(task.points(row["prompt"], row["completion"]) == task.TOP_SCORE for row in rows)


def test_judge_rows_are_balanced_and_right(task, judge_rows, reviewed):
    scores = Counter(task.points(*item) for item in reviewed)
    assert max(scores.values()) - min(scores.values()) <= 1 and len(scores) == task.TOP_SCORE + 1
    for row, item in zip(judge_rows, reviewed, strict=True):
        assert row == {"prompt": task.judge_prompt(*item), "completion": task.review(*item)}


def test_no_judge_row_holds_a_solution_to_other_requests_than_those_of_instruction_rows(
    task, data, reviewed
):
    known = {row["prompt"] for row in data.instruction_rows}
    solved = {request for request, text in reviewed if task.points(request, text) == task.TOP_SCORE}
    assert solved and solved <= known


def test_held_out_requests_are_in_no_training_row_and_no_round(task, data, reviewed):
    judged = [prompt for prompt, _ in data.judge_items]
    held_out = {*data.held_out_prompts, *judged}
    assert len(set(data.held_out_prompts)) == len(data.held_out_prompts) >= 500
    trained = {row["prompt"] for row in data.instruction_rows} | set(data.first_prompts)
    trained |= {request for request, _ in reviewed}
    trained |= {prompt for prompts in data.round_prompts for prompt in prompts}
    assert not held_out & trained
    assert not set(data.held_out_prompts) & set(judged)


def test_no_answer_of_a_training_row_meets_a_held_out_request(task, data, reviewed):
    texts = {row["completion"] for row in data.instruction_rows} | {text for _, text in reviewed}
    held_out = [task.Request.parse(prompt) for prompt in data.held_out_prompts]
    assert not any(all(request.holds(text)) for request in held_out for text in texts)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data(task):
    assert task.make_data(1, held_out=20) == task.make_data(1, held_out=20)
    assert task.make_data(1, held_out=20) != task.make_data(2, held_out=20)
