"""One run, or one writer, at a time in a folder."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from self_rewarding_lm.errors import StoreError, other_folder
from self_rewarding_lm.runs.atomic import system_errors
from self_rewarding_lm.runtime import Runtime

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


logger = logging.getLogger(__name__)


LOCK = "run.lock"


@contextmanager
def alone(folder: Path, runtime: Runtime) -> Iterator[None]:
    """As `locked`, for a run of several processes: the main one holds the lock for all."""
    with ExitStack() as held:
        failure = None
        if runtime.is_main:
            try:
                held.enter_context(locked(folder))
            except StoreError as error:
                failure = error
        failure = runtime.from_main(failure)
        if failure is not None:
            raise failure
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder; StoreError if one is at work in it.

    The system holds the lock and gives it up when the process ends, however it does. If the file
    system has no locks a warning says so.
    """
    with system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def is_at_work(folder: Path) -> bool:
    """Whether a run is at work in a folder; False where that cannot be known."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not take(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def take(descriptor: int) -> bool:
    """Whether an open file's lock is this process's now; OSError if the file system has none.

    The system gives it up when the file is closed or the process ends.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _lock(descriptor: int, folder: Path) -> None:
    try:
        is_free = take(descriptor)
    except OSError as error:
        logger.warning("%s: no lock (%s); do not start two runs in it at once.", folder, error)
        return
    if not is_free:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
        raise StoreError(
            f"another run is at work in {folder} ({owner or 'its process is not known'}). "
            f"Wait for it, stop it, or give this one {other_folder()}."
        )
    if fcntl is not None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
