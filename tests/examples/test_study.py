"""The study's page says what its result files say. (The runs themselves: slow.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from study_report import T95, interval, report  # noqa: E402

STAGE = {"length": 6.0, "judge_exact": 90.0, "pairs": 100, "pairs_right": 75.0}


def result(setting, seed, *accuracies, **more):
    stages = [{**STAGE, "accuracy": a} for a in accuracies]
    base = {"setting": setting, "seed": seed, "stages": stages, "seconds": 60.0}
    return {**base, "prompts": 500, "sft_steps": 700, **more}


RESULTS = [
    *(result("M1", seed, accuracy) for seed, accuracy in enumerate((40.0, 50.0, 60.0))),
    *(result("plain", seed, a, a + 10) for seed, a in enumerate((50.0, 58.0, 72.0))),
    *(result("better", seed, accuracy) for seed, accuracy in enumerate((60.0, 68.5, 81.5))),
    *(result("mixed", seed, accuracy) for seed, accuracy in enumerate((40.0, 68.0, 72.0))),
    *(result("none", seed, error="PairingError: no pair\nmore") for seed in range(3)),
    result("few", 0, 45.0, seconds=0.0) | {"stages": [{**STAGE, "accuracy": 45.0, "pairs": 2}]},
    result("few", 1, error="NoPairError: nothing left", seconds=0.0),
]
WORDS = {
    "plain": "the loop",
    "better": "adds",
    "mixed": "varies",
    "none": "x",
    "few": "z",
    "not_run": "y",
}


def test_half_an_interval_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, t of two degrees of freedom 4.303
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert interval([5.0]) is None


def test_students_t_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom, value in T95.items():
        assert value == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


def test_the_page_by_hand():
    page = report(RESULTS, WORDS)
    rows = {line.split("`")[1]: line.split("|") for line in page.splitlines() if "| `" in line[:3]}
    table = page[: page.index("## Read plainly")]
    assert "5 settings" in page and "3 seeds" in page and "not_run" not in page
    # M1: 40, 50, 60 have mean 50 and deviation 10; 4.303 * 10 / sqrt(3) = 24.8
    assert "M1: 50.0 % ± 24.8." in page
    # better - plain: 10, 10.5, 9.5; deviation 0.5; 4.303 * 0.5 / sqrt(3) = 1.2
    assert "| +10.0 ± 1.2 |" in table
    assert (
        "- `better`: +20.0 points on M1 (up with 3 of 3 seeds); +10.0 against plain, more than"
        in page
    )
    # mixed - plain: -10, 10, 0
    assert (
        "- `mixed`: +10.0 points on M1 (up with 2 of 3 seeds); +0.0 against plain, no diff" in page
    )
    assert "- `none`: no run came to a result. PairingError: no pair" in page
    assert (
        "- `few`: +5.0 points on M1 (up with 1 of 1 seeds); -5.0 against plain, one seed: nothing follows, on 2 "
        "pairs a seed. 1 of 2 runs ended with NoPairError: nothing left" in page
    )
    assert rows["plain"][2].strip() == "60.0 ± 27.7"  # of the second rounds' table
    assert "All runs together took 15 minutes of one core." in page


@pytest.mark.slow
def test_a_small_study_runs_goes_on_and_writes_its_page(tmp_path):
    page = tmp_path / "study.md"
    command = [sys.executable, str(EXAMPLES / "study.py"), "--only", "plain", "answers_2"]
    command += ["--seeds", "0", "--out", str(tmp_path), "--page", str(page), "--sft-steps", "200"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.count(" s\n") == 3 and "| `answers_2` |" in page.read_text()
    found = json.loads((tmp_path / "plain-0.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["round-1", "round-2"]
    (tmp_path / "answers_2-0.json").unlink()
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0 and told.stdout.count(" s\n") == 1
