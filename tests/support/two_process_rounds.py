"""What each of two processes runs, and one alone: rounds with a reference that moves, with a fixed
one, and of policy gradients."""

import sys

import torch

from self_rewarding_lm import EMAReference, OptimConfig
from tests.stages.test_grpo import grpo
from tests.test_trainer import external, model64, trainer_of, weights_of


def main(folder: str) -> None:
    model = model64()
    optim = OptimConfig(batch_size=3, micro_batch_size=1, learning_rate=1e-2)
    rounds = dict(rounds=3, prompts_per_round=3, num_generated_preference_pairs=None, optim=optim)
    stages = [external(**rounds, reference=EMAReference(decay=0.6)), external(**rounds)]
    stages.append(grpo(rounds=3, prompts_per_round=3, beta=0.1, scale="batch", optim=optim))
    trainer = trainer_of(folder, stages, model, accelerate_kwargs=dict(cpu=True))
    trainer()
    torch.save(weights_of(model), f"{folder}/weights.{trainer.runtime.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
