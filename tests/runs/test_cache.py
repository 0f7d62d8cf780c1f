"""Folders kept in the user's cache: whole or not there, whoever writes, dies or has no room."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

from self_rewarding_lm.runs.cache import CACHE_VARIABLE, SIZES, Cache

FILES = {"weights": "1234567", "config.json": "{}"}


def write(folder):
    for name, text in FILES.items():
        (folder / name).write_text(text)


def holds(folder):
    return {file.name: file.read_text() for file in folder.iterdir() if file.name != SIZES}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def left(cache):
    """All names in the cache but those of locks."""
    return sorted(path.name for path in cache.root.iterdir() if path.suffix != ".lock")


def test_what_is_kept_is_found_again_and_not_written_twice(cache):
    assert cache.find("a") is None and not cache.root.exists()
    folder = cache.keep("a", write, 9)
    assert folder == cache.find("a") == cache.root / "a"
    assert holds(folder) == FILES and cache.size(folder) == 9
    assert cache.keep("a", lambda _: pytest.fail("is there already"), 9) == folder
    assert left(cache) == ["a"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "weights").write_text("123456"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / SIZES).unlink(),
        lambda folder: (folder / SIZES).write_text('{"weights": 7'),
        lambda folder: (folder / SIZES).write_text("[3]"),
        lambda folder: (folder / SIZES).write_text('{"weights": {}}'),
        shutil.rmtree,
    ],
    ids=["cut", "file gone", "sizes gone", "sizes cut", "a list", "no number", "folder gone"],
)
def test_a_folder_that_is_not_as_it_was_kept_is_made_again(harm, cache):
    harm(cache.keep("a", write, 9))
    assert cache.find("a") is None
    assert holds(cache.keep("a", write, 9)) == FILES
    assert left(cache) == ["a"]


def test_its_place_is_the_argument_else_the_variable_else_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().root == tmp_path / ".cache/self_rewarding_lm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().root == tmp_path / "xdg/self_rewarding_lm"
    monkeypatch.setenv(CACHE_VARIABLE, "~/mine")
    assert Cache().root == tmp_path / "mine"
    assert Cache("~/other").root == tmp_path / "other"


def forked(work):
    """Start a process that does `work` and nothing else; its exit status is 0 if that is True."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(not work())
        finally:
            os._exit(status)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_in_the_middle_leaves_nothing_that_is_found_and_the_next_one_clears_it(cache):
    def write_and_die(folder):
        (folder / "weights").write_text("123")
        os.kill(os.getpid(), signal.SIGKILL)

    assert status_of(forked(lambda: cache.keep("a", write_and_die, 9))) == -signal.SIGKILL
    [draft] = left(cache)
    assert draft.endswith(".tmp") and cache.find("a") is None
    assert holds(cache.keep("a", write, 9)) == FILES
    assert left(cache) == ["a"]


def test_while_another_process_writes_nothing_is_written_beside_it_nor_waited_for(cache):
    cache.root.mkdir()
    with (cache.root / "a.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (cache.root / "a.1.tmp").mkdir()  # the other's draft
        assert cache.keep("a", lambda _: pytest.fail("another is at it"), 9) is None
        assert cache.keep("b", write, 9) is not None
    assert left(cache) == ["a.1.tmp", "b"]


def test_of_processes_that_keep_the_same_at_once_each_finds_it_whole_or_not_at_all(cache):
    def write_slowly(folder):
        for name, text in FILES.items():
            time.sleep(0.02)
            (folder / name).write_text(text)

    def is_right():
        folder = cache.keep("a", write_slowly, 9)
        return folder is None or holds(folder) == FILES

    children = [forked(is_right) for _ in range(6)]
    assert [status_of(child) for child in children] == [0] * 6
    assert holds(cache.find("a")) == FILES and left(cache) == ["a"]


def full(folder):
    (folder / "weights").write_text("123")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuses(folder):
    raise NotImplementedError("models of this kind are not saved")


@pytest.mark.parametrize("failing", [full, refuses])
def test_what_cannot_be_written_is_done_without_and_said_once(failing, cache, caplog):
    for name in ("a", "b"):
        assert cache.keep(name, failing, 9) is None
    assert left(cache) == []
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    words = record.getMessage()
    assert str(cache.root) in words and "made again each time" in words and CACHE_VARIABLE in words
    assert cache.keep("c", write, 9) is not None  # the room is back


def test_a_place_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.find("a") is None and cache.keep("a", write, 9) is None
    assert len(caplog.records) == 1


def test_a_disk_without_twice_the_room_is_not_filled(cache, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    assert cache.keep("a", lambda _: pytest.fail("no room"), 1001) is None
    assert "1,001 bytes, and 2,000 are free" in caplog.text
    assert cache.keep("a", write, 1000) is not None


def test_ctrl_c_goes_through_and_leaves_no_draft(cache):
    def interrupted(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.keep("a", interrupted, 9)
    assert left(cache) == []
    assert json.loads((cache.keep("a", write, 9) / SIZES).read_text()) == {
        "config.json": 2,
        "weights": 7,
    }
