"""The sentences' task is sound, and the loop never sees its checker. (A run on SmolLM2: slow.)"""

import json
import random
import string
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import sentences  # noqa: E402
import sentences_task as task  # noqa: E402
from demands import NO, YES  # noqa: E402

from self_rewarding_lm import MarkedRubric, RewardConfig, Run, SamplingConfig  # noqa: E402
from self_rewarding_lm.judges.self_judge import form_of  # noqa: E402
from self_rewarding_lm.judges.templates import compile_prompt_template  # noqa: E402
from tests.support.hf_models import VOCAB, tiny, word_tokenizer  # noqa: E402

REQUEST = (
    'Write a sentence that starts with "She", contains "milk" and "market", and ends with "home".'
)
MARKS = MarkedRubric(items=len(task.DEMANDS), yes=YES, no=NO)


@pytest.fixture(scope="module")
def data():
    return task.make_data(3)


@pytest.fixture(scope="module")
def judge_rows(data):
    """With first answers as a model could give them, some of which meet a held-out request."""
    rng = random.Random(3)
    answers = [task.altered(prompt, rng.randrange(4), rng) for prompt in data.first_prompts]
    answers[:40] = [task.altered(prompt, 4, rng) for prompt in data.held_out_prompts[:40]]
    return task.make_judge_rows(data, answers, 3)


def asked_in(judge_row):
    """The request and the sentence in a judge row's prompt."""
    _, _, asked = judge_row["prompt"].partition("Task: ")
    request, _, sentence = asked.partition("\nSentence: ")
    return request, sentence


@pytest.mark.parametrize(
    ("sentence", "held"),
    [
        ("She took milk from the market back home.", [True, True, True, True]),
        ("She took milk from the market back homeward.", [True, True, True, False]),
        ("He took milk from the supermarket home", [False, True, False, True]),
        ("she sold Milk", [False, False, False, False]),
        ("Sheila: milk? market! home", [False, True, True, True]),
        ("", [False, False, False, False]),
    ],
)
def test_the_checker_by_hand(sentence, held):
    assert task.holds(REQUEST, sentence) == held
    assert task.points(REQUEST, sentence) == sum(held)


def test_a_request_is_read_back_from_its_text():
    request = task.Request("She", "milk", "market", "home")
    assert request.text == REQUEST and task.Request.parse(REQUEST) == request


def test_a_review_copies_what_it_sees_and_its_marks_are_the_points():
    sentence = "She took milk home"
    review = task.review(REQUEST, sentence)
    assert review == (
        "Starts with She: She, yes. milk: took milk, yes. market: none, no. Ends with home: home, "
        "yes. Score: 3"
    )
    read = form_of(RewardConfig(prompt_template=task.JUDGE_PROMPT, marks=MARKS)).read
    assert read(review).score == 3
    rng = random.Random(0)
    for score in range(5):
        request = task.random_request(rng).text
        text = task.altered(request, score, rng)
        assert task.points(request, text) == score
        assert read(task.review(request, text)).score == score


def test_the_judge_prompt_is_what_the_library_renders():
    render = compile_prompt_template(task.JUDGE_PROMPT, auto_dedent=True)
    assert render("a request", "a sentence") == task.judge_prompt("a request", "a sentence")


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


def test_no_sentence_of_a_training_row_meets_a_held_out_request(data, judge_rows):
    texts = {row["completion"] for row in data.instruction_rows}
    texts |= {text for _, text in map(asked_in, judge_rows)}
    assert not any(task.points(p, text) == 4 for p in data.held_out_prompts for text in texts)


def test_judge_rows_are_balanced_and_right(judge_rows):
    scores = Counter(task.points(*asked_in(row)) for row in judge_rows)
    assert max(scores.values()) - min(scores.values()) <= 1 and len(scores) == 5
    assert all(row["completion"] == task.review(*asked_in(row)) for row in judge_rows)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    assert task.make_data(1, held_out=20) == task.make_data(1, held_out=20)
    assert task.make_data(1, held_out=20) != task.make_data(2, held_out=20)


@pytest.mark.parametrize("control", ["none", "shuffled", "sft", "oracle"])
def test_a_control_differs_from_the_loop_in_one_thing(control, data):
    rows = [{"prompt": "a", "completion": "b"}]
    m1, *rounds = sentences.build_stages(data, rows, task, control)
    _, *own = sentences.build_stages(data, rows, task, "none")
    assert m1.num_train_steps == sentences.SFT_STEPS
    assert [stage.name for stage in rounds] == ["M2", "M3"]
    if control == "sft":
        assert [stage.num_train_steps for stage in rounds] == [27, 20]  # 2 epochs of 220 and 160
        assert rounds[0].optim.learning_rate == own[0].optim.learning_rate
    else:
        judges = [stage.judge for stage in rounds]
        assert [type(judge).__name__ for judge in judges] == [JUDGES[control]] * 2
        for stage, other in zip(rounds, own, strict=True):
            assert list(stage.prompt_dataset) == list(other.prompt_dataset)
            others = {"prompt_dataset": None, "judge": None}
            assert repr(stage.model_copy(update=others)) == repr(other.model_copy(update=others))


JUDGES = {"none": "NoneType", "shuffled": "ShuffledJudge", "oracle": "FunctionJudge"}


# -- the run -------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The example with a tiny random model and few prompts; a function of a control runs it.

    Random texts neither end nor review: they stop at a letter, and any text is a score. What is
    tested is where the scores come from.
    """
    model = tiny("llama", VOCAB, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    sizes = {"first_prompts": 6, "prompts_per_round": (6, 5), "held_out": 4, "judge_items": 3}
    monkeypatch.setattr(sentences, "SMALL", sizes)
    monkeypatch.setattr(sentences, "SFT_STEPS", 2)
    monkeypatch.setattr(sentences, "PRECISION", "no")
    score = lambda text: sum(map(ord, text)) % 5  # noqa: E731
    read = lambda **_: RewardConfig(prompt_template=task.JUDGE_PROMPT, parse_reward=score)  # noqa: E731
    monkeypatch.setattr(sentences, "RewardConfig", read)
    stopping = lambda **how: SamplingConfig(**how, stop=[*string.ascii_lowercase])  # noqa: E731
    monkeypatch.setattr(sentences, "SamplingConfig", stopping)

    def run(name, *words):
        out = [tmp_path / name, tmp_path / f"{name}.json"]
        flags = ["--small", "--model", tmp_path / "model", "--out", out[0], "--json", out[1]]
        monkeypatch.setattr(sys, "argv", ["sentences.py", *map(str, (*flags, *words))])
        sentences.main()
        return Run.open(out[0]), json.loads(out[1].read_text())

    return run


@pytest.mark.slow
def test_a_checker_of_garbage_leaves_the_pairs_identical(small, monkeypatch):
    # the data are made with the checker before the loop begins: the same for both
    data = task.make_data(0, **sentences.SMALL)
    rows = task.make_judge_rows(data, [""] * len(data.first_prompts), 0, count=50)
    monkeypatch.setattr(task, "make_data", lambda *given, **sizes: data)
    monkeypatch.setattr(task, "make_judge_rows", lambda *given: rows)
    honest, result = small("honest")
    assert [model["name"] for model in result["models"]] == ["M0", "M1", "M2", "M3"]
    assert {"task", "seed", "control", "model", "seconds"} < set(result)
    noise = random.Random(0)
    monkeypatch.setattr(task, "holds", lambda *_: [noise.random() < 0.5 for _ in task.DEMANDS])
    deceived, other = small("deceived")
    assert result["models"] != other["models"]  # the garbage was asked
    for stage in ("M2", "M3"):
        assert len(honest.pairs(stage)) and list(honest.pairs(stage)) == list(deceived.pairs(stage))
