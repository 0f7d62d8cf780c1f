"""Pairs to reference log-probs.

The reference of a stage are the weights it starts from, or others that it names. They are asked
once, before training, with dropout off, and their answers are kept beside the pairs: no second copy
of the weights, no drift. References that move are in live_reference.
"""

import math
from array import array
from collections.abc import Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from self_rewarding_lm.adapters.inference import evaluating
from self_rewarding_lm.adapters.training import grouped
from self_rewarding_lm.batching import pad_rows
from self_rewarding_lm.checks import not_finite
from self_rewarding_lm.context import Context
from self_rewarding_lm.lines import Picked
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.stored import Groups

PAIRS_AT_ONCE = 4096  # that are in memory together, and put into forwards by length


@dataclass(frozen=True)
class PairSums:
    """A pair's summed reference log-probs."""

    chosen: float
    rejected: float


class StoredReference:
    """Log-probs of pairs under the present weights, computed where they are not on disk yet.

    round: pairs that are trained in several rounds have a reference in each. weights: others than
    the present ones, as `ctx.weights` names them; they are the reference of all rounds.
    """

    def __init__(
        self,
        ctx: Context,
        out: StageDir,
        *,
        token_budget: int,
        round: int = 0,
        weights: str | None = None,
    ) -> None:
        self.ctx, self.out = ctx, out
        self.token_budget = token_budget
        self.weights = weights
        self.label = f"r{round}" if weights is None else weights.replace("/", "_")

    def sums(self, pairs: Sequence[PreferencePair]) -> Sequence[PairSums]:
        """The summed log-probs of each pair, in the order of `pairs`.

        Raises TrainingError where they are not finite.
        """
        chosen, rejected = array("d"), array("d")
        for found in self.tokens(pairs):
            chosen.append(sum(found.chosen))
            rejected.append(sum(found.rejected))
        found = zip(chosen, rejected, strict=True)
        bad = [i for i, both in enumerate(found) if not math.isfinite(sum(both))]
        if bad:
            raise not_finite(
                f"stage {self.ctx.stage!r}, before step 1",
                "reference log-probs are not finite",
                [pairs[i].id for i in bad],
                "The reference's weights give them no finite probability: they are "
                "damaged, too large for their type, or have logits of -inf. Begin with earlier "
                f"weights (init_from), and delete reference.jsonl in {self.out.path} before.",
            )
        return Picked(range(len(chosen)), change=lambda i: PairSums(chosen[i], rejected[i]))

    def tokens(self, pairs: Sequence[PreferencePair]) -> Sequence[ReferenceLogprobs]:
        """The log-probs of each pair token by token, read from disk when they are asked for."""
        known = Groups(self.out.known(ReferenceLogprobs))
        names = [f"{pair.id}/{self.label}" for pair in pairs]
        mine = self.ctx.runtime.share([*range(len(names))])
        if all(name in known for name in names):
            mine = []
        bar = self.ctx.runtime.progress(len(mine), "reference log-probs", "pair")
        others = self.ctx.weights(self.weights) if mine and self.weights else nullcontext()
        with bar, others:
            for start in range(0, len(mine), PAIRS_AT_ONCE):
                some = mine[start : start + PAIRS_AT_ONCE]
                for count in self._stored([(names[i], pairs[i]) for i in some], known):
                    bar.update(count)
        self.out.merge(ReferenceLogprobs)
        return Groups(self.out.known(ReferenceLogprobs)).in_order(names)

    def _stored(
        self, named: list[tuple[str, PreferencePair]], known: Container[str]
    ) -> Iterator[int]:
        """Compute and store what is not known; how many pairs came with each forward.

        Pairs go through the model in the same groups whatever is known, so that the log-probs of a
        reference that was stopped are bit for bit those of one that was not.
        """
        policy = self.ctx.runtime.unwrapped(self.ctx.policy)  # siblings have other groups
        sequences = [_sequences(pair) for _, pair in named]
        rows = [[(*prompt, *response) for prompt, response in pair] for pair in sequences]
        for group in grouped(self.ctx.model, rows, token_budget=self.token_budget):
            if any(named[i][0] not in known for i in group):
                together = [sequence for i in group for sequence in sequences[i]]
                found = iter(response_logprobs(policy, together))
                made = [ReferenceLogprobs(named[i][0], next(found), next(found)) for i in group]
                self.out.append(record for record in made if record.id not in known)
                self.ctx.runtime.stopping.heed()
            yield len(group)


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
