"""A model that measurably improves itself: train, answer, judge, pair, train again. No download.

A small character-level transformer learns from a few solved instructions and many reviews of mostly
wrong answers. Then, twice, it answers new instructions, reviews its own answers and is trained on
its best against its worst. The checker in quickstart_task.py measures; the loop never sees it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import quickstart_task as task
import torch
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    FinetuneConfig,
    LocalEngine,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardGRPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    ShuffledJudge,
    generate,
)

ENGINE = LocalEngine(max_rows=512)
ANSWER = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=16)
BEST_ANSWER = SamplingConfig(temperature=0, top_p=None, max_new_tokens=16)
REVIEW = SamplingConfig(temperature=0, top_p=None, max_new_tokens=32)
REWARD = RewardConfig(
    prompt_template=task.JUDGE_PROMPT,
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)


def build_model() -> torch.nn.Module:
    layers = Decoder(dim=128, depth=3, heads=4, attn_dim_head=32, ff_mult=2)
    return TransformerWrapper(num_tokens=task.VOCAB_SIZE, max_seq_len=128, attn_layers=layers)


def build_stages(
    data: task.TaskData, control: str, sft_steps: int = 700, method: str = "dpo"
) -> list[FinetuneConfig]:
    rows = data.instruction_rows * 21 + data.judge_rows
    high = OptimConfig(learning_rate=3e-3, warmup_steps=30, batch_size=40, betas=(0.9, 0.95))
    low = OptimConfig(learning_rate=4e-4, batch_size=32, betas=(0.9, 0.95))
    m1 = SFTConfig(name="M1", train_dataset=rows, num_train_steps=sft_steps, dropout=0, optim=high)
    if control == "sft":
        more = {"train_dataset": rows, "num_train_steps": 40, "dropout": 0, "optim": low}
        return [m1, SFTConfig(name="M2", **more), SFTConfig(name="M3", **more)]
    rounds = []
    for name, prompts in zip(("M2", "M3"), data.round_prompts, strict=True):
        own = {
            "name": name,
            "prompt_dataset": prompts,
            "num_candidate_responses": 4,
            "generation": ANSWER,
            "judging": REVIEW,
            "num_sampled_reward_responses": 1,  # a greedy review is the same each time
            "judge": ShuffledJudge() if control == "shuffled" else None,
            "dropout": 0,
        }
        if method == "dpo":  # all answers at once, the best of each prompt against the worst
            how = {"prompts_per_block": len(prompts), "dpo_beta": 0.3, "nll_weight": 0.5}
            optim = low.model_copy(update={"epochs": 2})
            rounds.append(SelfRewardDPOConfig(**own, **how, optim=optim))
        else:  # as many answers, and a step after those of each 50 prompts
            few = min(50, len(prompts))
            how = {"prompts_per_round": few, "rounds": len(prompts) // few}
            optim = low.model_copy(update={"batch_size": few * 4, "schedule": "constant"})
            rounds.append(SelfRewardGRPOConfig(**own, **how, optim=optim))
    return [m1, *rounds]


def greedy(model: torch.nn.Module, prompts: list[str], how: SamplingConfig) -> list[str]:
    """The answers of a model; one that never ends is none."""
    found = generate(model, prompts, sampling=how, tokenizer=task.Characters(), engine=ENGINE)
    return [answer.text if answer.finished else "" for [answer] in found]


class Measure:
    """Called by the trainer after each stage: asks the checker, prints a line of the table."""

    def __init__(self, data: task.TaskData) -> None:
        self.data, self.models = data, []
        print("model   accuracy   mean score   judge exact   kept pairs", flush=True)

    def on_stage_end(self, run: Run, stage: str, model: torch.nn.Module) -> None:
        prompts, items = self.data.held_out_prompts, self.data.held_out_judge_items
        words = greedy(model, prompts, BEST_ANSWER)
        scores = [task.points(*pair) for pair in zip(prompts, words, strict=True)]
        reviews = greedy(model, [task.judge_prompt(*item) for item in items], REVIEW)
        right = [f"Score: {task.points(*item)}" for item in items]
        exact = [review.endswith(score) for review, score in zip(reviews, right, strict=True)]
        accuracy = 100 * sum(score == 5 for score in scores) / len(scores)
        mean, judge = sum(scores) / len(scores), 100 * sum(exact) / len(exact)
        kept = run.summary(stage).get("pairs", "-")
        print(f"{stage:5}{accuracy:10.1f} %{mean:13.2f}{judge:12.1f} %{kept:>13}", flush=True)
        found = {"name": stage, "accuracy": accuracy, "mean_score": mean, "judge_exact": judge}
        self.models.append(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control", choices=("none", "shuffled", "sft"), default="none")
    parser.add_argument(
        "--method", choices=("dpo", "grpo"), default="dpo", help="pairs, or policy gradients"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--out", type=Path, help="run directory; a run in it is replaced (default: temporary)"
    )
    arguments = parser.parse_args()

    started = time.time()
    torch.manual_seed(arguments.seed)
    data = task.make_data(arguments.seed)
    table = Measure(data)
    trainer = SelfRewardingTrainer(
        build_model(),
        finetune_configs=build_stages(data, arguments.control, method=arguments.method),
        tokenizer=task.Characters(),
        self_reward_prompt_config=REWARD,
        seed=arguments.seed,
        checkpoints_folder=arguments.out or tempfile.mkdtemp(prefix="quickstart-"),
        engine=ENGINE,
        callbacks=[table],
    )
    run = trainer(overwrite_checkpoints=True)

    first, *_, last = (model["accuracy"] for model in table.models)
    seconds = time.time() - started
    print(
        f"\nM3 minus M1: {last - first:+.1f} points in {seconds:.0f} s, "
        f"method {arguments.method}, control {arguments.control}"
    )
    if arguments.json:
        told = {"seed": arguments.seed, "control": arguments.control, "method": arguments.method}
        result = {**told, "seconds": seconds}
        arguments.json.write_text(json.dumps({**result, "models": table.models}, indent=2))
    print(f"Every prompt, answer, review and pair: {run.folder}")


if __name__ == "__main__":
    main()
