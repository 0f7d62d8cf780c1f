"""The preview of a recipe: rows as the model reads them, judge prompts, what a judge must write."""

import json
import re

import pytest

from self_rewarding_lm.cli import main
from self_rewarding_lm.config import (
    PAPER_REWARD_CONFIG,
    ComparisonConfig,
    MarkedRubric,
    RewardConfig,
)
from self_rewarding_lm.judges.self_judge import score_parser
from self_rewarding_lm.recipes.preview import must_write
from tests.support.hf_models import tiny, word_tokenizer

RECIPE = """\
model: m0
chat_template: chatml
reward_prompts:
  default:
    prompt_template: "Rate {{ response }} to {{ prompt }}."
    reward_regex_template: "Points: {{ reward }}"
    score_range: [0, 5]
stages:
  - {stage: sft, train_dataset: ift.jsonl}
  - {stage: eft, ranked_dataset: ranked.jsonl}
  - {stage: sft, name: again, init_from: initial, train_dataset: [ift.jsonl, {from_stage: eft}]}
  - {stage: self_reward, prompt_dataset: prompts.jsonl, num_generated_preference_pairs: 2}
  - {stage: dpo, train_dataset: pairs.jsonl, max_seq_len: 40}
"""
ROWS = {
    "ift": [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(5)],
    "ranked": [{"prompt": "say it", "replies": ["no", "it"], "ranks": [1, 0]}],
    "prompts": [{"prompt": "tell \x1b[31m 0"}, {"prompt": "tell 1"}],
    "pairs": [{"prompt": "ask", "chosen": "good", "rejected": "bad" * 20}],
}


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose model has a configuration and a tokenizer, and no weights."""
    tokenizer = word_tokenizer()
    tiny("llama", vocab=len(tokenizer)).config.save_pretrained(tmp_path / "m0")
    tokenizer.save_pretrained(tmp_path / "m0")
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def parts(told):
    """What is printed of each stage."""
    return [f"stage {part}" for part in re.split(r"^stage ", told, flags=re.MULTILINE)[1:]]


def shown(part):
    return "\n".join(re.findall(r"^    \| (.*)$", part, re.MULTILINE))


def test_rows_are_shown_as_the_model_reads_them_with_what_is_learnt(recipe, capsys):
    assert main(["preview", str(recipe), "--rows", "1"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    sft, eft, again, rounds, dpo = parts(told)
    assert "stage 1 of 5: sft (SFTConfig)" in sft and "train_dataset: 5 rows" in sft
    asked = "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n"
    assert shown(sft) == f"{asked}[[it is 0<|im_end|>]]"
    learnt = len("it is 0") + 1  # a token a byte, and the end
    before = 2 + len("user\nsay 0") + 1 + 1 + len("assistant\n")  # special tokens count one
    assert f"ift.jsonl, line 1: a row, {before + learnt} tokens, {learnt} learnt" in sft
    asked = asked.replace("say 0", "say it")
    better, worse = re.split(r"(?m)^  .*a reply of rank 1 to judge.*$", eft)
    assert "a reply of rank 0 to judge" in better
    assert shown(better) == f"{asked}it<|im_end|>"
    assert shown(worse).startswith(f"{asked}no<|im_end|>")
    assert "rows that an earlier stage will make" in again
    assert shown(rounds).startswith("<|im_start|>user\ntell \N{REPLACEMENT CHARACTER}[31m 0")
    assert "[[" not in rounds
    before = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    assert f"{before}[[good<|im_end|>]]" in shown(dpo)
    assert "cut at 40 (max_seq_len)" in dpo and "40 tokens" in dpo


def test_a_judge_prompt_is_filled_in_once_with_what_must_be_written(recipe, capsys):
    assert main(["preview", str(recipe)]) == 0
    _, eft, _, rounds, _ = parts(capsys.readouterr().out)
    assert "Rate (a response) to say it." in shown(eft)
    assert "judged by: the reward prompt 'default'" in eft
    assert "it must write 'Points: ' and then a number from 0 to 5" in eft
    assert "judged as above" in rounds and "Rate" not in rounds


def test_what_is_learnt_is_green_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["preview", str(recipe), "--rows", "1"]) == 0
    sft = parts(capsys.readouterr().out)[0]
    assert "\x1b[32mit is 0<|im_end|>\x1b[0m" in sft and "[[" not in sft


def test_a_recipe_without_a_tokenizer_says_how_to_name_one(recipe, capsys):
    (recipe.parent / "m0" / "tokenizer.json").unlink()
    (recipe.parent / "m0" / "tokenizer_config.json").unlink()
    assert main(["preview", str(recipe)]) == 1
    told = capsys.readouterr()
    assert "a preview needs the tokenizer" in told.err and "--set tokenizer=FOLDER" in told.err


STATED = {"prompt_template": "{{ prompt }} {{ response }}"}
SCORED = {**STATED, "reward_regex_template": "Score: {{ reward }}", "score_range": (0, 4)}


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        (PAPER_REWARD_CONFIG, "'Score: ' and then a number from 0 to 5; the last such"),
        (
            RewardConfig(**{**SCORED, "score_range": None}, allowed_scores=(1, 2.5)),
            "then one of 1, 2.5",
        ),
        (RewardConfig(**SCORED, score_mode="expected"), "the mean of what may stand there"),
        (RewardConfig(**SCORED, forced_ending=True), "put after its text"),
        (RewardConfig(**SCORED, forced_ending="at_once"), "it writes nothing"),
        (RewardConfig(**STATED, parse_reward=len), "is given to len"),
        (
            RewardConfig(**STATED, marks=MarkedRubric(items=3, yes=": yes", no=": no")),
            "each of 3 items with ': yes' or ': no'; the score is the sum of the points, 0 to 3",
        ),
        (ComparisonConfig(tie_label="C"), "'Better: ' and then 'A' or 'B' or 'C'"),
    ],
)
def test_what_a_judge_must_write_is_said(asks, words):
    assert words in " ".join(must_write(asks))


def test_what_is_said_is_what_is_read():
    said = next(must_write(PAPER_REWARD_CONFIG))
    stated = re.search(r"write '(.*)' and", said)[1]
    assert score_parser(PAPER_REWARD_CONFIG)(f"Well. {stated}4").score == 4
