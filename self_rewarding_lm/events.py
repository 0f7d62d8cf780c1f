"""What happened in a stage, and when: its beginnings and ends, its training, its warnings.

Lines of events.jsonl: `time` (seconds since 1970), `event`, and words of its own. They say nothing
of the result, so two runs with one result have others. Knows no stage.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.lines import append_lines

EVENTS = "events.jsonl"


def append_event(folder: Path, event: str, words: dict[str, Any]) -> None:
    """Append a line to events.jsonl."""
    append_lines(folder / EVENTS, [{"time": round(time.time(), 3), "event": event, **words}])


@contextmanager
def ends_told(tell: Callable[..., None]) -> Iterator[None]:
    """Tell of the error that ends what is done within, as the event `stopped`."""
    try:
        yield
    except BaseException as error:
        with suppress(StoreError):  # the error is the one to raise, though the disk be full
            tell("stopped", words=f"{type(error).__name__}: {error}")
        raise
