"""The figures of the example on a pretrained model are those of its result files."""

import json
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import sentences_table as table  # noqa: E402

PAGE = (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results():
    found = [json.loads(p.read_text()) for p in (ROOT / "docs/results").glob("sentences_*.json")]
    return sorted(found, key=lambda result: (result["control"], result["seed"]))


@pytest.fixture(scope="module")
def own(results):
    return [result for result in results if result["control"] == "none"]


def test_the_tables_of_runs_are_made_of_the_result_files(results):
    assert "\n".join(table.runs(results)) in PAGE
    assert "\n".join(table.medians(results)) in README


def test_the_table_of_models_is_made_of_the_result_files(own):
    assert "\n".join(table.models(own)) in PAGE


@pytest.mark.parametrize("key", ["answers", "reviews"])
def test_the_texts_are_those_that_the_models_wrote(key, own):
    assert "\n".join(table.texts(own[0], key)) in PAGE


def test_the_second_task_is_told_by_its_result_files():
    found = [json.loads(p.read_text()) for p in (ROOT / "docs/results").glob("json_*.json")]
    assert found
    assert "\n".join(table.runs(found)) in PAGE
    assert "\n".join(table.models(found)) in PAGE
    answers = table.texts(found[0], "answers")
    assert "\n".join(answers[: answers.index("")]) in PAGE


DPO_BY_RATE = {
    "M1": "none (the SFT model) |",
    "rate_5e-5": "5e-5 | 0.3",
    "base": "2e-4 | 0.3",
    "rate_4e-4": "4e-4 | 0.3",
    "nll_0": "2e-4 | 0",
    "nll_1": "2e-4 | 1",
}
"""Of settings of the study: the learning rate and the NLL term, as the guide's table has them."""


def test_the_learning_rates_of_an_adapter_are_those_of_the_study():
    results = json.loads((ROOT / "docs/results/study_sentences.json").read_text())
    guide = (ROOT / "docs/models.md").read_text()
    means = {}
    for name, told in DPO_BY_RATE.items():
        runs = sorted((r for r in results if r["setting"] == name), key=lambda r: r["seed"])
        found = [run["stages"][-1]["accuracy"] for run in runs]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        means[name] = f"{fmean(found):.1f}"
        each = ", ".join(f"{share:.1f}" for share in found)
        assert f"| {told} | {means[name]} % ({each}) |" in guide
    why = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    assert (
        f"from {means['M1']} to {means['nll_0']} % of held-out requests without an NLL term, to "
        f"{means['base']} % with `nll_weight=0.3`, and to {means['rate_5e-5']} % at a quarter of "
        "the learning rate"
    ) in why


def test_every_result_counts_what_it_says(results):
    for result in results:
        for model in result["models"]:
            low, high = model["interval"]
            assert low <= model["accuracy"] <= high
            assert sum(model["right_tied_wrong"]) == model["pairs"]


def test_the_picture_is_of_one_task(own, tmp_path):
    pytest.importorskip("matplotlib")
    import sentences_picture

    sentences_picture.draw(own, tmp_path / "all.png", {**own[0], "seed": 0})
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="json, sentences"):
        sentences_picture.draw(own, tmp_path / "none.png", {**own[0], "task": "json"})


def test_what_make_real_took_is_in_its_result_file():
    run = json.loads((ROOT / "docs/results/make_real_0.json").read_text())
    m1, m2, m3 = (f"{model['accuracy']:.1f}" for model in run["models"][1:])
    assert f"seed {run['seed']} took {run['seconds'] / 60:.1f} minutes" in PAGE
    assert f"went from {m1} to {m2} to {m3} % (" in PAGE
    assert f"The run takes {run['seconds'] / 60:.0f} minutes" in " ".join(README.split())
