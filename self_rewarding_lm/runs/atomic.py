"""Files that are on disk in full or not at all, and whether they still are what was written.

A folder's `files.json` lists the digest of each file that was finished in it. Knows nothing of what
the files hold.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from self_rewarding_lm.errors import StoreError

LEDGER = "files.json"


GOES_ON = (
    "What was written before is complete and is kept; fix the cause (such as a full disk, or a "
    "folder that cannot be written to) and start the run again: it resumes from there."
)
"""What to do when a file of a run cannot be written."""


OTHER_PLACE = "Choose another place, or fix the cause (a full disk, a folder without write access)."
"""What to do when a file that is no part of a run cannot be written."""


@contextmanager
def writing(path: Path, *, listed_in: Path | None = None, advice: str = GOES_ON) -> Iterator[Path]:
    """Gives a draft to write, which becomes `path` at the end: flushed to the disk, then renamed.

    listed_in: the folder whose ledger takes the file's digest. If writing fails, the draft is
    deleted, `path` stays what it was, and an error of the system becomes a StoreError with advice.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with system_errors(path, advice):
            yield draft
            settle(draft, path, listed_in=listed_in)
    except BaseException:
        with suppress(OSError):  # a disk that cannot be written to does not delete either
            draft.unlink()
        raise


def settle(draft: Path, path: Path, *, listed_in: Path | None = None) -> None:
    """Let a file that is fully written take the place of another.

    Meanwhile the ledger holds the digests of both, so that a right file looks wrong at no moment.
    listed_in: as for `writing`.
    """
    flush(draft)
    if listed_in is None:
        _rename(draft, path)
        return
    name = path.relative_to(listed_in).as_posix()
    digests, new = ledger(listed_in), digest_of(draft)
    _write_ledger(listed_in, {**digests, name: [*digests.get(name, []), new]})
    _rename(draft, path)
    _write_ledger(listed_in, {**digests, name: [new]})


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def system_errors(path: Path, advice: str = GOES_ON) -> Iterator[None]:
    """Turn an error of the system while `path` is written into a StoreError with advice."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error}. {advice}") from error


def ledger(folder: Path) -> dict[str, list[str]]:
    """The digests of a folder's finished files by name; more than one while a file is replaced."""
    path = folder / LEDGER
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(digests, dict) or not all(isinstance(v, list) for v in digests.values()):
            raise ValueError("it must hold lists of digests by file name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}. Without it nothing tells whether the files beside it "
            "are whole; delete it to go on without that check."
        ) from error
    return digests


def delist(folder: Path, names: Iterable[str]) -> None:
    """Take files that are to be deleted out of the ledger."""
    digests, gone = ledger(folder), set(names)
    others = {name: listed for name, listed in digests.items() if name not in gone}
    if not others:
        (folder / LEDGER).unlink(missing_ok=True)
    elif others != digests:
        _write_ledger(folder, others)


def digest_of(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, folder: Path) -> None:
    """Raise StoreError if the ledger of `folder` lists another digest for the file."""
    name = path.relative_to(folder).as_posix()
    listed = ledger(folder).get(name)
    if listed is None:
        return
    digest = digest_of(path)  # of a file that may have been replaced meanwhile
    if digest not in [*listed, *ledger(folder).get(name, [])]:
        raise changed(path)


def changed(path: Path) -> StoreError:
    """The error of a file whose digest is not the one that the ledger lists."""
    return StoreError(
        f"{path} is not the file that was written: it was changed, cut or damaged afterwards. Put "
        "the right one back; or delete the stage's folder (and those of later stages) to have all "
        "of it made again. To use it as it is, delete its line from "
        f"{LEDGER} beside it: then it is no longer checked."
    )


def _rename(draft: Path, path: Path) -> None:
    draft.replace(path)
    flush(path.parent)


def _write_ledger(folder: Path, digests: dict[str, list[str]]) -> None:
    path, draft = folder / LEDGER, folder / f"{LEDGER}.tmp"
    with system_errors(path):
        draft.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        flush(draft)
        _rename(draft, path)
