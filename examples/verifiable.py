"""Rewards that a program checks: sums of reasoning-gym, scored by its own `score_answer`.

    pip install ".[examples]"
    python examples/verifiable.py

A tiny transformer learns from scratch to answer sums such as `7 + 5 = `. First it is trained on
worked answers of which a third is wrong by one, so that it often errs. Then one
`ExternalRewardDPOConfig` stage samples eight answers a sum; the task's own program scores each, and
the best is trained against the worst by DPO. Nobody shows it a right answer in that stage. The
accuracy on sums of their own, decoded greedily, is printed before and after; and what is printed
for a reward that is shuffled among the answers shows that the program's scores do it.
"""

import argparse
import json
import random
import string
import tempfile
from pathlib import Path

import reasoning_gym
import torch
from torch import nn
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    CallableTokenizer,
    ExternalRewardDPOConfig,
    OptimConfig,
    Run,
    SamplingConfig,
    SelfRewardingTrainer,
    SFTConfig,
    generate,
)

ALPHABET = string.digits + " +-="
END = len(ALPHABET)
TOKENIZER = CallableTokenizer(
    lambda text: torch.tensor([ALPHABET.index(c) for c in text]),
    lambda ids: "".join(ALPHABET[i] for i in ids.tolist() if i < END),
)


def tasks(size: int, seed: int) -> list[dict]:
    """Rows of prompts; `entry` is what the task's program checks an answer with, as JSON."""
    made = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    return [
        {
            "prompt": f"{entry['metadata']['expression']} = ",
            "entry": json.dumps(entry),
            "answer": entry["answer"],
        }
        for entry in made
    ]


CHECK = reasoning_gym.create_dataset("chain_sum", size=1, seed=0).score_answer


def score(prompts, completions, entry):
    """What the task's program gives: 1.0 for the right answer, 0.0 for others here."""
    return [
        CHECK(text.strip() or None, json.loads(row))
        for text, row in zip(completions, entry, strict=True)
    ]


def shuffled(prompts, completions, entry):
    """The same scores, each given to another answer."""
    scores = score(prompts, completions, entry)
    random.Random(0).shuffle(scores)
    return scores


def worked(rows: list[dict]) -> list[dict]:
    """Answers to imitate, a third of them wrong by one."""
    noise = random.Random(1)
    return [
        {
            "prompt": row["prompt"],
            "completion": str(int(row["answer"]) + noise.choice((0, 0, 0, 0, -1, 1))),
        }
        for row in rows
    ]


def accuracy(model: nn.Module, rows: list[dict]) -> float:
    greedy = SamplingConfig(temperature=0, max_new_tokens=4)
    prompts = [row["prompt"] for row in rows]
    found = generate(model, prompts, sampling=greedy, tokenizer=TOKENIZER, eos_id=END)
    texts, entries = [c.text or "" for (c,) in found], [row["entry"] for row in rows]
    return sum(score(prompts, texts, entries)) / len(rows)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = Decoder(
        dim=64, depth=2, heads=2, attn_dim_head=32, rotary_emb_dim=32, rotary_pos_emb=True
    )
    return TransformerWrapper(num_tokens=END + 1, max_seq_len=32, attn_layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the run (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="verifiable-"))
    train, held_out = tasks(600, seed=1), tasks(200, seed=2)
    first = SFTConfig(
        name="m0",
        train_dataset=worked(train),
        optim=OptimConfig(learning_rate=3e-3, batch_size=32, epochs=15),
        dropout=0.0,
    )
    print("accuracy on held-out sums, greedy:")
    for name, reward in (("checked", score), ("shuffled", shuffled)):
        m0 = folder / "checked" / "01-m0" / "model"
        stage = ExternalRewardDPOConfig(
            init_from="previous" if name == "checked" else m0,
            prompt_dataset=[{"prompt": r["prompt"], "entry": r["entry"]} for r in train[:200]],
            reward_model=reward,
            num_candidate_responses=8,
            generation=SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=4),
            prompts_per_block=100,
            nll_weight=0.5,
            optim=OptimConfig(learning_rate=3e-4, batch_size=16, epochs=2),
            dropout=0.0,
        )
        model = model_of(options.seed)
        trainer = SelfRewardingTrainer(
            model,
            finetune_configs=[first, stage] if name == "checked" else [stage],
            tokenizer=TOKENIZER,
            eos_id=END,
            seed=options.seed,
            checkpoints_folder=folder / name,
            accelerate_kwargs={"cpu": True},
            quiet=True,
        )
        run = trainer()
        before = model_of(options.seed)
        Run.open(folder / "checked").load_weights(before, "m0")
        pairs = len(run.pairs("external_reward"))
        print(
            f"  reward {name:9s} {accuracy(before, held_out):6.1%} before, "
            f"{accuracy(model, held_out):6.1%} after DPO on {pairs} pairs"
        )
    print(f"Every answer with its score: {folder}")


if __name__ == "__main__":
    main()
