"""A judge against human rankings: figures that can be counted by hand, judges known beforehand."""

import json
import logging
import re

import pytest
import torch

from self_rewarding_lm import RewardConfig, SamplingConfig, evaluate_judge
from self_rewarding_lm.data.ranked import as_candidates
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.evaluation.judge_quality import judge_ranked
from self_rewarding_lm.evaluation.tables import judge_table
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.judges.make import top_score_of
from self_rewarding_lm.judges.self_judge import SelfJudge
from self_rewarding_lm.records import RankedReplies, stable_hash
from self_rewarding_lm.runtime import Runtime
from tests.support.models import (
    ALPHABET,
    CHARACTERS,
    END,
    TEXT_VOCAB,
    Fixed,
    Recurrent,
    context,
    decode,
    ids_of,
    lively,
    text_tokens,
)

REWARD = RewardConfig(
    prompt_template="rate <{{ prompt }}> and <{{ response }}>:",
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)
RANKED = [
    RankedReplies("", "one", ("a", "b", "c"), (0.0, 1.0, 2.0), "tree 1"),
    RankedReplies("", "two", ("d", "e"), (0.0, 1.0), "tree 2"),
    RankedReplies("", "six", ("f", "g", "h"), (1.0, 0.0, 0.0), "tree 2"),
]
ROWS = [
    {"prompt": "one", "replies": ["a", "b", "c"], "group": "tree 1"},
    {"prompt": "two", "replies": ["d", "e"], "group": "tree 2"},
    {"prompt": "six", "replies": ["f", "g", "h"], "ranks": [1, 0, 0], "group": "tree 2"},
]
SAID = {  # of the reply in the judge prompt
    "a": "Score: 5",
    "b": "so so. Score: 3",
    "c": "Score: 3",
    "d": "Score: 2",
    "e": "better. Score: 4",
    "f": "Score: 1",
    "g": "no idea",
    "h": "Score: 5",
}


class Saying(LocalEngine):
    """An engine that answers to the reply in the judge prompt, and notes what it was asked."""

    def __init__(self, said=SAID) -> None:
        super().__init__()
        self.said = said
        self.asked: list[str] = []

    def generate(self, model, requests, decoding):
        for i in reversed(range(len(requests))):
            prompt = decode(torch.tensor(requests[i].ids))
            self.asked.append(prompt)
            text = self.said[prompt[prompt.index("and <") + 5]]
            yield i, Completion((*ids_of(text), END), True)


class ByKey(LocalEngine):
    """An engine that answers with the text named for a judgement's id, whatever it is asked."""

    def __init__(self, texts, seed: int = 0) -> None:
        super().__init__()
        self.texts = {stable_hash(seed, name): text for name, text in texts.items()}

    def generate(self, model, requests, decoding):
        for i, request in enumerate(requests):
            yield i, Completion((*ids_of(self.texts[request.key]), END), True)


def model() -> torch.nn.Module:
    return lively(Recurrent(TEXT_VOCAB).double())


def evaluated(ranked=RANKED, module=None, **options):
    settings = dict(tokenizer=CHARACTERS, reward=REWARD, eos_id=END, engine=Saying(), quiet=True)
    return evaluate_judge(module or model(), ranked, **{**settings, **options})


def test_every_figure_is_what_a_reader_counts():
    # one: a>b and a>c agree, b and c tie. two: e is scored over d, against people.
    # six: g has no score; h (rank 0) over f (rank 1) agrees, g against f is unscored.
    found = evaluated()
    pairs = found.agreement.pairs
    assert (pairs.agree, pairs.disagree, pairs.tied, pairs.unscored) == (3, 1, 1, 1)
    assert pairs.accuracy == 3 / 4 and pairs.accuracy_ties_half == 3.5 / 5
    assert pairs.tie_rate == 1 / 5
    assert found.parse_rate == found.agreement.scored == 7 / 8
    assert found.histogram == {1.0: 1, 2.0: 1, 3.0: 2, 4.0: 1, 5.0: 2}
    assert list(found.histogram) == sorted(found.histogram)
    assert found.agreement.best_precision == 1.0 and found.agreement.best_count == 2  # a and h
    assert found.agreement.exact_match == 0.0
    assert (found.agreement.groups, found.agreement.instructions) == (2, 3)
    assert [item.scores for item in found.items] == [(5, 3, 3), (2, 4), (1, None, 5)]
    assert [item.ranks for item in found.items] == [item.ranks for item in RANKED]


def test_the_interval_resamples_trees_and_not_rows():
    # resamples of two trees: tree 1 alone 2/2, tree 2 alone 1/2, both 3/4
    assert evaluated().pairwise_interval == (0.5, 1.0)
    in_one_tree = [RankedReplies("", i.prompt, i.replies, i.ranks, "tree") for i in RANKED]
    assert evaluated(in_one_tree).pairwise_interval is None


def test_the_judge_is_shown_the_prompt_and_each_reply():
    engine = Saying()
    evaluated(engine=engine)
    shown = [("one", "abc"), ("two", "de"), ("six", "fgh")]
    assert sorted(engine.asked) == sorted(
        f"rate <{prompt}> and <{reply}>:" for prompt, replies in shown for reply in replies
    )


def test_judgements_keep_their_words_and_come_in_the_order_of_the_rows():
    found = evaluated()
    assert [(j.id, j.text, j.score) for j in found.judgements[:4]] == [
        ("evaluate/0/0/0/j0", "Score: 5", 5.0),
        ("evaluate/0/0/1/j0", "so so. Score: 3", 3.0),
        ("evaluate/0/0/2/j0", "Score: 3", 3.0),
        ("evaluate/1/0/0/j0", "Score: 2", 2.0),
    ]
    assert len(found.judgements) == 8


def test_several_judgements_of_a_reply_are_averaged_and_unreadable_ones_left_out():
    texts = {
        "evaluate/0/0/0/j0": "Score: 1",
        "evaluate/0/0/0/j1": "Score: 4",
        "evaluate/0/0/1/j0": "hm",
        "evaluate/0/0/1/j1": "Score: 3",
    }
    ranked = [RankedReplies("", "one", ("a", "b"), (0.0, 1.0), "tree")]
    found = evaluated(ranked, engine=ByKey(texts), num_judgements=2)
    assert found.items[0].scores == (2.5, 3.0)
    assert found.agreement.pairs.disagree == 1
    assert found.parse_rate == 3 / 4 and found.agreement.scored == 1.0
    assert found.histogram == {1.0: 1, 3.0: 1, 4.0: 1}


def test_a_judge_that_says_what_people_said_has_full_marks_and_its_reverse_none():
    ranked = [
        {"prompt": "one", "replies": ["a", "b", "c"]},
        {"prompt": "two", "replies": ["a", "c"]},
        {"prompt": "six", "replies": ["a", "b"]},
    ]
    for texts, accuracy, correlation in (("520", 1.0, 1.0), ("025", 0.0, -1.0)):
        said = {reply: f"Score: {text}" for reply, text in zip("abc", texts, strict=True)}
        found = evaluated(ranked, engine=Saying(said))
        assert found.agreement.pairs.accuracy == found.agreement.exact_match == accuracy
        assert found.agreement.spearman == pytest.approx(correlation)
        assert found.pairwise_interval == (accuracy, accuracy)


def test_a_model_that_says_the_same_whatever_it_reads_gives_nothing_but_ties():
    row = [9.0 if c in "012345" else 0.0 for c in ALPHABET] + [0.0]
    reward = RewardConfig(**{**dict(REWARD), "forced_ending": "at_once"})
    found = evaluated(module=Fixed(row).double(), reward=reward, engine=None)
    pairs = found.agreement.pairs
    assert (pairs.tied, pairs.total) == (6, 6) and pairs.tie_rate == 1.0
    assert pairs.accuracy is None and pairs.accuracy_ties_half == 0.5
    assert found.pairwise_interval is None and found.agreement.uncorrelated == 3
    assert found.histogram == {2.5: 8} and found.parse_rate == 1.0  # 0 to 5 alike


def test_rows_files_and_records_are_the_same(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_records = evaluated()
    assert evaluated(ROWS) == evaluated(path) == evaluated(str(path)) == from_records


def test_a_real_model_judges_the_same_twice_and_is_left_as_it_was():
    module = model().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    reward = RewardConfig(
        prompt_template="{{ prompt }}>{{ response }}:",
        parse_reward=lambda text: float(len(set(text))),
    )
    options = dict(reward=reward, judging=SamplingConfig(max_new_tokens=6), engine=None)
    found = evaluated(module=module, **options)
    assert found == evaluated(module=module, **options)
    assert found != evaluated(module=module, seed=1, **options)
    assert found.agreement.best_precision is None  # no limit to the scores is known
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_its_table_says_why_judgements_have_no_score():
    [line] = [line for line in judge_table(evaluated()).splitlines() if line.startswith("parse")]
    assert line.endswith("of 8 judgements; without a score: 1 no_score")


@pytest.fixture
def logger():
    logger = logging.getLogger("self_rewarding_lm")
    kept = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(kept)


def test_its_progress_is_in_the_log_unless_it_is_quiet(logger, caplog):
    for quiet in (False, True, False):
        caplog.clear()
        evaluated(quiet=quiet)
        lines = [text for text in caplog.messages if re.search(r"judging: \d+ judgements in", text)]
        assert len(lines) == (not quiet)


def test_a_run_around_it_logs_as_before(logger):
    for quiet in (False, True):
        runtime = Runtime({}, quiet=quiet)
        evaluated(quiet=not quiet)
        with runtime.at_work():
            level = logger.level
            assert level == (logging.WARNING if quiet else logging.INFO)
            evaluated(quiet=not quiet)
            assert logger.level == level


def test_a_run_goes_on_logging_after_a_quiet_one_within_it(logger):
    with Runtime({}).at_work():
        with Runtime({}, quiet=True).at_work():
            assert logger.level == logging.WARNING
        assert logger.level == logging.INFO


def test_a_level_that_the_user_set_holds_in_a_run(logger):
    runtime = Runtime({})
    logger.setLevel(logging.WARNING)
    with runtime.at_work():
        assert logger.level == logging.WARNING


def test_a_judge_in_a_trainers_context_is_measured_alike():
    ctx = context(model(), stage="mine", tokens=text_tokens(), engine=Saying())
    found = judge_ranked(ctx, RANKED, SelfJudge(REWARD, SamplingConfig(), 1), top_score=5)
    alone = evaluated()
    assert (found.agreement, found.histogram, found.items) == (
        alone.agreement,
        alone.histogram,
        alone.items,
    )
    assert found.pairwise_interval == alone.pairwise_interval
    assert found.judgements[0].id == "mine/0/0/0/j0"


def test_any_judge_can_be_measured():
    def shorter(prompts, completions, **columns):
        return [-float(len(text)) for text in completions]

    ctx = context(model(), tokens=text_tokens())
    ranked = [RankedReplies("", "one", ("a", "bb", "ccc"), (0.0, 1.0, 2.0), "tree")]
    assert judge_ranked(ctx, ranked, FunctionJudge(shorter)).agreement.exact_match == 1.0


def test_replies_of_people_become_candidates_that_nobody_sampled():
    item = RankedReplies("eft/7", "one", ("a", "bc"), (0.0, 1.0), "tree")
    prompt, candidates = as_candidates(item, text_tokens())
    assert (prompt.id, prompt.row, prompt.text, prompt.ids) == ("eft/7/0", 7, "one", ids_of("one"))
    assert [c.id for c in candidates] == ["eft/7/0/0", "eft/7/0/1"]
    assert [c.ids for c in candidates] == [(*ids_of("a"), END), (*ids_of("bc"), END)]
    assert {(c.prompt_id, c.finished, c.max_new_tokens) for c in candidates} == {
        ("eft/7/0", None, 0)
    }


def test_the_top_score_is_what_the_reward_prompt_allows():
    free = RewardConfig(prompt_template="", parse_reward=len)
    few = RewardConfig(prompt_template="", parse_reward=len, allowed_scores=(1, 9, 4))
    assert [top_score_of(r) for r in (REWARD, few, free)] == [5.0, 9.0, None]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (dict(ranked=[]), DataError, "empty"),
        (dict(ranked=[{"prompt": "one", "replies": ["a"]}]), DataError, "ranked, row 0: at least"),
        (dict(ranked=[{"prompt": "one"}]), DataError, "ranked, row 0"),
        (dict(ranked="missing.jsonl"), DataError, "missing.jsonl"),
        (dict(num_judgements=0), ConfigError, "num_judgements must be 1 or more"),
        (
            dict(reward=RewardConfig(prompt_template="{{ prompt }}", parse_reward=len)),
            ConfigError,
            "{{ response }}",
        ),
        (dict(module=Recurrent(8)), ConfigError, "eos_id must be one of the model's 8 tokens"),
    ],
)
def test_what_cannot_be_used_is_named(wrong, error, words):
    with pytest.raises(error) as caught:
        evaluated(**wrong)
    assert words in str(caught.value)


def test_a_stage_is_no_dataset_outside_a_run():
    from self_rewarding_lm import from_stage

    with pytest.raises(DataError, match="there is no run here"):
        evaluated(from_stage("eft"))


def test_a_row_that_is_no_ranking_is_named_before_the_model_is_loaded(tmp_path):
    with pytest.raises(DataError, match="row 0: the row has no 'replies'"):
        evaluate_judge(tmp_path / "no model here", [{"prompt": "q"}])
