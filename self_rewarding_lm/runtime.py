"""Processes, devices, signals and progress. The only file that imports accelerate.

Nothing else knows ranks. Logging and progress bars are set up here, because only one process shows
them: a bar while an arrow runs, one line when it ends; in a file, where a bar cannot be drawn, a
line now and then takes its place. The first signal lets the record or step at hand be finished, the
second does not.
"""

import atexit
import gc
import io
import itertools
import logging
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from self_rewarding_lm.errors import ConfigError, Interrupted, said
from self_rewarding_lm.sharding import Sharded, send_from_main, sum_gradients, whole
from self_rewarding_lm.text import amount, markdown_table, printable

logger = logging.getLogger(__name__)


EVERY = 60.0
"""Seconds between two lines in a file."""


T = TypeVar("T")


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose output takes a line that rewrites itself."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


SHARE = "this process's share"
"""What a bar of the main process calls its own part of the work of several processes."""


class Progress(tqdm):
    """Counts what is done of `total`, and shows it if `shows`. total: None if unknown.

    done: how much of it an earlier attempt did. A terminal and a notebook get a bar, a file a line
    a minute, also while nothing is done. What is counted within a step (`part`) is shown with it.
    """

    def __init__(
        self, total: int | None, label: str, unit: str, *, shows: bool, done: int = 0
    ) -> None:
        self.is_live = sys.stderr.isatty() or in_notebook()
        self._part: tuple[int, int, str, float] | None = None  # done, of how many, unit, since when
        self._part_is_share = False
        self.told_at = math.inf
        self._closed, self._telling = threading.Event(), threading.Lock()
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
        self.told_at = getattr(self, "start_t", 0.0)
        self._counted_at = self.told_at
        if shows and not self.is_live:
            threading.Thread(target=self._tell_now_and_then, daemon=True).start()

    def part(
        self, items: Iterable[T], total: int, unit: str, *, is_share: bool = False
    ) -> Iterator[T]:
        """The items as they come, counted beside what is done of the whole.

        total: how many there will be. is_share: other processes have items of their own.
        """
        if self.disable:
            yield from items
            return
        began = drawn_at = self._now()
        self._part, self._part_is_share = (0, total, unit, began), is_share
        try:
            for number, item in enumerate(items, 1):
                yield item
                self._part = (number, max(number, total), unit, began)
                if self._now() - drawn_at >= self.mininterval:
                    drawn_at = self._now()
                    self.refresh()
        finally:
            self._part = None
            self.set_postfix_str("", refresh=False)

    def counting(self, items: Iterable[T]) -> Iterator[T]:
        """The items as they come, each counted as one that is done."""
        for item in items:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if not self.disable:
            self._counted_at = self._now()
        return super().update(n)

    def refresh(self, *args: Any, **options: Any) -> Any:
        if self._part is not None:
            self.postfix = self._part_words(with_time=True)
        return super().refresh(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or log a line in its place; tqdm calls it when it is time."""
        if self.is_live:
            return super().display(msg, pos)
        if msg is None and self.n != self.total:
            with self._telling:
                since = self._now() - self.told_at
                is_time = since >= EVERY  # threads that watch ask out of turn
                self.told_at += since if is_time else 0.0
            if is_time:
                logger.info("%s after %s", self._words(is_running=True), self._took())
        return None

    def close(self) -> None:
        """Take the bar away and log in a line what was done."""
        was_open = not self.disable
        self._closed.set()
        super().close()
        if was_open and self.n:
            logger.info("%s in %s", self._words(), self._took())

    def _tell_now_and_then(self) -> None:
        """Have a line written also if nothing is done for long."""
        while not self._closed.wait(EVERY):
            self.display()

    def _now(self) -> float:
        return self._time()  # type: ignore[attr-defined]

    def _words(self, *, is_running: bool = False) -> str:
        done, total = amount(self.n, self.unit), self.total
        if total is not None and self.n != total:
            done = f"{self.n:,} of {amount(total, self.unit)}"
        notes = [f"{self.n / total:.0%}"] if is_running and total and self.n != total else []
        notes += [f"{self.initial:,} of them earlier"] if self.initial else []
        said = f"{self.desc.removesuffix(': ')}: {done}"
        said += f" ({', '.join(notes)})" if notes else ""
        if not is_running:
            return said
        left, part = self._left(), self._part_words(with_time=self._left() is None)
        return said + ("" if left is None else f", {left}") + (part and f"; {part}")

    def _left(self) -> str | None:
        """How long the rest takes at the speed until now; None if nothing can be said."""
        if self.total is None or not self.initial < self.n < self.total:
            return None
        taken = self._counted_at - self.start_t
        rest = taken / (self.n - self.initial) * (self.total - self.n)
        return time_left(rest - (self._now() - self._counted_at))

    def _part_words(self, *, with_time: bool) -> str:
        if self._part is None:
            return ""
        done, total, unit, began = self._part
        said = f"{done:,} of {amount(total, unit)} ({done / max(1, total):.0%})"
        said = f"{SHARE}: {said}" if self._part_is_share else said
        if not with_time or not 0 < done < total:
            return said
        return f"{said}, {time_left((self._now() - began) / done * (total - done))}"

    def _took(self) -> str:
        return self.format_interval(self.format_dict["elapsed"])


def time_left(seconds: float) -> str:
    """A guess of how long something takes, in words."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute left"
    if minutes < 90:
        return f"about {minutes} min left"
    return f"about {round(seconds / 3600)} h left"


class LogHandler(logging.StreamHandler):
    """Writes lines of the log above the bars that are drawn, not into them.

    What others wrote (answers of servers, ids, names) steers no terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what clusters send before they take a node


LOOK = 0.1  # seconds between two looks whether all processes are there


_WAITS = itertools.count()  # of this process for its siblings


ONE = 1.0  # seconds within which signals are one: launchers hand on what the terminal sends, too


OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)
"""In torch's errors that have no type of their own: those of the CPU, of MPS, of libraries."""


class Stopping:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """The signal's name."""
        self._heard_at = 0.0
        self._acts_at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are heeded; only in the main thread, as Python gives them to it alone."""
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
            logger.warning("Stopped. Everything so far is on disk: run the same again to resume.")
            raise
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises Interrupted wherever it comes: nobody looks whether one came."""
        self.heed()
        self._acts_at_once = True
        try:
            yield
        finally:
            self._acts_at_once = False

    def heed(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.asked:
            raise Interrupted(self.asked)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items; if a signal came, Interrupted is raised after the one at hand."""
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
        if self._acts_at_once:
            raise Interrupted(name)
        logger.warning(
            "%s: finishing the current record or step, then saving. Once more stops at once.", name
        )


QUIET_VARIABLE = "SELF_REWARDING_LM_QUIET"


NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The types of products by the names of mixed precision; with "fp8" those that Accelerate casts."""


class Runtime:
    """This process among its siblings, and the device it computes on."""

    def __init__(self, accelerate_kwargs: Mapping[str, Any], *, quiet: bool = False) -> None:
        self.accelerator = _accelerator(dict(accelerate_kwargs))
        _check_trackers(accelerate_kwargs.get("log_with"), self.accelerator)
        _scale_on_cpu(self.accelerator)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.shards = _asks_for_fsdp(accelerate_kwargs, self.world)
        self._sharded: Sharded | None = None
        self._bars: list[Progress] = []
        self.stopping = Stopping()
        _check_processes(self.world)
        self.shows = self.is_main and not quiet and os.environ.get(QUIET_VARIABLE, "") in ("", "0")
        if _AT_WORK.get() is None:  # else that run's log goes on as it was
            _set_up_logging(self.shows)
        self._tell_processes()
        if self.world > 1:
            atexit.unregister(_leave_siblings)
            atexit.register(_leave_siblings)

    def _tell_processes(self) -> None:
        if self.shows:
            processes = amount(self.world, "process", "processes")
            kind = ", which share weights and gradients (FSDP2)" if self.shards else ""
            logger.info("%s on %s%s", processes, self.device.type, kind)
        if self.accelerator.gradient_accumulation_steps != 1:  # of the launch
            logger.warning(
                "gradient_accumulation_steps=%d of accelerate's launch is ignored: a step is "
                "optim.batch_size rows, however many micro-batches they take.",
                self.accelerator.gradient_accumulation_steps,
            )
            self.accelerator.gradient_accumulation_steps = 1
        if self.world > 1 and self.accelerator.ddp_handler is not None:
            logger.warning(
                "DistributedDataParallelKwargs are ignored: gradients are summed once a step, "
                "without DDP."
            )

    def prepare(self, module: nn.Module, *, place: bool = True) -> nn.Module:
        """The module wrapped for mixed precision, as the launch asks; on all processes the same.

        place: move it to this process's device. The weights are then those of the main process.
        """
        prepared = self.accelerator.prepare_model(
            module, device_placement=place, evaluation_mode=True
        )
        if self.world > 1:
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            shapes = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items()]
            if any(others != shapes for others in self.gather([shapes])):
                raise ConfigError(
                    "processes were given models of different weights (names, shapes or types); "
                    "each must make the same model."
                )
            send_from_main(list(tensors.values()))
        return prepared

    @contextmanager
    def training(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module to train in place of a prepared one, which under FSDP is spread meanwhile."""
        if self.shards:
            self._sharded = Sharded(module, self.device)
            try:
                with self._sharded.training() as twin:
                    yield twin
            finally:
                self._sharded = None
        else:
            yield module
        if self.world > 1:  # running statistics are of each process's own rows
            send_from_main(list(module.buffers()))

    def whole(self) -> AbstractContextManager[None]:
        """Within `training`: the prepared module's own weights are there, and may be changed."""
        return nullcontext() if self._sharded is None else self._sharded.whole()

    def unwrapped(self, module: nn.Module) -> Any:
        """A prepared module without its wrappers for several processes."""
        return self.accelerator.unwrap_model(module)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimiser wrapped for mixed precision."""
        return self.accelerator.prepare_optimizer(optimizer)

    def release(self, optimizers: list[Any]) -> None:
        """Forget optimisers of a stage that is over; accelerate keeps a list of them."""
        held = self.accelerator._optimizers
        held[:] = [o for o in held if all(o is not gone for gone in optimizers)]

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss` to those there are.

        is_last: of a step; the forwards and backwards before it send no gradients.
        """
        if self._sharded is not None:
            loss = loss * self.world  # FSDP's reduction is a mean
            self._sharded.expect_backward(loss, is_last=is_last)
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def sum_gradients(self, module: nn.Module) -> None:
        """After a step's last backward: gradients become the sums of those of all processes.

        Weights without a gradient on any process stay without one.
        """
        if self._sharded is not None:  # the last backward has summed them
            self._sharded.drop_unused()
        elif self.world > 1:
            sum_gradients([p for p in module.parameters() if p.requires_grad], self.device)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], limit: float | None) -> float:
        """The norm of all gradients, which are scaled down to `limit`; None clips nothing."""
        self.accelerator.unscale_gradients()
        return float(whole(nn.utils.clip_grad_norm_(parameters, limit or float("inf"))))

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by, so that float16 holds its gradients; 0.0 if it is not."""
        scaler = self.accelerator.scaler
        return 0.0 if scaler is None else scaler.get_scale()

    def scaling(self) -> dict[str, Any]:
        """The state of the loss scale; empty if nothing is scaled."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def scale_as(self, scaling: dict[str, Any]) -> None:
        """Go on from what `scaling` gave."""
        if scaling and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaling)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is True on any process."""
        return tuple(count > 0 for count in self.sum([float(flag) for flag in flags]))

    def step(self, optimizers: Sequence[Any], norm: float) -> None:
        """A step of all optimisers.

        If the loss is scaled and the gradient's norm is not finite, the scale is too large: it is
        halved, and no optimiser steps. Accelerate's own step is not used: it updates the scale
        after each optimiser, so that the next one's gradients would be divided by it once more,
        and it steps only if no other Accelerator of the process is accumulating.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            for optimizer in optimizers:
                optimizer.optimizer.step()
        elif math.isfinite(norm):
            for optimizer in optimizers:
                scaler.step(optimizer.optimizer)
            scaler.update()
        else:  # the norm is that of all processes, so they agree; an overflow may be in one alone
            scaler.update(self.loss_scale * scaler.get_backoff_factor())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, this is the runtime of the run at work, see `settings_at_work`.

        The log shows what this runtime shows, whatever other runtimes showed since it was made.
        """
        before = _AT_WORK.set(self)
        self._show_log()
        try:
            yield
        finally:
            _AT_WORK.reset(before)
            if (around := _AT_WORK.get()) is not None:
                around._show_log()

    def _show_log(self) -> None:
        """Have the log show what this runtime shows, unless the user set a level meanwhile."""
        if logging.getLogger("self_rewarding_lm").level == _log_level:
            _set_up_logging(self.shows)

    def autocasted(self, results: Iterable[T]) -> Iterator[T]:
        """The results of forwards outside the prepared module, each computed in mixed precision.

        Between two results precision is as before.
        """
        iterator = iter(results)
        while True:
            with self.accelerator.autocast():
                try:
                    result = next(iterator)
                except StopIteration:
                    return
            yield result

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all processes."""
        if self.world == 1:
            return values
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = self.accelerator.reduce(
            torch.tensor(values, device=self.device, dtype=dtype), reduction="sum"
        )
        return total.tolist()  # type: ignore[union-attr]

    def in_step(self, groups: list[T], idle: T) -> list[tuple[T, bool]]:
        """Groups to work on, each with whether it counts.

        Under FSDP filled up with `idle`, which does not count, to as many as the process with the
        most has.
        """
        most = max(self.gather([len(groups)])) if self.shards else 0
        filling = [(idle, False)] * (most - len(groups))
        return [(group, True) for group in groups] + filling

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of their ranks."""
        return items if self.world == 1 else gather_object(items)

    def from_main(self, value: T) -> T:
        """The value that the main process passed, on all processes."""
        if self.world == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def share(self, items: list[T]) -> list[T]:
        """This process's items of a list that all processes hold."""
        return items[self.rank :: self.world]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    @contextmanager
    def working_together(self) -> Iterator[None]:
        """For work of the user's that may take long: at its end all processes wait for each other.

        Signals act at once, also on those that wait. They do not wait in a barrier: within one
        Python hears no signal, and it ends with an error after some minutes.
        """
        with self.stopping.at_once():
            yield
            if self.world > 1:
                store, number = (
                    torch.distributed.distributed_c10d._get_default_store(),
                    next(_WAITS),
                )
                ready = [f"self_rewarding_lm/{number}/{rank}" for rank in range(self.world)]
                store.set(ready[self.rank], "")
                while not store.check(ready):
                    time.sleep(LOOK)

    @property
    def trackers(self) -> list[GeneralTracker]:
        """Those of `accelerate_kwargs=dict(log_with=...)`, begun; on the main process alone."""
        if self.is_main and self.accelerator.log_with and not self.accelerator.trackers:
            self.accelerator.init_trackers("self_rewarding_lm")
        return self.accelerator.trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers to the trackers, if there are any."""
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
    ) -> None:
        """Send a table of texts to the trackers that can show one.

        They are those with `log_table(table_name, columns, data, step=...)`, of Accelerate or the
        user, and TensorBoard, which gets it as Markdown.
        """
        for tracker in self.trackers:
            log_table = getattr(tracker, "log_table", None)
            if log_table is not None:
                log_table(name, list(columns), list(map(list, rows)), step=step)
            elif getattr(tracker, "name", None) == "tensorboard":
                tracker.log({name: _markdown(columns, rows)}, step=step)

    def end_trackers(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def progress(
        self, total: int | None, label: str, unit: str, done: int = 0, *, is_share: bool = False
    ) -> Progress:
        """A bar and then a line on the main process, silent elsewhere.

        is_share: what is counted is this process's part of the work, if there are several.
        """
        label = f"{label} ({SHARE})" if is_share and self.world > 1 else label
        bar = Progress(total, label, unit, shows=self.shows, done=done)
        self._bars = [*(b for b in self._bars if not b.disable), bar]
        return bar

    def counted(self, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
        """This process's items, counted as they come beside what the progress around them shows."""
        bar = next((b for b in reversed(self._bars) if not b.disable), None)
        return iter(items) if bar is None else bar.part(items, total, unit, is_share=self.world > 1)


_AT_WORK: ContextVar[Runtime | None] = ContextVar("the runtime of the run at work", default=None)


def settings_at_work() -> dict[str, Any]:
    """The device and precision of the run at work, as arguments of Accelerate; none without one.

    What a run's callbacks, custom stages and own judges ask of the library is computed so.
    """
    runtime = _AT_WORK.get()
    if runtime is None:
        return {}
    precision = runtime.accelerator.mixed_precision
    return {"cpu": runtime.device.type == "cpu", "mixed_precision": precision}


def in_precision(name: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Within, products on a device are computed in a precision: "bf16", "fp16", "fp32" or "no".

    None: as the `torch.autocast` around it says, else as the run at work does.
    """
    if name is None and not torch.is_autocast_enabled(device.type):
        name = settings_at_work().get("mixed_precision")
    if name is None:
        return nullcontext()
    narrow = NARROW.get(name)
    return torch.autocast(device.type, dtype=narrow, enabled=narrow is not None)


class MemoryUsedUpError(ConfigError):
    """Memory was used up; the message says while what, and which settings bound it."""


@contextmanager
def memory_told(what: str, advice: str) -> Iterator[None]:
    """Turn torch's error of memory that is used up into MemoryUsedUpError.

    what: what was done within, as "sampling". advice: which settings to change, as a sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error)
        is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_known and not OUT_OF_MEMORY.search(words):
            raise
        first = words.partition("\n")[0][:300] or type(error).__name__
        raise MemoryUsedUpError(f"out of memory while {what}: {first}. {advice}") from error


def give_back_memory(*, after_error: bool = False) -> None:
    """Let go of memory of a GPU that torch keeps for later, so that others can have it.

    after_error: let go first of what the frames of an error still hold.
    """
    if after_error:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """The global random state of torch and Python is afterwards what it was before."""
    state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)


def _accelerator(kwargs: dict[str, Any]) -> Accelerator:
    """An Accelerator with these settings, whatever an earlier one of this process has.

    accelerate shares one state among all of a process. A process alone gets a new state for each;
    one of several cannot change the process group, so other settings than before are refused.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )
    for reason in _refused(kwargs):
        raise ConfigError(reason)
    if alone:  # earlier accelerators keep the dicts they hold
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state = type(state._shared_state)()
    try:
        return Accelerator(**kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"accelerate.Accelerator refused {_arguments()} {kwargs}: {error} (These are its "
            "arguments; with several processes, all trainers in a process share them.)"
        ) from error


def _check_trackers(asked: Any, accelerator: Accelerator) -> None:
    """ConfigError if a tracker that is asked for is not installed: Accelerate leaves it out."""
    names = [asked] if isinstance(asked, str) else asked if isinstance(asked, list | tuple) else []
    held = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
    for name in names:
        if isinstance(name, str) and name not in ("all", *held):
            raise ConfigError(
                f"the tracker {name!r} needs its package, which is not installed: pip install "
                f"{name}"
            )


def _arguments() -> str:
    """The setting that holds arguments of Accelerate."""
    return said("accelerate_kwargs", "`accelerate`")


def _refused(kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Why settings of Accelerate, given or of the launch, cannot be had."""
    plugin = kwargs.get("gradient_accumulation_plugin")
    steps = kwargs.get("gradient_accumulation_steps", 1 if plugin is None else plugin.num_steps)
    if steps != 1:
        yield (
            f"{_arguments()} asks for gradient_accumulation_steps={steps}, which would divide "
            "every gradient by it. Leave it out: a step is optim.batch_size rows; the gradients of "
            "its micro-batches (optim.micro_batch_size, optim.micro_batch_tokens) are summed."
        )
    for name, variable in (("deepspeed", "DEEPSPEED"), ("megatron_lm", "MEGATRON_LM")):
        given = kwargs.get(f"{name}_plugin") is not None
        if given or os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() == "true":
            yield (
                f"{name} was asked for; this library trains with each process holding the whole "
                "model, or with FSDP2 (`accelerate config`, or --use_fsdp --fsdp_version 2)."
            )


WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are: torchrun and accelerate, and those of MPI."""


_ON_CPUS = ('accelerate_kwargs={"cpu": True}', "`accelerate: {cpu: true}`")


def _check_processes(world: int) -> None:
    """ConfigError if this is one of several processes that know nothing of each other."""
    for variable in WORLD_VARIABLES:
        number = os.environ.get(variable, "1")
        if world == 1 and number.isdigit() and int(number) > 1:
            raise ConfigError(
                f"{variable}={number} says that this is one of {number} processes, but Accelerate "
                "has joined no others, so each would begin a run of its own. On CPUs set "
                f"{said(*_ON_CPUS)} or the environment variable ACCELERATE_USE_CPU=true; on GPUs "
                "start them with `torchrun` or `accelerate launch`. For one process alone unset "
                f"{variable}."
            )


def _leave_siblings() -> None:
    """End the process group; threads of it that outlive the interpreter can abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _scale_on_cpu(accelerator: Accelerator) -> None:
    """Have float16 on a CPU; accelerate alone would compute in float32 and not say so."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        handler = accelerator.scaler_handler
        settings = {} if handler is None else handler.to_kwargs()
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", **settings)


def _asks_for_fsdp(kwargs: Mapping[str, Any], world: int) -> bool:
    """Whether the launch or the arguments ask for FSDP; ConfigError if it is not to be had.

    Without a GPU accelerate itself would use DDP and not say so.
    """
    plugin = kwargs.get("fsdp_plugin")
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = getattr(plugin, "fsdp_version", None) or int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise ConfigError(
            f"FSDP version {version} was asked for; this library trains with FSDP2: set "
            "fsdp_version: 2 in the accelerate config, or FullyShardedDataParallelPlugin("
            "fsdp_version=2)."
        )
    if world == 1:
        raise ConfigError(
            "FSDP was asked for and there is one process, so nothing can be sharded. Start "
            "several with `accelerate launch --num_processes N ...`, or leave FSDP out."
        )
    return True


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; no text of a cell can end the cell or be read as markup."""
    marks = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_{}[]()<>#+-!|&~:"}
    cells = [[" ".join(cell.split()).translate(marks) for cell in row] for row in rows]
    return markdown_table(columns, cells)


_log_level: int | None = None
"""What `_set_up_logging` set last."""


def _set_up_logging(shows: bool) -> None:
    """Show the library's log, unless the user has set up logging. shows: INFO too."""
    global _log_level
    logger = logging.getLogger("self_rewarding_lm")
    if not logger.handlers and not logging.getLogger().handlers:
        handler = LogHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if logger.level in (logging.NOTSET, logging.INFO, logging.WARNING):  # any other is the user's
        _log_level = logging.INFO if shows else logging.WARNING
        logger.setLevel(_log_level)
