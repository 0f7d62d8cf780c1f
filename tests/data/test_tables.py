"""DataFrames of pandas and polars, and datasets of the hub, as rows of a stage."""

import pytest

from self_rewarding_lm import SFTConfig, from_hub
from self_rewarding_lm.cli import main
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.recipes.reader import Reader, read_recipe
from self_rewarding_lm.recipes.yaml_nodes import parse_yaml
from tests.test_trainer import sft, trainer_of

TABLE = {"prompt": ["a", "b"], "completion": ["c", None], "score": [1, 2], "weight": [0.5, None]}
ROWS = [
    {"prompt": "a", "completion": "c", "score": 1, "weight": 0.5},
    {"prompt": "b", "completion": None, "score": 2, "weight": None},
]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_is_its_rows(library):
    frame = pytest.importorskip(library).DataFrame(TABLE)
    rows = Rows(frame, "train_dataset")
    assert [rows.read(i) for i in range(len(rows))] == ROWS
    assert list(rows.preview()) == [0, 1]
    assert [type(value) for value in rows.read(0).values()] == [str, str, int, float]
    assert rows.where(1) == "train_dataset, row 1"
    both = Rows([frame, [{"prompt": "x"}]], "train_dataset")
    assert [both.read(i)["prompt"] for i in range(len(both))] == ["a", "b", "x"]


def test_cells_of_arrays_and_missing_values_of_pandas_are_plain():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "ids": [pandas.array([1, 2]).to_numpy(), None],
            "text": pandas.array(["a", pandas.NA], dtype="string"),
            "when": [pandas.NaT, pandas.NaT],
        }
    )
    rows = Rows(frame, "prompts")
    assert [rows.read(i) for i in range(2)] == [
        {"ids": [1, 2], "text": "a", "when": None},
        {"ids": None, "text": None, "when": None},
    ]


def test_a_stage_trains_on_a_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "ca"}]
    texts = dict(eos_id=3)
    of_list = trainer_of(tmp_path / "list", [sft(train_dataset=rows)], **texts)()
    of_frame = trainer_of(
        tmp_path / "frame", [sft(train_dataset=pandas.DataFrame(rows))], **texts
    )()
    assert of_frame.metrics("sft") == of_list.metrics("sft")


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A folder that `datasets` loads as it loads a dataset of the hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "own" / "alpaca"
    folder.mkdir(parents=True)
    lines = ["instruction,output,rest", *(f"say {i},i say {i},x" for i in range(4))]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


COLUMNS = {"prompt": "instruction", "completion": "output"}


def test_columns_of_a_dataset_of_the_hub_get_our_names(hub):
    rows = from_hub(hub, split="train[1:3]", columns=COLUMNS)
    assert list(rows) == [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in (1, 2)]
    assert from_hub(hub).column_names == ["instruction", "output", "rest"]
    assert SFTConfig(train_dataset=rows).train_dataset is rows


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"split": "test"},
            r"split 'test', could not be loaded: .*https://huggingface.co/datasets",
        ),
        ({"columns": {"prompt": "question"}}, "no column 'question'; it has: instruction, output"),
        ({"columns": {"prompt": "output", "completion": "output"}}, "twice"),
    ],
)
def test_a_dataset_of_the_hub_that_is_none_is_an_error(settings, words, hub):
    with pytest.raises(DataError, match=words):
        from_hub(hub, **settings)


def test_without_the_package_datasets_the_pip_line_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[data\]"):
        from_hub("tatsu-lab/alpaca")


def test_a_recipe_and_a_flag_name_a_dataset_of_the_hub(hub, tmp_path):
    columns = "{prompt: instruction, completion: output}"
    text = f"{{hub: {hub}, split: 'train[:2]', columns: {columns}}}"
    reader = Reader()
    rows = reader.dataset(parse_yaml(text, "recipe.yaml", tmp_path), ())
    assert not reader.problems
    assert list(rows) == [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in (0, 1)]


def test_a_recipe_whose_hub_is_not_reached_is_refused_with_the_line(tmp_path):
    text = (
        "model: org/m0\nstages:\n  - stage: sft\n    train_dataset: {hub: no/where, splt: test}\n"
    )
    with pytest.raises(
        ConfigError, match=r"line 4: .*splt: this is not a setting; did you mean 'split'"
    ):
        read_recipe(parse_yaml(text, "recipe.yaml", tmp_path))


def test_a_hubs_name_in_place_of_a_file_is_told_how_it_is_written(tmp_path, capsys):
    assert main(["judge", "--model", str(tmp_path), "--ranked", "tatsu-lab/alpaca"]) == 1
    assert "'{hub: tatsu-lab/alpaca}'" in capsys.readouterr().err
