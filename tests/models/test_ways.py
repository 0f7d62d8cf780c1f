"""No fast way is lost by what a model's weights, types and adapters are; what is lost is told."""

import pytest
import torch

from self_rewarding_lm.models.compiled import uncompiled
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.ways import generation_way, training_way
from tests.support.hf_models import tiny
from tests.support.models import Recurrent, lively, transformer

pytest.importorskip("transformers")


def sharp(module):
    """As after long training: nearly all probability is on one token."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return module


def adapted(dtype=torch.float32, merged=False, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj", "down_proj"], **options})
    module = lively(peft.get_peft_model(tiny("llama", dtype=dtype), config))
    return module.merge_and_unload() if merged else module


KINDS = {
    "sharp": lambda: sharp(tiny("llama")),
    "sharp, tied and sliding": lambda: sharp(tiny("gemma3")),
    "bf16": lambda: sharp(tiny("qwen3", dtype=torch.bfloat16)),
    "fp16": lambda: tiny("llama", dtype=torch.float16),
    "lora": adapted,
    "lora on bf16": lambda: adapted(torch.bfloat16, target_modules="all-linear"),
    "dora": lambda: adapted(use_dora=True),
    "rslora": lambda: adapted(use_rslora=True, lora_dropout=0.1),
    "lora with a head of its own": lambda: adapted(modules_to_save=["lm_head"]),
    "merged": lambda: adapted(merged=True),
    "compiled": lambda: uncompiled(torch.compile(tiny("llama"))),
    "x-transformers": lambda: sharp(transformer("rotary")),
    "x-transformers, bf16": lambda: transformer("rotary").bfloat16(),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_the_fast_ways(kind, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = adapt(KINDS[kind]())
    assert generation_way(model).startswith("over our keys and values"), model.refused
    assert training_way(model).startswith("rows packed without padding"), model.refused


def test_a_way_that_is_not_gone_is_told_with_its_reason():
    model = adapt(Recurrent())
    assert generation_way(model).startswith("without a cache, a whole forward a token (its forward")
    assert training_way(model) == "padded rows, all logits at once (the model gives logits alone)"
    other = adapt(transformer(attn_pre_talking_heads=True))
    why = other.refused["attends"]
    assert generation_way(other).endswith(f"a batch after the other ({why})")
    assert training_way(other) == f"padded rows, logits a piece at a time ({why})"
