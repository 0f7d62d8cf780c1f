"""Folders that can be made again, kept for all runs in a place that the user can name.

A folder is there in full or not at all. Knows nothing of what the folders hold.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from self_rewarding_lm.runs.atomic import flush
from self_rewarding_lm.runs.lock import take

logger = logging.getLogger(__name__)


CACHE_VARIABLE = "SELF_REWARDING_LM_CACHE"


SIZES = "kept.json"
"""In each folder: the sizes of its files, in bytes by name."""


_given_up: set[Path] = set()  # caches of which this process has said that they cannot be written


class Cache:
    """Folders by name, below one folder.

    root: that folder; default what SELF_REWARDING_LM_CACHE names, else self_rewarding_lm in the
    user's cache directory ($XDG_CACHE_HOME, else ~/.cache).
    """

    def __init__(self, root: str | Path | None = None) -> None:
        users = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache")
        root = root or os.environ.get(CACHE_VARIABLE) or Path(users, "self_rewarding_lm")
        self.root = Path(root).expanduser().absolute()

    def find(self, name: str) -> Path | None:
        """The folder of that name; None if there is none, or if a file in it has another size."""
        folder = self.root / name
        return folder if self.size(folder) is not None else None

    def size(self, folder: Path) -> int | None:
        """How many bytes a folder holds; None if it is not as it was kept."""
        try:
            sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
            if any((folder / file).stat().st_size != size for file, size in sizes.items()):
                return None
            return sum(sizes.values())
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def keep(self, name: str, write: Callable[[Path], None], size: int) -> Path | None:
        """Keep a folder whose files `write` makes in the empty folder that it is given.

        None if it could not be kept: another process is at it, the disk has not twice its size
        left, or writing failed, which a warning says once. size: about how many bytes it will hold.
        """
        draft = self.root / f"{name}.{os.getpid()}.tmp"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._alone(name) as is_alone:
                if is_alone and self.find(name) is None:
                    self._check_room(size)
                    draft.mkdir()
                    write(draft)
                    self._settle(draft, self.root / name)
        except Exception as error:  # of the system, or of the library that writes
            if self.root not in _given_up:
                _given_up.add(self.root)
                logger.warning(
                    "nothing can be kept in %s (%s: %s); it is made again each time. "
                    "%s names another folder.",
                    *(self.root, type(error).__name__, f"{error!s:.300}", CACHE_VARIABLE),
                )
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return self.find(name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        """Whether no other process writes that folder meanwhile; drafts of killed ones go."""
        descriptor = os.open(self.root / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_alone = take(descriptor)
            if is_alone:
                for draft in self.root.glob(f"{name}.*.tmp"):
                    shutil.rmtree(draft, ignore_errors=True)
            yield is_alone
        finally:
            os.close(descriptor)

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < 2 * size:
            raise OSError(f"it would take {size:,} bytes, and {free:,} are free")

    def _settle(self, draft: Path, folder: Path) -> None:
        """Let a draft that is fully written be the folder."""
        files = sorted(draft.iterdir())
        sizes = json.dumps({file.name: file.stat().st_size for file in files}, indent=1)
        (draft / SIZES).write_text(sizes + "\n", encoding="utf-8")
        for path in (*files, draft / SIZES, draft):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)  # one that is not as it was kept
        draft.rename(folder)
        flush(self.root)
