"""Two processes on one machine (gloo) give what one gives."""

import signal
import time
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import Run
from tests.support.processes import FSDP, launched, one, two
from tests.test_trainer import model64


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_records_and_weights_of_one(settings, tmp_path):
    script = ("-m", "tests.support.two_process_run")
    one(*script, tmp_path / "one")
    two(*script, tmp_path / "two", **settings)
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for stage in alone.stages:
        for records in ("prompts", "candidates", "judgements", "pairs", "rows"):
            assert getattr(alone, records)(stage) == getattr(together, records)(stage)
        assert not list((tmp_path / "two").glob("*/*.[0-9]*.jsonl"))
        mine = [m for m in alone.metrics(stage) if "loss" in m]
        theirs = [m for m in together.metrics(stage) if "loss" in m]
        assert len(mine) == len(theirs)
        for one_step, other_step in zip(mine, theirs, strict=True):
            assert one_step.keys() == other_step.keys()
            for name, value in one_step.items():
                if name == "rewards/accuracies":
                    continue  # margins that are 0 but for rounding have no sign
                torch.testing.assert_close(other_step[name], value, rtol=1e-6, atol=1e-9)
    assert together.summary("sft")["early_stopping"] == {"best_step": 1, "score": 2.0}
    weights = [
        torch.load(tmp_path / f, weights_only=True)
        for f in ("one/weights.0.pt", "two/weights.0.pt", "two/weights.1.pt")
    ]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_rounds_and_moving_references_of_two_processes_are_those_of_one(settings, tmp_path):
    script = ("-m", "tests.support.two_process_rounds")
    one(*script, tmp_path / "one")
    two(*script, tmp_path / "two", **settings)
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for stage in alone.stages:
        for records in ("prompts", "candidates", "judgements", "pairs", "advantages"):
            assert getattr(alone, records)(stage) == getattr(together, records)(stage)
        assert alone.summary(stage)["rounds"] == 3
        assert alone.summary(stage)["steps"] == together.summary(stage)["steps"] >= 3
    weights = [
        torch.load(tmp_path / f, weights_only=True)
        for f in ("one/weights.0.pt", "two/weights.0.pt", "two/weights.1.pt")
    ]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], value, rtol=1e-7, atol=1e-9)


def test_an_error_on_one_process_ends_the_other_with_its_words(tmp_path):
    process = launched("-m", "tests.support.two_process_ends", "fails", tmp_path)
    output, _ = process.communicate(timeout=120)  # the other waits for it for half an hour
    assert process.returncode != 0
    assert "this judge fails here" in output


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_run_goes_on_where_it_was(tmp_path):
    script = ("-m", "tests.support.two_process_ends", "waits", tmp_path)
    process = launched(*script, JUDGE_SECONDS="600")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("judging.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert Run.open(tmp_path / "run").is_done("sft")
    before = (tmp_path / "run/01-sft/done.json").stat().st_mtime_ns
    two(*script)
    run = Run.open(tmp_path / "run")
    assert run.is_done("external_reward")
    assert (tmp_path / "run/01-sft/done.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_run_goes_on_from_shares_to_one_process_and_the_other_way_round(sharded_first, tmp_path):
    """SFT by one kind of run and a stage of pairs by the other: as by one process all the way."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    script = ("-m", "tests.support.two_process_ends", "counts")
    one(*script, whole)
    if sharded_first:
        two(*script, parted, "sft", **FSDP)
        one(*script, parted)
    else:
        one(*script, parted, "sft")
        two(*script, parted, **FSDP)
    runs = [Run.open(folder / "run") for folder in (whole, parted)]
    assert runs[0].pairs("external_reward") == runs[1].pairs("external_reward")
    models = [model64() for _ in runs]
    for run, model in zip(runs, models, strict=True):
        run.load_weights(model, "external_reward")
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "then"),
    [(FSDP, FSDP), (FSDP, None), (None, FSDP)],
    ids=["shares, shares", "shares, one", "one, shares"],
)
def test_training_that_was_stopped_goes_on_with_shares_or_in_one_process(first, then, tmp_path):
    """After step 4 of 6, with AdamW's moments and the best weights so far."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"

    def train(folder: Path, stop_after: int, settings: dict[str, str] | None) -> int:
        folder.mkdir(exist_ok=True)
        script = ("-m", "tests.support.two_process_ends", "trains", folder, stop_after)
        if settings is None:
            one(*script)
        else:
            two(*script, **settings)
        return int((folder / "steps.0").read_text())

    assert train(whole, 0, None) == 6
    assert train(parted, 4, first) == 4
    assert not Run.open(parted / "run").is_done("sft")
    assert train(parted, 0, then) == 2
    runs = [Run.open(folder / "run") for folder in (whole, parted)]
    best = [run.summary("sft")["early_stopping"] for run in runs]
    assert best[0]["best_step"] == best[1]["best_step"]
    models = [model64() for _ in runs]
    for run, model in zip(runs, models, strict=True):
        run.load_weights(model, "sft")
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
