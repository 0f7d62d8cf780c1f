"""What holds for any bytes: files of rows, files of records, recipes; and for sequences on them."""

import gzip
import json
import tempfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from hypothesis import strategies as st

from self_rewarding_lm.data.files import JsonLines
from self_rewarding_lm.errors import ConfigError, DataError, StoreError
from self_rewarding_lm.records import Candidate, Judgement, to_json
from tests.support.mutants import over

SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
BYTES = st.binary(max_size=30)
DEEP = st.sampled_from([b"@deep", b"[" * 20 + b"]" * 20])
"""@deep stands for many brackets, see `expanded`."""


def dumped(value) -> bytes:
    return json.dumps(value).encode()


LINE = (
    JSON.map(dumped)
    | BYTES
    | st.sampled_from([b"", b" ", b"{", b"\xff", b"1" * 5000, b"NaN", b'"\\ud800"'])
    | DEEP
)
ENDING = st.sampled_from([b"\n", b"\r\n", b"\n\n", b""])


def expanded(content: bytes) -> bytes:
    return content.replace(b"@deep", b"[" * 100_000)


def packed(content: bytes, how: str) -> bytes:
    """By gzip, as it is, cut off or with a byte that is another."""
    if how == "plain":
        return content
    whole = gzip.compress(content)
    return {"packed": whole, "cut": whole[:-9], "damaged": whole[:11] + b"\x07" + whole[12:]}[how]


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# Sequences


@over(
    "runs.lines",
    st.tuples(st.lists(st.lists(st.integers(), max_size=4), max_size=4), st.data()),
    mutants={
        "bisect_right(self._starts, place) - 1": "min(place, len(self._parts) - 1)",
        "places = range(len(self))[index]": "places = range(len(self) + 1)[index]",
        "self._items[self._places[place]]": "self._items[place]",
        "return len(self) == len(other) and all": "return all",
    },
    examples=300,
)
def lazy_sequences_are_the_lists_that_they_stand_for(lines, case):
    parts, data = case
    joined, plain = lines.Joined(*parts), [item for part in parts for item in part]
    places = data.draw(st.lists(st.integers(0, max(0, len(plain) - 1)), max_size=5 if plain else 0))
    picked, chosen = (
        lines.Picked(plain, places, lambda item: item + 1),
        [plain[p] + 1 for p in places],
    )
    for lazy, wanted in ((joined, plain), (picked, chosen)):
        assert list(lazy) == wanted and lazy == wanted and len(lazy) == len(wanted)
        assert lazy != [*wanted, 0]
        part = slice(
            *data.draw(
                st.tuples(*[st.none() | st.integers(-6, 6)] * 2, st.sampled_from([None, 1, -1, 2]))
            )
        )
        assert lazy[part] == wanted[part]
        i = data.draw(st.integers(-8, 8))
        try:
            assert lazy[i] == wanted[i]
        except IndexError:
            assert not -len(wanted) <= i < len(wanted)


@over(
    "runs.lines",
    st.lists(st.tuples(BYTES, ENDING), max_size=6).map(
        lambda lines: b"".join(a + b for a, b in lines)
    ),
    mutants={
        "place += len(line)": "place += len(line.strip())",
        "return 1 + sum(start < place": "return sum(start < place",
    },
    examples=300,
)
def a_file_is_its_lines_and_each_is_found_again(lines, content):
    file = lines.LineFile(BytesIO(content), Path("x"))
    found = list(file)
    assert b"".join(line for _, line in found) == content
    for number, (start, line) in enumerate(found, 1):
        assert file.at(start) == line == content[start : start + len(line)]
        assert file.number(start) == number


def _edited(content: bytes, edit: tuple[str, int, int]) -> bytes:
    """Bytes of lines after one edit. edit: its name and two places, counted around the end."""
    what, one, other = edit
    lines = content.splitlines(keepends=True)
    i, j = one % len(lines), other % len(lines)
    if what == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "delete":
        del lines[i]
    elif what == "double":
        lines.insert(j, lines[i])
    elif what == "cut":
        return content[: one % len(content)]
    else:
        place = one % len(content)
        return content[:place] + bytes([other % 256]) + content[place + 1 :]
    return b"".join(lines)


@over(
    "runs.lines",
    st.tuples(
        st.lists(st.lists(st.dictionaries(st.text(max_size=2), JSON, min_size=1), max_size=3)),
        st.none()
        | st.tuples(
            st.sampled_from(("swap", "delete", "double", "cut", "byte")),
            st.integers(0, 4000),
            st.integers(0, 4000),
        ),
    ),
    mutants={
        "before + plain": "plain",
        "seal == _seal(plain, last) if seal or last else": "seal or last or",
        "_seal_at(file, start)) if sealed": 'b"") if sealed',
    },
    examples=600,
)
def sealed_lines_are_those_that_were_written_or_fewer(lines, case):
    appended, edit = case
    with folder() as where:
        path = where / "x.0.jsonl"
        path.touch()
        for values in appended:
            lines.append_lines(path, values, sealed=True)
        content = path.read_bytes()
    written = [value for values in appended for value in values]
    held = content if edit is None or not content else _edited(content, edit)
    file = lines.SealedFile(BytesIO(held), Path("x.0.jsonl"))
    try:
        found = [(start, line) for start, line in file if line.endswith(b"\n")]
    except StoreError as error:
        assert held != content and "x.0.jsonl" in str(error)
        return
    assert all(file.at(start) == line for start, line in found)
    assert [json.loads(line) for _, line in found] == written[: len(found)]
    assert held != content or len(found) == len(written)


# Files of rows


def _row(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@over(
    "data.files",
    st.tuples(
        st.lists(st.tuples(LINE, ENDING), max_size=5).map(
            lambda lines: b"".join(a + b for a, b in lines)
        ),
        st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet"]),
        st.sampled_from(["plain", "packed", "cut", "damaged"]),
        st.booleans(),
    ),
    mutants={
        "except (ValueError, RecursionError) as error:  # brackets": "except ValueError as error:  # brackets",
        "        except (ValueError, RecursionError) as error:  # brackets within brackets without end\n            return UnreadableLine(str(error))": "        except KeyError as error:\n            return UnreadableLine(str(error))",
        "except (OSError, EOFError, zlib.error)": "except OSError",
        "if not isinstance(rows, list):": "if False:",
        "if blank_lines or not is_blank:": "if True:",
        "            if not is_blank:\n                rows": "            if True:\n                rows",
        "enumerate(self._lines, 1)": "enumerate(self._lines)",
        "except (csv.Error, UnicodeDecodeError)": "except csv.Error",
        "if len(fields) != len(head):": "if False:",
        "except (OSError, ValueError) as error:  # pyarrow": "except KeyError as error:  # pyarrow",
        "del self._starts[rows:], self._numbers[rows:]": "pass",
    },
    examples=600,
)
def any_file_of_rows_is_read_or_refused(files, case):
    """A line that is no JSON stands in its place; a file that cannot be read is named."""
    content, suffix, how, blank_lines = case
    content = expanded(content)
    with folder() as where:
        path = where / f"rows{suffix}"
        path.write_bytes(packed(content, how) if suffix.endswith(".gz") else content)
        try:
            rows = files.read_rows(path, "the data", blank_lines=blank_lines)
        except DataError as error:
            assert str(path) in str(error) and "the data" in str(error)
            assert suffix not in (".jsonl",) and (suffix, how) != (".jsonl.gz", "packed")
            return
        found = list(rows)
        assert isinstance(rows, list | files.FileRows) and len(rows) == len(found)
        if suffix.startswith(".jsonl"):
            lines = content.split(b"\n")
            while lines and not lines[-1].strip():
                lines.pop()
            numbered = [(n, it) for n, it in enumerate(lines, 1) if blank_lines or it.strip()]
            assert [rows.line(place) for place in range(len(rows))] == [n for n, _ in numbered]
            for row, (_, line) in zip(found, numbered, strict=True):
                assert isinstance(row, files.UnreadableLine) or repr(row) == repr(
                    _row(line.rstrip())
                )
                assert isinstance(row, files.UnreadableLine) == (
                    _row(line.rstrip()) is None and line.strip() != b"null"
                )


@over(
    "report.export",
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5),
    mutants={
        'json.dumps(row, ensure_ascii=False) + "\\n" for row in rows)': "json.dumps(row, ensure_ascii=False) for row in rows)",
        "for row in rows)": "for row in rows[1:])",
    },
    examples=250,
)
def rows_that_are_written_are_read_back(files, rows):
    with folder() as where:
        files.write_rows(where / "rows.jsonl", rows)
        assert list(JsonLines(where / "rows.jsonl", "the data")) == rows


# Records

ID = st.sampled_from(
    ["s/0/0", "s/1/0", "s/2/0", "s/10/0", "s/01/0", "s/x", "é", "\ud800", 'a"b', ""]
)
RECORD = st.builds(
    lambda i, text: Judgement(i, ("c",), "self", 1.0, None, text),
    ID,
    st.none() | st.text(st.characters(), max_size=6),
)
WHOLE_LINE = st.one_of(
    RECORD.map(lambda r: json.dumps(to_json(r), ensure_ascii=False).encode("utf-8", "replace")),
    RECORD.map(lambda r: dumped(to_json(r))),
)
BROKEN_LINE = st.one_of(
    JSON.map(dumped),
    st.dictionaries(
        st.sampled_from(["id", "candidate_ids", "judge", "score", "colour"]),
        SCALAR | ID,
        max_size=4,
    ).map(dumped),
    BYTES,
    DEEP,
    st.sampled_from([b'{"id": "', b'{"id": "s/0/0"}', b'{"id": "\\ud800"}', b"[]", b"\xff" * 3]),
)
NUMBERED_LINE = RECORD.map(lambda r: dumped({**to_json(r), "id": 3}))
STORED_LINE = st.integers(0, 11).flatmap(
    lambda n: {10: NUMBERED_LINE, 11: BROKEN_LINE}.get(n, WHOLE_LINE)
)


@over(
    "runs.stored",
    st.tuples(
        st.lists(st.lists(STORED_LINE, max_size=4), min_size=1, max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    mutants={
        "values = json_of(line, file.path, lambda: file.number(start))": "values = __import__('json').loads(line)",
        "except (AttributeError, TypeError, ValueError) as error:": "except ValueError as error:",
        'if line.endswith(b"\\n"):': "if True:",
    },
    examples=600,
)
def any_files_of_records_are_read_or_refused(stored, case):
    """Each id once; a line without its end does not count."""
    files, merged, torn = case
    with folder() as where:
        for rank, lines in enumerate(files):
            name = "judgements.jsonl" if merged and rank == 0 else f"judgements.{rank}.jsonl"
            content = b"".join(expanded(line.replace(b"\n", b"")) + b"\n" for line in lines)
            (where / name).write_bytes(content[:-1] if torn else content)
        try:
            records = stored.Stored(Judgement, where)
            found, ids = list(records), list(records.ids())
        except StoreError as error:
            assert str(where) in str(error)
            return
        whole = sum(max(0, len(lines) - torn) for lines in files)
        assert len(found) == len(ids) <= whole and all(isinstance(one, Judgement) for one in found)
        assert ids == [one.id for one in found] and all(isinstance(i, str) for i in ids)
        assert len(set(ids)) == len(ids) or (merged and len(files) == 1)


@over(
    "runs.stored",
    st.tuples(st.lists(st.lists(RECORD, max_size=6), min_size=1, max_size=3), st.booleans()),
    mutants={
        "if record_id not in seen:\n            seen.add(record_id)\n            yield line": "yield line",
        '(0, int(p), "") if p.isdecimal()': "(1, 0, p) if p.isdecimal()",
        "            if record_id in seen:\n                again.add(place)": "            if record_id in seen:\n                pass",
        "while some := sorted(islice(lines, RUN)):": "while some := list(islice(lines, RUN)):",
        "part.unlink()": "pass",
    },
    examples=500,
)
def merging_keeps_every_record_once_in_the_order_of_the_ids(stored, case):
    parts, again = case
    with folder() as where:
        first = {}
        for rank, records in enumerate(parts):
            lines = [
                json.dumps(to_json(r), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                for r in records
            ]
            (where / f"judgements.{rank}.jsonl").write_bytes(b"".join(lines))
            for line in lines:
                first.setdefault(json.loads(line)["id"], line)
        before = list(stored.Stored(Judgement, where).ids())
        assert before == list(first)
        stored.merge_files(where, "judgements")
        if again:
            stored.merge_files(where, "judgements")
        assert not stored.rank_files(where, "judgements")
        lines = (where / "judgements.jsonl").read_bytes().splitlines(keepends=True)
        assert sorted(lines) == sorted(first.values())
        keys = [
            [
                (0, int(p), "") if p.isdecimal() else (1, 0, p)
                for p in json.loads(line)["id"].split("/")
            ]
            for line in lines
        ]
        assert keys == sorted(keys)
        groups = stored.Groups(stored.Stored(Judgement, where))
        assert all([r.id for r in groups[i]] == [i] for i in first) and "no such id" not in groups


@over(
    "runs.lines",
    st.tuples(
        st.lists(JSON.filter(lambda v: isinstance(v, dict)), max_size=3),
        BYTES,
        st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=2), min_size=1, max_size=3),
    ),
    mutants={
        "file.truncate(start)\n        try": "pass\n        try",
        "return start + last + 1": "return start + last",
        'return _ENCODER.encode(values) + "\\n"': "return _ENCODER.encode(values)",
    },
    examples=250,
)
def what_is_appended_stands_behind_the_last_whole_line(lines, case):
    before, torn, values = case
    whole = b"".join(dumped(value) + b"\n" for value in before)
    with folder() as where:
        path = where / "x.jsonl"
        path.write_bytes(whole + torn.replace(b"\n", b""))
        lines.append_lines(path, values)
        content = path.read_bytes()
    assert content.startswith(whole) and content.endswith(b"\n")
    assert [json.loads(line) for line in content[len(whole) :].split(b"\n")[:-1]] == values


@over(
    "records",
    st.tuples(
        ID,
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.none() | st.text(max_size=5),
        st.none() | st.booleans(),
        st.dictionaries(st.text(max_size=3), SCALAR, max_size=2),
    ),
    mutants={
        "if unknown:": "if False:",
        "tuple(v) if isinstance(v, list) else v": "v",
    },
    examples=200,
)
def records_come_back_from_json_as_they_were(records, case):
    name, ids, text, ended, extra = case
    one = records.Candidate(name, "p", ids, text, ended, 8)
    back = records.from_json(records.Candidate, json.loads(json.dumps(records.to_json(one))))
    assert back == one and type(back.ids) is tuple
    strange = {key: value for key, value in extra.items() if not hasattr(one, key)}
    try:
        records.from_json(Candidate, {**records.to_json(one), **strange})
        assert not strange
    except ValueError as error:
        assert strange and next(iter(sorted(strange))) in str(error)


# Recipes

WITHIN_ITSELF = (b"a: &x [*x]", b"a: &x {b: *x}")
YAML_TEXT = st.lists(
    st.sampled_from(
        [
            *(
                "a: ",
                "b: ",
                "- ",
                "\n",
                "  ",
                "[",
                "]",
                "{",
                "}",
                "&x ",
                "*x",
                "<<: *x",
                "<<: 3",
                "!!int ",
                "!!bool ",
                "!!float ",
            ),
            *(
                "!!null ",
                "!!binary ",
                "!!set ",
                "!!timestamp ",
                "!!omap ",
                "!!pairs ",
                "!!str ",
                "!!python/object:os.system ",
                "!x ",
            ),
            *(
                "true",
                "no",
                "1e-6",
                "010",
                "1:30",
                "0x1f",
                "1_0",
                ".inf",
                ".nan",
                "~",
                "2020-01-01",
                '"',
                "'",
                "|",
                ">",
                "? ",
                ": ",
                "#",
            ),
            *(
                "---\n",
                "...\n",
                "%YAML 1.1\n",
                "\t",
                "<<",
                "=",
                "maybe",
                "\x85",
                "\ufeff",
                "\x07",
                "\ud800",
            ),
        ]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@over(
    "recipes.yaml_nodes",
    st.one_of(
        YAML_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
        BYTES,
        st.sampled_from(
            [
                b"- " * 1500,
                *WITHIN_ITSELF,
                b"<<: 3",
                b"a: {<<: [{b: 1}, 2]}",
                b"a: !!timestamp x",
                b"a: " + b"1" * 5000,
                b"a: !!int ''",
                b"a: !!bool maybe",
                b"? [a]\n: b",
            ]
        ),
    ),
    mutants={
        "except (OSError, UnicodeDecodeError) as error:": "except OSError as error:",
        "except yaml.YAMLError as error:": "except KeyError as error:",
        "    except RecursionError as error:\n        raise _too_deep(source) from error\n    if": "    except KeyError as error:\n        raise _too_deep(source) from error\n    if",
        "ValueError, LookupError, AttributeError)": "ValueError)",
        "if top is None:\n        raise": "if False:\n        raise",
        "if id(read) in above:": "if False:",
        "if not all(isinstance(part.value, dict) for part in parts):": "if False:",
    },
    examples=750,
)
def any_recipe_file_is_read_or_refused_with_its_name(recipe_yaml, content):
    with folder() as where:
        path = where / "recipe.yaml"
        path.write_bytes(content)
        try:
            node = recipe_yaml.read_yaml(path)
        except ConfigError as error:
            assert str(path) in str(error)
            assert content not in WITHIN_ITSELF or "alias" in str(error)
            return
        assert node.folder == where.resolve() and node.place.startswith(str(path))
        _check_node(node, recipe_yaml.Node)
        node.plain()
        assert node.at(("a", 0, "b")).place


@over(
    "recipes.yaml_nodes",
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 3)), max_size=6),
    mutants={
        " - len(sizes) > MOST_REPEATED": " - len(sizes) > 10**9",
        "if _size(top, sizes) - len(sizes) >": "if len(sizes) >",
        "sizes[id(read)] = 1 + sum(": "sizes[id(read)] = sum(",
        "[] if isinstance(read, yaml.ScalarNode) else read.value": "[]",
    },
    examples=300,
)
def aliases_add_a_bounded_number_of_values(recipe_yaml, lists):
    """lists: of each its scalars, and how often it names the one before it and the first."""
    lines, sizes, values = [], [], []
    for place, (scalars, before, first) in enumerate(lists):
        named = [place - 1] * before + [0] * first if place else []
        items = ["1"] * scalars + [f"*l{i}" for i in named]
        lines.append(f"l{place}: &l{place} [{', '.join(items)}]\n")
        sizes.append(1 + scalars + sum(sizes[i] for i in named))
        # what stands for more than is allowed is not made here either
        is_small = sum(sizes) < 2 * recipe_yaml.MOST_REPEATED
        values.append([1] * scalars + [values[i] for i in named] if is_small else None)
    if not lists:
        return
    added = sum(sizes) - sum(1 + scalars for scalars, _, _ in lists)
    try:
        node = recipe_yaml.parse_yaml("".join(lines), "text", Path("."))
    except ConfigError as error:
        assert added > recipe_yaml.MOST_REPEATED and "text: its aliases" in str(error)
    else:
        assert added <= recipe_yaml.MOST_REPEATED
        assert list(node.plain().values()) == values


def _check_node(node, kind):
    assert type(node) is kind
    children = (
        node.value.values()
        if isinstance(node.value, dict)
        else node.value
        if isinstance(node.value, list)
        else ()
    )
    assert not isinstance(node.value, dict) or all(isinstance(key, str) for key in node.value)
    for child in children:
        _check_node(child, kind)


YAML_SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
)
YAML_VALUE = st.recursive(
    YAML_SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text("abcno<", min_size=1, max_size=4).filter(lambda k: k != "<<"), inner, max_size=3
        )
    ),
    max_leaves=8,
).filter(lambda value: value is not None)


@over(
    "recipes.yaml_nodes",
    YAML_VALUE,
    mutants={
        '("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"))': '("bool", r"yes|no", list("yn"))',
        "([eE][-+]?[0-9]+)?": "",
        "if name in values:": "if False:",
        "return {key: child.plain() for key, child in self.value.items()}": "return {key: child for key, child in self.value.items()}",
        '("null", r"~|null|Null|NULL|", ["~", "n", "N", ""])': '("null", r"~", ["~"])',
    },
    examples=400,
)
def json_is_yaml_and_says_the_same(recipe_yaml, value):
    text = json.dumps(value)
    if "Infinity" in text:
        return
    assert recipe_yaml.parse_yaml(text, "text", Path(".")).plain() == value
    if isinstance(value, dict) and value:
        block = "".join(f"{json.dumps(key)}: {json.dumps(item)}\n" for key, item in value.items())
        assert recipe_yaml.parse_yaml(block, "text", Path(".")).plain() == value
        twice = block + block.splitlines(keepends=True)[0]
        try:
            recipe_yaml.parse_yaml(twice, "text", Path("."))
        except ConfigError as error:
            assert f"line {len(value) + 1}: the key {next(iter(value))!r} appears twice" in str(
                error
            )
        else:
            raise AssertionError("a key that is there twice was taken")
    if isinstance(value, list) and value:
        block = "".join(f"- {json.dumps(item)}\n" for item in value)
        assert recipe_yaml.parse_yaml(block, "text", Path("."), lines=False).plain() == value
