"""Rows of an objective through the model, in micro-batches, and the sums of what comes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.models.batching import grouped, packs, pad_masks, pad_rows
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.training.objectives import Objective, PreferenceObjective
from self_rewarding_lm.training.reference import LiveReference

ROWS_AT_ONCE = 4096  # of an evaluation, whose tokens are in memory together


@dataclass
class Sums:
    """Sums over the rows of a step, on this process. places: tokens and padding together."""

    loss: float = 0.0
    tokens: int = 0
    places: int = 0
    rows: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, losses: Tensor, tokens: tuple[int, int], metrics: dict[str, Tensor]) -> None:
        """Add what `Forwards.losses` gave."""
        self.loss += float(losses.detach().double().sum())
        self.tokens += tokens[0]
        self.places += tokens[1]
        self.rows += len(losses)
        for name, values in metrics.items():
            total = float(values.detach().double().sum())
            self.metrics[name] = self.metrics.get(name, 0.0) + total


class Forwards:
    """Forwards of a training. live: a reference that moves, which is asked before the policy."""

    def __init__(self, ctx: Context, optim: OptimConfig) -> None:
        self.ctx, self.optim = ctx, optim
        self.live: LiveReference | None = None

    def micro_batches(
        self, module: nn.Module, objective: Objective, rows: list[int]
    ) -> list[tuple[list[int], bool]]:
        """This process's rows of those that all have, in groups, each with whether it counts."""
        mine = self.ctx.runtime.share(rows)
        places = grouped(
            self.ctx.model,
            [[ids for ids, _ in objective.sequences(row)] for row in mine],
            token_budget=self.optim.micro_batch_tokens,
            max_rows=self.optim.micro_batch_size,
        )
        groups = [[mine[i] for i in group] for group in places]
        found = self.ctx.runtime.in_step(groups, rows[:1])  # fewer rows than processes
        if self.live is not None and isinstance(objective, PreferenceObjective):
            own = self.ctx.runtime.unwrapped(module)
            with self.live.in_place(own):
                objective.hear((group, *_logprobs(own, objective, group)[:2]) for group, _ in found)
        return found

    def losses(
        self, module: nn.Module, objective: Objective, rows: list[int]
    ) -> tuple[Tensor, tuple[int, int], dict[str, Tensor]]:
        """The rows' losses, their tokens and these with their padding, and their metrics."""
        logprobs, targets, tokens = _logprobs(module, objective, rows)
        result = objective.loss(rows, logprobs, targets.to(logprobs.device))
        places = tokens if packs(self.ctx.model) else targets.numel()
        return result.losses, (tokens, places), dict(result.metrics)

    def means(self, sums: Sums, divisor: float) -> dict[str, float]:
        """Over all processes."""
        names = sorted(set(self.ctx.runtime.gather(list(sums.metrics))))
        values = [sums.loss, float(sums.tokens), float(sums.places), float(sums.rows)]
        values += [sums.metrics.get(name, 0.0) for name in names]
        loss, tokens, places, rows, *rest = self.ctx.runtime.sum(values)
        means = {name: value / rows for name, value in zip(names, rest, strict=True)}
        padding = 1 - tokens / places if places else 0.0
        return {"loss": loss / divisor, "num_tokens": tokens, "padding_share": padding, **means}

    @torch.no_grad()
    def evaluated(self, module: nn.Module, objective: Objective) -> dict[str, float]:
        """The loss and the metrics of all rows, without dropout."""
        sums, rows = Sums(), list(range(len(objective)))
        with evaluating(module):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = rows[start : start + ROWS_AT_ONCE]
                for group, counts in self.micro_batches(module, objective, some):
                    found = self.losses(module, objective, group)
                    if counts:
                        sums.add(*found)
        means = self.means(sums, sum(map(objective.count, rows)))
        return {k: v for k, v in means.items() if k not in ("num_tokens", "padding_share")}


def _logprobs(
    module: nn.Module, objective: Objective, rows: Sequence[int]
) -> tuple[Tensor, Tensor, int]:
    """Log-probs of the rows' sequences, which of them are targets, and how many tokens went in."""
    sequences = [pair for row in rows for pair in objective.sequences(row)]
    ids, lengths = pad_rows([ids for ids, _ in sequences])
    targets = pad_masks([targets for _, targets in sequences])
    return module(ids, lengths, targets), targets, int(lengths.sum())
