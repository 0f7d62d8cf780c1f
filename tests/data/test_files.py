"""Files of rows are read as far as they are asked for; rows are written a piece at a time."""

import csv
import gzip
import json
import os

import pytest

from self_rewarding_lm.data.files import UnreadableLine, place_in, read_rows
from self_rewarding_lm.errors import DataError
from self_rewarding_lm.report.export import write_rows

ROWS = [{"prompt": f"ü {i}", "n": i} for i in range(50)]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_can_be_read_in_any_order(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    text = lines_of(ROWS).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    rows = read_rows(path, "data")
    assert rows == ROWS and len(rows) == 50
    for place in (49, 0, 17, -1, 17):
        assert rows[place] == ROWS[place]
    assert rows[10:13] == ROWS[10:13]


def test_a_line_is_parsed_when_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines_of(ROWS))
    parsed = []

    class Parser:
        def loads(self, line):
            parsed.append(json.loads(line)["n"])
            return ROWS[parsed[-1]]

    monkeypatch.setattr("self_rewarding_lm.data.files.json", Parser())
    rows = read_rows(path, "data")
    assert len(rows) == 50 and parsed == []
    assert rows[7] == ROWS[7] and rows[3:5] == ROWS[3:5]
    assert parsed == [7, 3, 4]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n\t\r\n"], ids=repr)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(suffix, end, tmp_path):
    path = tmp_path / f"rows{suffix}"
    text = b'\n1\n\n{"a"\n \t\n2' + end.encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    rows = read_rows(path, "data")
    one, broken, two = rows
    assert (one, two) == (1, 2)
    assert isinstance(broken, UnreadableLine) and "':'" in broken.reason
    assert [place_in(path, rows, i) for i in range(3)] == [f"{path}, line {n}" for n in (2, 4, 6)]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n\t\r\n"], ids=repr)
def test_in_a_run_of_the_first_version_a_blank_line_between_others_is_a_row(end, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'1\n\n{"a"\n2' + end.encode())
    one, blank, broken, two = read_rows(path, "data", blank_lines=True)
    assert (one, two) == (1, 2)
    assert isinstance(blank, UnreadableLine) and "Expecting value" in blank.reason
    assert isinstance(broken, UnreadableLine) and "':'" in broken.reason


def test_a_csv_file_has_texts_by_column(tmp_path):
    path = tmp_path / "rows.csv"
    text = 'prompt,completion\n"say ""a"", please","a\nb"\n\nü,\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_rows(path, "data") == [
        {"prompt": 'say "a", please', "completion": "a\r\nb"},
        {"prompt": "ü", "completion": ""},
    ]
    path.write_text("prompt\n" + "x" * 300_000 + "\n")  # longer than csv's own limit
    limit = csv.field_size_limit()
    assert len(read_rows(path, "data")[0]["prompt"]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must name its columns"),
        (b"a,a\n1,2\n", "each once; it is 'a,a'"),
        (b"a,b\n1,2\n3\n", "line 3: the row has 1 field, and the first line names 2"),
        (b"a,b\n1,2,3\n", "line 2: the row has 3 fields"),
        (b"a\n\xff\n", "is not valid CSV in UTF-8"),
        (b'a\n"b\n', "not valid CSV in UTF-8: unexpected end of data"),
    ],
)
def test_a_csv_file_that_is_none_is_an_error(content, words, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(path, "data")


@pytest.mark.parametrize("content", ["", " \n \n"], ids=repr)
def test_a_file_of_nothing_has_no_rows(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert read_rows(path, "data") == []


def test_a_file_that_is_changed_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines_of(ROWS))
    rows = read_rows(path, "data")
    assert rows[1] == ROWS[1]
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"data: .*rows\.jsonl was changed while it was in use"):
        rows[1]


def test_a_file_may_be_replaced_by_another_one_meanwhile(tmp_path):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other"
    path.write_text(lines_of(ROWS))
    rows = read_rows(path, "data")
    other.write_text("[]\n")
    os.replace(other, path)
    assert rows == ROWS


def test_parquet_rows_are_made_a_few_at_a_time(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("self_rewarding_lm.data.files.ROWS_AT_ONCE", 8)
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5)
    rows = read_rows(path, "data")
    assert rows == ROWS and len(rows) == 50
    for place in (49, 0, 7, 8, 15, 16, 48, -50):
        assert rows[place] == ROWS[place]
        assert len(rows._block) <= 8
    assert rows[6:10] == ROWS[6:10]


UNLIKE = [
    [{"a": None, "b": [1]}, {"a": "text", "b": []}],
    [{"a": 1, "b": [{"role": "user"}]}, {"a": 2, "b": [{"role": "user", "name": "x"}]}],
    [{"a": [], "b": True}, {"a": [1.5], "b": None}],
    [{"a": 1, "b": "x"}, {"a": 2.5, "b": "y"}],
]


@pytest.mark.parametrize("rows", UNLIKE, ids=str)
@pytest.mark.parametrize("piece", [1, 100])
def test_parquet_is_written_in_pieces_of_one_schema(rows, piece, tmp_path, monkeypatch):
    """As all at once, though the first piece does not show what the second holds."""
    pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("self_rewarding_lm.report.export.ROWS_WRITTEN", piece)
    write_rows(tmp_path / "rows.parquet", rows)
    table = parquet.read_table(tmp_path / "rows.parquet")

    def whole(row):
        messages = row["b"]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            return {**row, "b": [{"role": None, "name": None} | message for message in messages]}
        return row

    assert list(map(whole, table.to_pylist())) == list(map(whole, rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_written_can_be_read(suffix, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "new" / f"rows{suffix}"
    write_rows(path, ROWS)
    assert read_rows(path, "data") == ROWS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_brackets_without_end_are_no_json(tmp_path):
    """Python's reader says RecursionError of them."""
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + "[" * 200_000 + "\n")
    assert [type(row) for row in read_rows(tmp_path / "rows.jsonl", "data")] == [
        dict,
        UnreadableLine,
    ]
    (tmp_path / "rows.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is not valid JSON"):
        read_rows(tmp_path / "rows.json", "data")
