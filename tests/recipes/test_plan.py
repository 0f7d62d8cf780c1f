"""What a recipe takes: parameters, bytes, tokens and disk by hand, and against what is really kept."""

import contextlib
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
import transformers

from self_rewarding_lm.config import (
    PAPER_REWARD_CONFIG,
    ComparisonConfig,
    FinetuneConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfInstruct,
    from_stage,
)
from self_rewarding_lm.data.datasets import create_mock_dataset
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan as SessionPlan
from self_rewarding_lm.models.narrow import NarrowMatrices
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.models.policy import Policy, dropout_set
from self_rewarding_lm.recipes.plan.disk import RunDisk, StageDisk, records, run_disk, stage_disk
from self_rewarding_lm.recipes.plan.machine import UTILISATION, Machine, measure
from self_rewarding_lm.recipes.plan.memory import (
    Block,
    Micro,
    Types,
    activation_bytes,
    key_value_bytes,
    layer_bytes,
    logits_bytes,
    state_bytes,
)
from self_rewarding_lm.recipes.plan.model import FOUR_BIT_BYTES, read_shape
from self_rewarding_lm.recipes.plan.phases import (
    Device,
    fitting_tokens,
    micro_batch,
    sampling_phase,
    training_phases,
)
from self_rewarding_lm.recipes.plan.table import bytes_of
from self_rewarding_lm.stages.contrastive import Contrast, ContrastiveDPOConfig
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.grpo import SelfRewardGRPOConfig
from self_rewarding_lm.stages.lengths import training_row_lengths
from self_rewarding_lm.stages.pairing import PairingConfig
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.stages.temporal import TemporalDPOConfig
from self_rewarding_lm.stages.work import Asking, Counting, RowShape, Training, Work
from self_rewarding_lm.training.optimizers import make_optimizers
from tests.support.hf_models import tiny
from tests.support.models import transformer

FP32, BF16, MIXED = Types(4, 4), Types(2, 2), Types(4, 2, autocast=True)
SIZES = dict(
    vocab_size=40,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
"""Of a Llama that is small enough to be counted by hand: heads of 2 numbers."""
LLAMA_BLOCK = Block(
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    inner=12,
    gated=True,
    attention_inputs=3,
    inner_inputs=2,
    activation_kept=2,
    rms_norms=2,
    norms=0,
)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))


def gpt2(**changes):
    sizes = dict(vocab_size=40, n_embd=8, n_layer=3, n_head=4, n_positions=512)
    ends = dict(bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ends, **changes}))


def saved(folder, config):
    config.save_pretrained(folder)
    return str(folder)


# -- parameters ------------------------------------------------------------------------------------


def test_parameters_of_a_llama_are_those_counted_by_hand(tmp_path):
    shape = read_shape(saved(tmp_path, transformers.LlamaConfig(**SIZES)))
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8  # q; k and v of two heads of 2; output
    layer = attention + 3 * 8 * 12 + 2 * 8  # gate, up and down; two norms
    assert shape.parameters == shape.trainable == 40 * 8 + 3 * layer + 8 + 40 * 8 == 2136
    assert shape.weight_bytes == shape.gradient_bytes == shape.saved_bytes == 4 * 2136
    assert shape.products == 3 * (layer - 2 * 8) + 40 * 8
    assert shape.block == LLAMA_BLOCK
    assert (shape.layers, shape.vocab, shape.max_len) == (3, 40, 2048)
    assert shape.head_trained and shape.dtype is torch.float32
    assert all(p.device.type == "meta" for p in shape.module.parameters())


def test_parameters_of_a_gpt2_are_those_counted_by_hand(tmp_path):
    shape = read_shape(saved(tmp_path, gpt2().config))
    attention = 8 * 24 + 24 + 8 * 8 + 8
    layer = attention + 8 * 32 + 32 + 32 * 8 + 8 + 2 * (8 + 8)
    assert shape.parameters == 40 * 8 + 512 * 8 + 3 * layer + 16  # the head is the embedding
    block = shape.block
    assert block is not None and not block.gated and block.inner == 32 and block.kv_heads == 4
    assert (block.attention_inputs, block.inner_inputs) == (1, 1)
    assert (block.norms, block.rms_norms, block.dropouts) == (2, 0, 2)
    assert block.activation_kept == 5  # x, x / 2, tanh, 1 + tanh, and the result


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once_and_multiplied_with(tied):
    shape = read_shape(llama(tie_word_embeddings=tied))
    assert shape.parameters == 2136 - 320 * tied
    assert shape.products == 2136 - 320 - 3 * 16 - 8


def test_a_module_stays_as_it_is_and_its_twin_has_no_memory():
    module = llama()
    module.lm_head.weight.requires_grad_(False)
    before = [p.clone() for p in module.parameters()]
    shape = read_shape(module)
    assert all(p.device.type == "meta" for p in shape.module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert shape.trainable == 2136 - 320 and not shape.head_trained
    assert shape.gradient_bytes == 4 * (2136 - 320)


def test_a_function_makes_its_model_without_memory():
    made = []

    def make():
        made.append(llama())
        return made[0]

    assert read_shape(make).parameters == 2136
    assert next(made[0].parameters()).device.type == "meta"


@pytest.mark.parametrize(
    ("dtype", "bytes_each"), [(None, 4), ("bfloat16", 2), ("float64", 8), ("auto", 2)]
)
def test_weights_have_the_type_they_would_be_loaded_in(tmp_path, dtype, bytes_each):
    config = transformers.LlamaConfig(**SIZES, dtype=torch.bfloat16)
    shape = read_shape(saved(tmp_path, config), torch_dtype=dtype)
    assert shape.weight_bytes == bytes_each * 2136


def test_an_adapter_trains_its_own_weights_alone(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    shape = read_shape(saved(tmp_path, llama().config), torch_dtype="bfloat16", peft_config=lora)
    # a pair of matrices for each layer: rank x (input + output)
    added = 3 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 12))
    assert shape.trainable == added and shape.parameters == 2136 + added
    assert shape.weight_bytes == 2 * 2136 + 4 * added  # peft keeps adapters in float32
    assert shape.saved_bytes == shape.gradient_bytes == 4 * added
    assert not shape.head_trained
    assert shape.adapter is not None and (shape.adapter.rank, shape.adapter.itemsize) == (2, 4)


def test_a_folder_with_an_adapter_is_its_base_model_with_it(tmp_path):
    peft = pytest.importorskip("peft")
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(loaded, lora).save_pretrained(tmp_path / "adapter")
    shape = read_shape(str(tmp_path / "adapter"))
    assert shape.trainable == 3 * 2 * (8 + 8)
    with pytest.raises(ConfigError, match="has an adapter already"):
        read_shape(str(tmp_path / "adapter"), peft_config=lora)


def test_weights_in_four_bit():
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules="all-linear")
    shape = read_shape(llama(), four_bit=True, peft_config=lora)
    linear = 2136 - 2 * 320 - 3 * 16 - 8
    expected = FOUR_BIT_BYTES * linear + 4 * (2136 - linear) + 4 * shape.trainable
    assert shape.weight_bytes == pytest.approx(expected, abs=32)


def test_of_layers_that_are_not_known_nothing_is_guessed(tmp_path):
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    shape = read_shape(saved(tmp_path, transformers.MixtralConfig(**sizes)))
    assert shape.parameters > 2136 and shape.block is None
    assert "linear parts" in (shape.reason or "")
    shape = read_shape(transformer())
    assert shape.block is None and "no model of transformers" in (shape.reason or "")
    assert shape.parameters == sum(p.numel() for p in transformer().parameters())


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a folder with a config\.json"):
        read_shape(str(tmp_path))
    with pytest.raises(ConfigError, match="must make a torch module; got int"):
        read_shape(lambda: 3)

    def breaks():
        return torch.ones(2).numpy()

    with pytest.raises(ConfigError, match=r"breaks\(\) makes cannot be looked at"):
        read_shape(breaks)


# -- bytes by hand ---------------------------------------------------------------------------------


def test_a_layer_of_a_llama_keeps_what_the_derivation_says():
    # d = 8, a = 8, g = 4, i = 12: 6 d + 3 a + 2 g + 4 i numbers, and a sum of each of 4 heads
    numbers = 6 * 8 + 3 * 8 + 2 * 4 + 4 * 12
    assert layer_bytes(LLAMA_BLOCK, FP32, Micro(1)) == 4 * numbers + 4 * 4
    # bfloat16: the same in 2 bytes, but the two inputs of norms, d each, in float32
    assert layer_bytes(LLAMA_BLOCK, BF16, Micro(1)) == 2 * numbers + 4 * 4 + 2 * 2 * 8
    # mixed: both tensors of each norm in float32; q, k, v and gate, up cast their input each
    inner = 2 * (3 * 8 + 2 * 4 + 4 * 12)
    assert layer_bytes(LLAMA_BLOCK, MIXED, Micro(1)) == 4 * 4 * 8 + 5 * 2 * 8 + inner + 4 * 4


def test_checkpointed_layers_keep_their_inputs():
    last = 4 * 3 * 8 + 2 * 2 * 4  # the last norm and the head's input; cosine and sine
    kept = activation_bytes(LLAMA_BLOCK, 3, FP32, Micro(5), checkpointing=True)
    assert kept == 5 * (3 * 8 * 4 + last)
    kept = activation_bytes(LLAMA_BLOCK, 3, FP32, Micro(5))
    assert kept == 5 * (3 * layer_bytes(LLAMA_BLOCK, FP32, Micro(1)) + last)


@pytest.mark.parametrize(("kind", "at_once"), [("cpu", 2**22), ("cuda", 2**24)])
def test_logits_are_those_of_one_tile_at_most(kind, at_once):
    # few tokens: all of them in one tile, the head's gradient and the hidden states' two
    assert logits_bytes(10, 100, 8, FP32, kind=kind) == 4 * (10 * 100 + 100 * 8 + 2 * 10 * 8)
    settings = {"kind": kind, "head_trained": False}
    assert logits_bytes(10, 100, 8, FP32, **settings) == 4 * (10 * 100 + 2 * 10 * 8)
    # so many tokens of the vocabulary for 64 rows, and 1,024 of them at least, for fewer rows
    some = logits_bytes(64, 2**20, 8, FP32, **settings)
    assert some == 4 * (at_once + 2 * 64 * 8)
    many = logits_bytes(100_000, 2**17, 8, FP32, **settings)
    assert many == 4 * (at_once + 2 * 100_000 * 8)


def test_sizes_of_memory_in_words():
    assert bytes_of("24GB") == bytes_of("24 gb") == bytes_of("24g") == 24 * 10**9
    assert bytes_of("80GiB") == 80 * 2**30
    assert bytes_of("1.5 TB") == 1_500_000_000_000
    assert bytes_of("512") == 512
    for wrong in ("", "much", "24 GX", "-3GB", "0GB", "3 iB", "GB"):
        with pytest.raises(ConfigError, match="such as 24GB"):
            bytes_of(wrong)


# -- bytes against what autograd keeps -------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, `known` ones left out."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                name = storage._cdata
                if name not in self.sizes and name not in self.known:
                    self.sizes[name] = storage.nbytes()
                    self.now += self.sizes[name]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, name)
        return out

    def _gone(self, name):
        self.now -= self.sizes.pop(name)


def mixed_in(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def kept_bytes(module, ids, dropout, narrow):
    """Bytes of all tensors that autograd keeps for the backward pass, weights left out."""
    policy = Policy(adapt(module))
    policy.train()
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    found, casts = {}, 0

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    noise = RowNoise(0, lambda _: None)
    noise.begin([(0, row) for row in range(len(ids))])
    with dropout_set(policy, dropout), hooks, mixed_in(narrow), noise:
        logprobs = policy(ids, noise=noise)
    if narrow is not None and next(module.parameters()).itemsize > narrow.itemsize:
        casts = narrow.itemsize * read_shape(module).products
    assert logprobs.requires_grad
    return sum(storage.nbytes() for storage in found.values()) - casts


MODELS = {
    "llama": lambda: tiny("llama"),
    "grouped": lambda: llama(num_attention_heads=8, hidden_size=64, intermediate_size=80),
    "gpt2": lambda: gpt2(n_embd=32),
    "qwen3": lambda: tiny("qwen3"),
    "gemma3": lambda: tiny("gemma3"),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_keeps_as_many_bytes_as_estimated(name, dropout):
    module = MODELS[name]()
    ids = torch.randint(0, 40, (3, 64))
    shape = read_shape(module)
    assert shape.block is not None
    micro = Micro(ids.numel(), dropout)
    estimate = activation_bytes(shape.block, shape.layers, FP32, micro)
    assert estimate == pytest.approx(kept_bytes(module, ids, dropout, None), rel=0.1)


@pytest.mark.parametrize("kind", ["mixed", "narrow"])
@pytest.mark.parametrize("name", ["llama", "grouped", "gpt2"])
def test_a_forward_in_bfloat16_keeps_as_many_bytes_as_estimated(name, kind):
    module = MODELS[name]()
    narrow = torch.bfloat16 if kind == "mixed" else None
    if narrow is None:
        module = module.to(torch.bfloat16)
    ids = torch.randint(0, 40, (3, 64))
    shape = read_shape(module)
    assert shape.block is not None
    types, micro = MIXED if kind == "mixed" else BF16, Micro(ids.numel(), attention=4)
    estimate = activation_bytes(shape.block, shape.layers, types, micro)
    assert estimate == pytest.approx(kept_bytes(module, ids, 0.0, narrow), rel=0.1)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_with_an_adapter_keeps_as_many_bytes_as_estimated(dtype, narrow):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    module = peft.get_peft_model(tiny("llama", dtype=dtype), lora)
    shape = read_shape(tiny("llama", dtype=dtype), peft_config=lora)
    assert shape.block is not None
    product = dtype if narrow is None else narrow
    types = Types(dtype.itemsize, product.itemsize, autocast=narrow is not None)
    ids = torch.randint(0, 40, (3, 64))
    micro = Micro(ids.numel(), attention=4)
    estimate = activation_bytes(shape.block, shape.layers, types, micro, adapter=shape.adapter)
    assert estimate == pytest.approx(kept_bytes(module, ids, 0.0, narrow), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("module", "rows", "length"),
    [
        (lambda: llama(hidden_size=64, intermediate_size=160), 4, 400),
        (lambda: llama(hidden_size=16, intermediate_size=32, vocab_size=50_000), 1, 500),
        (lambda: gpt2(n_embd=32), 4, 400),
    ],
    ids=["llama", "vocabulary", "gpt2"],
)
def test_a_training_step_has_the_estimated_peak(module, rows, length, checkpointing):
    """Two micro-batches and a step of the optimiser; all tensors that live, weights aside."""
    module = module()
    model, shape = adapt(module), read_shape(module)
    policy = Policy(model)
    policy.train()
    ids = torch.randint(0, 40, (rows, length))
    tokens = rows * length
    optim = OptimConfig(micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
    stage = SFTConfig(train_dataset=[], dropout=0.0, optim=optim)
    (optimizer,) = make_optimizers(module, optim.completed(1e-4, 0.0, 1), shape.vocab)

    def step():
        for _ in range(2):
            policy(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    keeping = model.checkpointing() if checkpointing else contextlib.nullcontext()
    with keeping, dropout_set(policy, 0.0):
        step()  # the optimiser's state is there now
        live = Live([*module.parameters(), *module.buffers()])
        with live:
            step()
    states = sum(
        t.numel() * t.itemsize for s in optimizer.state.values() for t in s.values() if t.ndim
    )
    training = Training(UNKNOWN, RowShape(), UNKNOWN, UNKNOWN)
    (phase,) = [
        phase
        for phase in training_phases(stage, training, shape, Device("cpu", FP32, 4), states)
        if phase.is_used
    ]
    assert phase.tokens == tokens and phase.optimizer == states
    assert phase.peak is not None
    estimate = phase.peak - shape.weight_bytes - states
    assert estimate == pytest.approx(live.peak, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor"])
def test_an_optimiser_keeps_as_many_bytes_as_estimated(name):
    module = llama()
    optim = OptimConfig(optimizer=name, learning_rate=1e-3)
    estimate = state_bytes(read_shape(module).module, optim, 40)
    found = 0
    for optimizer in make_optimizers(module, optim.completed(1e-3, 1e-4, 1), 40):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = (t for s in optimizer.state.values() for t in s.values() if t.ndim)
        found += sum(t.numel() * t.itemsize for t in states)
    assert estimate == found
    by_hand = {"adamw": 2 * 4 * 2136, "sgd": 0, "muon": 4 * (2 * 2136 - 1440)}
    assert estimate == by_hand.get(name, estimate)


def test_an_optimiser_in_eight_bit_keeps_two_bytes_a_number():
    optim = OptimConfig(optimizer="adamw_8bit")
    module = read_shape(llama(hidden_size=128, intermediate_size=128)).module
    embedding, small = 40 * 128, 7 * 128  # and 7 norms of 128 numbers
    rest = sum(p.numel() for p in module.parameters()) - embedding - small
    assert state_bytes(module, optim, 40) == 8 * (embedding + small) + round(2 * rest * 260 / 256)


def test_an_optimiser_by_a_function_takes_a_step_without_memory():
    module = read_shape(llama()).module
    optim = OptimConfig(optimizer=lambda params: torch.optim.Adagrad(params))
    assert state_bytes(module, optim, 40) == 4 * 2136

    def breaks(params):
        raise RuntimeError("only on a GPU")

    assert state_bytes(module, OptimConfig(optimizer=breaks), 40) is None
    assert all(p.grad is None for p in module.parameters())
    half = read_shape(llama().half()).module
    with pytest.raises(ConfigError, match="some of these are float16"):
        state_bytes(half, OptimConfig(), 40)


def test_a_session_allocates_the_cache_that_was_estimated():
    module = tiny("llama")
    model, shape = adapt(module), read_shape(module)
    plan = SessionPlan((), longest=7, max_new=5, max_rows=4)
    session = model.session(plan)
    session.prefill([[1, 2, 3, 4, 5, 6, 7]])
    assert shape.block is not None
    # 2 layers of keys and values of 2 heads of 8 numbers
    assert key_value_bytes(shape.block, shape.layers, 1, 4) == 2 * 2 * 2 * 8 * 4
    assert model.bytes_per_token == key_value_bytes(shape.block, shape.layers, 1, 4)
    asking = Asking(Range.of(4), Range(1, 5), NOTHING, longest=7)
    phase = sampling_phase("generating", asking, shape, Device("cpu", FP32, 4), LocalEngine())
    kept = session.memory.layers.values()
    allocated = sum(
        t.numel() * t.itemsize for la in kept for part in (la.stems, la.own) for t in part
    )
    assert phase.cache == allocated == plan.tokens * model.bytes_per_token
    assert phase.tokens == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_in_mixed_precision_holds_the_copies_that_were_estimated(kind):
    module = tiny(kind)
    asking = Asking(Range.of(4), Range(1, 5), NOTHING, longest=7)
    shape, engine = read_shape(module), LocalEngine()
    exact, mixed = (
        sampling_phase("generating", asking, shape, Device("cpu", types, 2), engine).weights
        for types in (FP32, MIXED)
    )
    copies = NarrowMatrices(module)
    with torch.autocast("cpu", torch.bfloat16):
        copies.prepare()
    assert mixed - exact == copies.nbytes > 0


def test_what_all_prompts_begin_with_is_held_once():
    shape = read_shape(tiny("llama"))
    asking = Asking(Range.of(8), Range(1, 5), NOTHING, longest=30, at_once=8, shared=20)
    phase = sampling_phase("judging", asking, shape, Device("cpu", FP32, 4), LocalEngine())
    # 20 tokens once, 10 of each of 8 + 1 + 2 prompts, 5 new ones of 8 rows
    assert phase.cache == (20 + 11 * 10 + 8 * 5) * 2 * 2 * 2 * 8 * 4


def test_the_engine_gets_as_many_rows_as_a_device_has_memory_for():
    shape = read_shape(tiny("llama"))
    asking = Asking(Range.of(1000), Range(1, 100), NOTHING, longest=20)
    phases = [
        sampling_phase("generating", asking, shape, Device("cuda", FP32, 4, memory), LocalEngine())
        for memory in (None, 10**8, 4 * 10**6, 1000)
    ]
    each = 2 * 2 * 2 * 8 * 4
    wanted = (128 + 16 + 2) * 20 + 128 * 100
    assert phases[0].cache == phases[1].cache == wanted * each
    assert phases[2].tokens is not None and 1 < phases[2].tokens < 128
    assert (phases[2].cache or 0) <= 2 * 10**6
    assert phases[3].tokens == 1 and (phases[3].peak or 0) > 1000


# -- the micro-batch -------------------------------------------------------------------------------


def training_of(rows=100, longest=30, sequence=30, answers=1):
    row = RowShape(Range.of(20), Range.of(10), longest, sequence, answers)
    return Training(Range.of(rows), row, Range.of(7), Range.of(2000))


def test_a_micro_batch_is_the_settings_or_what_a_step_has():
    def tokens(training, **optim):
        return micro_batch(SFTConfig(train_dataset=[], optim=OptimConfig(**optim)), training)

    assert tokens(training_of(), micro_batch_tokens=100) == 100
    assert tokens(training_of(), micro_batch_tokens=10) == 30  # a row is not cut in two
    assert tokens(training_of(), batch_size=16) == 16 * 30
    assert tokens(training_of(rows=3), batch_size=16) == 3 * 30
    assert tokens(training_of(), batch_size=16, micro_batch_size=2) == 2 * 30
    assert tokens(training_of(longest=None), micro_batch_tokens=100) == 100


def test_the_largest_micro_batch_that_fits():
    shape = read_shape(tiny("llama"))
    stage = SFTConfig(train_dataset=[], dropout=0.0)

    def fits(memory, again):
        device = Device("cuda", FP32, 4, memory)
        settings = (stage, training_of(longest=None), shape, device, 2 * shape.gradient_bytes)
        return fitting_tokens(*settings, checkpointing=again)

    for again in (False, True):
        found = fits(50_000_000, again)
        sizes = [50_000_000 * factor for factor in (0.5, 1, 2)]
        assert found and found & (found - 1) == 0  # a power of two
        assert [fits(round(size), again) for size in sizes] == sorted(
            fits(round(size), again) for size in sizes
        )
    assert fits(50_000_000, True) > fits(50_000_000, False)
    assert fits(1000, False) == fits(1000, True) == 0
    assert fits(None, False) is None


# -- ranges ----------------------------------------------------------------------------------------


def test_ranges_add_and_multiply_their_bounds():
    assert Range(1, 2) + Range(3, 4) == Range(4, 6)
    assert Range(1, 2) + Range(3) == Range(4)
    assert Range(2, 3).times(4) == Range(8, 12)
    assert Range(2, 3).times(Range(1, 5)) == Range(2, 15)
    assert Range(2).times(Range(1, 5)) == Range(2)
    assert UNKNOWN.times(NOTHING) == NOTHING == Range(3, 0).times(7).capped(0)
    assert total([]) == NOTHING and total([Range(1, 1), Range(2, 3)]) == Range(3, 4)
    assert Range(5, 9).capped(7) == Range(5, 7) and Range(9).capped(7) == Range(7, 7)
    assert UNKNOWN.is_unknown and not NOTHING.is_unknown and not Range(1).is_unknown


# -- what stages do --------------------------------------------------------------------------------


def letters() -> Tokens:
    """A token a character."""
    tokenizer = CallableTokenizer(
        lambda text: torch.tensor([ord(c) % 128 for c in text]),
        lambda ids: "".join(chr(i) for i in ids.tolist()),
    )
    return Tokens(tokenizer, eos_id=0, vocab=128)


TEMPLATE = "Rate: {{ prompt }}{{ response }}"
SHARED = len("Rate:")
"""Tokens of the template before what it shows, white space at their end left out."""
JUDGE = RewardConfig(prompt_template=TEMPLATE, reward_regex_template="{{ reward }}!")
TEMPLATE_OF_TWO = "{{ prompt }} {{ response_a }} {{ response_b }}"
ROWS = [{"prompt": "abcd", "completion": "xyz"}, {"prompt": "ab", "completion": "x"}]
"""4 + 3 and 2 + 1 tokens, and an end token after each: 8 and 4."""
PROMPTS = ["abcd", "ab"]
PAIRS = [{"prompt": "ab", "chosen": "xyz", "rejected": "x"}] * 5
RANKED = [{"prompt": "ab", "replies": ["x", "xyz"]}, {"prompt": "ab", "replies": ["x", "y", "z"]}]


def counted(*stages, tokens="letters", max_len=100, rewards=None):
    """The work of stages, by their names a, b, c, ..."""
    rewards = rewards or {"default": JUDGE}
    counting = Counting(rewards, letters() if tokens == "letters" else None, max_len)
    return [counting.work(stage, name) for stage, name in zip(stages, "abcdef", strict=False)]


def test_supervised_rows_steps_and_tokens():
    optim = OptimConfig(epochs=2, batch_size=3)
    (work,) = counted(SFTConfig(train_dataset=ROWS * 5, optim=optim))
    training = work.training
    assert training is not None and not training.pairs
    assert training.rows == Range.of(10) and training.row.tokens == Range.of(6)
    assert training.steps == Range.of(2 * 4)  # 10 rows in threes, twice
    assert training.tokens == Range.of(2 * 10 * 6)
    assert (training.row.longest, training.row.sequence) == (8, 8)
    (work,) = counted(SFTConfig(train_dataset=ROWS, num_train_steps=7))
    assert work.training and work.training.steps == Range.of(7)
    assert work.training.tokens == Range.of(7 * 16 * 6)


def test_without_a_tokenizer_rows_are_counted_and_their_tokens_bounded():
    (work,) = counted(SFTConfig(train_dataset=ROWS, max_seq_len=50), tokens=None)
    training = work.training
    assert training and training.rows == Range.of(2)
    assert training.row.tokens == Range(0, 50) and training.tokens == Range(0, 3 * 2 * 50)
    (work,) = counted(SFTConfig(train_dataset=ROWS), tokens=None, max_len=None)
    assert work.training and work.training.tokens == UNKNOWN


def test_rows_that_cannot_be_counted_are_unknown():
    def endless():
        while True:
            yield ROWS[0]

    (work,) = counted(SFTConfig(train_dataset=endless()))
    assert work.training and work.training.rows == UNKNOWN == work.training.steps
    (work,) = counted(SFTConfig(train_dataset=create_mock_dataset(3, ROWS[0])))
    assert work.training and work.training.rows == Range.of(3)


def test_pairs_share_their_prompt():
    (work,) = counted(DPOConfig(train_dataset=PAIRS))
    training = work.training
    assert training and training.pairs and training.rows == Range.of(5)
    assert training.row.tokens == Range.of(2 + 4 + 2)  # prompt once, both answers with their ends
    assert (training.row.longest, training.row.sequence) == (8, 6)


def test_rows_of_earlier_stages_are_those_that_they_make():
    first = SelfRewardDPOConfig(prompt_dataset=PROMPTS, num_generated_preference_pairs=20)
    again = DPOConfig(train_dataset=from_stage("a"))
    mixed = DPOConfig(train_dataset=[PAIRS, from_stage("a")])
    works = counted(first, again, mixed)
    assert [work.training.rows for work in works if work.training] == [
        Range.of(20),
        Range.of(20),
        Range.of(25),
    ]


def self_reward(**changes):
    settings = dict(
        prompt_dataset=PROMPTS * 50,
        num_generated_preference_pairs=40,
        num_candidate_responses=4,
        num_sampled_reward_responses=3,
        generation=SamplingConfig(max_new_tokens=10),
        judging=SamplingConfig(max_new_tokens=20, min_new_tokens=2),
        prompts_per_block=16,
    )
    return SelfRewardDPOConfig(**{**settings, **changes})


def test_a_round_of_self_reward():
    (work,) = counted(self_reward())
    # 40 pairs need 3 blocks of 16 prompts at least; at most 4 passes over 100 prompts
    assert work.prompts == Range(48, 400) and work.prompt == Range.of(3)
    assert work.candidates.count == Range(192, 1600)
    assert work.candidates.written == Range(192, 16_000)
    assert work.candidates.read == Range(48 * 3, 400 * 3)
    assert work.candidates.longest == 4 and work.candidates.at_once == 64
    assert work.judgements.count == Range(576, 4800)
    assert work.judgements.written == Range(2 * 576, 20 * 4800)
    # the prompt of three judgements of an answer is computed once, its beginning once for all
    own = len(TEMPLATE) - SHARED
    least, most = 192 * (3 + 1 + own), 1600 * (3 + 10 + own)
    assert work.judgements.read == Range(least + SHARED, most + SHARED)
    assert work.judgements.longest == 4 + 10 + len(TEMPLATE) and work.judgements.shared == SHARED
    assert work.judgements.at_once == 192
    training = work.training
    assert training and training.rows == Range.of(40) and training.steps == Range.of(3)
    assert training.row.tokens == Range(3 + 2 * 1, 3 + 2 * 10)
    assert (training.row.longest, training.row.sequence) == (24, 14)
    assert work.made == Range.of(40) and work.notes == ()


def test_a_round_over_all_prompts():
    (work,) = counted(self_reward(num_generated_preference_pairs=None))
    assert work.prompts == Range.of(100)
    assert work.training and work.training.rows == Range(0, 100)
    (work,) = counted(self_reward(max_prompt_passes=1))
    assert work.prompts == Range(48, 100)
    (work,) = counted(self_reward(prompt_dataset=PROMPTS, max_prompt_passes=1))
    assert work.prompts == Range.of(2)  # fewer than a block


def test_judges_of_other_kinds():
    comparison = ComparisonConfig()
    (work,) = counted(self_reward(comparison=comparison))
    assert work.judgements.count == Range(192 * 3, 1600 * 3)  # 4 x 3 of 4 candidates
    rewards = {"default": JUDGE, "kind": JUDGE}
    (work,) = counted(self_reward(self_reward_config_keyname=("default", "kind")), rewards=rewards)
    assert work.judgements.count == Range(2 * 576, 2 * 4800)
    at_once = PAPER_REWARD_CONFIG.model_copy(update={"forced_ending": "at_once"})
    (work,) = counted(self_reward(), rewards={"default": at_once})
    assert work.judgements.count == Range(192, 1600) and work.judgements.written == NOTHING
    (work,) = counted(self_reward(rewarding_model=nn.Linear(1, 1)))
    assert not work.judgements.here and "another model judges" in work.notes[0]
    (work,) = counted(self_reward(judge=object()))
    assert work.judgements.count == UNKNOWN and "an object" in work.notes[0]
    (work,) = counted(ExternalRewardDPOConfig(prompt_dataset=PROMPTS, reward_model=len))
    assert work.judgements.count == work.candidates.count == Range.of(8)
    assert not work.judgements.here and work.judgements.written == NOTHING


def test_contrasts_are_read_on_both_sides_and_judged_where_they_are_confirmed():
    settings = dict(
        prompt_dataset=PROMPTS * 50,
        num_generated_preference_pairs=40,
        generation=SamplingConfig(max_new_tokens=10),
        prompts_per_block=16,
        contrasts=(Contrast(positive="x" * 7, negative="x" * 5),),
    )
    (work,) = counted(ContrastiveDPOConfig(**settings))
    assert work.prompts == Range(48, 400) and work.candidates.count == Range(96, 800)
    assert work.candidates.read == Range(96 * (3 + 5), 800 * (3 + 7))
    assert work.candidates.longest == 4 + 7
    assert work.judgements == Asking() and work.training
    assert work.training.row.tokens == Range(3 + 2 * 1, 3 + 2 * 10)  # the prompt alone is trained
    (work,) = counted(ContrastiveDPOConfig(**settings, confirm="drop"))
    assert work.judgements.count == Range(96 * 3, 800 * 3)


def test_comparisons_of_known_pairs_are_counted():
    comparison = ComparisonConfig(prompt_template=TEMPLATE_OF_TWO, verdict_prefix="b ")
    rows = [{"prompt": "ab", "replies": ["x", "y", "z"]}] * 2
    stage = BuildEFTConfig(
        ranked_dataset=rows,
        method="comparisons",
        comparison=comparison,
        num_judgements=4,
        judging=SamplingConfig(max_new_tokens=20),
    )
    (work,) = counted(stage)
    assert work.judgements.count == Range(4 * 2, 4 * 6)  # one to three pairs a row, four times
    assert work.made == Range(0, 6)
    assert work.judgements.written == Range(8, 20 * 24)
    (work,) = counted(stage.model_copy(update={"num_judgements": None}))
    assert work.judgements.count == Range(15 * 2, 15 * 6)


def test_new_prompts_are_counted_and_writing_them_is_not():
    new = SelfInstruct(seed_dataset=PROMPTS, num_prompts=30)
    (work,) = counted(self_reward(prompt_dataset=new, num_generated_preference_pairs=None))
    assert work.prompts == Range.of(30) and "not counted" in work.notes[0]


def test_top_scored_responses_beside_a_dataset():
    stage = SelfRewardSFTConfig(
        prompt_dataset=PROMPTS * 50,
        num_generated_preference_pairs=40,
        generation=SamplingConfig(max_new_tokens=10),
        prompts_per_block=4,
        train_dataset=ROWS,
        optim=OptimConfig(epochs=1, batch_size=4),
    )
    (work,) = counted(stage)
    assert work.prompts == Range(12, 400)  # each prompt may give four
    training = work.training
    assert training and not training.pairs and training.rows == Range.of(42)
    assert training.tokens == Range(40 * 4 + 2 * 6, 40 * 13 + 2 * 6)
    assert training.steps == Range.of(11) and training.row.longest == 14


def test_policy_gradients_train_on_all_responses_and_read_what_they_must():
    stage = SelfRewardGRPOConfig(
        prompt_dataset=PROMPTS * 5,
        generation=SamplingConfig(max_new_tokens=10),
        num_candidate_responses=4,
        rounds=3,
        prompts_per_round=8,
        optim=OptimConfig(batch_size=32),
    )
    (work,) = counted(stage)
    assert work.prompts == Range.of(24) and work.candidates.count == Range.of(24 * 4)
    training = work.training
    assert training and not training.pairs and training.rows == Range(0, 32)
    assert training.steps == Range(0, 3) and training.row.answers == 1
    assert stage.reference_tokens(training) == NOTHING  # one step a round, no reference
    read = Range(0, 3 * 32).times(training.row.tokens)
    for change in (dict(beta=0.1), dict(optim=OptimConfig(batch_size=16))):
        other = stage.model_copy(update=change)
        assert other.reference_tokens(counted(other)[0].training) == read
    both = stage.model_copy(update=dict(beta=0.1, optim=OptimConfig(epochs=2)))
    assert both.reference_tokens(counted(both)[0].training) == read.times(2)
    same = both.model_copy(update=dict(reference="round"))
    assert same.reference_tokens(counted(same)[0].training) == read


def test_self_play():
    stage = SelfPlayConfig(
        train_dataset=ROWS * 8,
        iterations=3,
        generation=SamplingConfig(max_new_tokens=5),
        optim=OptimConfig(epochs=1, batch_size=4),
    )
    (work,) = counted(stage)
    assert work.candidates.count == Range.of(48) and work.candidates.written == Range(48, 240)
    training = work.training
    assert training and training.pairs and training.rows == Range(0, 16)
    assert training.steps == Range(0, 3 * 4)
    assert training.row.tokens == Range(7, 11)  # 6 of the row and 1 to 5 of its own
    (work,) = counted(stage.model_copy(update={"mix_previous": True}))
    assert work.training and work.training.steps == Range(0, 4 + 8 + 8)


def test_judging_examples():
    (work,) = counted(BuildEFTConfig(ranked_dataset=RANKED * 2, num_judgements=2))
    assert work.judgements.count == Range.of(10 * 2)  # 2, 3, 2 and 3 replies
    assert work.judgements.written == Range(20, 20 * 256)
    assert work.made == Range(0, 10) and work.training is None
    # 2 tokens of the prompt, (1 + 3 + 1 + 1 + 1) / 5 of a reply, the judge prompt around them, and
    # a judgement
    shown = round(2 + 7 / 5) + len(TEMPLATE)
    assert work.example == Range(shown + 1, shown + 256)
    (work,) = counted(BuildEFTConfig(ranked_dataset=RANKED, method="ranks"))
    assert work.judgements.count == NOTHING
    assert work.example == Range.of(shown + len("{{ reward }}!"))
    (work,) = counted(BuildEFTConfig(ranked_dataset=RANKED), tokens=None)
    assert work.judgements.count == Range(12)  # of each row two replies at least


def test_rows_beside_those_of_an_earlier_stage_are_as_long_as_both():
    """Judging examples are many times as long as the rows beside them, and set the memory."""
    eft = BuildEFTConfig(ranked_dataset=RANKED, method="ranks")
    made, mixed, alone = counted(
        eft,
        SFTConfig(train_dataset=[ROWS, from_stage("a")]),
        SFTConfig(train_dataset=from_stage("a")),
    )
    assert made.example.most is not None and made.example.most > 8
    assert mixed.training and mixed.training.row.tokens == Range(6, made.example.most)
    assert mixed.training.row.longest == mixed.training.row.sequence == made.example.most
    assert alone.training and alone.training.row.tokens == made.example
    pairs = SelfRewardDPOConfig(prompt_dataset=PROMPTS, num_generated_preference_pairs=20)
    first, later = counted(pairs, DPOConfig(train_dataset=[PAIRS, from_stage("a")]))
    assert first.training and later.training and later.training.pairs
    assert later.training.row.longest == first.training.row.longest
    assert later.training.row.tokens.most == first.training.row.tokens.most
    # of a stage of one's own nothing is known but what the model takes
    _, unknown = counted(Counted(), SFTConfig(train_dataset=[ROWS, from_stage("a")]))
    assert unknown.training and unknown.training.row.tokens == Range(0, 100)


def test_a_stage_that_may_stop_early_has_fewer_steps_at_least():
    stage = SFTConfig(
        train_dataset=ROWS * 5,
        early_stopper_eval_module=len,
        optim=OptimConfig(epochs=4, batch_size=1, eval_every=6),
    )
    (work,) = counted(stage)
    assert work.training and work.training.steps == Range(6, 40)
    assert work.training.tokens == Range(6 * 6, 40 * 6)


class Custom(FinetuneConfig):
    def run(self, ctx, out):
        pass


def test_a_stage_of_ones_own_is_not_guessed():
    (work,) = counted(Custom())
    assert work.training is None and "Custom" in work.notes[0] and work.made == NOTHING


class Counted(Custom):
    def work(self, counting):
        return Work(made=counting.data(ROWS, training_row_lengths).rows)


def test_a_stage_of_ones_own_may_count_its_work():
    own, later = counted(Counted(), SFTConfig(train_dataset=from_stage("a")))
    assert own.made == Range.of(2) and own.notes == ()
    assert later.training and later.training.rows == Range.of(2)


# -- disk and time ---------------------------------------------------------------------------------


def test_weights_that_a_run_keeps():
    stages = [StageDisk(100, NOTHING, NOTHING, Range(1, 2)) for _ in range(5)]
    whole = run_disk(stages, uses_initial=True, merged=30, keep=None)
    assert whole == RunDisk(100, Range.of(530), NOTHING, Range(5, 10))
    assert whole.total == Range(635, 640)
    # two are kept, and the next one is written before the oldest goes
    kept = run_disk(stages, uses_initial=False, merged=0, keep=2)
    assert kept.weights == Range.of(300) and kept.initial == 0


def test_weights_that_are_there_while_a_stage_trains():
    training = training_of()
    stopping = SFTConfig(
        train_dataset=[],
        early_stopper_eval_module=len,
        optim=OptimConfig(checkpoint_every=3),
    )
    disk = stage_disk(stopping, Work(training=training), 1000, 40, states=500)
    assert disk.kept == Range.of(2000)  # of 7 steps the 3rd and the 6th
    assert disk.meanwhile == Range(3000, 6000)  # and the best weights, and two states of training
    never = OptimConfig(save_state_minutes=None)
    play = SelfPlayConfig(train_dataset=[], iterations=4, optim=never)
    assert stage_disk(play, Work(training=training), 1000, 40).meanwhile == Range.of(3000)
    assert stage_disk(Custom(), Work(), 1000, 40).meanwhile == NOTHING


def test_times_are_operations_over_the_assumed_rate():
    machine = Machine(rate=100.0, bandwidth=10.0)
    assert machine.computing(Range(100, 1000)) == Range(
        round(1 / UTILISATION), round(10 / UTILISATION)
    )
    assert machine.seconds_per_token(50, 1, 1) == pytest.approx(1 / UTILISATION)
    # 80 bytes of weights are read in 8 seconds, for four rows at once
    assert machine.seconds_per_token(50, 80, 4) == pytest.approx(2 / UTILISATION)


def test_a_machine_is_measured():
    machine = measure("cpu", torch.float32)
    assert machine.rate > 1e8 and machine.bandwidth > 1e7


def test_records_grow_with_their_tokens():
    few = Work(Range.of(1), Range.of(10), Asking(Range.of(4), Range.of(10)))
    more = Work(Range.of(1), Range.of(10), Asking(Range.of(4), Range.of(20)))
    assert records(few, 10).least < records(more, 10).least < records(more, 100_000).least


@pytest.mark.parametrize("sizes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_docs_table_of_sizes_is_what_its_command_prints(sizes, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SHAPES" in c)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("in SHAPES.items()", f"in list(SHAPES.items())[:{sizes}]"), {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * sizes and [row for row in rows if row not in text] == []


# -- memory as the machine sees it -----------------------------------------------------------------

MEASURED = """
import json, resource, sys, tempfile
import psutil, torch, transformers
from self_rewarding_lm import OptimConfig, SelfRewardingTrainer, SFTConfig

torch.set_num_threads(1)
sizes, small = json.loads(sys.argv[1]), json.loads(sys.argv[2])
kind, again = sys.argv[3], bool(int(sys.argv[4]))


def train(sizes, steps, rows, length):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    data = [(ids, 1) for ids in torch.randint(0, config.vocab_size, (rows, length))]
    optim = OptimConfig(batch_size=rows, micro_batch_tokens=1024, gradient_checkpointing=again)
    stage = SFTConfig(train_dataset=data, num_train_steps=steps, dropout=0.0, optim=optim)
    with tempfile.TemporaryDirectory() as folder:
        SelfRewardingTrainer(
            model,
            finetune_configs=[stage],
            checkpoints_folder=folder,
            accelerate_kwargs={"cpu": True},
            quiet=True,
        )()


train({**sizes, **small}, 1, 8, 32)  # what is imported and allocated once
before = psutil.Process().memory_info().rss
train(sizes, 2, 8, 256)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
LARGE = {
    "LlamaConfig": (
        dict(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2),
    ),
    "GPT2Config": (
        dict(vocab_size=50_257, n_embd=384, n_layer=6, n_head=6, n_positions=512),
        dict(vocab_size=64, n_embd=36, n_layer=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_process_that_trains_takes_the_planned_memory(kind, again):
    """Resident memory above that before the model was made, of a whole stage.

    glibc keeps pieces of freed memory below its threshold for mapping it; that is set to 1 MiB.
    """
    sizes, small = LARGE[kind]
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURED,
            json.dumps(sizes),
            json.dumps(small),
            kind,
            str(int(again)),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"},
    )
    config = getattr(transformers, kind)(**sizes)
    with torch.device("meta"):
        shape = read_shape(lambda: transformers.AutoModelForCausalLM.from_config(config))
    optim = OptimConfig(batch_size=8, micro_batch_tokens=1024, gradient_checkpointing=again)
    stage = SFTConfig(train_dataset=[], dropout=0.0, optim=optim)
    optimizer = state_bytes(shape.module, optim, shape.vocab)
    training = training_of(rows=8, longest=256, sequence=256)
    phases = training_phases(stage, training, shape, Device("cpu", FP32, 4), optimizer)
    (phase,) = [phase for phase in phases if phase.is_used]
    assert phase.peak == pytest.approx(int(told.stdout), rel=0.25)


def test_a_temporal_stage_asks_three_models_and_trains_twice_with_pairs_mixed_in():
    stages = [
        self_reward(num_generated_preference_pairs=20),
        TemporalDPOConfig(
            prompt_dataset=PROMPTS * 50,
            num_generated_preference_pairs=40,
            num_candidate_responses=3,
            generation=SamplingConfig(max_new_tokens=10),
            mix_pairs=("a",),
            optim=OptimConfig(epochs=1, batch_size=4),
        ),
    ]
    _, work = counted(*stages)
    assert work.candidates.count == work.prompts.times(9)
    assert work.training and work.training.rows == Range.of(60)
    assert work.training.steps == Range.of(10 + 15)


def test_several_pairs_of_a_prompt_need_fewer_prompts():
    several = PairingConfig(pick="top_bottom", pairs_per_prompt=2)
    one, two = (
        counted(self_reward(num_generated_preference_pairs=64, prompts_per_block=4, pairing=p))[0]
        for p in (PairingConfig(), several)
    )
    assert (one.prompts.least, two.prompts.least) == (64, 32)


def test_a_plan_counts_blocks_that_end_with_the_dataset_and_says_of_few_prompts():
    twelve = [f"tell {i}" for i in range(12)]
    options = dict(prompt_dataset=twelve, num_generated_preference_pairs=25, prompts_per_block=4)
    few, often, once, small = counted(
        self_reward(**options, unless_few_prompts=True),
        self_reward(**options),
        self_reward(**{**options, "num_generated_preference_pairs": 13}),
        self_reward(**{**options, "num_generated_preference_pairs": 4, "prompts_per_block": 32}),
    )
    assert few.prompts == Range.of(12) and few.made == Range(0, 12)
    assert "12 prompts, each used once" in few.remarks[0]
    assert often.prompts.least == 28 and often.made == Range.of(25)  # 4 at a time
    assert "asked 3 times each or more, as num_generated_preference_pairs is 25" in often.remarks[0]
    assert once.prompts.least == 16 and once.remarks == ()
    assert small.prompts.least == 4
