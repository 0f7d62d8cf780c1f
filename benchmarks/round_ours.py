"""This library's round: one stage of `SelfRewardingTrainer`, as a user has it, with a clock."""

import json
from pathlib import Path
from typing import Any

import torch
from round_clock import PhaseClock
from round_request import BYTES, JUDGE_PROMPT, SHORT_JUDGE_PROMPT, Round, score_of
from workloads import as_bytes, build_x_transformer

from self_rewarding_lm import (
    LocalEngine,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.judges.self_judge import SelfJudge
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.reference import StoredReference


def run(asked: Round, folder: Path, clock: PhaseClock) -> dict:
    """The round; what it made."""
    _watch(clock)
    template = SHORT_JUDGE_PROMPT if asked.kind == BYTES else JUDGE_PROMPT
    words = {"prompt": "{{ prompt }}", "response": "{{ response }}"}
    stage = SelfRewardDPOConfig(
        prompt_dataset=asked.prompts,
        num_candidate_responses=asked.samples,
        num_sampled_reward_responses=asked.judgements,
        generation=_sampling(asked, asked.new_tokens),
        judging=_sampling(asked, asked.judge_tokens),
        dpo_beta=asked.beta,
        dropout=0.0,
        optim=OptimConfig(
            learning_rate=asked.learning_rate,
            final_learning_rate=asked.learning_rate,
            schedule="constant",
            epochs=1,
            batch_size=asked.batch,
            weight_decay=0.0,
        ),
    )
    trainer = SelfRewardingTrainer(
        **_model(asked),
        finetune_configs=[stage],
        self_reward_prompt_config=RewardConfig(
            prompt_template=template.format(**words), parse_reward=score_of
        ),
        engine=LocalEngine(max_rows=asked.rows),
        checkpoints_folder=folder / "run",
        accelerate_kwargs={"cpu": True, "mixed_precision": asked.precision},
        quiet=True,
        report=False,
    )
    done = trainer()
    [records] = (folder / "run").glob("01-*")
    candidates = [json.loads(line) for line in (records / "candidates.jsonl").open()]
    return {
        "candidates": len(candidates),
        "new_tokens": sum(len(one["ids"]) for one in candidates),
        "judgements": len(done.judgements(stage.folder_name)),
        "pairs": len(done.pairs(stage.folder_name)),
    }


def _watch(clock: PhaseClock) -> None:
    """Have the pieces of a stage tell the clock when they work."""
    Context.sample = clock.items("candidates", Context.sample)  # type: ignore[method-assign]
    SelfJudge.judge = clock.items("judging", SelfJudge.judge)  # type: ignore[method-assign]
    StoredReference.sums = clock.calls("reference", StoredReference.sums)  # type: ignore[method-assign]
    Fit.run = clock.calls("training", Fit.run)  # type: ignore[method-assign]


def _sampling(asked: Round, new_tokens: int) -> SamplingConfig:
    return SamplingConfig(
        temperature=asked.temperature, top_p=asked.top_p, max_new_tokens=new_tokens
    )


def _model(asked: Round) -> dict[str, Any]:
    """The model and the tokenizer, as arguments of the trainer."""
    if asked.kind != BYTES:
        return {"model": asked.model, "torch_dtype": torch.float32}
    net, _ = build_x_transformer(asked.dim, asked.depth)

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(as_bytes(text))

    def decode(ids: torch.Tensor) -> str:
        return "".join(chr(max(32, int(i))) for i in ids)

    return {"model": net, "tokenizer_encode": encode, "tokenizer_decode": decode}
