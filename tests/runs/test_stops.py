"""Stages that train several times and may stop early, killed at any write: all numbers are the same.

Steps, lines of metrics, numbers of judges and the summary of a run that was killed and goes on are
those of an undisturbed one, as its records and weights are.
"""

import math
import shutil
import signal

import pytest
import torch

from self_rewarding_lm import OptimConfig, Run, SelfPlayConfig
from tests.runs.test_kill import Faults, ended, in_child, kill, outcome
from tests.stages.test_temporal import comparing, temporal
from tests.test_trainer import ROWS, SHORT, external, model64, trainer_of

OPTIM = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=1, save_state_every=2)
PLANNED = 6
FEW, MANY = (1 / 2, 2 / 3, 5 / 6), [k / 40 for k in range(40)]
"""When a run is killed, as shares of its writes: in the fast tier, in the slow one."""


def rugged(module) -> float:
    """A score of weights that soon gets worse, and is not the same for any others."""
    return math.sin(1e3 * sum(p.sum().item() for p in module.parameters()))


EARLY = dict(num_train_steps=PLANNED, early_stopper_eval_module=rugged, optim=OPTIM)


def spin(**options):
    own = dict(train_dataset=ROWS[:5], generation=SHORT, mix_previous=True, dropout=0.0)
    return SelfPlayConfig(**{**own, "iterations": 2, **EARLY, **options})


STAGES = {
    "spin": spin,
    "longer spin with held-out rows": lambda: spin(valid_dataset=ROWS[:2], iterations=3),
    "spin without states": lambda: spin(optim=OPTIM.model_copy(update={"save_state_every": None})),
    "temporal": lambda: temporal(**EARLY),
    "temporal, compared": lambda: temporal(comparing(), **EARLY),
    "rounds": lambda: external(rounds=3, prompts_per_round=4, optim=OPTIM),
}
TRAININGS = 2  # of the first of them


def work(kind, folder):
    torch.set_num_threads(1)
    trainer_of(folder, [STAGES[kind]()], model64())(rehearse=False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """By kind what an undisturbed run leaves, and how often it writes."""
    found = {}

    def run(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("straight") / "run"
            told = folder.with_suffix(".events")

            def job():
                with Faults().watching() as faults:
                    work(kind, folder)
                told.write_text(str(len(faults.seen)))

            assert ended(in_child(job)) == 0
            found[kind] = outcome(folder), int(told.read_text()), Run.open(folder)
        return found[kind]

    return run


def gone_wrong(kind, folder, place, before):
    """Kill a run at its n-th write, let it go on, and name what is then different."""

    def killed():
        with Faults(place, "before", kill).watching():
            work(kind, folder)

    assert ended(in_child(killed)) == -signal.SIGKILL
    if ended(in_child(lambda: work(kind, folder))) != 0:
        return [(kind, place, "it does not go on")]
    after = outcome(folder)
    shutil.rmtree(folder)
    changed = (what for what in before.keys() | after.keys() if before.get(what) != after.get(what))
    return [(kind, place, what) for what in changed]


@pytest.mark.parametrize("kind", ["spin", "temporal"])
def test_steps_are_those_that_were_taken(kind, straight):
    _, _, run = straight(kind)
    lines = [line for line in run.metrics(0) if "loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    assert run.summary(0)["steps"] == len(steps) < TRAININGS * PLANNED
    checks = [line["step"] for line in run.metrics(0) if "early_stopping/score" in line]
    assert len(checks) == len(steps) + TRAININGS


def check_kills(kind, straight, folder, shares):
    before, writes, _ = straight(kind)
    places = [int(share * writes) for share in shares]
    wrong = [one for p in places for one in gone_wrong(kind, folder / str(p), p, before)]
    print(f"{kind}: killed at {len(places)} of {writes} writes, {len(wrong)} mismatches")
    assert wrong == []


@pytest.mark.parametrize("kind", ["spin", "temporal"])
def test_a_stage_that_is_killed_at_a_write_comes_to_the_same_numbers(kind, straight, tmp_path):
    check_kills(kind, straight, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_that_is_killed_at_many_writes_comes_to_the_same_numbers(kind, straight, tmp_path):
    check_kills(kind, straight, tmp_path, MANY)
