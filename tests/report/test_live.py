"""What a run shows while it goes on: bars, lines, tables, trackers."""

import io
import logging
import re
import sys
import time
from types import SimpleNamespace

import pytest
from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from self_rewarding_lm import (
    Callback,
    EnsembleJudge,
    HeldOutReward,
    Run,
    ShuffledJudge,
    TemporalDPOConfig,
    runtime,
)
from self_rewarding_lm.report.examples import SAMPLE
from self_rewarding_lm.report.terminal import stage_table
from self_rewarding_lm.runtime import LogHandler, Progress, Runtime
from self_rewarding_lm.scores import candidate_scores
from tests.stages.test_pair_maker import COMPARISON, numerate
from tests.test_trainer import PROMPTS, QUICK, SHORT, external, self_reward, sft, trainer_of


def letters(completions, **columns):
    return [float(len(set(text))) for text in completions]


class Book(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory = "book", False

    def __init__(self):
        super().__init__()
        self.lines, self.tables, self.finished = [], [], 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, dict(values)))

    def log_table(self, table_name, columns=None, data=None, step=None, **kwargs):
        self.tables.append((step, table_name, columns, data))

    def finish(self):
        self.finished += 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tracked(folder, stages, book, **options):
    return trainer_of(folder, stages, accelerate_kwargs=dict(cpu=True, log_with=[book]), **options)


def shown(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_bar_that_ends_says_in_a_line_what_was_done(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", Terminal())
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    for total, done, now in ((1200, 0, 1200), (1200, 200, 300), (None, 0, 5)):
        with Progress(total, "sft: training", "step", shows=True, done=done) as bar:
            bar.update(now)
        bar.close()
    assert shown(caplog) == [
        "sft: training: 1,200 steps in 00:00",
        "sft: training: 500 of 1,200 steps (200 of them earlier) in 00:00",
        "sft: training: 5 steps in 00:00",
    ]


def test_a_bar_that_shows_nothing_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    with Progress(3, "sft: training", "step", shows=False) as bar:
        bar.update(3)
    assert not caplog.records and not terminal.getvalue()


def test_a_file_gets_a_line_a_minute_and_no_bar(monkeypatch, caplog):
    """Time is ours: thirty updates, each ten seconds after the last, are five minutes."""
    now = [1000.0]
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    bar = Progress(30, "x", "pair", shows=True)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = bar.told_at = now[0]
    for _ in range(30):
        now[0] += 10
        bar.refresh()  # as tqdm's watching thread does
        bar.update()
    bar.close()
    lines = shown(caplog)
    assert file.getvalue() == ""
    left = [f"about {minutes} min left" for minutes in (4, 3, 2, 1)] + ["less than a minute left"]
    shares = zip((5, 11, 17, 23, 29), (17, 37, 57, 77, 97), left, range(1, 6), strict=True)
    assert lines[:-1] == [
        f"x: {done} of 30 pairs ({share}%), {words} after 0{minute}:00"
        for done, share, words, minute in shares
    ]
    assert lines[-1] == "x: 30 pairs in 05:00"


def test_candidates_are_counted_within_a_block_and_its_pairs_once_it_is_done(monkeypatch, caplog):
    """Time is ours: a candidate takes ten seconds, a block of 12 of them two minutes."""
    now = [1000.0]
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    bar = Progress(8, "m2", "pair", shows=True)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = bar.told_at = now[0]

    def sampled():
        for _ in range(12):
            now[0] += 10
            yield

    for _ in range(2):
        assert len(list(bar.part(sampled(), 12, "candidate"))) == 12
        bar.update(2)
    bar.close()
    assert shown(caplog) == [
        "m2: 0 of 8 pairs (0%); 6 of 12 candidates (50%), about 1 min left after 01:00",
        "m2: 0 of 8 pairs (0%); 12 of 12 candidates (100%) after 02:00",
        "m2: 2 of 8 pairs (25%), about 5 min left; 6 of 12 candidates (50%) after 03:00",
        "m2: 2 of 8 pairs (25%), about 4 min left; 12 of 12 candidates (100%) after 04:00",
        "m2: 4 of 8 pairs in 04:00",
    ]


@pytest.mark.parametrize(("world", "share"), [(1, ""), (2, "this process's share")])
def test_what_one_of_several_processes_counts_is_told_as_its_share(
    world, share, monkeypatch, caplog
):
    monkeypatch.setattr("sys.stderr", Terminal())
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    runtime = Runtime(dict(cpu=True))
    monkeypatch.setattr(runtime, "world", world)
    with runtime.progress(4, "reference log-probs", "pair", is_share=True) as bar:
        bar.update(4)
    label = f"reference log-probs ({share})" if share else "reference log-probs"
    assert shown(caplog)[-1] == f"{label}: 4 pairs in 00:00"
    with runtime.progress(8, "m2", "prompt") as bar:
        for number, _ in enumerate(runtime.counted(range(3), 3, "judgement"), 1):
            told = bar._part_words(with_time=False)
            part = f"{number - 1} of 3 judgements ({(number - 1) / 3:.0%})"
            assert told == (f"{share}: {part}" if share else part)


def test_a_file_gets_lines_also_while_nothing_is_done(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(runtime, "EVERY", 0.02)
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    with Progress(4, "x", "step", shows=True):
        deadline = time.monotonic() + 20
        while len(shown(caplog)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(shown(caplog)) >= 2
    assert {line.split(" after ")[0] for line in shown(caplog)} == {"x: 0 of 4 steps (0%)"}


def test_a_notebook_gets_a_line_that_rewrites_itself_and_no_warning(monkeypatch, recwarn):
    class ZMQInteractiveShell:
        """What get_ipython gives in a Jupyter kernel."""

    kernel = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr("sys.stderr", cell := io.StringIO())
    with Progress(4, "x", "step", shows=True) as bar:
        bar.update(2)
        list(bar.part(range(3), 3, "candidate"))
        bar.refresh()
    drawn = cell.getvalue()
    assert "2/4" in drawn and drawn.count("\r") >= 3 and "\n" not in drawn
    assert not [w for w in recwarn if "IProgress" in str(w.message)]
    kernel.get_ipython = lambda: None
    assert not Progress(4, "x", "step", shows=False).is_live


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5, "less than a minute left"),
        (250, "about 4 min left"),
        (5300, "about 88 min left"),
        (5400, "about 2 h left"),
        (36000, "about 10 h left"),
    ],
)
def test_the_time_left_is_told_in_words(seconds, words):
    assert runtime.time_left(seconds) == words


@pytest.mark.parametrize(
    "stage",
    [
        lambda: self_reward(num_sampled_reward_responses=2),
        lambda: self_reward(comparison=COMPARISON),
        lambda: self_reward(judge=EnsembleJudge([(letters, 1.0), (letters, 2.0)])),
        lambda: external(reward_model=letters, judge=ShuffledJudge()),
        lambda: TemporalDPOConfig(
            prompt_dataset=PROMPTS,
            num_generated_preference_pairs=3,
            num_candidate_responses=2,
            generation=SHORT,
            judging=SHORT,
            dropout=0.0,
            optim=QUICK,
        ),
        lambda: external(
            reward_model=letters,
            early_stopper_eval_module=HeldOutReward(["tell 1"], letters, sampling=SHORT),
        ),
    ],
    ids=["scores", "comparisons", "ensemble", "shuffled", "temporal", "held out"],
)
def test_so_many_candidates_and_judgements_come_as_were_announced(stage, tmp_path, monkeypatch):
    told = []

    def counted(self, items, total, unit):
        items = list(items)
        told.append((unit, total, len(items)))
        return iter(items)

    monkeypatch.setattr(Runtime, "counted", counted)
    run = trainer_of(tmp_path, [stage()], numerate())(rehearse=False)
    assert all(total == number for _, total, number in told)
    sampled = sum(number for unit, _, number in told if unit == "candidate")
    judged = sum(number for unit, _, number in told if unit == "judgement")
    assert sampled == len(run.candidates(0))
    assert judged == len([j for j in run.judgements(0) if not j.is_moved])


def test_what_is_logged_beside_a_bar_in_a_file_is_one_line(monkeypatch):
    """tqdm draws bars anew after each such line; here that would be a line again."""
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    logger = logging.getLogger("self_rewarding_lm")
    monkeypatch.setattr(logger, "handlers", [handler := LogHandler(file)])
    assert handler.level == logging.NOTSET
    logger.setLevel(logging.INFO)
    with Progress(4, "x", "step", shows=True) as bar:
        bar.told_at -= 60
        bar.update(2)
        bar.refresh()
        logger.warning("look here")
    lines = [line.split(" in ")[0].split(",")[0] for line in file.getvalue().splitlines()]
    assert lines == ["x: 2 of 4 steps (50%)", "look here", "x: 2 of 4 steps"]


def test_a_line_of_the_log_stands_above_the_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    logger = logging.getLogger("tests.above")
    logger.addHandler(handler := LogHandler(terminal))
    with Progress(4, "x", "step", shows=True) as bar:
        bar.update(2)
        bar.refresh()
        logger.warning("look here")
    logger.removeHandler(handler)
    [line] = [part for part in terminal.getvalue().splitlines() if "look here" in part]
    assert line.split("\r")[-1] == "look here"


def test_each_stage_ends_with_the_table_of_its_numbers(tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("SELF_REWARDING_LM_QUIET", raising=False)
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    run = trainer_of(tmp_path, [sft(), self_reward()], quiet=False)()
    for name in run.stages:
        [table] = [words for words in shown(caplog) if words.startswith(f"{name}: done in data")]
        assert table == stage_table(run, name)
        cells = {
            key: numbers.split()
            for key, numbers in re.findall(
                r"([a-z_]+(?:/\S+)?)((?: +-?[\d.,e-]+)+)(?= |$)", table, re.M
            )
        }
        for key in {k for line in run.metrics(name) for k in line} - {"step"}:
            values = [line[key] for line in run.metrics(name) if key in line]
            assert float(cells[key][-1].replace(",", "")) == pytest.approx(values[-1], rel=1e-3)
            if len(values) > 1:
                first = float(cells[key][0].replace(",", ""))
                assert first == pytest.approx(values[0], rel=1e-3, abs=1e-12)
    arrows = [words for words in shown(caplog) if re.search(r" in \d\d:\d\d$", words)]
    assert [words.split(" in ")[0] for words in arrows] == [
        "rehearsal: 2 stages",
        "sft: training: 6 steps",
        "self_reward: sampling and judging: 4 pairs",
        "reference log-probs: 4 pairs",
        "self_reward: training: 1 step",
    ]


def test_a_quiet_run_shows_no_table(tmp_path, caplog):
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    trainer_of(tmp_path, [sft()])()
    assert not any("done in" in words for words in shown(caplog))


def test_a_stage_that_has_no_numbers_yet_has_a_heading(tmp_path):
    class StopError(RuntimeError):
        pass

    class Stopping(Callback):
        def on_stage_end(self, run, stage, model):
            raise StopError

    with pytest.raises(StopError):
        trainer_of(tmp_path, [sft(), sft()], callbacks=[Stopping()])()
    assert stage_table(Run.open(tmp_path), "sft-2") == "sft-2: not begun"


def test_trackers_get_all_numbers_of_metrics_at_steps_that_never_fall(tmp_path):
    """Trackers such as that of Weights & Biases drop what comes at an earlier step."""
    book = Book()
    run = tracked(tmp_path, [sft(), self_reward(rounds=2), external()], book)()
    steps = [step for step, _ in book.lines]
    assert steps == sorted(steps)
    expected, before = [], 0
    for name in run.stages:
        for line in run.metrics(name):
            numbers = {
                f"{name}/{k}": v for k, v in line.items() if k not in ("step", "round", "rounds")
            }
            expected.append((before + line["step"], numbers))
        before += run.summary(name)["steps"]
    assert [line for line in book.lines if line[1]] == expected
    assert before > 6 and book.finished == 1


def test_a_resumed_run_goes_on_at_the_steps_of_the_stages_before(tmp_path):
    run = tracked(tmp_path, [sft()], Book())()
    tracked(tmp_path, [sft(), external()], book := Book())()
    least = run.summary("sft")["steps"]
    assert {name.split("/")[0] for _, line in book.lines for name in line} == {"external_reward"}
    assert min(step for step, _ in book.lines) == least == 6


def test_trackers_that_can_get_samples_of_each_stage(tmp_path):
    book = Book()
    run = tracked(tmp_path, [sft(), self_reward()], book)()
    [(step, name, columns, rows)] = book.tables
    assert (step, name) == (7, "self_reward/samples")
    assert columns == ["prompt", "response", "role", "score", "judge"]
    candidates = {(c.text, p.text) for c in run.candidates(1) for p in run.prompts(1)}
    assert rows and all((row[1], row[0]) in candidates for row in rows)
    assert len({row[0] for row in rows}) == min(8, len(run.prompts(1)))
    pairs = [row for row in rows if row[2]]
    assert {row[2] for row in pairs} == {"chosen", "rejected"}
    scores = candidate_scores(run.candidates(1), run.judgements(1))
    of = {
        (p.text, c.text): scores[c.id]
        for p in run.prompts(1)
        for c in run.candidates(1)
        if c.prompt_id == p.id
    }
    assert all(float(row[3]) == pytest.approx(of[row[0], row[1]], rel=1e-5) for row in pairs)
    for prompt, text, _, _, judged in rows:
        ids = {c.id for c in run.candidates(1) if c.text == text and of.get((prompt, text))}
        said = [
            "\n".join(j.text for j in run.judgements(1) if j.candidate_ids[0] == i) for i in ids
        ]
        assert judged in said


def test_tensorboard_gets_samples_as_text(tmp_path):
    """As Markdown; nothing that a model wrote can end a cell or be markup."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(
        tmp_path / "run",
        [self_reward()],
        accelerate_kwargs=dict(cpu=True, log_with="tensorboard", project_dir=str(tmp_path)),
    )
    run = trainer()
    bad = ["a|b\n| --- |\nc", "<script>`x`</script>", "**no** [link](to)", "", "\\|"]
    trainer.runtime.log_table("attack", SAMPLE, [bad], 3)
    trainer.runtime.end_trackers()
    texts = {}
    for folder in {file.parent for file in tmp_path.rglob("events.out.tfevents*")}:
        found = EventAccumulator(str(folder)).Reload()
        for tag in found.Tags()["tensors"]:
            [event] = found.Tensors(tag)
            texts[tag] = event.tensor_proto.string_val[0].decode()
    assert set(texts) == {"self_reward/samples/text_summary", "attack/text_summary"}
    lines = texts["self_reward/samples/text_summary"].splitlines()
    assert lines[0] == "| prompt | response | role | score | judge |"
    assert len(lines) == 2 + len(run.candidates(0))
    attack = texts["attack/text_summary"].splitlines()
    assert len(attack) == 3 and attack[2].count("|") == 6
    assert not set("<>`*[]\\") & set(attack[2])
