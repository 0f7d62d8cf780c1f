"""Pairs to reference log-probs.

The reference of a stage are the weights it starts from. They are asked once, before training, with
dropout off, and their answers are kept beside the pairs: no second copy of the weights, no drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from self_rewarding_lm.adapters.inference import evaluating
from self_rewarding_lm.adapters.training import grouped
from self_rewarding_lm.batching import pad_rows
from self_rewarding_lm.context import Context
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs
from self_rewarding_lm.store import StageDir


@dataclass(frozen=True)
class PairSums:
    """A pair's summed reference log-probs."""

    chosen: float
    rejected: float


class StoredReference:
    """Log-probs of pairs under the present weights, computed where they are not on disk yet.

    round: pairs that are trained in several rounds have a reference in each.
    """

    def __init__(self, ctx: Context, out: StageDir, *, token_budget: int, round: int = 0) -> None:
        self.ctx, self.out = ctx, out
        self.token_budget = token_budget
        self.round = round

    def sums(self, pairs: Sequence[PreferencePair]) -> list[PairSums]:
        """The summed log-probs of each pair, in the order of `pairs`."""
        wanted = {f"{pair.id}/r{self.round}": pair for pair in pairs}
        stored = {record.id for record in self.out.known(ReferenceLogprobs)}
        missing = [(i, pair) for i, pair in wanted.items() if i not in stored]
        self._store(self.ctx.runtime.share(missing))
        self.out.merge(ReferenceLogprobs)
        found = {record.id: record for record in self.out.read(ReferenceLogprobs)}
        return [PairSums(sum(found[i].chosen), sum(found[i].rejected)) for i in wanted]

    def _store(self, missing: list[tuple[str, PreferencePair]]) -> None:
        sequences = [_sequences(pair) for _, pair in missing]
        rows = [[(*prompt, *response) for prompt, response in pair] for pair in sequences]
        groups = grouped(self.ctx.model, rows, token_budget=self.token_budget)
        with self.ctx.runtime.progress(len(missing), "reference log-probs", "pair") as bar:
            for group in groups:
                together = [sequence for i in group for sequence in sequences[i]]
                found = iter(response_logprobs(self.ctx.policy, together))
                self.out.append(
                    [ReferenceLogprobs(missing[i][0], next(found), next(found)) for i in group]
                )
                bar.update(len(group))


def _sequences(pair: PreferencePair) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]


@torch.no_grad()
def response_logprobs(
    policy: nn.Module, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, ...]]:
    """Per-token log-probs of the responses of (prompt, response) sequences, dropout off."""
    ids, lengths = pad_rows([(*prompt, *response) for prompt, response in sequences])
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    targets = torch.arange(ids.shape[1]) >= starts[:, None]
    with evaluating(policy):
        logprobs = policy(ids, lengths, targets).cpu()
    return [
        tuple(row[len(prompt) : length].tolist())
        for row, (prompt, _), length in zip(logprobs, sequences, lengths.tolist(), strict=True)
    ]
