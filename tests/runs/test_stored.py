"""Records on disk: read one by one, looked up by a key, and merged; against readings in full."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import Candidate, Prompt, from_json, to_json
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups, Stored, id_order, merge_files, record_files
from self_rewarding_lm.runtime import Runtime
from tests.support.sealed import write_sealed

KIND = Candidate.kind


def candidate(record_id, text="t"):
    return Candidate(record_id, record_id.rpartition("/")[0], (1, 2), text, True, 8)


def line_of(record):
    return json.dumps(to_json(record), ensure_ascii=False) + "\n"


def write(path, records, torn=""):
    path.write_text("".join(map(line_of, records)) + torn, encoding="utf-8")


def all_lines(folder):
    """The naive reading: every whole line of every file, in the order in which files count."""
    merged = [folder / f"{KIND}.jsonl"]
    found = []
    for path in merged + sorted(set(folder.glob(f"{KIND}.*.jsonl")) - set(merged)):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found += [part + "\n" for part in text.split("\n")[:-1]]
    return found


def first_of_each(lines):
    found = {}
    for line in lines:
        found.setdefault(json.loads(line)["id"], line)
    return found


def naive_merge(folder):
    found = first_of_each(all_lines(folder))
    return "".join(found[i] for i in sorted(found, key=id_order))


def scattered(folder, seed, *, merged):
    """Records with random ids in the files of several ranks, many of them more than once."""
    random = Random(seed)

    def some_id():
        row = random.choice([random.randint(0, 30), "007", "7", "٣", "valid/3"])
        parts = [random.choice(["sr", 'q"uo\\te', "ü", "9"]), row, random.randint(0, 2)]
        return "/".join(map(str, parts[: random.randint(2, 3)]))

    def some(count):
        return [candidate(some_id(), f"{random.random()} ü \u2028") for _ in range(count)]

    for rank in (0, 1, 2, 10):
        torn = random.choice(["", '{"id": "sr/0/', '{"id": "sr/0/0", "text": "'])
        write(folder / f"{KIND}.{rank}.jsonl", some(random.randint(0, 60)), torn)
    if merged:
        held = first_of_each(map(line_of, some(50)))
        lines = (held[i] for i in sorted(held, key=id_order))
        (folder / f"{KIND}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("run", [1, 7, 1 << 16], ids="sorted {} at once".format)
@pytest.mark.parametrize("merged", [False, True], ids=["first merge", "merged before"])
def test_a_merge_is_what_sorting_all_lines_in_memory_gives(tmp_path, run, merged, monkeypatch):
    monkeypatch.setattr("self_rewarding_lm.runs.stored.RUN", run)
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        scattered(folder, seed, merged=merged)
        expected = naive_merge(folder)
        merge_files(folder, KIND)
        assert sorted(p.name for p in folder.iterdir()) == [f"{KIND}.jsonl", "files.json"]
        assert (folder / f"{KIND}.jsonl").read_text(encoding="utf-8") == expected
        merge_files(folder, KIND)
        assert (folder / f"{KIND}.jsonl").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("hashed", [hash, len, lambda record_id: 0], ids=["hash", "few", "one"])
@pytest.mark.parametrize("merged", [False, True], ids=["ranks", "merged and ranks"])
def test_what_is_read_is_the_first_record_of_each_id(tmp_path, merged, hashed, monkeypatch):
    """Also where different ids have the same hash."""
    monkeypatch.setattr("self_rewarding_lm.runs.stored.hash", hashed, raising=False)
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        scattered(folder, seed, merged=merged)
        expected = first_of_each(all_lines(folder))
        stored = Stored(Candidate, folder)
        assert list(stored.ids()) == list(expected)
        assert stored == [from_json(Candidate, json.loads(line)) for line in expected.values()]
        odd = Stored(Candidate, folder, lambda record_id: len(record_id) % 2 == 1)
        assert odd == [record for record in stored if len(record.id) % 2 == 1]


@pytest.mark.parametrize("hashed", [hash, lambda key: 0], ids=["hash", "one for all"])
def test_groups_are_those_of_a_dict(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr("self_rewarding_lm.runs.stored.hash", hashed, raising=False)
    scattered(tmp_path, 3, merged=True)
    stored = Stored(Candidate, tmp_path)
    expected = {}
    for record in stored:
        expected.setdefault(record.prompt_id, []).append(record)
    groups = Groups(stored, lambda c: c.prompt_id)
    for key, own in expected.items():
        assert groups[key] == own and key in groups
        assert stored[groups.places(key)[0]] == own[0]
    assert groups["none"] == [] and "none" not in groups
    by_id = Groups(stored)
    assert all(by_id[record.id] == [record] for record in stored)
    assert Counter(map(len, expected.values())).total() < len(stored)  # some had several


def test_nothing_on_disk_has_no_groups(tmp_path):
    groups = Groups(Stored(Candidate, tmp_path))
    assert groups["a/0"] == [] and "a/0" not in groups and groups.in_order([]) == []


def test_records_can_be_had_in_any_order_of_their_ids(tmp_path):
    records = [candidate(f"a/{i}") for i in range(5)]
    write(tmp_path / f"{KIND}.jsonl", records)
    stored = Stored(Candidate, tmp_path)
    groups = Groups(stored)
    assert groups.in_order(stored.ids()) == records
    assert groups.in_order(["a/3", "a/0"]) == [records[3], records[0]]
    assert groups.in_order([f"a/{i}" for i in (4, 3, 2, 1, 0)]) == records[::-1]
    with pytest.raises(KeyError, match="a/7"):
        groups.in_order(["a/7"])


def test_records_in_order_stay_those_of_their_ids_when_others_are_merged_with_them(tmp_path):
    records = [candidate(f"b/{i}") for i in range(3)]
    write(tmp_path / f"{KIND}.jsonl", records)
    stored = Stored(Candidate, tmp_path)
    groups = Groups(stored)
    found = groups.in_order(["b/0", "b/1", "b/2"])
    assert found == records
    stored.close()
    write(tmp_path / f"{KIND}.jsonl", [candidate("a/0"), candidate("a/1"), *records])
    assert found == records and "a/1" in groups


def test_a_record_that_is_not_asked_for_is_not_parsed(tmp_path):
    """Every third line has an id and is damaged after it; the others can be read."""
    lines = [line_of(candidate(f"a/{i}")) for i in range(1000)]
    lines[::3] = [f'{{"id": "a/{i}", "prom\n' for i in range(0, 1000, 3)]
    (tmp_path / f"{KIND}.jsonl").write_text("".join(lines))
    stored = Stored(Candidate, tmp_path)
    assert len(stored) == 1000
    assert list(stored.ids()) == [f"a/{i}" for i in range(1000)]
    assert stored[1] == stored[1:3][0] == candidate("a/1") and stored[-2] == candidate("a/998")
    assert Picked(stored, [500, 4])[0] == Groups(stored)["a/500"][0] == candidate("a/500")
    with pytest.raises(
        StoreError, match=r"candidates\.jsonl, line 502, is not a JSON object.*delete it"
    ):
        stored[501]
    with pytest.raises(StoreError, match="line 1,"):
        list(stored)


def test_a_batch_that_is_looked_at_again_is_not_parsed_again(tmp_path, monkeypatch):
    parsed = []

    def counting(record_type, values):
        parsed.append(values["id"])
        return from_json(record_type, values)

    monkeypatch.setattr("self_rewarding_lm.runs.stored.from_json", counting)
    write(tmp_path / f"{KIND}.jsonl", [candidate(f"a/{i}") for i in range(1000)])
    stored = Stored(Candidate, tmp_path)
    for _ in range(3):
        assert [stored[i].id for i in range(16)] == [f"a/{i}" for i in range(16)]
    assert parsed == [f"a/{i}" for i in range(16)]


def test_what_was_given_is_what_was_there_whatever_is_appended_or_merged_by_others(tmp_path):
    write(tmp_path / f"{KIND}.0.jsonl", [candidate("a/2"), candidate("a/1")], torn='{"id": "a')
    stored = Stored(Candidate, tmp_path)
    before = list(stored)
    with (tmp_path / f"{KIND}.0.jsonl").open("a") as file:
        file.write('/3"}\n')
    write(tmp_path / f"{KIND}.1.jsonl", [candidate("a/0")])
    merge_files(tmp_path, KIND)
    assert stored == before == [candidate("a/2"), candidate("a/1")]


def test_files_that_are_merged_while_they_are_opened_are_read_merged(tmp_path, monkeypatch):
    """As by a reader that looks at a run which goes on."""
    write(tmp_path / f"{KIND}.0.jsonl", [candidate("a/1")])
    write(tmp_path / f"{KIND}.1.jsonl", [candidate("a/0")])
    found = []

    def finding(folder, kind):
        found.append(record_files(folder, kind))
        if len(found) == 1:
            merge_files(tmp_path, KIND)
        return found[-1] if len(found) > 2 else found[0]

    monkeypatch.setattr("self_rewarding_lm.runs.stored.record_files", finding)
    assert Stored(Candidate, tmp_path) == [candidate("a/0"), candidate("a/1")]
    assert [p.name for p in found[0]] == [f"{KIND}.0.jsonl", f"{KIND}.1.jsonl"]
    assert [p.name for p in found[-1]] == [f"{KIND}.jsonl"]


def stage_dir(path):
    stage = StageDir(path, Runtime({}, quiet=True))
    stage.begin({})
    return stage


def test_what_a_stage_gave_is_the_merged_records_after_a_merge(tmp_path):
    stage = stage_dir(tmp_path)
    stage.append(candidate(f"a/{i}") for i in (10, 9, 8))
    stage.append([Prompt("a/8", 0, (1,))])
    all_of, odd = stage.known(Candidate), stage.known(Candidate, lambda i: i.endswith("9"))
    prompts = stage.known(Prompt)
    assert [c.id for c in all_of] == ["a/10", "a/9", "a/8"]
    stage.append([candidate("a/7")])
    assert len(all_of) == 3
    stage.merge(Candidate)
    assert [c.id for c in all_of] == ["a/7", "a/8", "a/9", "a/10"]
    assert odd == [candidate("a/9")] and prompts == [Prompt("a/8", 0, (1,))]


def test_files_are_closed_when_nobody_holds_the_records(tmp_path):
    write(tmp_path / f"{KIND}.jsonl", [candidate("a/0")])
    stored = Stored(Candidate, tmp_path)
    [file] = [f.file for f in stored._files]
    assert stored[0] == candidate("a/0") and not file.closed
    del stored
    assert file.closed


# What a process that is killed leaves


class KilledError(Exception):
    pass


def test_a_merge_that_is_killed_before_its_end_loses_nothing(tmp_path, monkeypatch):
    scattered(tmp_path, 5, merged=True)
    expected, before = naive_merge(tmp_path), all_lines(tmp_path)

    def killed(*_):
        raise KilledError

    for name in ("replace", "unlink"):  # before the new file has its name; before parts are deleted
        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(Path, name, killed)
            merge_files(tmp_path, KIND)
        read = {record.id: record for record in Stored(Candidate, tmp_path)}
        for record_id, line in first_of_each(before).items():
            assert read[record_id] == from_json(Candidate, json.loads(line))
    merge_files(tmp_path, KIND)
    assert (tmp_path / f"{KIND}.jsonl").read_text(encoding="utf-8") == expected
    assert record_files(tmp_path, KIND) == [tmp_path / f"{KIND}.jsonl"]


def test_records_of_which_one_cannot_be_made_are_not_there(tmp_path):
    stage = stage_dir(tmp_path)

    def making(count):
        for i in range(count):
            yield candidate(f"b/{i}", "x" * 10_000)  # more than a buffer holds
        raise KilledError

    with pytest.raises(KilledError):
        stage.append(making(0))
    assert not (tmp_path / f"{KIND}.0.jsonl").exists()
    stage.append([candidate("a/0")])
    before = (tmp_path / f"{KIND}.0.jsonl").read_bytes()
    with pytest.raises(KilledError):
        stage.append(making(20))
    assert (tmp_path / f"{KIND}.0.jsonl").read_bytes() == before
    stage.append([candidate("a/1")])
    assert stage.read(Candidate) == [candidate("a/0"), candidate("a/1")]


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 100], ids="torn by {}".format)
def test_a_torn_line_longer_than_what_is_looked_through_at_once_is_cut_off(
    tmp_path, length, monkeypatch
):
    monkeypatch.setattr("self_rewarding_lm.runs.lines.BLOCK", 6)
    stage = stage_dir(tmp_path)
    path = tmp_path / f"{KIND}.0.jsonl"
    for held in ([], [candidate("a/0")]):
        write_sealed(path, map(line_of, held), torn="ü" * length)
        stage.append([candidate("a/1")])
        assert stage.read(Candidate) == [*held, candidate("a/1")]
        assert path.read_text().count("\n") == len(held) + 1


def test_brackets_without_end_are_a_damaged_record(tmp_path):
    (tmp_path / f"{KIND}.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(StoreError, match="line 1, is not a JSON object"):
        Stored(Candidate, tmp_path)
