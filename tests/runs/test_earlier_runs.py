"""Runs that earlier code began, where their module paths were others: they go on to the same end."""

import json
import math
import re
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from self_rewarding_lm import Run
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.runs.stage_files import FORMAT
from tests.fixtures.make_runs import EXPECTED, WEIGHTS, serving
from tests.fixtures.runs import COMPARISONS, EARLIER, RUNS, comparison, outcome, trainer_of

NEED_TRANSFORMERS = ("library_objects",)


@pytest.fixture(params=RUNS)
def name(request):
    if request.param in NEED_TRANSFORMERS:
        pytest.importorskip("transformers")
    return request.param


def differences(expected, found, where=""):
    """Where two JSON values differ: floats by more than rounding, all else at all."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        parts = [(expected.get(k, "nothing"), found.get(k, "nothing"), k) for k in keys]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        parts = [(*both, i) for i, both in enumerate(zip(expected, found, strict=True))]
    elif isinstance(expected, float) and isinstance(found, float):
        is_close = math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)
        return [] if is_close else [f"{where}: {expected} and now {found}"]
    else:
        is_same = type(expected) is type(found) and expected == found
        return [] if is_same else [f"{where}: {expected!r:.200} and now {found!r:.200}"]
    return [line for a, b, key in parts for line in differences(a, b, f"{where}/{key}")]


def expected_of(name):
    """What earlier code came to; its judgements did not say whether their texts were cut off, and
    its candidates had no log-probs of the sampler."""
    expected = json.loads((EARLIER / name / EXPECTED).read_text(encoding="utf-8"))
    for records in (expected, *expected.values()):
        for judgement in records.get("judgements", ()) if isinstance(records, dict) else ():
            judgement["finished"] = None
        for candidate in records.get("candidates", ()) if isinstance(records, dict) else ():
            candidate["logprobs"] = None
    return expected


def settled(expected):
    """What was expected, without shares of margins that are nothing but rounding."""
    for line in (line for stage in expected.values() for line in stage["metrics"]):
        if abs(line.get("rewards/margins", 1.0)) < 1e-12:
            del line["rewards/accuracies"]
    return expected


def without_cuts(found):
    """What a run came to, without what runs that begin now tell of texts that were cut off."""
    for stage in found.values():
        for judgement in stage.get("judgements", ()):
            judgement["finished"] = None
        for numbers in (*stage["metrics"], stage["summary"].get("metrics", {})):
            numbers.pop("judge/cut", None)
    return found


def check(name, run):
    """Records, numbers and weights of the last stage are those that earlier code came to."""
    expected, found = expected_of(name), outcome(run)
    if run.format > 1:
        found = without_cuts(found)
    assert differences(settled(expected), settled(found)) == []
    before, after = load_file(EARLIER / name / WEIGHTS), load_file(run.weights(run.stages[-1]))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert_close(after[key], tensor, rtol=1e-9, atol=1e-12)


def test_a_run_that_earlier_code_began_goes_on_to_the_same_end(name, tmp_path):
    shutil.copytree(EARLIER / name / "run", tmp_path / "run")
    halted = Run.open(tmp_path / "run")
    done = [halted.is_done(stage) for stage in halted.stages]
    assert not done[-1]
    kept = {p: p.read_bytes() for p in (tmp_path / "run").glob("*/config.json")}
    run = trainer_of(name, tmp_path / "run")()
    assert all(run.is_done(stage) for stage in run.stages)
    assert all(p.read_bytes() == text for p, text in kept.items())
    assert halted.format == run.format == 1
    check(name, run)


def test_a_run_that_begins_anew_has_the_rules_of_this_version(tmp_path):
    shutil.copytree(EARLIER / "training" / "run", tmp_path / "run")
    run = trainer_of("training", tmp_path / "run")(rehearse=False, overwrite_checkpoints=True)
    assert run.format == FORMAT > 1


@pytest.mark.parametrize("written", [FORMAT + 1, 0, None, "1"])
def test_a_run_of_another_format_is_refused(written, tmp_path):
    shutil.copytree(EARLIER / "training" / "run", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    info = json.loads(path.read_text(encoding="utf-8")) | {"format": written}
    path.write_text(json.dumps(info), encoding="utf-8")
    for go_on in (lambda: Run.open(path.parent), trainer_of("training", path.parent)):
        with pytest.raises(StoreError, match=f"format of 1 to {FORMAT}.*got {written!r}"):
            go_on()
    assert json.loads(path.read_text(encoding="utf-8")) == info


def test_a_run_that_is_not_stopped_comes_to_the_end_that_it_came_to_earlier(name, tmp_path):
    with serving() as address:
        check(name, trainer_of(name, tmp_path, address=address)(rehearse=False))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_that_earlier_code_began_goes_on_to_the_same_end(name, tmp_path):
    shutil.copytree(EARLIER / name / "out", tmp_path / "out")
    kept = {p: p.read_bytes() for p in (tmp_path / "out").glob("*/config.json")}
    assert len(kept) == 3
    assert differences(expected_of(name), comparison(name, tmp_path / "out")) == []
    assert all(p.read_bytes() == text for p, text in kept.items())
    assert differences(expected_of(name), comparison(name, tmp_path / "new")) == []


def test_earlier_runs_name_modules_of_the_library_and_nothing_of_a_machine():
    files = [p for p in EARLIER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 1_500_000
    assert {p.name for p in EARLIER.iterdir()} == {*RUNS, *COMPARISONS}
    texts = {p: p.read_bytes() for p in files}
    assert not [p for p, text in texts.items() if re.search(rb"/(tmp|home|root|work)/", text)]
    configs = b"".join(text for p, text in texts.items() if p.name == "config.json")
    assert len(set(re.findall(rb"self_rewarding_lm\.[\w.<>]+", configs))) > 15
