"""Figures of the quickstart's study that pages tell are those of its results."""

import json
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/results/study_quickstart.json"


def words_of(page):
    return " ".join((ROOT / page).read_text().split())


@pytest.fixture(scope="module")
def last():
    """Each setting's held-out accuracy after its last stage, the mean of three seeds."""
    found: dict[str, dict[int, float]] = {}
    for run in json.loads(FILE.read_text()):
        if run["stages"]:
            found.setdefault(run["setting"], {})[run["seed"]] = run["stages"][-1]["accuracy"]
    return {name: fmean(of.values()) for name, of in found.items() if sorted(of) == [0, 1, 2]}


def test_the_readme_tells_what_the_scores_are_worth(last):
    m1, own, shuffled, grpo = (last[name] for name in ("M1", "plain", "shuffled", "grpo"))
    assert (
        f"M1's {m1:.1f} % become {own:.1f} % on its own scores and {shuffled:.1f} % on shuffled ones; "
        f"policy gradients in the place of pairs (`--method grpo`) come to {grpo:.1f} %."
    ) in words_of("README.md")
    assert f"({grpo:.1f} against {own:.1f} % in the means of the study)" in words_of(
        "docs/quickstart.md"
    )


@pytest.mark.parametrize(
    ("scores", "pairs", "rewards"),
    [
        ("the model's own", "plain", "grpo"),
        ("the checker's", "oracle", "grpo_oracle"),
        ("the model's own, given to other responses", "shuffled", "grpo_shuffled"),
        ("votes over the whole response", None, "grpo_votes"),
        ("certainty", None, "grpo_certainty"),
    ],
)
def test_the_guide_compares_pairs_with_rewards(last, scores, pairs, rewards):
    told = "-" if pairs is None else f"{last[pairs]:.1f}"
    row = f"| {scores} | {told} | {last[rewards]:.1f} |"
    assert row in (ROOT / "docs/policy_gradients.md").read_text()


def test_as_many_settings_as_pages_say():
    settings = {run["setting"] for run in json.loads(FILE.read_text())} - {"M1"}
    assert f"studies [of {len(settings)} settings at toy size]" in words_of("README.md")
    assert f"{len(settings)} settings on the quickstart's task" in words_of("docs/index.md")
