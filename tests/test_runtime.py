"""What a launch says and what Accelerate is told, and that neither changes a step."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.runtime import WORLD_VARIABLES, Runtime
from tests.support.models import Recurrent, context, stage_dir
from tests.support.processes import launched
from tests.training.test_fit import Fit, logged, optim, supervised, weights_of

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def trained(folder):
    """Weights and norms of one pass, by plain SGD and with AdamW's wrapper of Accelerate."""
    module = Recurrent().double()
    ctx = context(module)
    settings = optim(micro_batch_size=1, batch_size=4, optimizer="adamw", learning_rate=1e-2)
    Fit(ctx, stage_dir(ctx, folder), supervised(), settings).run()
    return weights_of(module), logged(folder, "grad_norm")


def assert_same(one, other):
    assert one[1] == other[1] and all(map(torch.equal, one[0], other[0]))


def test_accumulation_of_the_launch_divides_nothing_and_is_told(tmp_path, monkeypatch, caplog):
    plain = trained(tmp_path / "plain")
    monkeypatch.setenv(ACCUMULATION, "4")
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        assert_same(trained(tmp_path / "launched"), plain)
    assert "gradient_accumulation_steps=4 of accelerate's launch is ignored" in caplog.text
    assert Runtime({"cpu": True}, quiet=True).accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_accumulation_of_another_accelerator_in_the_process_changes_nothing(
    when, tmp_path, monkeypatch
):
    """All accelerators of a process share how many steps they accumulate, and where they are."""
    plain = trained(tmp_path / "plain")

    def accumulates():
        users = Accelerator(cpu=True, gradient_accumulation_steps=4)
        with users.accumulate():
            assert not users.sync_gradients

    if when == "before":
        accumulates()
    else:
        train = Fit._train

        def train_beside_another(self, done):
            accumulates()
            return train(self, done)

        monkeypatch.setattr(Fit, "_train", train_beside_another)
    assert_same(trained(tmp_path / when), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=4)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_accumulation_is_refused(settings):
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=4.*optim\.batch_size"):
        Runtime({"cpu": True, **settings})
    Runtime({"cpu": True, "gradient_accumulation_steps": 1}, quiet=True)


@pytest.mark.parametrize("name", ["deepspeed", "megatron_lm"])
def test_other_ways_to_spread_a_model_are_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ConfigError, match=f"{name} was asked for.*FSDP2"):
        Runtime({"cpu": True})


@pytest.mark.parametrize("variable", WORLD_VARIABLES)
def test_one_of_several_processes_that_knows_no_other_is_an_error(variable, monkeypatch):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ConfigError, match=rf"{variable}=2 .*cpu.*ACCELERATE_USE_CPU"):
        Runtime({})
    monkeypatch.setenv(variable, "1")
    Runtime({}, quiet=True)


def test_the_first_line_of_the_log_says_how_many_processes_there_are(caplog):
    with caplog.at_level(logging.INFO, "self_rewarding_lm"):
        Runtime({"cpu": True})
    assert caplog.messages[0] == "1 process on cpu"


TWO = """
import sys
from accelerate import DistributedDataParallelKwargs
from self_rewarding_lm.errors import ConfigError
from tests.support.models import Recurrent
from self_rewarding_lm.runtime import Runtime

runtime = Runtime({"kwargs_handlers": [DistributedDataParallelKwargs()]})
try:
    runtime.prepare(Recurrent(vocab=9 + runtime.rank))
except ConfigError as error:
    print(f"{runtime.rank}: {error}")
"""


def test_two_processes_say_so_and_refuse_two_models(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    process = launched(script, ACCELERATE_USE_CPU="true")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.count("2 processes on cpu") == 1
    assert output.count("DistributedDataParallelKwargs are ignored") == 2
    for rank in (0, 1):
        assert f"{rank}: processes were given models of different weights" in output


@pytest.mark.slow
def test_torchrun_without_a_word_of_cpus_is_an_error(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    process = launched(script, CUDA_VISIBLE_DEVICES="")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "WORLD_SIZE=2 says" in output
