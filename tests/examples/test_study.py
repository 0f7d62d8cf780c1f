"""The study's page says what its results say, and its jobs go on. (Whole runs: slow.)"""

import importlib
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import sentences  # noqa: E402
import sentences_task  # noqa: E402
import study  # noqa: E402
import study_demands  # noqa: E402
import study_quickstart  # noqa: E402
from study_jobs import M1, Job, Setting  # noqa: E402
from study_pages import PAGES, QUICKSTART  # noqa: E402
from study_report import T95, interval, report  # noqa: E402

from self_rewarding_lm import (  # noqa: E402
    Candidate,
    Judgement,
    Prompt,
    RewardConfig,
    Run,
    SamplingConfig,
)
from tests.support.hf_models import VOCAB, tiny, word_tokenizer  # noqa: E402

STAGE = {"length": 6.0, "judge_exact": 90.0, "pairs": 100, "pairs_right": 75.0}


def result(setting, seed, *accuracies, **more):
    stages = [{**STAGE, "accuracy": a} for a in accuracies]
    base = {"setting": setting, "seed": seed, "stages": stages, "seconds": 60.0}
    return {**base, "prompts": 500, "sft_steps": 700, **more}


KEPT = [(name, page) for name, page in PAGES.items() if (EXAMPLES.parent / page.results).exists()]
"""The tasks whose results are kept."""


@pytest.mark.parametrize(("name", "page"), KEPT, ids=[name for name, _ in KEPT])
def test_a_page_is_made_of_the_kept_results(name, page):
    settings = importlib.import_module(study.TASKS[name]).SETTINGS
    results = json.loads((EXAMPLES.parent / page.results).read_text())
    written = report(page, results, {setting.name: setting.words for setting in settings})
    assert (EXAMPLES.parent / page.target).read_text() == written


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
    page = report(QUICKSTART, RESULTS, WORDS)
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
    assert "The times of all runs add up to 15 minutes." in page


def test_a_page_of_the_last_round_by_hand():
    page = report(PAGES["sentences"], DEMANDS, {"base": "one", "three_rounds": "more"})
    rows = {line.split("`")[1]: line for line in page.splitlines() if "| `" in line[:3]}
    table = page[: page.index("## Read plainly")]
    assert "on tiny, 2\nseeds, 9 prompts" in page and "share of 8 held-out" in page
    # M1: 20 and 30 have mean 25; deviation 7.07; 12.706 * 7.07 / sqrt(2) = 63.5
    assert "M1: 25.0 % ± 63.5 (20.0, 30.0)." in page
    assert "| `base` | one | 40.0 ± 0.0 | 40.0, 40.0 |  |" in table
    # after its third round: 60 and 62 against 40 and 40
    assert "| `three_rounds` | more | 61.0 ± 12.7 | 60.0, 62.0 | +21.0 ± 12.7 |" in table
    assert "| setting | judge exact | words | distinct words | log-loss | pairs |" in table
    assert "| `three_rounds` | 90.0 | 11.0 | 600 | 4.50 | 100 | 75.0 | 60 |" in table
    assert "round 3 | gained |" in page and "| 40.0 ± 0.0 | 50.0 ± 0.0 | 61.0 ± 12.7 |" in page
    assert rows["three_rounds"].endswith("| +21.0 ± 12.7 |")


FIGURES = {"words": 11, "distinct_words": 600, "log_loss": 4.5, **STAGE}
DEMANDS = [
    {
        "setting": name,
        "seed": seed,
        "stages": [{**FIGURES, "accuracy": accuracy} for accuracy in accuracies],
        "seconds": 60.0,
        "prompts": 9,
        "sft_steps": 61,
        "held_out": 8,
        "model": "tiny",
    }
    for seed, found in enumerate(
        (
            {"M1": [20.0], "base": [40.0], "three_rounds": [40.0, 50.0, 60.0]},
            {"M1": [30.0], "base": [40.0], "three_rounds": [40.0, 50.0, 62.0]},
        )
    )
    for name, accuracies in found.items()
]


# -- jobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_absolute", [True, False])
def test_an_error_is_kept_without_where_the_study_lay(tmp_path, monkeypatch, is_absolute):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "lab" if is_absolute else Path("lab")
    job = Job("pairwise", 0, out, "sentences", 9)
    error = ValueError(f"nothing is in {job.folder().resolve()}, see {job.folder()}")
    kept = "ValueError: nothing is in lab/runs/pairwise-0, see lab/runs/pairwise-0"
    assert study.without_place(error, job) == kept


@pytest.mark.parametrize(("name", "page"), KEPT, ids=[name for name, _ in KEPT])
def test_kept_errors_name_no_place_of_a_machine(name, page):
    errors = [r.get("error", "") for r in json.loads((EXAMPLES.parent / page.results).read_text())]
    assert not [error for error in errors if " /" in error]


def test_what_a_setting_goes_on_from_is_run_before_it():
    settings = [
        Setting("later", "", list, "first"),
        Setting("first", "", list, "pool"),
        Setting("pool", "", list),
        Setting("other", "", list),
    ]
    wanted = {M1: None, "pool": M1, "first": "pool", "later": "first"}
    assert study.jobs_for(["later"], settings) == wanted
    assert list(study.jobs_for(["later"], settings)) == list(wanted)
    assert list(study.jobs_for(["other", "first"], settings)) == [M1, "other", "pool", "first"]


@pytest.mark.parametrize("settings", [study_quickstart.SETTINGS, study_demands.SETTINGS])
def test_each_setting_goes_on_from_one_that_is_there(settings):
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names) and M1 not in names
    assert study.jobs_for(names, settings).keys() == {M1, *names}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A function that runs `study.py` with jobs that only note their words; returns these jobs."""
    noted = []

    def run(command, **_):
        name, seed = command[3:5]  # python study.py --job NAME SEED --task ...
        words = dict(zip(command[5::2], command[6::2], strict=True))
        found = result(name, int(seed), 50.0) | {"model": "tiny", "held_out": 200}
        found["stages"][0] |= FIGURES
        (Path(words["--out"]) / f"{name}-{seed}.json").write_text(json.dumps(found))
        noted.append(f"{name}-{seed}")

    def ask(*words):
        noted.clear()
        flags = ["--json", tmp_path / "all.json", "--page", tmp_path / "page.md"]
        flags += ["--out", tmp_path / "runs", "--jobs", 1]
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, (*flags, *words))])
        study.main()
        return list(noted)

    monkeypatch.setattr(study.subprocess, "run", run)
    return ask


def test_a_study_goes_on_and_its_page_is_made_of_one_file(asked, tmp_path):
    words = ["--task", "quickstart", "--seeds", 0, 1, "--only", "simpo", "plain"]
    runs = ["M1-0", "M1-1", "simpo-0", "simpo-1", "plain-0", "plain-1"]
    assert asked(*words) == runs
    assert {
        f"{r['setting']}-{r['seed']}" for r in json.loads((tmp_path / "all.json").read_text())
    } == {*runs}
    (tmp_path / "runs" / "simpo-1.json").unlink()
    assert asked(*words) == ["simpo-1"]
    page = (tmp_path / "page.md").read_text()
    for path in (tmp_path / "runs").glob("*.json"):
        path.unlink()
    assert asked(*words, "--report") == [] and (tmp_path / "page.md").read_text() == page
    assert "| `simpo` |" in page


def test_a_setting_is_refused_where_its_task_has_none_of_the_name(asked, tmp_path, capsys):
    for words, told in (
        (
            ["--task", "sentences", "--only", "base", "cream"],
            "the task sentences has no setting cream; it has base,",
        ),
        (["--only", "pairwise"], "the task quickstart has no setting pairwise; it has plain,"),
        (["--model", "x"], "the task quickstart trains a model of its own"),
    ):
        with pytest.raises(SystemExit):
            asked(*words)
        assert told in capsys.readouterr().err
    asked("--only", "plain", "--seeds", 0)
    with pytest.raises(
        SystemExit,
        match=r"M1-0.json is a result with sft_steps 700, and 5 is asked for; give another",
    ):
        asked("--only", "plain", "--seeds", 0, "--sft-steps", 5)


# -- scores that are read again ------------------------------------------------------------------


def test_what_was_written_is_read_again_for_the_first_answers():
    prompt = Prompt("M2/7/0", 7, (1,), "a")
    candidates = [Candidate(f"M2/7/0/{k}", "M2/7/0", (1,), "b", True, 9) for k in (2, 0, 10, 1)]
    texts = {0: "x, yes. Score: 3", 1: "y, yes. Score: 12", 2: "Score: 1 ... Score: 4", 10: ""}
    known = [
        Judgement(f"{c.id}/j0", (c.id,), "self", float(k), None, texts[k], "sampled")
        for k, c in zip((2, 0, 10, 1), candidates, strict=True)
    ]

    def scores(answers, score):
        judge = study_demands.Reread(known, answers, score)
        found = list(judge.judge(None, [prompt], [candidates]))
        assert [j.id for j in found] == judge.judgement_ids(candidates)
        assert all((j.score is None) == bool(j.reason) for j in found)
        return {j.candidate_ids[0].rpartition("/")[2]: j.score for j in found}

    assert scores(2, study_demands.as_counted) == {"0": 0.0, "1": 1.0}
    assert scores(8, study_demands.as_counted) == {"0": 0.0, "1": 1.0, "2": 2.0}
    assert scores(99, study_demands.as_stated) == {"0": 3.0, "1": None, "2": 4.0, "10": None}
    assert scores(1, lambda *given: len(given)) == {"0": 3}


@pytest.mark.slow
def test_shared_answers_give_the_pairs_that_own_answers_give(tmp_path, monkeypatch):
    """A tiny random model, whose texts have no marks: any text is a score."""
    model = tmp_path / "model"
    tiny("llama", VOCAB, max_position_embeddings=1024).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    score = lambda text: sum(map(ord, text)) % 5  # noqa: E731
    asked = {"prompt_template": "{{ prompt }} {{ response }}", "parse_reward": score}
    read = lambda **_: RewardConfig(**asked)  # noqa: E731
    stopping = lambda **how: SamplingConfig(**how, stop=[*string.ascii_lowercase])  # noqa: E731
    make_data = sentences_task.make_data
    monkeypatch.setattr(
        sentences_task, "make_data", lambda seed, **sizes: make_data(seed, first_prompts=6, **sizes)
    )
    monkeypatch.setattr(study_demands, "RewardConfig", read)
    monkeypatch.setattr(sentences, "SamplingConfig", stopping)
    monkeypatch.setattr(sentences, "PRECISION", "no")
    for size, count in {"PROMPTS": 6, "HELD_OUT": 4, "JUDGE_ITEMS": 3}.items():
        monkeypatch.setattr(study_demands, size, count)

    def done(name):
        job = Job(name, 0, tmp_path, "sentences", 2, str(model))
        study.one_job(job)
        found = json.loads(job.result.read_text())
        return job, [stage["stage"] for stage in found["stages"]], found.get("error")

    assert [done(name)[1] for name in (M1, "answers_8")] == [["M1"], ["M2"]]
    shared, stages, _ = done("base")
    own, _, _ = done("expected")  # four answers of its own, read alike here
    pairs = [list(Run.open(job.folder()).pairs("M2")) for job in (shared, own)]
    assert stages == ["M2"] and pairs[0] and pairs[0] == pairs[1]
    assert done("three_rounds")[1] == ["M2", "M3", "M4"]
    _, stages, error = done("stated")  # there is no sum
    assert stages == [] and error.startswith("NoPairError: M2: no preference pair")


@pytest.mark.slow
def test_a_small_study_runs_goes_on_and_writes_its_page(tmp_path):
    page = tmp_path / "study.md"
    command = [sys.executable, str(EXAMPLES / "study.py"), "--only", "plain", "answers_2"]
    command += ["--seeds", "0", "--out", str(tmp_path / "runs"), "--page", str(page)]
    command += ["--json", str(tmp_path / "all.json"), "--sft-steps", "200"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.count(" s\n") == 3 and "| `answers_2` |" in page.read_text()
    found = json.loads((tmp_path / "runs" / "plain-0.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["round-1", "round-2"]
    (tmp_path / "runs" / "answers_2-0.json").unlink()
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0 and told.stdout.count(" s\n") == 1
