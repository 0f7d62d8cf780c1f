"""Being stopped: the first signal lets the record or step at hand be finished, the second not."""

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from self_rewarding_lm.errors import Interrupted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what clusters send before they take a node
ONE = 1.0  # seconds within which signals are one: launchers hand on what the terminal sends, too

T = TypeVar("T")


class Stopping:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """The signal's name."""
        self._heard_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are heeded; in the main thread alone, where Python can take them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = None
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN and handler is not None:
                    signal.signal(number, self._heard)
            yield
        except Interrupted:
            logger.warning(
                "Stopped. Everything until here is on disk: run the same again to go on."
            )
            raise
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    def heed(self) -> None:
        """Raise Interrupted where a signal came."""
        if self.asked:
            raise Interrupted(self.asked)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items; where a signal came, none after the one at hand."""
        for item in items:
            yield item
            self.heed()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if self.asked:
            if now - self._heard_at > ONE:
                raise Interrupted(name)
            return
        self.asked, self._heard_at = name, now
        logger.warning(
            "%s: finishing the record or step at hand, then saving. Once more stops at once.", name
        )
