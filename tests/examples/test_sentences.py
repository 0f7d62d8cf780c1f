"""The checker of the sentences' task, and that the loop never sees it. (Whole runs: slow.)"""

import json
import random
import string
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import sentences  # noqa: E402
import sentences_task as task  # noqa: E402

from self_rewarding_lm import RewardConfig, Run, SamplingConfig  # noqa: E402
from tests.support.hf_models import VOCAB, tiny, word_tokenizer  # noqa: E402
from tests.support.processes import one, two  # noqa: E402

REQUEST = (
    'Write a sentence that starts with "She", contains "milk" and "market", and ends with "home".'
)


@pytest.fixture(scope="module")
def data():
    return task.make_data(3)


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


def test_a_review_copies_what_it_sees():
    assert task.review(REQUEST, "She took milk home") == (
        "Starts with She: She, yes. milk: took milk, yes. market: none, no. Ends with home: home, "
        "yes. Score: 3"
    )


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
    sizes = {"first_prompts": 6, "prompts_per_round": (10, 10), "held_out": 4, "judge_items": 3}
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
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_checker_of_garbage_leaves_what_is_trained_on_identical(method, small, monkeypatch):
    # the data are made with the checker before the loop begins: the same for both
    data = task.make_data(0, **sentences.SMALL)
    rows = task.make_judge_rows(data, [""] * len(data.first_prompts), 0, count=50)
    monkeypatch.setattr(task, "make_data", lambda *given, **sizes: data)
    monkeypatch.setattr(task, "make_judge_rows", lambda *given: rows)
    honest, result = small("honest", "--method", method)
    assert [model["name"] for model in result["models"]] == ["M0", "M1", "M2", "M3"]
    assert {"task", "seed", "control", "method", "model", "seconds"} < set(result)
    noise = random.Random(0)
    monkeypatch.setattr(task, "holds", lambda *_: [noise.random() < 0.5 for _ in task.DEMANDS])
    deceived, other = small("deceived", "--method", method)
    assert result["models"] != other["models"]  # the garbage was asked
    for stage in ("M2", "M3"):
        of_run = lambda run: list(run.pairs(stage) or run.advantages(stage))  # noqa: B023, E731
        assert of_run(honest) and of_run(honest) == of_run(deceived)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path):
    tiny("llama", VOCAB, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    flags = [
        EXAMPLES / "sentences.py",
        "--small",
        "--control",
        "sft",
        "--model",
        tmp_path / "model",
    ]

    def places(name):
        return ["--out", tmp_path / name, "--json", tmp_path / f"{name}.json"]

    said = one(*flags, *places("one"))
    both = two(*flags, *places("two"), ACCELERATE_USE_CPU="true")
    assert both.count("M3 minus M1") == said.count("M3 minus M1") == 1
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    m0, *trained = first["models"]
    assert second["models"][0] == {**m0, "log_loss": pytest.approx(m0["log_loss"], rel=1e-5)}
    assert [m["name"] for m in second["models"][1:]] == [m["name"] for m in trained]
    assert all(len(m["answers"]) == 10 for m in second["models"])
