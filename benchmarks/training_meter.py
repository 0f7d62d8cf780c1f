"""What a training run takes: seconds and tokens by phase, and the most memory.

The memory of both sides is measured alike. Base: the process with the model loaded, its libraries
imported and its rows read, before any forward. Peak: the most that the process had from the begin
of the timed part on. Above: peak - base - 3 x the bytes of the parameters, which are the gradients
and the two moments of AdamW. Gradients come while activations go, and the moments come with the
first step, so not all of them need be there at the peak: this is somewhat less than what a side
needs besides them, on both sides, and says little where a model is large beside its batches.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import OthersClock
from torch import nn

SAMPLE_SECONDS = 0.005  # where the kernel does not keep the peak
STATES = 3  # gradients and two moments, each as large as the parameters


class Meter:
    """Measures while it is `on`; a warm-up before is not in its figures."""

    def __init__(self, module: nn.Module) -> None:
        self.on = False
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.parameters = sum(p.numel() * p.element_size() for p in module.parameters())
        gc.collect()
        _trim()
        self.base = _resident()
        self._now: str | None = None
        self._peak = Peak()
        self._left = 0
        self._clock: OthersClock | None = None

    def start(self) -> None:
        """The warm-up is over; what it left is freed as far as it can be."""
        gc.collect()
        _trim()
        self._left = _resident() - self.base
        self.on = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part that is timed; the first one begins all measurements."""
        if not self.on:
            yield
            return
        if self._clock is None:
            self._clock = OthersClock()
            self._peak.begin()
        self._now, started, cpu = name, time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started
            self.cpu[name] = time.process_time() - cpu
            self._now = None

    def watch(self, module: Any) -> None:
        """Count the tokens that go through a model of transformers, padding included."""

        def count(_: nn.Module, args: tuple, named: dict) -> None:
            ids = named["input_ids"] if "input_ids" in named else args[0]
            if self._now is not None:
                self.tokens[self._now] = self.tokens.get(self._now, 0) + ids.numel()

        module.base_model.register_forward_pre_hook(count, with_kwargs=True)

    def report(self) -> dict:
        """The figures, once all phases are over.

        cpu: seconds of all threads. left: bytes that the warm-up left behind.
        """
        assert self._clock is not None
        peak = self._peak.end()
        return {
            "seconds": self.seconds,
            "cpu": self.cpu,
            "tokens": self.tokens,
            "others": self._clock.seconds(),
            "base": self.base,
            "left": self._left,
            "peak": peak,
            "above": peak - self.base - STATES * self.parameters,
            "peak_by": "kernel" if self._peak.exact else "samples",
        }


class DeviceMeter(Meter):
    """The same of a CUDA device: its clock waits for it, and memory is that of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.base = torch.cuda.memory_allocated()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.on and self._clock is None:
            torch.cuda.reset_peak_memory_stats()
        with super().phase(name):
            torch.cuda.synchronize()
            yield
            torch.cuda.synchronize()

    def report(self) -> dict:
        peak = torch.cuda.max_memory_allocated()
        above = peak - self.base - STATES * self.parameters
        return {**super().report(), "peak": peak, "above": above, "peak_by": "the device's tensors"}


class Peak:
    """The most resident memory of this process since `begin`.

    Linux keeps it and forgets it on request; elsewhere a thread looks every few milliseconds.
    """

    def __init__(self) -> None:
        self.exact = False
        self._most = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.exact = True
        except OSError:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def end(self) -> int:
        if self.exact:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            line = next(line for line in lines if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return self._most

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._most = max(self._most, _resident())


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _trim() -> None:
    """Give memory that is free back to the system, where the C library can."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc: what is held counts alike
        ctypes.CDLL(None).malloc_trim(0)
