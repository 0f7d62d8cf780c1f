"""An arrow's work in the terminal: a bar while it goes on, one line when it ends.

Where the output is no terminal, such as a file of a cluster, a line now and then is the bar.
"""

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two lines in a file."""


class Progress(tqdm):
    """Counts what is done of `total` (None: nobody knows); shows nothing where it is not to.

    done: how much of it an earlier attempt did.
    """

    def __init__(
        self, total: int | None, label: str, unit: str, *, shows: bool, done: int = 0
    ) -> None:
        self.is_live = sys.stderr.isatty()
        super().__init__(
            total=total,
            desc=label,
            unit=unit,
            initial=done,
            disable=not shows,
            file=None if self.is_live else io.StringIO(),  # what tqdm draws is for terminals
            leave=False,
            mininterval=0.5 if self.is_live else EVERY,
            maxinterval=10.0 if self.is_live else EVERY,
        )
        self.told_at: float = getattr(self, "start_t", 0.0)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write where it stands; tqdm calls it where it is time."""
        if self.is_live:
            return super().display(msg, pos)
        if msg is None and self.initial < self.n != self.total:
            since = self._time() - self.told_at  # type: ignore[attr-defined]
            if since >= EVERY:  # tqdm's watching thread asks out of turn
                self.told_at += since
                logger.info("%s after %s", self._words(), self._took())
        return None

    def close(self) -> None:
        """Take the bar away and say in a line what was done."""
        was_open = not self.disable
        super().close()
        if was_open and self.n:
            logger.info("%s in %s", self._words(), self._took())

    def _words(self) -> str:
        whole = f" of {self.total:,}" if self.total is not None and self.n != self.total else ""
        unit = self.unit if self.n == 1 and not whole else f"{self.unit}s"
        earlier = f" ({self.initial:,} of them earlier)" if self.initial else ""
        return f"{self.desc.removesuffix(': ')}: {self.n:,}{whole} {unit}{earlier}"

    def _took(self) -> str:
        return self.format_interval(self.format_dict["elapsed"])


class LogHandler(logging.StreamHandler):
    """Writes lines of the log above the bars that are drawn, not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
