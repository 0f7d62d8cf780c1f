"""The two floors of a machine, and the least that a workload must move and compute.

The least is what no engine can avoid that samples these tokens with these weights: the weights are
read once a step of `rows` rows, each distinct beginning of the prompts is computed once, each row
reads its own keys and values, and those of a beginning that rows share are read once a step for
all of them. Attention's own operations, norms and sampling are left out.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby

import torch

COPY_BYTES = 512 * 2**20
REPEAT_SECONDS = 0.5  # for each size that is tried
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """Of a model. body: parameters of its matrices without the head; head: of the last one;
    item: bytes of a parameter; kv: bytes of the keys and values of one token."""

    body: int
    head: int
    item: int
    kv: int


@dataclass(frozen=True)
class Least:
    """What a workload must at least move and do."""

    bytes: float
    operations: float

    def seconds(self, floors: "Floors", dtype: str) -> float:
        """The longer of both at the machine's floors, as if they went on side by side."""
        return max(self.bytes / floors.bandwidth, self.operations / floors.rate(dtype))

    def report(self, floors: "Floors", dtype: str, taken: float) -> dict:
        """The same beside the time that was taken."""
        return {
            **asdict(self),
            "bytes_seconds": self.bytes / floors.bandwidth,
            "operations_seconds": self.operations / floors.rate(dtype),
            "taken_seconds": taken,
            "share_reached": self.seconds(floors, dtype) / taken,
        }


@dataclass(frozen=True)
class Floors:
    """bandwidth: bytes/s, reads and writes of a copy; matrix: operations/s of a large product."""

    bandwidth: float
    matrix: dict[str, float]

    def rate(self, dtype: str) -> float:
        """Of products of weights of a type; they may be widened to float32 where that is faster."""
        return max(self.matrix[dtype], self.matrix.get("fp32", 0.0))


def measure_floors(dtypes: Sequence[str]) -> Floors:
    """Both floors, the best of some repetitions."""
    return Floors(_bandwidth(), {dtype: _matrix_rate(DTYPES[dtype]) for dtype in dtypes})


def least_work(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rows: int,
    sizes: Sizes,
    cached: bool = True,
) -> Least:
    """The least for prompts that are followed by so many new tokens each.

    The first new token comes of the prompt's own forward. cached: False for a module without a
    cache, which computes the whole row for each further token.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    pairs = [(tuple(prompts[i]), lengths[i]) for i in order]
    distinct, shared = _shared(pairs, 0, rows)
    steps = max(max(lengths) - 1, sum(n - 1 for n in lengths) / rows)
    weights = (sizes.body + sizes.head) * sizes.item
    first = 2 * sizes.body * distinct + 2 * sizes.head * len(set(map(tuple, prompts)))
    later = sum(n - 1 for n in lengths)
    if not cached:
        tokens = sum(t + len(ids) for ids, n in pairs for t in range(1, n))
        return Least(
            (1 + steps) * weights, first + 2 * sizes.body * tokens + 2 * sizes.head * later
        )
    own = sum(n * (n - 1) / 2 for n in lengths)
    return Least(
        (1 + steps) * weights + (shared + own) * sizes.kv,
        first + 2 * (sizes.body + sizes.head) * later,
    )


def _shared(pairs: list[tuple[tuple[int, ...], int]], start: int, rows: int) -> tuple[int, float]:
    """Of sorted prompts that agree up to `start`: distinct tokens from there on, and how often
    tokens are read when rows that have them in common read them once a step."""
    one, other = pairs[0][0], pairs[-1][0]
    limit = min(len(one), len(other))
    end = next((i for i in range(start, limit) if one[i] != other[i]), limit)
    later = [n - 1 for _, n in pairs]
    distinct = end - start
    reads = distinct * max(max(later), sum(later) / rows)
    longer = [pair for pair in pairs if len(pair[0]) > end]
    for _, group in groupby(longer, key=lambda pair: pair[0][end]):
        more, read = _shared(list(group), end, rows)
        distinct, reads = distinct + more, reads + read
    return distinct, reads


def _bandwidth() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _least_seconds(lambda: target.copy_(source), 4 * REPEAT_SECONDS)


def _matrix_rate(dtype: torch.dtype) -> float:
    """Of a batch of rows and a square matrix, the best of some sizes, while they take no longer
    than REPEAT_SECONDS. Such products are what a model consists of."""
    best = 0.0
    for rows, size in ((256, 512), (512, 1024), (1024, 1024), (2048, 2048), (4096, 4096)):
        one, other = torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)
        seconds = _least_seconds(partial(torch.matmul, one, other), REPEAT_SECONDS)
        best = max(best, 2 * rows * size * size / seconds)
        if 4 * seconds > REPEAT_SECONDS:
            break
    return best


def _least_seconds(run: Callable[[], object], total: float) -> float:
    """Of one call, over `total` seconds of calls and two calls at least; the first is not timed."""
    run()
    begun, least, calls = time.perf_counter(), math.inf, 0
    while calls < 2 or time.perf_counter() - begun < total:
        started = time.perf_counter()
        run()
        least, calls = min(least, time.perf_counter() - started), calls + 1
    return least
