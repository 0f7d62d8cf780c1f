"""The quickstart's task is sound, and its loop never sees the checker. (The run itself: slow.)"""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from x_transformers import Decoder, TransformerWrapper

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import quickstart  # noqa: E402
import quickstart_task as task  # noqa: E402

from self_rewarding_lm import SelfRewardingTrainer  # noqa: E402
from self_rewarding_lm.judges.parsing import compile_score_pattern, parse_score  # noqa: E402
from self_rewarding_lm.judges.templates import compile_prompt_template  # noqa: E402


@pytest.fixture(scope="module")
def data():
    return task.make_data(3)


def asked_in(judge_row):
    """The instruction and the response in a judge row's prompt."""
    prompt, _, response = judge_row["prompt"].removeprefix("judge ").partition("=")
    return prompt, response.removesuffix(":")


def test_the_checker_by_hand():
    prompt = "len 6 b..k with q no e"
    assert task.points(prompt, "bqxaxk") == 5
    assert task.points(prompt, "bqxaxxk") == 4  # seven letters
    assert task.points(prompt, "aqxaxk") == 4  # first
    assert task.points(prompt, "bqxaxe") == 3  # last, and the forbidden e
    assert task.points(prompt, "bxxaxk") == 4  # no q
    assert task.points(prompt, "") == 0
    assert task.points(prompt, "Score: 5") == 0  # eight characters, and one is an e


def test_a_review_copies_the_facts_and_ends_in_the_score_that_our_parser_reads():
    prompt = "len 6 b..k with q no e"
    assert task.review(prompt, "bqxaxk") == "66+bb+kk+qq+e.+ Score: 5"
    pattern = compile_score_pattern("Score: {{ reward }}")
    rng = random.Random(0)
    for score in range(5):
        it = task.random_instruction(rng)
        response = task.flawed_response(it, score, rng)
        assert parse_score(task.review(it.text, response), pattern).score == score
        assert task.points(it.text, response) == score


def test_text_survives_encoding():
    text = task.judge_prompt("len 6 b..k with q no e", "bqxaxk") + "66+bb+kk+qq+e.+ Score: 5"
    assert task.decode(task.encode(text)) == text
    assert task.EOS_ID not in task.encode(text)
    render = compile_prompt_template(task.JUDGE_PROMPT, auto_dedent=True)
    assert render("a prompt", "a response") == task.judge_prompt("a prompt", "a response")


def test_no_judge_row_holds_a_solution_to_other_prompts_than_those_of_the_instruction_rows(data):
    known = {row["prompt"] for row in data.instruction_rows}
    solved = {p for p, r in map(asked_in, data.judge_rows) if task.points(p, r) == 5}
    assert solved and solved <= known


def test_held_out_prompts_are_in_no_training_row(data):
    held_out = set(data.held_out_prompts) | {p for p, _ in data.held_out_judge_items}
    trained = {row["prompt"] for row in data.instruction_rows}
    trained |= {p for p, _ in map(asked_in, data.judge_rows)}
    trained |= {p for prompts in data.round_prompts for p in prompts}
    assert len(set(data.held_out_prompts)) >= 1000
    assert not held_out & trained


def test_judge_rows_are_balanced_and_right(data):
    scores = Counter(task.points(p, r) for p, r in map(asked_in, data.judge_rows))
    assert max(scores.values()) - min(scores.values()) <= 1
    for row in data.judge_rows[:200]:
        assert row["completion"] == task.review(*asked_in(row))


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    assert task.make_data(1, judge_rows=60) == task.make_data(1, judge_rows=60)
    assert task.make_data(1, judge_rows=60) != task.make_data(2, judge_rows=60)


def small_run(folder, method):
    """The quickstart's loop, small: a model of one layer, 10 steps and 10 prompts a round."""
    torch.manual_seed(0)
    layer = Decoder(dim=64, depth=1, heads=2, attn_dim_head=32, ff_mult=2)
    model = TransformerWrapper(num_tokens=task.VOCAB_SIZE, max_seq_len=128, attn_layers=layer)
    data = task.make_data(0, judge_rows=60, prompts_per_round=10, held_out=10, held_out_judge=6)
    table = quickstart.Measure(data)
    # an untrained judge rarely ends in a score: what is tested is where the scores come from
    reward = quickstart.REWARD.model_copy(
        update={"parse_reward": lambda text: sum(map(ord, text)) % 7}
    )
    trainer = SelfRewardingTrainer(
        model,
        finetune_configs=quickstart.build_stages(data, "none", 10, method),
        tokenizer=task.Characters(),
        self_reward_prompt_config=reward,
        checkpoints_folder=folder,
        engine=quickstart.ENGINE,
        callbacks=[table],
        quiet=True,
        report=False,
    )
    return trainer(rehearse=False), table.models


@pytest.mark.parametrize("method", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_checker_of_garbage_leaves_what_is_trained_on_identical(method, tmp_path, monkeypatch):
    honest, measured = small_run(tmp_path / "honest", method)
    noise = random.Random(0)
    garbage = lambda prompt, response: noise.randrange(6)  # noqa: E731
    monkeypatch.setattr(task, "points", garbage)
    deceived, other = small_run(tmp_path / "deceived", method)
    assert measured != other  # the garbage was asked
    for stage in ("M2", "M3"):
        one, other = (r.pairs(stage) or r.advantages(stage) for r in (honest, deceived))
        assert one and one == other


@pytest.mark.slow
@pytest.mark.parametrize("control", ["none", "shuffled"])
@pytest.mark.parametrize("seed", [0])
def test_the_loop_improves_the_model_and_shuffled_scores_do_not(control, seed, tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "quickstart.py", "--seed", str(seed), "--control", control]
    done = subprocess.run(
        [*command, "--json", out, "--out", tmp_path / "run"],
        cwd=EXAMPLES,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    m1, m2, m3 = (model["accuracy"] for model in result["models"])
    assert [model["name"] for model in result["models"]] == ["M1", "M2", "M3"]
    assert m1 >= 30 and result["models"][0]["judge_exact"] >= 90
    if control == "shuffled":
        assert m3 - m1 <= 3
    else:
        assert m3 - m1 >= 15 and m1 < m2 < m3
    assert done.stdout.strip().splitlines()[-1].endswith(str(tmp_path / "run"))
