"""Settings: what is refused and how it is said; defaults; the learning rate of a step."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import self_rewarding_lm
from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    FinetuneConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.errors import ConfigError, SelfRewardingError
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.training.optimizers import learning_rate_at

ROWS = [([1, 2], 1)]
STAGES = [
    (SFTConfig, {"train_dataset": ROWS}),
    (DPOConfig, {"train_dataset": ROWS}),
    (SelfPlayConfig, {"train_dataset": ROWS}),
    (SelfRewardDPOConfig, {"prompt_dataset": ROWS, "num_generated_preference_pairs": 2}),
    (
        ExternalRewardDPOConfig,
        {"prompt_dataset": ROWS, "num_generated_preference_pairs": 2, "reward_model": len},
    ),
]


@pytest.mark.parametrize(
    ("config", "wrong", "meant"),
    [
        (SamplingConfig, "temprature", "temperature"),
        (SamplingConfig, "max_tokens", "max_new_tokens"),
        (OptimConfig, "batchsize", "batch_size"),
        (OptimConfig, "learn_rate", "learning_rate"),
        (RewardConfig, "reward_regex", "reward_regex_template"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(config, wrong, meant):
    with pytest.raises(ConfigError, match=rf"'{wrong}' is not a setting; did you mean '{meant}'\?"):
        config(**{wrong: 1})


@pytest.mark.parametrize(("config", "needed"), STAGES)
def test_every_stage_refuses_unknown_settings(config, needed):
    config(**needed)
    with pytest.raises(ConfigError, match=r"'droput' is not a setting; did you mean 'dropout'\?"):
        config(**needed, droput=0.1)


def test_an_unknown_setting_like_no_known_one_is_answered_with_the_list():
    with pytest.raises(ConfigError, match=r"'xyzzy' is not a setting\. It has: temperature, top_p"):
        SamplingConfig(xyzzy=1)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="SFTConfig: 'train_dataset' is required"):
        SFTConfig()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SamplingConfig(temperature=-0.1), "temperature.*got -0.1"),
        (lambda: SamplingConfig(top_p=0.0), "top_p.*got 0.0"),
        (lambda: SamplingConfig(top_p=1.1), "top_p.*got 1.1"),
        (lambda: SamplingConfig(top_k=0), "top_k.*got 0"),
        (lambda: SamplingConfig(min_p=2), "min_p.*got 2"),
        (lambda: SamplingConfig(max_new_tokens=0), "max_new_tokens.*got 0"),
        (lambda: SamplingConfig(temperature="warm"), "temperature.*got 'warm'"),
        (
            lambda: SamplingConfig(min_new_tokens=9, max_new_tokens=8),
            r"min_new_tokens \(9\) is more than max_new_tokens \(8\)",
        ),
        (lambda: OptimConfig(learning_rate=0), "learning_rate.*got 0"),
        (lambda: OptimConfig(batch_size=0), "batch_size.*got 0"),
        (lambda: OptimConfig(optimizer="adam"), "optimizer must be 'adamw', 'muon'.*got 'adam'"),
        (lambda: OptimConfig(schedule="step"), "schedule.*got 'step'"),
        (lambda: RewardConfig(prompt_template="x"), "reward_regex_template.*or parse_reward"),
        (
            lambda: RewardConfig(prompt_template="x", parse_reward="Score"),
            "parse_reward must be a function, got 'Score'",
        ),
        (
            lambda: RewardConfig(
                prompt_template="x", reward_regex_template="y", score_range=(5, 0)
            ),
            r"score_range must be \(low, high\), got \(5.0, 0.0\)",
        ),
        (lambda: SFTConfig(train_dataset=ROWS, name="a/b"), "name.*got 'a/b'"),
        (lambda: SFTConfig(train_dataset=ROWS, dropout=1.0), "dropout.*got 1.0"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_what_came(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_config_error_is_a_value_error_and_one_of_ours():
    with pytest.raises(ValueError) as caught:
        SamplingConfig(top_k=0)
    assert isinstance(caught.value, SelfRewardingError)


@pytest.mark.parametrize(("config", "needed"), STAGES)
def test_no_stage_trains_for_0_steps(config, needed):
    with pytest.raises(ConfigError, match=r"num_train_steps.*got 0"):
        config(**needed, num_train_steps=0)


@pytest.mark.parametrize(("config", "needed"), STAGES)
def test_two_lengths_of_training_are_refused(config, needed):
    config(**needed, num_train_steps=3)
    config(**needed, optim=OptimConfig(epochs=2))
    with pytest.raises(ConfigError, match=r"num_train_steps and optim\.epochs both"):
        config(**needed, num_train_steps=3, optim=OptimConfig(epochs=2))


def test_a_config_cannot_be_changed():
    config = SamplingConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.temperature = 0.1
    assert config.temperature == 0.7


def test_configs_compare_by_identity():
    one, other = SamplingConfig(), SamplingConfig()
    assert one == one and hash(one) == hash(one)
    assert one != other
    assert len({one, other, one}) == 2


def test_a_dataset_is_taken_as_it_is_and_not_copied():
    assert SFTConfig(train_dataset=ROWS).train_dataset is ROWS


@pytest.mark.parametrize("name", ["spin_lambda", "spin_λ"])
def test_spin_lambda_may_be_written_in_greek(name):
    config = SelfPlayConfig(train_dataset=ROWS, **{name: 0.25})
    assert config.spin_lambda == config.spin_λ == 0.25


def test_two_spin_lambdas_are_one_too_many():
    with pytest.raises(ConfigError, match="spin_λ"):
        SelfPlayConfig(train_dataset=ROWS, spin_lambda=0.25, spin_λ=0.5)


def test_spin_lambda_stays_what_it_is_by_default():
    assert SelfPlayConfig(train_dataset=ROWS).spin_λ == 0.1


def test_the_datasets_of_a_stage_are_those_that_are_given():
    stage = SFTConfig(train_dataset=ROWS)
    assert stage.datasets() == {"train_dataset": ROWS}
    stage = SFTConfig(train_dataset=ROWS, valid_dataset=[])
    assert stage.datasets() == {"train_dataset": ROWS, "valid_dataset": []}


def test_a_stage_of_ones_own_is_a_subclass_with_run():
    class Mine(FinetuneConfig):
        strength: float = 1.0

        def run(self, ctx, out):
            out.append((ctx, self.strength))

    done = []
    Mine(strength=2.0, name="mine").run("ctx", done)
    assert done == [("ctx", 2.0)]


def test_defaults_are_the_papers():
    """arXiv:2401.10020, 3.1.3."""
    sampling, optim = SamplingConfig(), OptimConfig()
    assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    assert (optim.batch_size, optim.eval_every, optim.schedule) == (16, 200, "cosine")
    assert DPOConfig(train_dataset=ROWS).dpo_beta == 0.1
    assert DEFAULT_REWARD_CONFIG.score_range == (0, 5)


def test_configs_can_be_imported_without_torch():
    program = "import sys, self_rewarding_lm.config; print('torch' in sys.modules)"
    root = str(Path(self_rewarding_lm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "rate", "final", "epochs"),
    [
        ({}, 5.5e-6, 1.1e-6, 3),  # nothing said: the stage's defaults
        ({"learning_rate": 1e-3}, 1e-3, 1e-4, 3),  # a tenth of what is given
        ({"final_learning_rate": 2e-6}, 5.5e-6, 2e-6, 3),
        ({"final_learning_rate": 0.0}, 5.5e-6, 0.0, 3),  # 0 is said, not missing
        ({"learning_rate": 1e-3, "final_learning_rate": 1e-3, "epochs": 7}, 1e-3, 1e-3, 7),
    ],
    ids=str,
)
def test_defaults_of_a_stage_fill_what_is_not_said(given, rate, final, epochs):
    done = OptimConfig(batch_size=5, **given).completed(5.5e-6, 1.1e-6, 3)
    assert done.learning_rate == rate
    assert done.final_learning_rate == pytest.approx(final)
    assert done.epochs == epochs
    assert done.batch_size == 5


def rates(total, **settings):
    optim = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, **settings)
    return [learning_rate_at(step, total, optim) for step in range(total)]


def test_the_cosine_falls_from_the_first_rate_to_the_final_one_at_the_last_step():
    expected = [1.0, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6, None, 0.2]
    expected[3] = 0.2 + 0.4 * (1 + math.cos(3 * math.pi / 4))
    assert rates(5) == pytest.approx(expected)


def test_the_line_falls_evenly_to_the_final_rate_at_the_last_step():
    assert rates(5, schedule="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_constant_rate_stays_after_the_warm_up():
    assert rates(4, schedule="constant", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_the_warm_up_rises_evenly_to_the_first_rate_and_the_last_step_has_the_final_one():
    found = rates(9, schedule="linear", warmup_steps=4)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_single_step_has_the_first_rate():
    assert rates(1) == [1.0]


def test_a_warm_up_longer_than_the_training_only_rises():
    assert rates(3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
