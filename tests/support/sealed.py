"""Files of records as processes leave them while an arrow runs."""

import json
from collections.abc import Iterable
from pathlib import Path

from self_rewarding_lm.runs.lines import append_lines


def write_sealed(path: Path, lines: Iterable[str], torn: str = "") -> None:
    """Write JSON lines in place of a file, as a process appends them. torn: what follows them."""
    path.unlink(missing_ok=True)
    append_lines(path, map(json.loads, lines), sealed=True)
    if torn:
        with path.open("a", encoding="utf-8") as file:
            file.write(torn)
