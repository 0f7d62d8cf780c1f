"""What is trained on: rows as sequences of ids, and the loss of a few of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from self_rewarding_lm.models.logprobs import masked_sum
from self_rewarding_lm.records import Ids, PreferencePair, ReferenceLogprobs, TrainingRow
from self_rewarding_lm.training.loss_config import LossConfig, losses_in, read_by
from self_rewarding_lm.training.losses import LossResult, PairBatch, Responses, sft_loss
from self_rewarding_lm.training.reference import MovingReference, PairSums

Sequences = list[tuple[tuple[int, ...], tuple[bool, ...]]]
"""(ids, targets) of each sequence of a row."""


def behind(prompt: Ids, *responses: Ids) -> Sequences:
    """Each response after the prompt; its tokens are the targets."""
    return [
        ((*prompt, *response), (*(False,) * len(prompt), *(True,) * len(response)))
        for response in responses
    ]


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
        """The losses of rows from the log-probs of their sequences, in the order of the rows."""
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
        training_row = self.rows[row]
        return [(training_row.ids, training_row.targets)]

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
    """The sum of several losses of pairs, against the log-probs of a reference.

    A row is a pair: two sequences, the chosen response's and the rejected one's, each after the
    prompt. A pair's own weight multiplies its loss; the divisor counts every pair as one.

    reference: summed log-probs of each pair; None if no loss reads them. reference_tokens: the same
    token by token, for losses that read tokens. beta: of losses without a beta of their own, and of
    the rewards among the metrics. nll_weight: of the chosen response's NLL, beside `losses`.
    live: how the reference moves; `reference` and `reference_tokens` are then dicts by row that
    `set_reference` fills. begins_even: whether the reference is the policy itself at the first
    step, so that all rewards are 0 there.
    """

    pairs: Sequence[PreferencePair]
    reference: Sequence[PairSums] | dict[int, PairSums] | None
    beta: float
    nll_weight: float = 0.0
    losses: Sequence[LossConfig] = (LossConfig("dpo"),)
    reference_tokens: Sequence[ReferenceLogprobs] | dict[int, ReferenceLogprobs] | None = None
    live: MovingReference | None = None
    begins_even: bool = True

    def __len__(self) -> int:
        return len(self.pairs)

    def count(self, row: int) -> int:
        return 1

    def sequences(self, row: int) -> Sequences:
        pair = self.pairs[row]
        return behind(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)

    def name(self, row: int) -> str:
        return self.pairs[row].id

    def set_reference(self, batches: Iterable[tuple[Sequence[int], Tensor, Tensor]]) -> None:
        """Take a moving reference's log-probs in place of its earlier ones.

        batches: (rows, log-probs (s, t), targets (s, t)), two sequences a row.
        """
        sums, tokens = self.reference, self.reference_tokens
        assert isinstance(sums, dict)
        sums.clear()
        if isinstance(tokens, dict):
            tokens.clear()
        for rows, logprobs, targets in batches:
            of_responses = [
                sequence[is_target].tolist()
                for sequence, is_target in zip(logprobs.cpu(), targets, strict=True)
            ]
            sides = zip(rows, of_responses[::2], of_responses[1::2], strict=True)
            for row, chosen, rejected in sides:
                sums[row] = PairSums(sum(chosen), sum(rejected))
                if isinstance(tokens, dict):
                    name = self.name(row)
                    tokens[row] = ReferenceLogprobs(name, tuple(chosen), tuple(rejected))

    def loss(
        self,
        rows: Sequence[int],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> LossResult:
        # 1. the two responses of each pair, as losses read them
        pairs = [self.pairs[row] for row in rows]
        batch = self._batch(rows, pairs, logprobs, targets)
        # 2. add the losses up; if there are several, each is a metric of its own
        losses = losses_in(list(self.losses), self.nll_weight)
        are_several = sum(loss.label != "nll" for loss in losses) > 1
        shares = [pair.label_smoothing or 0.0 for pair in pairs]
        smoothing = _like(logprobs, shares) if any(shares) else None  # (b,)
        metrics = _metrics(batch, self.beta)
        total = torch.zeros_like(batch.chosen.logprobs)  # (b,)
        for loss in losses:
            values = loss.with_beta(self.beta).of(batch, label_smoothing=smoothing)  # (b,)
            total = total + loss.weight * values
            if loss.label == "nll" or are_several:
                name = "nll" if loss.label == "nll" else f"losses/{loss.label}"
                metrics[name] = metrics.get(name, 0.0) + values
        # 3. weigh the pairs
        weights = [1.0 if pair.weight is None else pair.weight for pair in pairs]
        return LossResult(total * _like(logprobs, weights), torch.ones_like(total), metrics)

    def _batch(
        self,
        rows: Sequence[int],
        pairs: Sequence[PreferencePair],
        logprobs: Float[Tensor, "s t"],
        targets: Bool[Tensor, "s t"],
    ) -> PairBatch:
        """The responses of pairs, chosen and rejected apart; in `logprobs` they alternate."""
        sums = None if self.reference is None else [self.reference[row] for row in rows]
        stored = self.reference_tokens
        records = None if stored is None else [stored[row] for row in rows]
        reads_tokens, sides = read_by(self.losses).tokens, list[Responses]()
        for k, side in enumerate(("chosen", "rejected")):
            values, is_target = logprobs[k::2], targets[k::2]  # (b, t)
            responses = Responses(
                masked_sum(values, is_target),  # (b,)
                is_target.sum(dim=-1).to(values.dtype),  # (b,)
                _like(values, [_win_probabilities(pair)[k] for pair in pairs]),  # (b,)
                reference=None if sums is None else _like(values, [getattr(s, side) for s in sums]),
            )
            if reads_tokens:
                responses = replace(responses, tokens=_from_first_target(values, is_target))
            if records is not None:
                lines = [torch.tensor(getattr(r, side), dtype=values.dtype) for r in records]
                padded = pad_sequence(lines, batch_first=True)  # (b, longest response)
                responses = replace(responses, reference_tokens=padded.to(values.device))
            sides.append(responses)
        return PairBatch(*sides)


def _metrics(batch: PairBatch, beta: float) -> dict[str, Tensor]:
    """Metrics of each pair, (b,). Rewards are beta times the gain on the reference.

    Without a reference they are unknown; a pair is then right if the chosen response has the
    higher log-prob per token.
    """
    chosen, rejected = batch.chosen, batch.rejected
    logps = {"logps/chosen": chosen.logprobs, "logps/rejected": rejected.logprobs}
    if chosen.reference is None:
        is_right = chosen.means(chosen.logprobs) > rejected.means(rejected.logprobs)
        return {"rewards/accuracies": is_right.to(chosen.logprobs.dtype), **logps}
    chosen_rewards, rejected_rewards = beta * chosen.gains(), beta * rejected.gains()
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        **logps,
    }


def _win_probabilities(pair: PreferencePair) -> tuple[float, float]:
    """How likely the chosen and the rejected response win."""
    chosen, rejected = pair.win_probability, pair.rejected_win_probability
    chosen = 1.0 if chosen is None else chosen
    return chosen, 1.0 - chosen if rejected is None else rejected


def _from_first_target(
    logprobs: Float[Tensor, "b t"], targets: Bool[Tensor, "b t"]
) -> Float[Tensor, "b r"]:
    """Each row's target log-probs moved to column 0, with 0 after them.

    A row's targets stand together; r is the longest row's number of them.
    """
    lengths = targets.sum(dim=-1, keepdim=True)  # (b, 1)
    columns = torch.arange(int(lengths.max()), device=logprobs.device)[None, :]  # (1, r)
    source = targets.int().argmax(dim=-1, keepdim=True) + columns  # (b, r)
    moved = logprobs.gather(-1, source.clamp(max=logprobs.shape[1] - 1))  # (b, r)
    return moved.masked_fill(columns >= lengths, 0.0)


def _like(values: Tensor, numbers: Sequence[object]) -> Tensor:
    """Numbers as a tensor of the type and on the device of `values`."""
    return torch.tensor(numbers, device=values.device, dtype=values.dtype)
