"""SIGTERM while a callback of the user works for minutes: all processes end in seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from self_rewarding_lm import Run
from tests.support.long_callback import KINDS
from tests.support.processes import HOME, launched

SOON = 30.0
"""Seconds that clusters give after SIGTERM, at least."""


def until(is_so, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not {what} in {seconds} seconds"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # one that has ended and that nobody waits for is gone, too
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


QUICK = (("alone", "generate"), ("processes", "sleep"))
EVERY = [(told, kind) for told in ("alone", "launcher", "processes", "other") for kind in KINDS]


@pytest.mark.parametrize(
    "told, kind",
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in EVERY],
)
def test_a_signal_in_a_long_callback_ends_all_processes_soon(told, kind, tmp_path):
    work = ("-m", "tests.support.long_callback", kind, tmp_path)
    if told == "alone":
        started = subprocess.Popen(
            [sys.executable, *map(str, work)],
            cwd=HOME,
            env={**os.environ, "PYTHONPATH": str(HOME)},
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        started = launched(*work, OMP_NUM_THREADS="1")
    pids: list[int] = []
    try:
        until((tmp_path / "begun").exists, 200, "begun")
        time.sleep(1.0)  # so that all wait, or work
        pids = [int(path.read_text()) for path in sorted(tmp_path.glob("pid-*"))]
        assert len(pids) == (1 if told == "alone" else 2)
        receivers = {"launcher": [started.pid], "other": pids[1:]}.get(told, pids)
        for pid in receivers:
            os.kill(pid, signal.SIGTERM)
        until(lambda: all(map(is_gone, pids)), SOON, "gone")
        output = started.communicate(timeout=SOON)
    finally:
        for pid in [started.pid, *pids]:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert started.returncode != 0
    if told == "alone":
        assert "Interrupted" in output[1] and "is on disk" in output[1]
    run = Run.open(tmp_path / "run")
    assert run.weights(0).exists() and run.is_done(0) == (kind != "all")
