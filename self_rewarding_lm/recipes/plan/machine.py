"""Measures how fast this machine multiplies and copies, and estimates times from these rates."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from self_rewarding_lm.stages.ranges import Range

SECONDS = 0.8
"""Time for the measurement of products, without its last call; the copy takes a quarter of it."""


SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Rows of the square matrices that are multiplied; the next size is tried only if time is left."""


COPY_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Bytes of the tensor that is copied."""


UTILISATION = 0.4
"""Share of the measured rates that training and generating reach. This is an assumption: the true
share depends on the size of the model, the length of its rows and the machine."""


@dataclass(frozen=True)
class Machine:
    """What a machine was measured to reach.

    rate: operations per second in a large matrix product. bandwidth: bytes per second that a copy
    reads and writes.
    """

    rate: float
    bandwidth: float

    def computing(self, operations: Range) -> Range:
        """Seconds that `operations` take."""
        return operations.times(1 / (self.rate * UTILISATION))

    def seconds_per_token(self, products: int, weight_bytes: int, rows: int) -> float:
        """Seconds for each token of a row, if `rows` are decoded together: the weights are read
        once for all of them."""
        slower = max(2 * products / self.rate, weight_bytes / (self.bandwidth * max(1, rows)))
        return slower / UTILISATION


def measure(device: str, dtype: torch.dtype) -> Machine:
    """Measure a device, "cpu" or "cuda", with products of numbers of `dtype`. Takes about two
    seconds."""
    return Machine(_rate(device, dtype), _bandwidth(device))


def _rate(device: str, dtype: torch.dtype) -> float:
    """The most operations per second over all sizes of matrices."""
    best, end = 0.0, time.perf_counter() + SECONDS
    for size in SIZES[device]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _least_seconds(partial(torch.mm, a, b), device, end)
        best = max(best, 2 * size**3 / seconds)
        if time.perf_counter() + 16 * seconds > end:  # the next size takes eight times as long
            break
    return best


def _bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    end = time.perf_counter() + SECONDS / 4
    return 2 * COPY_BYTES[device] / _least_seconds(partial(target.copy_, source), device, end)


def _least_seconds(run: Callable[[], object], device: str, end: float) -> float:
    """Seconds of the fastest call of `run`.

    Calls it for a third of the time until `end`, at least once, after one call to warm up.
    """
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
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
