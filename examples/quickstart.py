"""A model that measurably improves itself: train, answer, judge, pair, train again. No download.

    python examples/quickstart.py                      about two minutes on two CPU cores
    python examples/quickstart.py --control shuffled   the same with its scores shuffled
    python examples/quickstart.py --control sft        the same steps spent on more SFT
    python examples/quickstart.py --seed 7 --json result.json

A small character-level transformer learns from a few solved instructions and from many reviews of
(mostly wrong) answers. Then it answers new instructions, reviews its own answers, and is trained
on its best against its worst: twice. The program in quickstart_task.py that knows what is right
measures the models; the loop never sees it.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from quickstart_task import (
    EOS_ID,
    JUDGE_PROMPT,
    VOCAB_SIZE,
    TaskData,
    decode,
    encode,
    judge_prompt,
    make_data,
    points,
)
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    Candidate,
    FinetuneConfig,
    Judgement,
    LocalEngine,
    OptimConfig,
    Prompt,
    RewardConfig,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    generate,
)
from self_rewarding_lm.tokens import CallableTokenizer

ENGINE = LocalEngine(max_rows=512)
TOKENIZER = CallableTokenizer(
    lambda text: torch.tensor(encode(text)), lambda ids: decode(ids.tolist())
)
GREEDY_ANSWER = SamplingConfig(temperature=0, top_p=None, max_new_tokens=16)
GREEDY_REVIEW = SamplingConfig(temperature=0, top_p=None, max_new_tokens=32)
REWARD = RewardConfig(
    prompt_template=JUDGE_PROMPT, reward_regex_template="Score: {{ reward }}", score_range=(0, 5)
)


def build_model() -> torch.nn.Module:
    layers = Decoder(dim=128, depth=3, heads=4, attn_dim_head=32, ff_mult=2)
    return TransformerWrapper(num_tokens=VOCAB_SIZE, max_seq_len=128, attn_layers=layers)


def build_stages(data: TaskData, control: str) -> list[FinetuneConfig]:
    rows = [*data.instruction_rows * 10, *data.judge_rows]
    fast = OptimConfig(learning_rate=3e-3, warmup_steps=30, batch_size=40, betas=(0.9, 0.95))
    first = SFTConfig(name="m1", train_dataset=rows, num_train_steps=600, dropout=0, optim=fast)
    if control == "sft":
        more = OptimConfig(learning_rate=4e-4, batch_size=64)
        return [
            first,
            *(
                SFTConfig(name=name, train_dataset=rows, num_train_steps=40, dropout=0, optim=more)
                for name in ("m2", "m3")
            ),
        ]
    rounds = [
        SelfRewardDPOConfig(
            name=name,
            prompt_dataset=prompts,
            generation=SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=16),
            judging=GREEDY_REVIEW,
            num_sampled_reward_responses=1,  # greedy reviews are all the same
            judge=ShuffledScores() if control == "shuffled" else None,
            prompts_per_block=len(prompts),
            dpo_beta=0.3,
            nll_weight=0.5,
            dropout=0,
            optim=OptimConfig(learning_rate=4e-4, batch_size=32, epochs=2),
        )
        for name, prompts in zip(("m2", "m3"), data.round_prompts, strict=True)
    ]
    return [first, *rounds]


class ShuffledScores:
    """The control: the model's own judgements, each score given to a random other candidate."""

    def judge(
        self, ctx, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        from dataclasses import replace

        from self_rewarding_lm.judges import SelfJudge

        own = list(SelfJudge(REWARD, GREEDY_REVIEW, 1).judge(ctx, prompts, candidates_PG))
        scores = [judgement.score for judgement in own]
        random.Random(ctx.seed).shuffle(scores)
        return [replace(j, score=score) for j, score in zip(own, scores, strict=True)]


def measure(model: torch.nn.Module, data: TaskData, name: str) -> dict:
    """Accuracy and mean score of greedy answers, and how often the review's score is right."""
    options = {"tokenizer": TOKENIZER, "eos_id": EOS_ID, "engine": ENGINE}
    answers = generate(model, data.held_out_prompts, sampling=GREEDY_ANSWER, **options)
    scores = [
        points(prompt, answer.text) if answer.finished else 0
        for prompt, [answer] in zip(data.held_out_prompts, answers, strict=True)
    ]
    asked = [judge_prompt(prompt, response) for prompt, response in data.held_out_judge_items]
    reviews = generate(model, asked, sampling=GREEDY_REVIEW, **options)
    exact = [
        review.text.endswith(f"Score: {points(prompt, response)}")
        for (prompt, response), [review] in zip(data.held_out_judge_items, reviews, strict=True)
    ]
    return {
        "name": name,
        "accuracy": 100 * sum(score == 5 for score in scores) / len(scores),
        "mean_score": sum(scores) / len(scores),
        "judge_exact": 100 * sum(exact) / len(exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control", choices=("none", "shuffled", "sft"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--out", type=Path, help="the run directory; default: a new temporary one")
    arguments = parser.parse_args()

    started = time.time()
    data = make_data(arguments.seed)
    torch.manual_seed(arguments.seed)
    measured = []
    print(f"{'model':8}{'accuracy':>10}{'mean score':>12}{'judge exact':>13}{'kept pairs':>12}")

    class Measure:
        def on_stage_end(self, run, stage, model):
            found = measure(model, data, stage.upper())
            measured.append(found)
            pairs = run.summary(stage).get("pairs", "-")
            print(
                f"{found['name']:8}{found['accuracy']:9.1f}%{found['mean_score']:12.2f}"
                f"{found['judge_exact']:12.1f}%{pairs:>12}",
                flush=True,
            )

    trainer = SelfRewardingTrainer(
        build_model(),
        finetune_configs=build_stages(data, arguments.control),
        tokenizer=TOKENIZER,
        eos_id=EOS_ID,
        self_reward_prompt_config=REWARD,
        seed=arguments.seed,
        checkpoints_folder=arguments.out or tempfile.mkdtemp(prefix="quickstart-"),
        engine=ENGINE,
        callbacks=[Measure()],
    )
    run = trainer()

    seconds = time.time() - started
    gain = measured[-1]["accuracy"] - measured[0]["accuracy"]
    print(f"M3 minus M1: {gain:+.1f} points, in {seconds:.0f} s (control: {arguments.control})")
    if arguments.json:
        result = {"seed": arguments.seed, "control": arguments.control, "seconds": seconds}
        arguments.json.write_text(json.dumps({**result, "models": measured}, indent=2))
    print(f"Every prompt, answer, review and pair is in {run.folder}")


if __name__ == "__main__":
    main()
