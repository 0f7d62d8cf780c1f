"""Seconds and the most memory of each phase of a round, whatever order the phases come in."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import psutil
from machine import OthersClock

T = TypeVar("T")
REST = "rest"  # what is in no phase: setting up, records, saving
LOOK_SECONDS = 0.02


class PhaseClock:
    """Begins in REST. Of phases within each other, time belongs to the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self._now, self._since = REST, time.perf_counter()
        self._others = OthersClock()
        self._process, self._stop = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def calls(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """The function, whose calls are a phase."""

        @wraps(function)
        def run(*args: Any, **named: Any) -> T:
            with self.phase(name):
                return function(*args, **named)

        return run

    def items(self, name: str, function: Callable[..., Iterable[T]]) -> Callable[..., Iterator[T]]:
        """A function that gives an iterator: what is done for its items is a phase."""

        @wraps(function)
        def run(*args: Any, **named: Any) -> Iterator[T]:
            with self.phase(name):
                iterator = iter(function(*args, **named))
            while True:
                with self.phase(name):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item

        return run

    def report(self) -> dict:
        """seconds and peak (bytes) by phase; others: CPU seconds of other processes meanwhile."""
        self._switch(REST)
        self._stop.set()
        self._thread.join()
        self._seen()
        return {
            "seconds": dict(self.seconds),
            "peaks": dict(self.peaks),
            "others": self._others.seconds(),
        }

    def _switch(self, name: str) -> str:
        self._seen()
        now, before = time.perf_counter(), self._now
        self.seconds[before] += now - self._since
        self._now, self._since = name, now
        return before

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._seen()

    def _seen(self) -> None:
        name = self._now
        self.peaks[name] = max(self.peaks[name], self._process.memory_info().rss)
