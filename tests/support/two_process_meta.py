"""What each of two processes runs, and one alone: two blocks of Meta-Rewarding."""

import sys

import torch

from self_rewarding_lm import OptimConfig
from tests.stages.test_meta_rewarding import Stops, meta_reward, trainer_of
from tests.test_trainer import model64, weights_of


def main(folder: str) -> None:
    model = model64()
    optim = OptimConfig(batch_size=3, micro_batch_size=1, learning_rate=1e-2)
    stage = meta_reward(num_generated_preference_pairs=3, prompts_per_block=3, optim=optim)
    settings = dict(accelerate_kwargs=dict(cpu=True), engine=Stops())
    trainer = trainer_of(folder, [stage], model, **settings)
    trainer(rehearse=False)
    torch.save(weights_of(model), f"{folder}/weights.{trainer.runtime.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
