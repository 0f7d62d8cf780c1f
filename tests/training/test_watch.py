"""Warnings of known troubles: when they are said, and when not."""

import logging
import math

import pytest

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.training.watch import LEAST_PAIRS, WINDOW, Watcher


def metrics(chosen: float, rejected: float, accuracy: float = 0.5) -> dict[str, float]:
    return {
        "loss": math.log(1 + math.exp(rejected - chosen)),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracy,
    }


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "self_rewarding_lm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("step", "rows", "accuracy", "warns"),
    [
        (1, LEAST_PAIRS, 1.0, True),
        (1, LEAST_PAIRS - 1, 1.0, False),
        (1, LEAST_PAIRS, 0.99, False),
        (2, LEAST_PAIRS, 1.0, False),
    ],
)
def test_all_pairs_right_before_anything_was_learnt(step, rows, accuracy, warns, said):
    Watcher(Checker(None, "dpo")).see(metrics(0.0, 0.0, accuracy), step=step, rows=rows)
    assert [message.startswith("dpo: rewards/accuracies is 1.0") for message in said()] == (
        [True] if warns else []
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "warns"),
    [
        (-1.0, -2.0, True),  # a margin of 1, and the chosen lost as much
        (-0.51, -1.51, True),
        (-0.49, -1.49, False),  # less than half of it
        (0.3, -0.7, False),  # chosen rises
        (-1.0, -1.05, False),  # no margin to speak of
        (-2.0, -1.0, False),  # the margin is negative: nothing is learnt, another trouble
    ],
)
def test_chosen_that_fall_with_rejected_over_a_window_of_steps(chosen, rejected, warns, said):
    watcher = Watcher(Checker(None, "spin"))
    for step in range(1, WINDOW):
        watcher.see(metrics(chosen, rejected), step=step, rows=16)
    assert not said()
    for step in range(WINDOW, 3 * WINDOW):
        watcher.see(metrics(chosen, rejected), step=step, rows=16)
    assert len(said()) == int(warns)  # once, however often it is seen


def test_the_window_forgets_what_lies_behind_it(said):
    watcher = Watcher(Checker(None, "dpo"))
    for step in range(1, WINDOW):
        watcher.see(metrics(-9.0, -10.0), step=step, rows=16)
    for step in range(WINDOW, 3 * WINDOW):
        watcher.see(metrics(90.0, 89.0), step=step, rows=16)
    assert not said()


def test_supervised_training_has_no_pairs_to_watch(said):
    Watcher(Checker(None, "sft")).see({"loss": 1.0}, step=1, rows=16)
    assert not said()
