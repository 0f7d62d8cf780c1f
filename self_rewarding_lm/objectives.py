"""What is trained on: rows as padded tensors, and the loss of a few of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from self_rewarding_lm.logprobs import masked_sum
from self_rewarding_lm.losses import LossResult, PairLogprobs, dpo_loss, nll_term, sft_loss
from self_rewarding_lm.records import PreferencePair, TrainingRow
from self_rewarding_lm.reference import PairSums

Sequences = list[tuple[tuple[int, ...], tuple[bool, ...]]]


@runtime_checkable
class Objective(Protocol):
    """Rows and their loss. A row is one or more sequences of ids with their targets."""

    def __len__(self) -> int: ...

    def count(self, row: int) -> int:
        """What the row adds to the divisor of the loss."""
        ...

    def sequences(self, row: int) -> Sequences:
        """The row's (ids, targets)."""
        ...

    def name(self, row: int) -> str:
        """The row's record id."""
        ...

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        """The loss of rows, given the log-probs of their sequences, one row's after the other's."""
        ...


@dataclass(frozen=True)
class SupervisedObjective:
    """Likelihood of the target tokens; a row counts its target tokens."""

    rows: Sequence[TrainingRow]

    def __len__(self) -> int:
        return len(self.rows)

    def count(self, row: int) -> int:
        return sum(self.rows[row].targets)

    def sequences(self, row: int) -> Sequences:
        found = self.rows[row]
        return [(found.ids, found.targets)]

    def name(self, row: int) -> str:
        return self.rows[row].id

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        return sft_loss(logprobs, targets)


@dataclass(frozen=True)
class PreferenceObjective:
    """DPO on pairs against stored reference log-probs, with `nll_weight` times the NLL term."""

    pairs: Sequence[PreferencePair]
    reference: Sequence[PairSums]
    beta: float
    nll_weight: float = 0.0

    def __len__(self) -> int:
        return len(self.pairs)

    def count(self, row: int) -> int:
        return 1

    def sequences(self, row: int) -> Sequences:
        pair = self.pairs[row]
        prompt = (False,) * len(pair.prompt_ids)
        return [
            ((*pair.prompt_ids, *response), (*prompt, *(True,) * len(response)))
            for response in (pair.chosen_ids, pair.rejected_ids)
        ]

    def name(self, row: int) -> str:
        return self.pairs[row].id

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        sums = masked_sum(logprobs, targets)
        policy = PairLogprobs(sums[0::2], sums[1::2])
        like = {"device": sums.device, "dtype": sums.dtype}
        reference = PairLogprobs(
            torch.tensor([self.reference[i].chosen for i in rows], **like),
            torch.tensor([self.reference[i].rejected for i in rows], **like),
        )
        result = dpo_loss(policy, reference, beta=self.beta)
        if self.nll_weight == 0.0:
            return result
        nll = nll_term(policy.chosen, targets[0::2].sum(dim=-1).to(sums.dtype))
        metrics = {**result.metrics, "nll": nll}
        return LossResult(result.losses + self.nll_weight * nll, result.counts, metrics)
