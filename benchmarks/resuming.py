"""What a run in float32 that is stopped several times differs by, and whether memory creeps.

    python benchmarks/resuming.py            # shares of equal candidates, distance of weights
    python benchmarks/resuming.py --steps 10000    # resident memory over so many steps of training

Candidates that are sampled again, or for the first time, beside others than in an undisturbed run
have logits that differ by rounding; what that changes is counted.
"""

import argparse
import os
import signal
import tempfile
from pathlib import Path

import psutil
import torch
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm import (
    ExternalRewardDPOConfig,
    FinetuneConfig,
    OptimConfig,
    Run,
    SamplingConfig,
    SelfRewardingTrainer,
    SFTConfig,
)
from self_rewarding_lm.errors import Interrupted

VOCAB = 256


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = Decoder(dim=256, depth=6, heads=4, rotary_pos_emb=True, attn_flash=True)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=256, attn_layers=layers).to(dtype)


def reward(ids: torch.Tensor) -> torch.Tensor:
    """Larger tokens are better: any deterministic number does."""
    return ids.float().mean(dim=-1)


class Stops:
    """A filter that changes nothing and asks to stop at some of its calls."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.seen = calls, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.seen in self.calls:
            os.kill(os.getpid(), signal.SIGINT)
        return logits


def run_of(folder: Path, dtype: torch.dtype, stops: Stops) -> tuple[Run, torch.nn.Module]:
    model = model_of(dtype)
    torch.manual_seed(1)
    prompts = list(torch.randint(0, VOCAB, (96, 12)))
    stage = ExternalRewardDPOConfig(
        prompt_dataset=prompts,
        reward_model=reward,
        num_candidate_responses=4,
        generation=SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=96, filter_fn=stops),
        optim=OptimConfig(batch_size=8, learning_rate=1e-4),
        dropout=0.0,
    )
    trainer = trainer_of(model, stage, folder)
    while True:
        try:
            return trainer(rehearse=False), model
        except Interrupted:
            trainer.model.load_state_dict(model_of(dtype).state_dict())


def trainer_of(model: torch.nn.Module, stage: FinetuneConfig, folder: Path) -> SelfRewardingTrainer:
    return SelfRewardingTrainer(
        model,
        finetune_configs=[stage],
        checkpoints_folder=folder,
        accelerate_kwargs={"cpu": True},
        quiet=True,
    )


def compare(dtype: torch.dtype, stops: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        never = Stops(set())
        straight, first = run_of(Path(folder, "straight"), dtype, never)
        often = Stops({never.seen * i // (stops + 1) for i in range(1, stops + 1)})
        stopped, second = run_of(Path(folder, "stopped"), dtype, often)
        pairs = zip(straight.candidates(0), stopped.candidates(0), strict=True)
        equal = [one.ids == other.ids for one, other in pairs]
        same_pairs = list(straight.pairs(0)) == list(stopped.pairs(0))
        start = model_of(dtype).state_dict()
        moved = distance(first.state_dict(), start)
        apart = distance(first.state_dict(), second.state_dict())
    print(
        f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, stopped {stops} "
        f"times: {sum(equal)} of {len(equal)} candidates equal, pairs "
        f"{'equal' if same_pairs else 'not all equal'}; weights {apart:.3g} apart, "
        f"{moved:.3g} from the start"
    )


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    parts = [(one[n].double() - other[n].double()).square().sum() for n in one]
    return float(torch.stack(parts).sum().sqrt())


def creep(steps: int) -> None:
    model = model_of(torch.float32)
    rows = [(ids, 4) for ids in torch.randint(0, VOCAB, (64, 16))]
    process, seen = psutil.Process(), []

    def watch(module: torch.nn.Module) -> float:
        seen.append(process.memory_info().rss)
        return 0.0

    stage = SFTConfig(
        train_dataset=rows,
        num_train_steps=steps,
        dropout=0.0,
        early_stopper_eval_module=watch,
        early_stopper_patience=steps,
        optim=OptimConfig(batch_size=2, eval_every=max(1, steps // 10)),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(model, stage, Path(folder))()
    print("MB after each tenth of the steps:", *(round(size / 1e6) for size in seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="train so many steps and print the memory")
    parser.add_argument("--stops", type=int, default=5)
    options = parser.parse_args()
    if options.steps:
        creep(options.steps)
        return
    for dtype in (torch.float32, torch.float64):
        compare(dtype, options.stops)


if __name__ == "__main__":
    main()
