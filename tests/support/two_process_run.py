"""What each of two processes runs, and one alone: SFT, SPIN, external reward, self-reward."""

import os
import sys

import torch
from torch.distributed.tensor import DTensor

from self_rewarding_lm import CertaintyJudge, OptimConfig, SelfPlayConfig, ShuffledJudge
from tests.test_trainer import (
    ROWS,
    SHORT,
    external,
    model64,
    self_reward,
    sft,
    trainer_of,
    weights_of,
)

ONE_BY_ONE = OptimConfig(batch_size=3, micro_batch_size=1, learning_rate=1e-2)
"""A process has two micro-batches, the other has one."""


def sharded_or_not(parameters):
    """AdamW, and a check that parameters are spread over the processes if that was asked for."""
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    assert all(isinstance(p, DTensor) == asked for p in parameters)
    assert not asked or any(p.to_local().shape != p.shape for p in parameters)
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def main(folder: str) -> None:
    model = model64()
    watched = ONE_BY_ONE.model_copy(update={"optimizer": sharded_or_not})
    spin = SelfPlayConfig(train_dataset=ROWS[:5], generation=SHORT, dropout=0.0, optim=watched)
    asked = []

    def evaluate(module):
        asked.append(1)
        return [0.0, 2.0, 1.0][len(asked) - 1]

    often = ONE_BY_ONE.model_copy(update={"eval_every": 1})
    stops = sft(early_stopper_eval_module=evaluate, num_train_steps=9, optim=often)
    ragged = dict(optim=ONE_BY_ONE)
    judged = self_reward(num_generated_preference_pairs=5, **ragged)
    shuffled = self_reward(name="shuffled", judge=ShuffledJudge(), **ragged)
    again = external(name="again", candidates_from="shuffled", prompts_per_block=3, **ragged)
    sure = external(name="sure", init_from="initial", reward_model=CertaintyJudge(), **ragged)
    stages = [stops, spin, external(**ragged), judged, shuffled, again, sure]
    trainer = trainer_of(folder, stages, model, accelerate_kwargs=dict(cpu=True))
    trainer()
    assert trainer.runtime.is_main or not asked  # one process decides, all are told
    torch.save(weights_of(model), f"{folder}/weights.{trainer.runtime.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
