"""What each of two processes runs, and one alone: SFT, SPIN, external reward, self-reward."""

import sys

import torch

from self_rewarding_lm import SelfPlayConfig
from tests.test_trainer import (
    QUICK,
    ROWS,
    SHORT,
    external,
    model64,
    self_reward,
    sft,
    trainer_of,
    weights_of,
)


def main(folder: str) -> None:
    model = model64()
    spin = SelfPlayConfig(train_dataset=ROWS[:5], generation=SHORT, dropout=0.0, optim=QUICK)
    stages = [sft(), spin, external(), self_reward(num_generated_preference_pairs=5)]
    trainer = trainer_of(folder, stages, model, accelerate_kwargs=dict(cpu=True))
    trainer()
    torch.save(weights_of(model), f"{folder}/weights.{trainer.runtime.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
