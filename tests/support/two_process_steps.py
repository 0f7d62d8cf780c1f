"""What each of two processes runs, and one alone: steps of many micro-batches, case by case.

Of each case the trained weights are kept, and how often a gradient was sent in a step.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_rewarding_lm import sharding
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs, TrainingRow
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.loss_config import LossConfig
from self_rewarding_lm.training.losses import PAIR_LOSSES
from self_rewarding_lm.training.objectives import PreferenceObjective, SupervisedObjective
from self_rewarding_lm.training.reference import EMAReference, PairSums
from tests.support.hf_models import phi3
from tests.support.models import VOCAB, Recurrent, context, lively, stage_dir, transformer64

# ragged; the last step of three has one row, so that a process has none
SIZES = [9, 2, 7, 3, 12, 4, 5]
ONE_BY_ONE: dict[str, Any] = {"micro_batch_size": 1}
BY_TOKENS: dict[str, Any] = {"micro_batch_size": None, "micro_batch_tokens": 16}
AT_ONCE: dict[str, Any] = {"micro_batch_size": None, "micro_batch_tokens": 100}
CHECKPOINTED = {**AT_ONCE, "gradient_checkpointing": True}
METRICS = 50
"""Fewer numbers than this in one message are not gradients."""


class Spare(Recurrent):
    """With a layer that no forward uses, as the vision tower of a model that is given texts.

    And with statistics: how many forwards trained it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16)
        lively(self.spare)
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.forwards += self.training and torch.is_grad_enabled()
        return super().forward(ids)


class Experts(nn.Module):
    """A layer in which the row's first id alone says which expert it goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden: Tensor, choices: list[int]) -> Tensor:
        rows = zip(hidden, choices, strict=True)
        return self.gate(hidden) + torch.stack([self.experts[i](row) for row, i in rows])


class Routed(nn.Module):
    """Two layers of experts; the last expert of each is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(16, VOCAB)
        lively(self)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, choices = self.embed(ids), [first % 3 for first in ids[:, 0].tolist()]
        for layer in self.layers:
            hidden = hidden + layer(hidden, choices).tanh()
        return self.head(hidden)


class Adapted(nn.Module):
    """Most weights are frozen; the layers have low-rank adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Routed()
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self.down, self.up = nn.Linear(VOCAB, 2), nn.Linear(2, VOCAB)
        lively(self.down)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.net(ids)
        return logits + self.up(self.down(logits))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Recurrent().double(),
    "transformer": transformer64,
    "spare": lambda: Spare().double(),
    "routed": lambda: Routed().double(),
    "adapted": lambda: Adapted().double(),
    "longrope": phi3,
}


def supervised(times: int = 1) -> SupervisedObjective:
    """Rows of SIZES, each so many times as long."""
    rows = []
    for i, size in enumerate(times * size for size in SIZES):
        ids = tuple((i + k * k) % VOCAB for k in range(size))
        rows.append(TrainingRow(f"row/{i}", ids, tuple(k > 0 for k in range(size))))
    return SupervisedObjective(rows)


def preferences(loss: str, live: EMAReference | None = None) -> PreferenceObjective:
    pairs, records = [], []
    for i, size in enumerate(SIZES):
        chosen = tuple((3 * i + k) % VOCAB for k in range(size))
        rejected = tuple((5 * i + 2 * k) % VOCAB for k in range(1 + size // 2))
        pairs.append(PreferencePair(f"pair/{i}", (i, 1), chosen, rejected))
        of_sides = [tuple(-1.5 - (k % 3) for k in range(len(s))) for s in (chosen, rejected)]
        records.append(ReferenceLogprobs(pairs[-1].id, *of_sides))
    sums = [PairSums(sum(record.chosen), sum(record.rejected)) for record in records]
    if live is not None:
        return PreferenceObjective(pairs, {}, 0.3, 0.0, [LossConfig(loss)], {}, live)
    return PreferenceObjective(pairs, sums, 0.3, 0.0, [LossConfig(loss)], records, None, False)


@dataclass(frozen=True)
class Case:
    """model: of MODELS. objective: what is trained on."""

    model: str
    objective: Callable[[], Any]
    micro_batches: dict[str, Any]


CASES = {
    **{
        f"{model}, rows": Case(model, supervised, ONE_BY_ONE)
        for model in MODELS
        if model != "longrope"
    },
    "transformer, by tokens": Case("transformer", supervised, BY_TOKENS),
    **{
        f"longrope, {how}": Case("longrope", lambda: supervised(2), settings)
        for how, settings in (("two forwards", AT_ONCE), ("checkpointed", CHECKPOINTED))
        if find_spec("transformers")
    },
    **{
        f"plain, {loss}": Case("plain", lambda loss=loss: preferences(loss), ONE_BY_ONE)
        for loss in PAIR_LOSSES
    },
    **{
        f"{model}, moving": Case(model, lambda: preferences("dpo", EMAReference()), ONE_BY_ONE)
        for model in ("transformer", "routed")
    },
}


class Sent(TorchDispatchMode):
    """Counts the numbers of gradients that are sent to be summed, by whatever sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d" and "reduce" in str(function):
            tensors = [
                t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()
            ]
            size = max((t.numel() for t in tensors), default=0)
            self.numbers += size if size >= METRICS else 0
        return function(*args, **(kwargs or {}))


def train(case: Case, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Three steps of three rows or one: processes have two rows and one, and one and none."""
    torch.manual_seed(0)
    module = MODELS[case.model]()
    optim = OptimConfig(
        batch_size=3,
        epochs=1,
        learning_rate=1e-2,
        final_learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.1,
        max_grad_norm=0.5,
        **case.micro_batches,
    )
    ctx = context(module, runtime=runtime)
    with Sent() as sent:
        steps = Fit(ctx, stage_dir(ctx, folder), case.objective(), optim).run()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "sent": sent.numbers / steps / trained,
    }


def main(folder: str, *names: str) -> None:
    """Beside the folders of the cases: what came of each, by rank."""
    sharding.BUCKET_BYTES = 2000  # several messages a step
    runtime = Runtime({"cpu": True}, quiet=True)
    results = {}
    for name in names or CASES:
        results[name] = train(CASES[name], runtime, Path(folder, name))
        runtime.barrier()
    torch.save(results, Path(folder, f"results.{runtime.rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
