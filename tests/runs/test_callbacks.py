"""What callbacks are told of, when, and with what."""

import pytest
import torch

from self_rewarding_lm import Callback
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.runs.callbacks import Callbacks
from tests.test_trainer import self_reward, sft, trainer_of


class Book(Callback):
    def __init__(self):
        self.told = []

    def check(self, ctx):
        self.told.append(("check", ctx.stage))

    def on_pairs(self, ctx, pairs):
        self.told.append(("pairs", ctx.stage, [pair.id for pair in pairs]))

    def on_step_end(self, ctx, metrics, step):
        self.told.append(("step", ctx.stage, step, metrics["loss"]))

    def on_stage_trained(self, ctx, out):
        self.told.append(("trained", ctx.stage))

    def on_stage_end(self, run, stage, model):
        self.told.append(("end", stage))


def test_a_callback_is_told_of_pairs_steps_and_stages_in_their_order(tmp_path):
    book = Book()
    run = trainer_of(tmp_path, [sft(), self_reward()], callbacks=[book])()
    expected = [("check", "sft"), ("check", "self_reward")]
    for stage in run.stages:
        if stage == "self_reward":
            expected.append(("pairs", stage, [pair.id for pair in run.pairs(stage)]))
        steps = [row for row in run.metrics(stage) if "loss" in row]
        expected += [("step", stage, int(row["step"]), row["loss"]) for row in steps]
        expected += [("trained", stage), ("end", stage)]
    assert book.told == expected
    assert len([told for told in book.told if told[0] == "step"]) >= 2


def test_a_callback_with_one_method_is_enough_and_changes_nothing(tmp_path):
    class Drawing:
        drawn = 0

        def on_step_end(self, ctx, metrics, step):
            torch.manual_seed(step)
            self.drawn += torch.rand(()).item()

    callback = Drawing()
    with_one = trainer_of(tmp_path / "with", [sft(dropout=0.1)], callbacks=[callback])()
    without = trainer_of(tmp_path / "without", [sft(dropout=0.1)])()
    assert callback.drawn > 0
    assert with_one.metrics("sft") == without.metrics("sft")


def test_an_error_of_a_callback_ends_the_run_which_goes_on_from_there(tmp_path):
    class Once(Callback):
        failed = False

        def on_step_end(self, ctx, metrics, step):
            if step == 2 and not Once.failed:
                Once.failed = True
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        trainer_of(tmp_path / "stopped", [sft()], callbacks=[Once()])()
    stopped = trainer_of(tmp_path / "stopped", [sft()], callbacks=[Once()])()
    assert stopped.metrics("sft") == trainer_of(tmp_path / "whole", [sft()])().metrics("sft")


@pytest.mark.parametrize("wrong", [lambda run, stage, model: None, Book, {"on_step_end": 1}, None])
def test_what_has_none_of_the_methods_is_no_callback(wrong):
    with pytest.raises(ConfigError, match=r"on_pairs, on_step_end, .*callbacks=\[YourClass\(\)\]"):
        Callbacks([wrong])


def test_methods_that_are_not_written_are_not_called():
    class Ends(Callback):
        def on_stage_end(self, run, stage, model):
            pass

    ends = Ends()
    assert Callbacks([ends]).of("on_step_end") == []
    assert Callbacks([ends]).of("on_stage_end") == [ends.on_stage_end]
