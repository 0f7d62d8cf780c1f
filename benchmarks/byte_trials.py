"""The trials of a random x-transformers model over bytes: its own generation, the ancestor's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import peers
from floors import Least, Sizes, least_work
from plans import BARS, SAMPLES, WARM_TOKENS, Plan
from timing import Comparison, Side, Trial, Work
from workloads import Plain, as_bytes, build_x_transformer, decoding_of
from x_transformers import TransformerWrapper

from self_rewarding_lm import LocalEngine
from self_rewarding_lm.generation.engine import Request
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import stable_hash


@dataclass(frozen=True)
class Imposed:
    """Rows that end at lengths that were recorded before, for nothing ends them here.

    A peer cannot end a row of a batch: it runs to the batch's longest, and the useful tokens count.
    """

    plan: Plan
    net: TransformerWrapper
    sizes: Sizes
    ids: list[tuple[int, ...]]
    lengths: list[int]

    def ours(self, model: TokenModel, rows: int, seed: int, *, warm: bool = False) -> Work:
        lengths = self._lengths(warm)
        requests = [Request(self.ids[i], stable_hash(seed, i), n) for i, n in enumerate(lengths)]
        engine, decoding = LocalEngine(max_rows=rows), decoding_of(self.plan.sampler, ())
        found = engine.generate(model, requests, decoding)
        made = {index: len(done.ids) for index, done in found}
        assert [made[i] for i in range(len(lengths))] == lengths
        return Work(lengths, len(lengths))

    def peer(self, run: Callable[..., None], rows: int, seed: int, *, warm: bool = False) -> Work:
        lengths = self._lengths(warm)
        run(self.net, self.ids[: len(lengths)], lengths, self.plan.sampler, rows=rows, seed=seed)
        return Work(lengths, len(lengths))

    def least(self, lengths: Sequence[int], *, cached: bool = True) -> Least:
        return least_work(self.ids, lengths, rows=self.plan.rows, sizes=self.sizes, cached=cached)

    def _lengths(self, warm: bool) -> list[int]:
        return [WARM_TOKENS] * min(SAMPLES, len(self.lengths)) if warm else self.lengths


def x_transformers_trial(plan: Plan) -> Trial:
    """Against the model's own cached generation."""
    bar = BARS["x_transformers"]
    work = _imposed(plan, "x_transformers")
    sides = {
        "ours": _side(plan, partial(work.ours, adapt(work.net))),
        "wrapper": _side(plan, partial(work.peer, peers.x_transformers), bar),
    }
    comparison = Comparison("x_transformers", "ours", "wrapper", bar=bar)
    return _trial("x_transformers", work, sides, (comparison,))


def ancestor_trial(plan: Plan) -> Trial:
    """Against the ancestor's `sample`: ours with the cache and, of a plain module, without."""
    bar, plain_bar = BARS["ancestor"], BARS["plain_module"]
    work = _imposed(plan, "ancestor")
    sides = {
        "ours": _side(plan, partial(work.ours, adapt(work.net))),
        "plain": _side(plan, partial(work.ours, adapt(Plain(work.net))), bar / plain_bar),
        "sample": _side(plan, partial(work.peer, peers.ancestor), bar),
    }
    comparisons = (
        Comparison("ancestor", "ours", "sample", bar=bar),
        Comparison("plain_module", "plain", "sample", bar=plain_bar),
    )
    return _trial("ancestor", work, sides, comparisons)


def _imposed(plan: Plan, name: str) -> Imposed:
    net, sizes = _model()
    count = plan.counts[name]
    ids = [as_bytes(text) for text in plan.prompts[:count] for _ in range(SAMPLES)]
    return Imposed(plan, net, sizes, ids, plan.recording.lengths(count))


@cache
def _model() -> tuple[TransformerWrapper, Sizes]:
    return build_x_transformer()


def _side(plan: Plan, run: Callable[..., Work], slower: float = 1.0) -> Side:
    return Side(run, partial(run, plan.rows, 0, warm=True), slower)


def _trial(
    name: str, work: Imposed, sides: dict[str, Side], comparisons: tuple[Comparison, ...]
) -> Trial:
    parameters = work.sizes.body + 2 * work.sizes.head
    return Trial(
        name,
        "fp32",
        sides,
        comparisons,
        {"ours": work.least, "plain": partial(work.least, cached=False)},
        work.lengths,
        len(work.ids),
        {
            "prompts": len(work.ids) // SAMPLES,
            "samples": SAMPLES,
            "new_tokens": max(work.lengths),
            "parameters": parameters,
        },
    )
