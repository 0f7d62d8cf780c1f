"""Files that are on disk in full or not at all, and whether they still are what was written.

A folder's `files.json` lists the digest of each file that was finished in it. Knows nothing of what
the files hold.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from self_rewarding_lm.errors import StoreError

LEDGER = "files.json"


@contextmanager
def writing(path: Path, *, listed_in: Path | None = None) -> Iterator[Path]:
    """A draft to write, which becomes `path` at the end: flushed to the disk, then by rename.

    listed_in: the folder whose ledger takes the file's digest. Where writing fails the draft is
    deleted, `path` stays what it was, and an error of the system becomes a StoreError.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with system_errors(path):
            yield draft
            settle(draft, path, listed_in=listed_in)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def settle(draft: Path, path: Path, *, listed_in: Path | None = None) -> None:
    """Let a file that is written take another one's place, for good.

    Until it has, the ledger holds the digests of both, so that there is no moment at which a file
    that is right looks wrong.
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
def system_errors(path: Path) -> Iterator[None]:
    """An error of the system while `path` is written, as a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error}. What was written before is whole and is "
            "kept; mend the cause (room on the disk, a folder that can be written to) and start "
            "the run again: it goes on from there."
        ) from error


def ledger(folder: Path) -> dict[str, list[str]]:
    """The digests of a folder's finished files by name; more than one while a file is replaced."""
    path = folder / LEDGER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(v, list) for v in found.values()):
            raise ValueError("it must hold lists of digests by file name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}. Without it nothing tells whether the files beside it "
            "are whole; delete it to go on without that check."
        ) from error
    return found


def delist(folder: Path, names: Iterable[str]) -> None:
    """Take files that are to be deleted out of the ledger."""
    digests = ledger(folder)
    left = {name: found for name, found in digests.items() if name not in set(names)}
    if not left:
        (folder / LEDGER).unlink(missing_ok=True)
    elif left != digests:
        _write_ledger(folder, left)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, folder: Path) -> None:
    """Raise StoreError where a file is not what the ledger of `folder` says; none is no error."""
    digests = ledger(folder).get(path.relative_to(folder).as_posix())
    if digests is not None and digest_of(path) not in digests:
        raise changed(path)


def changed(path: Path) -> StoreError:
    return StoreError(
        f"{path} is not the file that was written: it was changed, cut or damaged afterwards. Put "
        "the right one back; or delete the stage's folder (and those of later stages) to have all "
        "of it made again. To use it as it is, delete its line from "
        f"{LEDGER} beside it: then nobody vouches for it."
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
