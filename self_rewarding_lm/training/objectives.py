"""What is trained on: rows as padded tensors, and the loss of a few of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from self_rewarding_lm.models.logprobs import masked_sum
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs, TrainingRow
from self_rewarding_lm.training.loss_config import LossConfig, losses_in, read_by
from self_rewarding_lm.training.losses import LossResult, PairBatch, Responses, sft_loss
from self_rewarding_lm.training.reference import Moving, PairSums

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
    """Losses of pairs, summed, against reference log-probs.

    reference: None where no loss reads one. beta: of losses that say none of their own, and of the
    rewards among the metrics. nll_weight: of the chosen response's NLL beside `losses`.
    reference_tokens: needed where a loss reads tokens. A pair's own weight multiplies all of its
    loss; the divisor counts it as one. live: how a reference moves; both are then dicts by row, in
    which `hear` puts what it said last. begins_even: whether the reference is what the policy is at
    the first step, so that no reward but 0 is right there.
    """

    pairs: Sequence[PreferencePair]
    reference: Sequence[PairSums] | dict[int, PairSums] | None
    beta: float
    nll_weight: float = 0.0
    losses: Sequence[LossConfig] = (LossConfig("dpo"),)
    reference_tokens: Sequence[ReferenceLogprobs] | dict[int, ReferenceLogprobs] | None = None
    live: Moving | None = None
    begins_even: bool = True

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

    def hear(self, said: Iterable[tuple[Sequence[int], Tensor, Tensor]]) -> None:
        """Take what a live reference says: rows, log-probs of their sequences, targets."""
        sums, tokens = self.reference, self.reference_tokens
        assert isinstance(sums, dict)
        for heard in (sums, tokens):
            if isinstance(heard, dict):
                heard.clear()
        for rows, logprobs, targets in said:
            sides = [own[at].tolist() for own, at in zip(logprobs.cpu(), targets, strict=True)]
            for row, chosen, rejected in zip(rows, sides[::2], sides[1::2], strict=True):
                sums[row] = PairSums(sum(chosen), sum(rejected))
                if isinstance(tokens, dict):
                    found = ReferenceLogprobs(self.name(row), tuple(chosen), tuple(rejected))
                    tokens[row] = found

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        pairs = [self.pairs[i] for i in rows]
        batch = self._batch(rows, pairs, logprobs, targets)
        losses = losses_in(list(self.losses), self.nll_weight)
        several = sum(one.label != "nll" for one in losses) > 1
        said = [pair.label_smoothing for pair in pairs]
        smoothing = None if not any(said) else _like(logprobs, [s or 0.0 for s in said])
        metrics, total = _metrics(batch, self.beta), torch.zeros_like(batch.chosen.logprobs)
        for one in losses:
            found = one.with_beta(self.beta).of(batch, label_smoothing=smoothing)
            total = total + one.weight * found
            if one.label == "nll" or several:
                name = "nll" if one.label == "nll" else f"losses/{one.label}"
                metrics[name] = metrics.get(name, 0.0) + found
        weights = [1.0 if pair.weight is None else pair.weight for pair in pairs]
        return LossResult(total * _like(logprobs, weights), torch.ones_like(total), metrics)

    def _batch(
        self,
        rows: Sequence[int],
        pairs: Sequence[PreferencePair],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> PairBatch:
        """What losses read: rows of sequences, the chosen and the rejected in turn, as sides."""
        reference, tokens = self.reference, self.reference_tokens
        sums = None if reference is None else [reference[i] for i in rows]
        stored = None if tokens is None else [tokens[i] for i in rows]
        reads_tokens, sides = read_by(self.losses).tokens, list[Responses]()
        for k, side in enumerate(("chosen", "rejected")):
            mine, own = logprobs[k::2], targets[k::2]
            found = Responses(
                masked_sum(mine, own),
                own.sum(dim=-1).to(mine.dtype),
                _like(mine, [_wins(pair)[k] for pair in pairs]),
                reference=None if sums is None else _like(mine, [getattr(s, side) for s in sums]),
            )
            if reads_tokens:
                found = replace(found, tokens=_from_first(mine, own))
            if stored is not None:
                lines = [torch.tensor(getattr(s, side), dtype=mine.dtype) for s in stored]
                padded = pad_sequence(lines, batch_first=True).to(mine.device)
                found = replace(found, reference_tokens=padded)
            sides.append(found)
        return PairBatch(*sides)


def _metrics(batch: PairBatch, beta: float) -> dict[str, Tensor]:
    """Rewards are beta times what was gained on the reference; without one they are not known."""
    chosen, rejected = batch.chosen, batch.rejected
    found = {"logps/chosen": chosen.logprobs, "logps/rejected": rejected.logprobs}
    if chosen.reference is None:
        right = chosen.means(chosen.logprobs) > rejected.means(rejected.logprobs)
        return {"rewards/accuracies": right.to(chosen.logprobs.dtype), **found}
    rewards = beta * chosen.gains(), beta * rejected.gains()
    margin = rewards[0] - rewards[1]
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        **found,
    }


def _wins(pair: PreferencePair) -> tuple[float, float]:
    """How likely the chosen and the rejected response win."""
    chosen, rejected = pair.win_probability, pair.rejected_win_probability
    chosen = 1.0 if chosen is None else chosen
    return chosen, 1.0 - chosen if rejected is None else rejected


def _from_first(
    logprobs: Float[Tensor, "b t"], targets: Bool[Tensor, "b t"]
) -> Float[Tensor, "b r"]:
    """The targets' log-probs from column 0 on, 0 behind them. A row's targets stand together."""
    lengths = targets.sum(dim=-1, keepdim=True)
    columns = torch.arange(int(lengths.max()), device=logprobs.device)[None, :]
    places = targets.int().argmax(dim=-1, keepdim=True) + columns
    found = logprobs.gather(-1, places.clamp(max=logprobs.shape[1] - 1))
    return found.masked_fill(columns >= lengths, 0.0)


def _like(values: Tensor, numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, device=values.device, dtype=values.dtype)
