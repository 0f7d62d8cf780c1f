"""Rows of an objective through the model, in micro-batches, and the sums of their losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.models.batching import grouped, packs, pad_masks, pad_rows
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.training.objectives import Objective, PreferenceObjective
from self_rewarding_lm.training.reference import LiveReference

ROWS_AT_ONCE = 4096  # of an evaluation, whose tokens are in memory together


MOST = 16_384
"""Tokens of a micro-batch at most, unless more are set: more gain nothing."""


MicroBatch = tuple[list[int], bool]
"""Rows that go through the model together, and whether their loss counts: under FSDP all processes
make equally many forwards, and those that only keep step with the others count nothing."""


@dataclass(frozen=True)
class RowLosses:
    """The losses of one micro-batch, a number per row, and each row's metrics.

    tokens: how many went through the model. places: the same with padding.
    """

    losses: Float[Tensor, " b"]
    tokens: int
    places: int
    metrics: Mapping[str, Float[Tensor, " b"]]


@dataclass
class Sums:
    """Sums over this process's rows of a step. tokens, places: as in RowLosses."""

    loss: float = 0.0
    tokens: int = 0
    places: int = 0
    rows: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def join(self, other: "Sums") -> None:
        """Add the sums of other rows."""
        self.loss += other.loss
        self.tokens += other.tokens
        self.places += other.places
        self.rows += other.rows
        for name, total in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + total

    def add(self, result: RowLosses) -> None:
        """Add a micro-batch."""
        self.loss += float(result.losses.detach().double().sum())
        self.tokens += result.tokens
        self.places += result.places
        self.rows += len(result.losses)
        for name, values in result.metrics.items():
            total = float(values.detach().double().sum())
            self.metrics[name] = self.metrics.get(name, 0.0) + total


class Forwards:
    """All forwards of a training. live: a moving reference, which is asked before the policy.

    token_budget: tokens that go through the model at once.
    """

    def __init__(
        self, ctx: Context, optim: OptimConfig, module: nn.Module, live: LiveReference | None
    ) -> None:
        self.ctx, self.optim, self.module, self.live = ctx, optim, module, live
        self.token_budget = optim.micro_batch_tokens or MOST

    def micro_batches(self, objective: Objective, rows: list[int]) -> list[MicroBatch]:
        """This process's share of the rows of a step, grouped by length."""
        mine = self.ctx.runtime.share(rows)
        groups = grouped(
            self.ctx.model,
            [[ids for ids, _ in objective.sequences(row)] for row in mine],
            token_budget=self.token_budget,
            max_rows=self.optim.micro_batch_size,
        )
        return self.ctx.runtime.in_step([[mine[i] for i in group] for group in groups], rows[:1])

    def lower_budget(self, objective: Objective, rows: list[int]) -> bool:
        """Halve the budget until rows make more micro-batches; False if each has one of its own."""
        before = len(self.micro_batches(objective, rows))
        if before >= len(rows):
            return False
        while len(self.micro_batches(objective, rows)) == before:
            self.token_budget //= 2
        return True

    def ask_reference(self, objective: Objective, micro_batches: list[MicroBatch]) -> None:
        """Give the objective the log-probs of the moving reference, if there is one."""
        if self.live is None or not isinstance(objective, PreferenceObjective):
            return
        policy = self.ctx.runtime.unwrapped(self.module)
        with self.live.in_place(policy):
            objective.set_reference(
                (rows, *logprobs_of(policy, objective, rows)[:2]) for rows, _ in micro_batches
            )

    def doubtful_references(self, objective: Objective) -> list[str]:
        """Ids of the pairs of all processes whose moving reference said no finite number last."""
        doubtful: list[str] = []
        if self.live is not None and isinstance(objective, PreferenceObjective):
            asked = objective.reference
            assert isinstance(asked, dict)
            doubtful = [
                objective.name(row)
                for row, sums in asked.items()
                if not math.isfinite(sums.chosen + sums.rejected)
            ]
        return self.ctx.runtime.gather(doubtful)

    def losses(
        self, objective: Objective, rows: list[int], noise: RowNoise | None = None
    ) -> RowLosses:
        """The losses and the metrics of a micro-batch. noise: of dropout, which this is within."""
        logprobs, targets, tokens = logprobs_of(self.module, objective, rows, noise)  # (s, t)
        result = objective.loss(rows, logprobs, targets.to(logprobs.device))
        places = tokens if packs(self.ctx.model) else targets.numel()
        return RowLosses(result.losses, tokens, places, result.metrics)

    def means(self, sums: Sums, divisor: float) -> dict[str, float]:
        """The loss over `divisor`, and metrics as means over the rows of all processes."""
        names = sorted(set(self.ctx.runtime.gather(list(sums.metrics))))
        values = [sums.loss, float(sums.tokens), float(sums.places), float(sums.rows)]
        values += [sums.metrics.get(name, 0.0) for name in names]
        loss, tokens, places, rows, *totals = self.ctx.runtime.sum(values)
        means = {name: total / rows for name, total in zip(names, totals, strict=True)}
        padding = 1 - tokens / places if places else 0.0
        return {"loss": loss / divisor, "num_tokens": tokens, "padding_share": padding, **means}

    @torch.no_grad()
    def evaluate(self, objective: Objective, rows: Sequence[int]) -> Sums:
        """The sums of rows, without dropout, on this process."""
        sums = Sums()
        with evaluating(self.module):
            block = self.micro_batches(objective, [*rows])
            self.ask_reference(objective, block)
            for micro_rows, counts in block:
                result = self.losses(objective, micro_rows)
                if counts:
                    sums.add(result)
        return sums


def logprobs_of(
    module: nn.Module, objective: Objective, rows: Sequence[int], noise: RowNoise | None = None
) -> tuple[Float[Tensor, "s t"], Bool[Tensor, "s t"], int]:
    """Log-probs of the rows' sequences, which of them are targets, and how many tokens went in."""
    sequences = [sequence for row in rows for sequence in objective.sequences(row)]
    ids, lengths = pad_rows([ids for ids, _ in sequences])  # (s, t), (s,)
    targets = pad_masks([targets for _, targets in sequences])  # (s, t)
    if noise is not None:
        noise.begin([(row, i) for row in rows for i in range(len(objective.sequences(row)))])
    return module(ids, lengths, targets, noise), targets, int(lengths.sum())
