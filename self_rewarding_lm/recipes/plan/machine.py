"""How fast this machine multiplies and reads, measured in a moment, and times made of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from self_rewarding_lm.stages.ranges import Range

SECONDS = 0.8
"""That each of the two measurements takes, beside its last call."""


SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Of square matrices; larger ones are tried while they are fast."""


COPY_BYTES = {"cpu": 2**26, "cuda": 2**28}


UTILISATION = 0.4
"""Share of the measured rates that training and generating are assumed to reach. An assumption:
what a model reaches depends on its size, the length of its rows and the machine."""


@dataclass(frozen=True)
class Machine:
    """rate: operations a second of a large product; bandwidth: bytes a second of a copy, read and
    written."""

    rate: float
    bandwidth: float

    def computing(self, operations: Range) -> Range:
        """Seconds of so many operations."""
        return operations.times(1 / (self.rate * UTILISATION))

    def seconds_per_token(self, products: int, weight_bytes: int, rows: int) -> float:
        """Of a row that is decoded among `rows`: all weights are read once for all of them."""
        slower = max(2 * products / self.rate, weight_bytes / (self.bandwidth * max(1, rows)))
        return slower / UTILISATION


def measure(device: str, dtype: torch.dtype) -> Machine:
    """The rates of a device, "cpu" or "cuda", for products of a type; takes about two seconds."""
    return Machine(_rate(device, dtype), _bandwidth(device))


def _rate(device: str, dtype: torch.dtype) -> float:
    best, end = 0.0, time.perf_counter() + SECONDS
    for size in SIZES[device]:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _least_seconds(partial(torch.mm, one, other), device, end)
        best = max(best, 2 * size**3 / seconds)
        if time.perf_counter() + 16 * seconds > end:  # the next one has eight times as much to do
            break
    return best


def _bandwidth(device: str) -> float:
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    end = time.perf_counter() + SECONDS / 4
    return 2 * COPY_BYTES[device] / _least_seconds(partial(target.copy_, source), device, end)


def _least_seconds(run: Callable[[], object], device: str, end: float) -> float:
    """Of one call, over a third of the time that is left and one call at least."""
    run()
    least, stop = math.inf, time.perf_counter() + (end - time.perf_counter()) / 3
    while math.isinf(least) or time.perf_counter() < stop:
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        least = min(least, time.perf_counter() - started)
    return least


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
