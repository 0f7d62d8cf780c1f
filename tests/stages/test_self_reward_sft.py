"""Supervised training on top-scored responses: which are taken, and what is trained."""

import pytest
import torch

from self_rewarding_lm.config import (
    ComparisonConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    from_stage,
)
from self_rewarding_lm.errors import ConfigError, PairingError
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.records import Candidate
from self_rewarding_lm.stages.pairing import DropCounts
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig, top_scored
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.trainer import SelfRewardingTrainer
from tests.support.models import ALPHABET, CHARACTERS, TEXT_VOCAB, transformer

PROMPTS = [f"tell {i}" for i in range(6)]
ROWS = [{"prompt": "say 1", "completion": "one"}, {"prompt": "say 2", "completion": "two"}]
SAMPLING = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=4)


def vowels(prompts, completions):
    """2 for a response with at least one vowel or digit, else 1, or 0 with a space."""
    return [
        0.0 if " " in text else 1.0 + any(c in "aeiou0123456789" for c in text)
        for text in completions
    ]


def candidate(sample, text, *, finished=True):
    return Candidate(f"s/0/0/{sample}", "s/0/0", (sample,), text, finished, 4)


def taken(candidates, scores, **options):
    drops = DropCounts()
    ids = {c.id: s for c, s in zip(candidates, scores, strict=True)}
    found = top_scored(candidates, ids, drops, min_score=5, **options)
    return [c.text for c in found], drops


def test_all_responses_with_the_top_score_are_taken_each_text_once():
    given = [candidate(i, text) for i, text in enumerate(["a", "b", "c", " b", "d"])]
    found, drops = taken(given, [5.0, 5.0, 4.9, 5.0, None])
    assert found == ["a", "b"]
    assert drops.kept == 2
    assert drops.candidates == {"unscored": 1, "low_score": 1, "identical": 1}
    assert drops.prompts == {}


@pytest.mark.parametrize(
    ("given", "scores", "options", "reason"),
    [
        ([candidate(0, "a", finished=False)], [5.0], {}, "unfinished"),
        ([candidate(0, "a"), candidate(1, "b", finished=False)], [None, 5.0], {}, "unscored"),
        ([candidate(0, "a")], [5.0], {"is_valid_score": lambda s: s != 5}, "invalid_score"),
        ([candidate(0, "a")], [4.0], {}, "low_score"),
        ([candidate(0, "a")], [-1.0], {}, "low_score"),
    ],
)
def test_a_prompt_that_gives_nothing_is_counted_by_its_reason(given, scores, options, reason):
    found, drops = taken(given, scores, **options)
    assert found == []
    assert drops.prompts == {reason: 1}
    assert drops.kept == 0


def stage(**changes):
    return SelfRewardSFTConfig(
        **{
            "prompt_dataset": PROMPTS,
            "num_candidate_responses": 3,
            "generation": SAMPLING,
            "judge": FunctionJudge(vowels),
            "min_score": 2,
            "dropout": 0.0,
            "num_train_steps": 3,
            "prompts_per_block": 4,
            "optim": OptimConfig(learning_rate=1e-2, batch_size=4),
            **changes,
        }
    )


def trainer(folder, *stages, seed=0):
    return SelfRewardingTrainer(
        transformer(vocab=len(ALPHABET), max_seq_len=64),  # no end token: none is cut off
        finetune_configs=list(stages),
        tokenizer=CHARACTERS,
        seed=seed,
        checkpoints_folder=folder,
        accelerate_kwargs={"cpu": True},
        quiet=True,
    )


def test_the_stage_learns_what_its_records_say_has_the_top_score(tmp_path):
    run = trainer(tmp_path, stage(train_dataset=ROWS))()
    scores = {j.candidate_ids[0]: j.score for j in run.judgements(0)}
    expected, seen = [], set()
    for c in run.candidates(0):
        key = (c.prompt_id, c.text.strip())
        if scores[c.id] >= 2 and key not in seen:
            expected.append(c.ids)
        seen |= {key} if scores[c.id] >= 2 else set()
    made = run.demonstrations(0)
    assert 0 < len(expected) < len(scores)
    assert [d.completion_ids for d in made] == expected
    assert all(d.parents == (d.id.rsplit("/", 1)[0], d.id) for d in made)
    trained = [row.ids for row in run.rows(0)]
    assert [(*d.prompt_ids, *d.completion_ids) for d in made] == trained[2:]
    assert len(trained) == len(made) + 2
    assert run.summary(0)["rows"] == len(trained)


def test_the_wanted_number_of_responses_is_kept(tmp_path):
    run = trainer(tmp_path, stage(num_generated_preference_pairs=2))()
    assert len(run.demonstrations(0)) == 2
    everything = trainer(tmp_path / "all", stage())()
    assert [d.id for d in run.demonstrations(0)] == [d.id for d in everything.demonstrations(0)[:2]]


def test_with_fit_from_initial_the_first_weights_are_trained_on_what_later_ones_said(tmp_path):
    """The same as supervised training of the first weights on those rows."""
    before = SFTConfig(
        train_dataset=ROWS,
        num_train_steps=4,
        dropout=0.0,
        name="m1",
        optim=OptimConfig(learning_rate=3e-2),
    )
    loop = trainer(tmp_path / "loop", before, stage(name="m2", fit_from="initial"))
    run = loop()
    rows = [(list(row.ids), row.targets.index(True)) for row in run.rows("m2")]
    alone = trainer(
        tmp_path / "alone",
        SFTConfig(
            name="m2",
            train_dataset=rows,
            num_train_steps=3,
            dropout=0.0,
            optim=OptimConfig(learning_rate=1e-2, batch_size=4),
        ),
    )
    alone()
    pairs = zip(loop.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    said = {c.ids for c in run.candidates("m2")}
    first = trainer(tmp_path / "first", stage(name="m2"))()
    assert said != {c.ids for c in first.candidates("m2")}  # m1 answered, not the first weights


def test_a_later_stage_takes_the_responses(tmp_path):
    later = SFTConfig(train_dataset=from_stage("self_reward_sft"), num_train_steps=1)
    run = trainer(tmp_path, stage(), later)()
    made = run.demonstrations("self_reward_sft")
    assert [r.ids for r in run.rows("sft")] == [(*d.prompt_ids, *d.completion_ids) for d in made]


def test_without_any_top_score_the_error_says_what_to_do(tmp_path):
    with pytest.raises(PairingError, match=r"has the top score of 3\. Dropped: .*low_score"):
        trainer(tmp_path, stage(min_score=3))()


@pytest.mark.parametrize(
    "pairs_only", [{"dpo_beta": 0.2}, {"min_margin": 1.0}, {"pick_paired_rewards_fn": len}]
)
def test_settings_of_pairs_are_refused(pairs_only):
    with pytest.raises(ConfigError, match="for pairs only, and this stage makes none"):
        stage(**pairs_only)


def test_a_judge_of_one_s_own_needs_a_least_score(tmp_path):
    with pytest.raises(ConfigError, match="the top score is not known"):
        trainer(tmp_path, stage(min_score=None))


@pytest.mark.parametrize(
    ("changes", "top"),
    [
        ({}, 5.0),
        ({"self_reward_config_keyname": "words"}, 3.0),
        ({"comparison": ComparisonConfig()}, 1.0),
        ({"min_score": 4.5}, 4.5),
    ],
)
def test_the_top_score_is_the_highest_that_the_judge_may_give(tmp_path, changes, top):
    template = "{{ prompt }} {{ response }}"
    score = "Score: {{ reward }}"
    rewards = {
        "default": RewardConfig(
            prompt_template=template, reward_regex_template=score, score_range=(0, 5)
        ),
        "words": RewardConfig(
            prompt_template=template, reward_regex_template=score, allowed_scores=(1, 3, 2)
        ),
    }
    own = SelfRewardSFTConfig(prompt_dataset=PROMPTS, **changes)
    from tests.support.models import context, text_tokens

    ctx = context(transformer(vocab=TEXT_VOCAB), tokens=text_tokens(), rewards=rewards)
    assert own.least_score(ctx) == top


def test_mixed_rows_are_checked_before_the_run(tmp_path):
    with pytest.raises(Exception, match="train_dataset"):
        trainer(tmp_path, stage(train_dataset=[{"prompt": "x"}]))
