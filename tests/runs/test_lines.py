"""Sequences whose items are made when they are asked for, against the lists of the same items."""

from io import BytesIO
from pathlib import Path

import pytest

from self_rewarding_lm.runs.lines import Joined, LineFile, Picked


class Counting:
    """Doubles a number, and notes for which."""

    def __init__(self):
        self.asked = []

    def __call__(self, item):
        self.asked.append(item)
        return 2 * item


LISTS = {
    "picked": (Picked([5, 6, 7], [2, 0]), [7, 5]),
    "picked, all, changed": (Picked([5, 6, 7], change=lambda i: -i), [-5, -6, -7]),
    "picked of picked": (Picked(Picked([5, 6, 7], [2, 1, 0]), [0, 2]), [7, 5]),
    "picked, none": (Picked([5, 6], []), []),
    "joined": (Joined([1, 2], (), (3,), Picked([4, 5])), [1, 2, 3, 4, 5]),
    "joined, nothing": (Joined(), []),
}


@pytest.mark.parametrize("name", LISTS)
def test_it_is_read_as_the_list_of_its_items(name):
    lazy, items = LISTS[name]
    assert lazy == items and items == lazy
    assert list(lazy) == list(iter(lazy)) == items and len(lazy) == len(items)
    assert bool(lazy) == bool(items)
    for index in range(-len(items), len(items)):
        assert lazy[index] == items[index]
    for beyond in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            lazy[beyond]
    for some in (slice(None), slice(1, None), slice(None, None, -1), slice(5, 9), slice(-2, None)):
        assert lazy[some] == items[some] and isinstance(lazy[some], list)
    assert list(reversed(lazy)) == items[::-1]


def test_two_with_other_items_or_another_length_differ():
    assert Picked([1, 2]) != [1, 3] and Picked([1, 2]) != [3, 2]
    assert Picked([1, 2]) != [1]
    assert Picked([1, 2]) == Joined([1], [2])
    assert Picked([1, 2]) != (1, 2)  # as a list is no tuple


def test_only_what_is_asked_for_is_made():
    double = Counting()
    lazy = Joined(Picked(range(1000), change=double), Picked(range(1000, 2000), change=double))
    assert len(lazy) == 2000 and double.asked == []
    assert lazy[1500] == 3000 and lazy[3:5] == [6, 8]
    assert double.asked == [1500, 3, 4]
    assert lazy != [0, 3, *range(1998)]
    assert double.asked[3:] == [0, 1]  # up to the first that differs


LINES = b"first\n\n\xc3\xbc third\r\ntorn"


def test_lines_are_found_again_where_they_begin():
    file = LineFile(BytesIO(LINES), Path("lines"))
    found = list(file)
    assert b"".join(line for _, line in found) == LINES
    assert [start for start, _ in found] == [0, 6, 7, 17]
    for start, line in reversed(found):
        assert file.at(start) == line
    assert [file.number(start) for start, _ in found] == [1, 2, 3, 4]


def test_a_file_can_be_read_though_another_took_its_name(tmp_path):
    path, other = tmp_path / "lines", tmp_path / "other"
    path.write_bytes(b"one\ntwo\n")
    file = LineFile.open(path)
    other.write_bytes(b"quite another\n")
    other.replace(path)
    assert file.at(4) == b"two\n"
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.at(4)
