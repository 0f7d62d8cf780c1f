"""Sampling in mixed precision: who says in which precision, and that tokens are the likeliest."""

import logging
from contextlib import nullcontext

import pytest
import torch

from self_rewarding_lm import (
    OptimConfig,
    SamplingConfig,
    SelfRewardingTrainer,
    ServerEngine,
    SFTConfig,
    evaluate_judge,
    generate,
)
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models import inference
from self_rewarding_lm.models.sessions import AttendingSession
from tests.evaluation.test_judge_quality import RANKED, REWARD
from tests.support.hf_models import tiny
from tests.support.models import CHARACTERS, END, TEXT_VOCAB, last_logits, transformer

PROMPTS = [torch.tensor([3, 1, 4]), torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2])]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Noting:
    """Takes the likeliest tokens, and notes the types of the logits that they are sampled from."""

    def __init__(self) -> None:
        self.types: set[torch.dtype] = set()
        self.sampling = SamplingConfig(temperature=0.0, max_new_tokens=6, filter_fn=self.note)

    def note(self, logits):
        self.types.add(logits.dtype)
        return logits

    def generate(self, model, **how):
        return generate(model, PROMPTS, sampling=self.sampling, **how)


@pytest.mark.parametrize(
    ("around", "precision", "found"),
    [
        (None, None, FP32),
        (None, "bf16", BF16),
        (None, "fp16", FP16),
        (BF16, None, BF16),
        (BF16, "fp16", FP16),
        (BF16, "fp32", FP32),
        (BF16, "no", FP32),
    ],
)
@pytest.mark.parametrize("make", [lambda: tiny("llama"), transformer], ids=["llama", "x"])
def test_the_precision_is_the_one_named_or_else_the_one_around(make, around, precision, found):
    noting = Noting()
    with nullcontext() if around is None else torch.autocast("cpu", around):
        noting.generate(make(), precision=precision)
    assert noting.types == {found}


@pytest.mark.parametrize("around", [False, True], ids=["named", "around"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_in_bf16_a_step_costs_one_token_a_row_and_tokens_are_the_likeliest(
    kind, around, monkeypatch
):
    steps, extend = [], AttendingSession.extend
    monkeypatch.setattr(
        AttendingSession, "extend", lambda self, new: steps.append(len(new)) or extend(self, new)
    )
    module = tiny(kind)
    with torch.autocast("cpu", BF16) if around else nullcontext():
        answers = Noting().generate(module, precision=None if around else "bf16")
    assert steps[-5:] == [3] * 5  # of three rows, each with 6 new tokens
    with torch.autocast("cpu", BF16):
        for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
            for step, token in enumerate(answer.ids):
                logits = last_logits(module, [*prompt.tolist(), *answer.ids[:step]]).float()
                assert logits[token] >= logits.max() - 0.05 * logits.abs().max()


def test_a_precision_of_this_process_is_refused_with_a_server():
    with pytest.raises(ConfigError, match=r"precision='bf16'.*server was started with"):
        generate(tiny("llama"), PROMPTS, engine=ServerEngine(url="http://x/v1"), precision="bf16")


# what is asked during a run


class Asking:
    """A callback that generates and has judged, and notes with which types."""

    def __init__(self) -> None:
        self.generated, self.named, self.judged = Noting(), Noting(), Noting()

    def on_stage_end(self, run, stage, model):
        self.generated.generate(model)
        self.named.generate(model, precision="fp32")
        how = {"reward": REWARD, "tokenizer": CHARACTERS, "eos_id": END, "quiet": True}
        evaluate_judge(model, RANKED[:1], judging=self.judged.sampling, **how)


def trainer_of(folder, mixed, model=None, **options):
    stage = SFTConfig(
        train_dataset=[{"prompt": "say", "completion": "so"}] * 4,
        num_train_steps=2,
        optim=OptimConfig(batch_size=2, learning_rate=1e-3, eval_every=1),
        **options.pop("stage", {}),
    )
    return SelfRewardingTrainer(
        model or tiny("llama", vocab=TEXT_VOCAB),
        finetune_configs=[stage],
        tokenizer=CHARACTERS,
        eos_id=END,
        checkpoints_folder=folder,
        accelerate_kwargs={"cpu": True, "mixed_precision": mixed},
        report=False,
        **options,
    )


@pytest.mark.parametrize(("mixed", "found"), [("bf16", BF16), ("no", FP32)])
def test_what_callbacks_and_stoppers_ask_is_computed_in_the_runs_precision(mixed, found, tmp_path):
    asking, stopper = Asking(), Noting()

    def score(model):
        stopper.generate(model)
        return 1.0

    model = tiny("llama", vocab=TEXT_VOCAB)
    stage = {"early_stopper_eval_module": score}
    trainer = trainer_of(tmp_path, mixed, model, stage=stage, callbacks=[asking], quiet=True)
    trainer(rehearse=False)
    assert stopper.types == asking.generated.types == {found}
    assert asking.judged.types == {found}
    assert asking.named.types == {FP32}
    after = Noting()
    after.generate(model)
    assert after.types == {FP32}


@pytest.mark.parametrize(("mixed", "told"), [("no", 1), ("bf16", 0)])
def test_a_run_says_once_at_its_start_that_products_in_bfloat16_are_not_used(
    mixed, told, tmp_path, monkeypatch, caplog
):
    known = {"architecture": "x86_64", "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    inference._has_products.cache_clear()
    monkeypatch.setattr(inference, "WORTH", 1000)
    try:
        with caplog.at_level(logging.INFO, "self_rewarding_lm"):
            trainer_of(tmp_path, mixed)()
    finally:
        inference._has_products.cache_clear()
    assert caplog.text.count("products in bfloat16 that are not used") == told
