"""What a notebook shows of configs, runs and records, and what help begins with."""

import inspect
import pydoc
from html.parser import HTMLParser

import pytest

from self_rewarding_lm import (
    DPOConfig,
    RewardConfig,
    SamplingConfig,
    SelfRewardDPOConfig,
    SFTConfig,
)
from self_rewarding_lm.runs.lines import Picked
from tests.test_trainer import self_reward, sft, trainer_of


class Cells(HTMLParser):
    """The texts of a table, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.caption, self.at = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.at = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        else:
            assert tag in ("table", "caption"), f"a value made the tag {tag}"

    def handle_data(self, data):
        if self.at == "caption":
            self.caption += data
        else:
            self.rows[-1][-1] += data


def cells(shown):
    return Cells(shown._repr_html_())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("run"), [sft(), self_reward()])()


def test_a_config_shows_what_was_given():
    table = cells(SamplingConfig(temperature=1.0, stop=("<b>&",)))
    assert table.rows == [["setting", "given"], ["stop", "('<b>&',)"], ["temperature", "1.0"]]
    assert table.caption == "SamplingConfig, 8 by default"


def test_a_run_shows_its_stages(run):
    table = cells(run)
    assert table.caption == str(run.folder)
    assert [row[:2] for row in table.rows] == [
        ["stage", ""],
        ["sft", "done"],
        ["self_reward", "done"],
    ]
    pairs, steps = (run.summary("self_reward")[name] for name in ("pairs", "steps"))
    assert table.rows[2][2:] == [str(pairs), str(steps)]


def test_records_show_their_first_with_texts_and_scores_and_without_ids_of_tokens(run):
    pairs = run.pairs("self_reward")
    table = cells(pairs)
    head, *rows = table.rows
    assert {"id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score"} <= set(head)
    assert not any(name.endswith("ids") for name in head) and "messages" not in head
    assert len(rows) == min(5, len(pairs)) and table.caption == f"{len(rows)} of {len(pairs)}"
    for row, pair in zip(rows, pairs, strict=False):
        assert row[head.index("chosen")] == pair.chosen
        assert float(row[head.index("chosen_score")]) == pair.chosen_score
    assert cells(run.preference_rows("self_reward")).rows[0] == ["prompt", "chosen", "rejected"]


def test_long_values_are_shortened_and_no_records_are_an_empty_table():
    assert cells(Picked(["x" * 500])).rows[1] == [f"{'x' * 120}…"]
    assert cells(Picked([])).rows == [[]] and cells(Picked([])).caption == "0 of 0"


def test_records_are_a_data_frame_in_a_line(run):
    pandas = pytest.importorskip("pandas")
    pairs = run.pairs("self_reward")
    frame = pandas.DataFrame(list(pairs))
    assert len(frame) == len(pairs)
    assert list(frame["chosen_score"]) == [pair.chosen_score for pair in pairs]


@pytest.mark.parametrize(
    ("cls", "required"),
    [
        (SFTConfig, ["train_dataset"]),
        (DPOConfig, ["train_dataset"]),
        (SelfRewardDPOConfig, ["prompt_dataset"]),
        (RewardConfig, ["prompt_template"]),
    ],
)
def test_help_begins_with_what_is_required(cls, required):
    parameters = list(inspect.signature(cls).parameters.values())
    assert [it.name for it in parameters if it.default is it.empty] == required
    assert [it.name for it in parameters[: len(required)]] == required
    assert set(inspect.signature(cls).parameters) == set(cls.model_fields)
    assert f"{cls.__name__}(*, {required[0]}:" in pydoc.plain(pydoc.render_doc(cls))
