"""How many tokens go through the model at once: chosen by free memory, told, kept."""

from dataclasses import replace

import pytest
import torch

from self_rewarding_lm import OptimConfig, SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.training import memory
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.forwards import MOST
from self_rewarding_lm.training.memory import LEAST, tokens_that_fit
from tests.support.models import decode, encode, run_of_format_1, transformer64
from tests.training.test_fit import context, optim, stage_dir, supervised

ROWS = [{"prompt": "ab" * (i % 5 + 1), "completion": "cde" * (i % 7 + 1)} for i in range(24)]
VOCAB = 128


def test_the_most_tokens_that_fit_are_a_power_of_two():
    assert [tokens_that_fit(float, allowed) for allowed in (1e9, 5000, 4096, 10)] == [
        *(MOST, 4096, 4096, LEAST)
    ]


def trained(folder, free, monkeypatch, **optim):
    """A run with so much free memory; what its stage told of micro-batches, and its weights."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    module = transformer64(vocab=VOCAB, max_seq_len=64, attn_dropout=0.1, ff_dropout=0.1)
    stage = SFTConfig(
        train_dataset=ROWS,
        num_train_steps=2,
        dropout=0.2,
        optim=OptimConfig(batch_size=12, learning_rate=1e-2, **optim),
    )
    trainer = SelfRewardingTrainer(
        module,
        finetune_configs=[stage],
        tokenizer_encode=encode,
        tokenizer_decode=decode,
        eos_id=0,
        checkpoints_folder=folder,
        accelerate_kwargs={"cpu": True},
        quiet=True,
    )
    run = trainer(rehearse=False)
    told = [line for line in run.events(0) if line["event"] == "micro_batch"]
    return told, [p.detach() for p in module.parameters()]


def test_free_memory_decides_the_micro_batch_and_not_the_weights(tmp_path, monkeypatch):
    [much], whole = trained(tmp_path / "much", 10**10, monkeypatch)
    [little], parts = trained(tmp_path / "little", 1, monkeypatch)
    assert (much["tokens"], little["tokens"]) == (MOST, LEAST)
    # 2 layers, a dozen tensors of 16 to 64 numbers each of 8 bytes: a rough bound of what is kept
    assert 2_000 < much["bytes_per_token"] < 50_000
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert trained(tmp_path / "set", 1, monkeypatch, micro_batch_tokens=300)[0] == []


def test_a_stage_that_goes_on_keeps_what_it_chose(tmp_path):
    ctx = context(transformer64(vocab=VOCAB))
    out, objective = stage_dir(ctx, tmp_path), supervised()
    settings = {"dropout": 0.0, "adapters": True}
    run = run_of_format_1()
    run.info = {"format": 2}
    at_work = replace(ctx, run=run)
    out.tell("micro_batch", tokens=512)
    out.tell("micro_batch", tokens=256)
    chosen = memory.micro_batch_tokens(at_work, out, objective, OptimConfig(), **settings)
    assert chosen == 256


def test_a_run_of_an_earlier_version_keeps_its_micro_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    ctx = replace(context(transformer64()), run=run_of_format_1())
    settings = {"dropout": 0.0, "adapters": True}
    out = stage_dir(ctx, tmp_path)
    assert memory.micro_batch_tokens(ctx, out, supervised(), OptimConfig(), **settings) == MOST


@pytest.mark.parametrize("tokens", [None, 7])
def test_what_is_set_is_taken(tokens, tmp_path):
    ctx = context(transformer64())
    optim, settings = OptimConfig(micro_batch_tokens=tokens), {"dropout": 0.0, "adapters": True}
    chosen = memory.micro_batch_tokens(
        ctx, stage_dir(ctx, tmp_path), supervised(), optim, **settings
    )
    assert chosen == (tokens or MOST)


def test_memory_that_another_process_used_up_ends_this_one_too(tmp_path, monkeypatch):
    """Each says so before gradients are summed, so that none waits for one that is gone."""
    ctx = context(transformer64())
    told = "process 1: out of memory while training: CUDA out of memory"
    asked = []
    monkeypatch.setattr(ctx.runtime, "world", 2)
    monkeypatch.setattr(ctx.runtime, "any", lambda *flags: (asked.append(flags), (True,))[1])
    monkeypatch.setattr(ctx.runtime, "gather", lambda items: [*items, told])
    training = Fit(ctx, stage_dir(ctx, tmp_path), supervised(), optim(), num_train_steps=1)
    with pytest.raises(ConfigError, match=told):
        training.run()
    assert asked == [(False,)]  # this one had enough
