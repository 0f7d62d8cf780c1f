"""This library's side of a training run: a stage's own pieces.

`StoredReference` and `Fit`, in the context that `SelfRewardingTrainer` makes for a stage, are all
that a DPO or SFT stage does with a model; the trainer itself would also render texts and save the
weights at the end, which is no training. What is written on the way (reference log-probs, metrics)
is timed.
"""

import json
from pathlib import Path
from typing import Any

from training_meter import Meter
from training_request import BETA, DPO, WARM_RATE, Request
from training_rows import Pair

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.records import PreferencePair, TrainingRow
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import (
    Objective,
    PreferenceObjective,
    SupervisedObjective,
)
from self_rewarding_lm.training.reference import StoredReference


class Ours:
    """One model and its rows. folder: for records."""

    def __init__(
        self, module: Any, request: Request, *, pairs: list[Pair], folder: Path, meter: Meter
    ) -> None:
        self.request, self.pairs, self.folder, self.meter = request, pairs, folder, meter
        model = adapt(module)
        meter.watch(module)
        settings = {"cpu": request.device == "cpu", "mixed_precision": request.precision}
        runtime = Runtime(settings, quiet=True)
        self.context = Context(
            stage=request.kind,
            seed=0,
            model=model,
            policy=runtime.prepare(Policy(model)),
            engine=LocalEngine(),
            tokens=Tokens(None, eos_id=None, vocab=model.vocab),
            runtime=runtime,
            rewards={},
            adapt=adapt,
        )

    def settings(self) -> dict:
        training = self.context.model.training
        packs = training is not None and training.packs
        return {"packs": packs, "head_in_pieces": training is not None}

    def warm(self) -> float:
        """A step on the first batch, which changes no weight; its loss."""
        return self._train(self.pairs[: self.request.batch_size], "warm", WARM_RATE)

    def run(self) -> float:
        """One epoch, with the reference where there is one; the first step's loss."""
        return self._train(self.pairs, "run", self.request.learning_rate)

    def _train(self, pairs: list[Pair], name: str, rate: float) -> float:
        out = StageDir(self.folder / name, self.context.runtime)
        out.begin({})
        objective = self._objective(pairs, out)
        with self.meter.phase("training"):
            Fit(self.context, out, objective, self._optim(rate)).run()
        first = (out.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
        return json.loads(first)["loss"]

    def _objective(self, pairs: list[Pair], out: StageDir) -> Objective:
        if self.request.kind == DPO:
            found = [
                PreferencePair(f"dpo/{i}/0", pair.prompt, pair.chosen, pair.rejected)
                for i, pair in enumerate(pairs)
            ]
            reference = StoredReference(self.context, out, token_budget=self.request.batch_tokens)
            with self.meter.phase("reference"):
                sums = reference.sums(found)
            return PreferenceObjective(found, sums, BETA)
        return SupervisedObjective(
            [
                TrainingRow(
                    f"sft/{i}",
                    (*pair.prompt, *pair.chosen),
                    (*(False,) * len(pair.prompt), *(True,) * len(pair.chosen)),
                )
                for i, pair in enumerate(pairs)
            ]
        )

    def _optim(self, rate: float) -> OptimConfig:
        return OptimConfig(
            learning_rate=rate,
            final_learning_rate=rate,
            schedule="constant",
            epochs=1,
            batch_size=self.request.batch_size,
            micro_batch_tokens=self.request.batch_tokens,
            gradient_checkpointing=self.request.checkpointing,
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
