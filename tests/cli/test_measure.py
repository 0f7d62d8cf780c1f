"""The commands that measure, on a tiny Hugging Face model: tables, JSON, data forms, errors."""

import json
from pathlib import Path

import pytest

from self_rewarding_lm import MarkedRubric, RewardConfig, SamplingConfig, evaluate_judge
from self_rewarding_lm.cli import main, make_parser
from self_rewarding_lm.cli.judging_flags import Flags
from self_rewarding_lm.evaluation.judge_quality import read_ranked
from tests.cli.test_cli import write_lines
from tests.support.hf_models import tiny, word_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
RANKED = [
    {"prompt": "one", "replies": ["a b", "a"]},
    {"prompt": "two", "chosen": "x", "rejected": "y"},
    {"input": "six", "output_1": "h", "output_2": "i", "label": 2},
]
OBJECTS = """\
from self_rewarding_lm import RewardConfig

reward = RewardConfig(
    prompt_template="{{ prompt }} {{ response }}", parse_reward=lambda text: len(text) % 6
)

def longer(prompts, completions):
    return [float(len(text)) for text in completions]

def right(prompts, completions, wanted):
    return [float(letter in text) for text, letter in zip(completions, wanted)]
"""
REWARD = """\
prompt_template: "{{ prompt }} {{ response }}"
reward_regex_template: "Score: {{ reward }}"
score_range: [0, 5]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m0"
    tokenizer = word_tokenizer()
    tiny("llama", vocab=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_lines(tmp_path / "ranked.jsonl", RANKED)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": t, "wanted": "a"} for t in ("x", "y", "z")])
    (tmp_path / "objects_of_it.py").write_text(OBJECTS)
    (tmp_path / "reward.yaml").write_text(REWARD)
    (tmp_path / "m0").symlink_to(model)
    return tmp_path


SHORTLY = "{max_new_tokens: 16, temperature: 1.0}"
JUDGE = ["judge", "--model", "m0", "--ranked", "ranked.jsonl", "--quiet", "--judging", SHORTLY]
PARSED = ["--reward", "objects_of_it:reward", "--chat-template", "raw"]
SHORT = ["--sampling", "{max_new_tokens: 6, temperature: 1.0}", "--quiet"]
COMPARE = ["compare", "m0", "m0", "--prompts", "prompts.jsonl", *SHORT]


def test_a_judge_is_measured_and_told_in_a_table(folder, capsys):
    assert main([*JUDGE, *PARSED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 replies to 3 prompts in 3 groups"
    assert [line[:20].strip() for line in lines[2:11]] == [
        *("pairwise accuracy", "ties as a half", "tie rate", "5-best", "exact match"),
        *("Spearman", "Kendall tau-b", "parse rate", "self-agreement"),
    ]
    [parsed] = [line for line in lines if line.startswith("parse rate")]
    assert parsed.split() == ["parse", "rate", "1.000", "of", "6", "judgements"]
    assert max(map(len, lines)) <= 100


def test_the_same_numbers_come_as_json(folder, capsys):
    assert main([*JUDGE, *PARSED, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["parse_rate"] == 1.0 and found["metrics"]["tie_rate"] <= 1
    assert found["intervals"]["scored"] == [1.0, 1.0]
    assert sum(found["histogram"].values()) == 6
    assert found["calibration"]["pairs"] == 3


def test_a_pairwise_judge_says_what_position_does(folder, capsys):
    assert main([*JUDGE, "--pairwise", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["metrics"]["parse_rate"] == 0.0  # it is random


def test_two_models_are_compared_and_kept(folder, capsys):
    asked = [*COMPARE, "--judge", "objects_of_it:longer", "--out", "kept"]
    assert main(asked) == 0
    table = capsys.readouterr().out
    assert table.startswith("m0 against m0: 3 prompts")
    assert {"won", "lost", "length-controlled", "held-out reward", "distinct-2"} <= {
        line[:20].strip() for line in table.splitlines()
    }
    assert (folder / "kept" / "judged" / "judgements.jsonl").exists()
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rates"]["ties"] == 3 and found["rates"]["win_rate"]["value"] == 0.5
    assert found["first"] == found["second"]


def test_a_verifier_gives_accuracy_and_pass_at_k(folder, capsys):
    assert main([*COMPARE, "--verifier", "objects_of_it:right", "--samples", "2"]) == 0
    assert {"accuracy", "pass@2"} <= {
        line[:20].strip() for line in capsys.readouterr().out.splitlines()
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--ranked", "none.jsonl"], "--ranked: there is no file"),
        (["--reward", "none.yaml"], "none.yaml"),
        (["--judging", "{temprature: 0}"], "did you mean 'temperature'?"),
        (["--reward", "reward.yaml", "--pairwise"], "not both"),
        (["--model", "./none"], "--model: there is no file or folder"),
        (["--reward", "objects_of_it:none"], "cannot be imported"),
    ],
)
def test_what_a_flag_cannot_be_is_named(folder, capsys, changes, words):
    assert main([*JUDGE, *changes]) == 1
    assert words in capsys.readouterr().err


def test_who_judges_must_be_said_once(folder, capsys):
    assert main(COMPARE) == 1
    assert "who judges?" in capsys.readouterr().err
    assert main([*COMPARE, "--pairwise", "--judge", "objects_of_it:longer"]) == 1
    assert "give one of" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not beside this checkout")
def test_published_rows_are_read_as_they_are():
    rows = read_ranked(str(DATA / "llmbar_natural_100.json"))
    assert len(rows) == 100 and {r.ranks for r in rows} == {(0.0, 1.0), (1.0, 0.0)}
    trees = read_ranked(DATA / "oasst_en_100_trees.jsonl")
    assert len({r.group for r in trees}) > 50 and all(len(r.replies) >= 2 for r in trees)
    assert trees == read_ranked(trees)


def test_a_file_of_trees_gives_all_its_ranked_replies(tmp_path):
    def message(text, role, **more):
        return {"text": text, "role": role, "lang": "en", "message_id": text, **more}

    replies = [message(f"r{i}", "assistant", rank=i, replies=[]) for i in range(2)]
    tree = {"message_tree_id": "t", "prompt": message("hello", "prompter", replies=replies)}
    write_lines(tmp_path / "trees.jsonl", [{**tree, "message_tree_id": t} for t in ("t", "u")])
    rows = read_ranked(tmp_path / "trees.jsonl")
    assert [(r.prompt, r.replies, r.ranks) for r in rows] == [("hello", ("r0", "r1"), (0, 1))] * 2
    assert {r.group for r in rows} == {"t", "u"}


def test_a_judge_is_read_by_marks_that_a_yaml_file_names(folder, capsys):
    marks = 'prompt_template: "{{ prompt }} {{ response }}"\nmarks: {items: 1, yes: is, no: not}\n'
    (folder / "reward.yaml").write_text(marks)
    assert (
        main([*JUDGE, "--reward", "reward.yaml", "--chat-template", "raw", "--json"]) == 1
    )  # it is random
    told = json.loads(capsys.readouterr().out)
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        marks=MarkedRubric(items=1, yes="is", no="not"),
    )
    judging = SamplingConfig(max_new_tokens=16, temperature=1.0)
    options = dict(reward=reward, judging=judging, chat_template="raw", quiet=True)
    assert told["metrics"] == evaluate_judge("m0", RANKED, **options).metrics()
    (folder / "reward.yaml").write_text(f"{marks}parse_reward: objects_of_it:longer\n")
    assert main([*JUDGE, "--reward", "reward.yaml"]) == 1
    assert "marks alone make the score" in capsys.readouterr().err


def test_the_command_says_what_the_function_says(folder, capsys):
    assert (
        main([*JUDGE, "--reward", "reward.yaml", "--chat-template", "raw", "--json"]) == 1
    )  # it is random
    told = json.loads(capsys.readouterr().out)["metrics"]
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="Score: {{ reward }}",
        score_range=(0, 5),
    )
    judging = SamplingConfig(max_new_tokens=16, temperature=1.0)
    options = dict(reward=reward, judging=judging, chat_template="raw", quiet=True)
    assert told == evaluate_judge("m0", RANKED, **options).metrics()


def test_a_judge_of_which_nothing_can_be_read_shows_its_texts_and_what_to_do(folder, capsys):
    asked = [*JUDGE, "--reward", "reward.yaml", "--chat-template", "raw"]
    assert main(asked) == 1
    told = capsys.readouterr()
    assert told.out == ""
    words = "self-rewarding-lm: error: none of 6 judgements has a score: 6 no_score. "
    lines = told.err[told.err.index(words) :].splitlines()
    texts = [j.text for j in evaluate_judge("m0", RANKED, **read_as()).judgements]
    assert [line.split(": ", 1)[1] for line in lines[1:4]] == [repr(text) for text in texts[:3]]
    assert "--score expected --at-once" in lines[4] and "max_new_tokens: 512" in lines[4]
    assert main([*asked, "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["metrics"]["parse_rate"] == 0 and "none of 6" in told.err


def read_as():
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="Score: {{ reward }}",
        score_range=(0, 5),
    )
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0)
    return dict(reward=reward, judging=sampling, chat_template="raw", quiet=True)


@pytest.mark.parametrize("given", [[], ["--reward", "reward.yaml"], ["--pairwise"]])
def test_scores_from_probabilities_are_asked_for_by_flags(folder, capsys, given):
    options = make_parser().parse_args([*JUDGE, *given, "--score", "expected", "--at-once"])
    flags = Flags(options)
    prompt = flags.comparison() if options.pairwise else flags.reward()
    assert (prompt.score_mode, prompt.forced_ending) == ("expected", "at_once")
    plain = Flags(make_parser().parse_args([*JUDGE, *given]))
    before = plain.comparison() if options.pairwise else plain.reward()
    assert before is None or (before.score_mode, before.forced_ending) == ("sampled", False)
    assert before is None or before.prompt_template == prompt.prompt_template


def test_a_score_at_once_needs_no_text(folder, capsys):
    asked = [*JUDGE, "--reward", "reward.yaml", "--chat-template", "raw", "--json"]
    main([*asked, "--score", "expected", "--at-once"])
    told = capsys.readouterr()
    reasons = {"low_mass"} if "none of 6" in told.err else set()
    assert not reasons or "low_mass" in told.err
    assert "no_score" not in told.err
    both = ["--judge", "objects_of_it:longer", "--score", "expected"]
    assert main([*COMPARE, *both]) == 1
    assert "--judge is set" in capsys.readouterr().err
    assert main([*JUDGE, "--pairwise", "--reward", "paper"]) == 1
    assert "give one of --reward and --pairwise" in capsys.readouterr().err
