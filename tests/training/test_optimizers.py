"""Optimisers by name, what weight decay acts on, the learning rate of a step, vanishing updates."""

import importlib.machinery
import importlib.util
import logging
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.training.optimizers import (
    SAMPLED_NUMBERS,
    check_optimizer,
    learning_rate_at,
    make_optimizers,
    updates_vanish,
    warmup_steps_of,
    warn_of_lost_updates,
)
from tests.support.hf_models import tiny
from tests.support.models import TEXT_VOCAB, VOCAB, Recurrent, lively, transformer
from tests.test_trainer import QUICK, sft, trainer_of
from tests.training.test_fit import ROWS, fit, logged, optim, sft_by_hand, sgd, supervised

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
IN_TORCH = ("adamw", "muon", "adafactor", "sgd")
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


@pytest.fixture
def recorded(monkeypatch):
    """A package in the place of bitsandbytes: what is asked of it, and AdamW in its place."""
    calls = []

    def kind(name):
        class Made(torch.optim.AdamW):
            def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
                super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
                calls.append((name, self))

        return Made

    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    names = ("AdamW8bit", "AdamW32bit", "PagedAdamW8bit", "PagedAdamW32bit")
    package.optim = types.SimpleNamespace(**{name: kind(name) for name in names})
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return calls


# weight decay


def named(name: str, **changes) -> OptimConfig:
    """Without gradients a step at rate 0.1 with decay 0.5 takes 5 % of the decayed weights."""
    return optim(optimizer=name, learning_rate=0.1, weight_decay=0.5, **changes)


def decayed(module: nn.Module, settings: OptimConfig, vocab: int = VOCAB) -> set[str]:
    """Names of the weights that lose 5 % in a step; all others stay as they are to the bit."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in make_optimizers(module, settings, vocab):
        optimizer.step()
    moved = set()
    for name, p in module.named_parameters():
        if not torch.equal(p, before[name]):
            assert torch.allclose(p, 0.95 * before[name], rtol=1e-5, atol=0), name
            moved.add(name)
    return moved


def layers(*ends: str, of: str = "", count: int = 2) -> set[str]:
    return {of.format(i) + end for i in range(count) for end in ends}


ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight")
FEEDFORWARD = ("ff.0.0.weight", "ff.2.weight")
HIDDEN_MATRICES = layers(*ATTENTION, of="attn_layers.layers.{}.1.", count=1) | layers(
    *FEEDFORWARD, of="attn_layers.layers.1.1.", count=1
)
PROJECTIONS = layers(
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    of="model.layers.{}.",
)
GPT2_MATRICES = layers(
    *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    of="transformer.h.{}.",
)


@pytest.mark.parametrize("name", IN_TORCH)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, HIDDEN_MATRICES | {"to_logits.weight"}),
        ({"tie_embedding": True}, HIDDEN_MATRICES),
        # a table of distances is an embedding; a scale of each head is (heads, 1, size)
        (
            {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, "rel_pos_bias": True},
            HIDDEN_MATRICES | {"to_logits.weight"},
        ),
    ],
    ids=["untied", "tied", "scales"],
)
def test_x_transformers_matrices_alone_are_decayed(options, expected, name):
    assert decayed(wrapper(**options), named(name)) == expected


def wrapper(tie_embedding: bool = False, **options) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = Decoder(dim=16, depth=1, heads=2, attn_dim_head=32, **options)
        made = TransformerWrapper(
            num_tokens=VOCAB, max_seq_len=24, attn_layers=inner, tie_embedding=tie_embedding
        )
    return lively(made)


@pytest.mark.parametrize("name", IN_TORCH)
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, PROJECTIONS | {"lm_head.weight"}),
        ("llama", {"tie_word_embeddings": True}, PROJECTIONS),
        ("qwen2", {"tie_word_embeddings": True}, PROJECTIONS),
        ("gemma3", {}, PROJECTIONS),
        ("gpt2", {}, GPT2_MATRICES),
    ],
    ids=["llama", "tied-llama", "qwen2", "gemma3", "gpt2"],
)
def test_hugging_face_matrices_alone_are_decayed(kind, options, expected, name):
    module = tiny(kind, **options)
    if kind == "gemma3":
        assert module.lm_head.weight is module.model.embed_tokens.weight
    assert decayed(lively(module), named(name), vocab=96) == expected


@pytest.mark.parametrize("name", IN_TORCH)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=str)
def test_of_an_adapter_the_factors_of_linear_layers_are_decayed(options, name):
    peft = pytest.importorskip("peft")
    targets, rank = (["q_proj"], 1) if options else (["q_proj", "embed_tokens"], 2)
    config = peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    module = lively(peft.get_peft_model(tiny("llama"), config))
    start = "base_model.model.model.layers.{}.self_attn.q_proj."
    expected = layers("lora_A.default.weight", "lora_B.default.weight", of=start)
    if options:  # a trained copy of a head is a head, one of an embedding is an embedding
        expected |= {"base_model.model.lm_head.modules_to_save.default.weight"}
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in n for n in trained)
    assert decayed(module, named(name), vocab=96) == expected


class Norm2D(nn.Module):
    """A head of a layer norm with a weight of two axes, and a linear layer to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((3, 4))
        self.out = nn.Linear(4, 1)
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))
        lively(self)


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_norm_of_two_axes_is_not_decayed_and_a_stack_of_matrices_is(name):
    assert decayed(Norm2D(), named(name)) == {"out.weight", "experts"}


def test_without_weight_decay_nothing_is_decayed():
    assert decayed(transformer(), optim(optimizer="adamw", learning_rate=0.1)) == set()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def spread() -> nn.Module:
    """A model with tied embeddings as FSDP2 has it."""
    module = lively(tiny("llama", tie_word_embeddings=True))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    return module


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_weights_that_fsdp_spreads_are_decayed_alike(name, alone):
    module = spread()
    before = {n: p.full_tensor().clone() for n, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(module, named(name), 96):
        optimizer.step()
    moved = {n for n, p in module.named_parameters() if not p.full_tensor().equal(before[n])}
    assert moved == PROJECTIONS
    assert updates_vanish(module.parameters(), 1.0) == 0.0


@pytest.mark.parametrize("name", ["adafactor", *EIGHT_BIT])
def test_optimisers_of_whole_weights_are_refused_under_fsdp(name, alone, recorded):
    with pytest.raises(ConfigError, match=f"optimizer='{name}' cannot step weights that FSDP2"):
        make_optimizers(spread(), named(name), 96)
    with pytest.raises(ConfigError, match="FSDP2"):
        check_optimizer(Recurrent(), named(name), sharded=True)
    check_optimizer(Recurrent(), named("muon"), sharded=True)


# optimisers by name


def names_in(module: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in held}


@pytest.mark.parametrize("name", IN_TORCH)
def test_every_trainable_weight_has_one_optimiser_and_no_other_has(name):
    module = transformer()
    module.to_logits.weight.requires_grad_(False)
    made = make_optimizers(module, named(name), VOCAB)
    held = [n for optimizer in made for n in names_in(module, optimizer)]
    assert sorted(held) == sorted(n for n, p in module.named_parameters() if p.requires_grad)
    assert "to_logits.weight" not in held


def test_names_are_torchs_classes_and_adamw_is_fused():
    def kinds(name):
        return [type(o) for o in make_optimizers(transformer(), named(name), VOCAB)]

    assert kinds("adamw") == [torch.optim.AdamW]
    assert kinds("adafactor") == [torch.optim.Adafactor]
    assert kinds("sgd") == [torch.optim.SGD]
    assert kinds("muon") == [torch.optim.Muon, torch.optim.AdamW]
    (adamw,) = make_optimizers(transformer(), named("adamw", betas=(0.8, 0.95)), VOCAB)
    assert adamw.defaults["fused"] is True
    assert all(group["betas"] == (0.8, 0.95) for group in adamw.param_groups)


def give_gradients(module: nn.Module) -> None:
    """Of either sign, from 0.1 to 1 in size."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        size = 0.1 + 0.9 * torch.rand(p.shape, generator=generator)
        p.grad = size * (1 - 2 * torch.randint(0, 2, p.shape, generator=generator))


def test_fused_adamw_takes_the_first_step_of_the_formula():
    """The first step of Adam (arXiv:1412.6980) is the rate in each direction: m = g, v = g * g."""
    module, start = transformer(), transformer()
    give_gradients(module)
    (adamw,) = make_optimizers(module, optim(optimizer="adamw", learning_rate=0.01), VOCAB)
    adamw.step()
    for new, old in zip(module.parameters(), start.parameters(), strict=True):
        assert torch.allclose(new, old - 0.01 * new.grad.sign(), atol=1e-6)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    module = transformer()
    muon, adamw = make_optimizers(module, named("muon"), VOCAB)
    hidden = {
        name
        for name, p in module.named_parameters()
        if name.startswith("attn_layers") and p.ndim == 2
    }
    assert hidden and names_in(module, muon) == hidden
    rest = {name for name, _ in module.named_parameters()} - hidden
    assert names_in(module, adamw) == rest
    assert {"token_emb.emb.weight", "pos_emb.emb.weight", "to_logits.weight"} <= rest


def test_a_tied_head_is_no_hidden_matrix_whatever_the_vocabulary_is_said_to_be():
    module = tiny("llama", tie_word_embeddings=True)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    muon, _ = make_optimizers(module, named("muon"), 1000)
    assert names_in(module, muon) == PROJECTIONS


def test_muon_knows_the_matrices_of_gpt2():
    module = tiny("gpt2")
    muon, _ = make_optimizers(module, named("muon"), 96)
    assert names_in(
        module, muon
    ) == GPT2_MATRICES - {  # 96 = 3 * 32 wide, as the vocabulary: AdamW's
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.weight",
    }


@pytest.mark.parametrize(
    ("name", "rate"), [("adamw", 1e-2), ("muon", 1e-2), ("adafactor", 3e-2), ("sgd", 0.1)]
)
def test_named_optimisers_lower_the_loss(name, rate, tmp_path):
    settings = optim(optimizer=name, learning_rate=rate, epochs=10)
    fit(transformer(), tmp_path, supervised(), settings)
    losses = logged(tmp_path, "loss")
    assert losses[-1] < losses[0]


def test_muon_trains_a_model_that_is_as_wide_as_its_vocabulary(tmp_path):
    module = Recurrent(vocab=16, dim=16)
    assert fit(module, tmp_path, supervised(), optim(optimizer="muon", learning_rate=1e-3)) == 1


def test_sgd_by_name_is_plain_gradient_descent(tmp_path):
    module, start = Recurrent().double(), Recurrent().double()
    fit(module, tmp_path, supervised(), optim(optimizer="sgd", learning_rate=0.5))
    gradients = torch.autograd.grad(sft_by_hand(start, ROWS), list(start.parameters()))
    for new, old, gradient in zip(module.parameters(), start.parameters(), gradients, strict=True):
        assert torch.allclose(new, old - 0.5 * gradient, atol=1e-12)


def test_a_function_is_given_the_trainable_weights(tmp_path):
    module, given = Recurrent(), []
    module.embed.weight.requires_grad_(False)
    before = module.embed.weight.clone()

    def make(parameters):
        given.extend(parameters)
        return sgd(parameters)

    fit(module, tmp_path, supervised(), optim(optimizer=make))
    assert {id(p) for p in given} == {id(p) for p in module.parameters()} - {
        id(module.embed.weight)
    }
    assert torch.equal(module.embed.weight, before)


@pytest.mark.parametrize("name", ["adam", "AdamW", None, 3])
def test_an_unknown_optimiser_is_refused(name):
    with pytest.raises(ConfigError, match=r"'adamw', 'muon', .*'sgd' or a function.*"):
        OptimConfig(optimizer=name)


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_optimisers_of_another_step_size_need_a_learning_rate(name):
    with pytest.raises(ConfigError, match=f"optimizer='{name}' needs learning_rate"):
        OptimConfig(optimizer=name)
    assert OptimConfig(optimizer=name, learning_rate=0.1).optimizer == name


def test_a_function_that_returns_no_optimiser_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must return a torch optimiser; got list"):
        fit(Recurrent(), tmp_path, supervised(), optim(optimizer=lambda parameters: parameters))


def test_a_model_without_trainable_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(Recurrent().requires_grad_(False), tmp_path, supervised())


# float16 weights


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_on_float16_weights_is_refused(name):
    with pytest.raises(ConfigError, match=r"float16.*Load the model in float32"):
        make_optimizers(Recurrent().half(), named(name), VOCAB)
    make_optimizers(Recurrent().bfloat16(), named(name), VOCAB)
    make_optimizers(Recurrent().half(), named("sgd"), VOCAB)


def test_why_adamw_on_float16_weights_is_refused():
    """Equal gradients give steps of the learning rate; in float16 they become 1 / sqrt(0.001)."""
    steps = []
    for dtype in (torch.float32, torch.float16):
        weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        adamw = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0, fused=True)
        for _ in range(2000):
            before = weight.item()
            weight.grad = torch.full_like(weight, 1e-4)
            adamw.step()
            weight.data.zero_() if abs(weight.item()) > 0.01 else None
        steps.append(abs(weight.item() - before))
    assert steps[0] == pytest.approx(1e-4, rel=0.02)
    assert steps[1] > 20 * steps[0]


def test_float16_weights_do_not_go_with_a_scaled_loss():
    module = Recurrent().half()
    with pytest.raises(ConfigError, match=r"mixed_precision='fp16' scales the loss"):
        check_optimizer(module, named("sgd"), scaled=True)
    check_optimizer(module, named("sgd"))
    check_optimizer(Recurrent(), named("adamw"), scaled=True)
    check_optimizer(module.requires_grad_(False), named("adamw"), scaled=True)


# 8 bit


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("adamw_8bit", ["AdamW8bit", "AdamW32bit"]),
        ("paged_adamw_8bit", ["PagedAdamW8bit", "PagedAdamW32bit"]),
    ],
)
def test_8_bit_states_are_for_all_but_embeddings(name, kinds, recorded):
    module = lively(tiny("llama", tie_word_embeddings=True))
    made = make_optimizers(module, named(name, betas=(0.8, 0.95)), 96)
    assert [kind for kind, _ in recorded] == kinds and [o for _, o in recorded] == made
    eight, wide = made
    assert names_in(module, wide) == {"model.embed_tokens.weight"}
    everything = {n for n, _ in module.named_parameters()}
    assert names_in(module, eight) == everything - names_in(module, wide)
    groups = [group for optimizer in made for group in optimizer.param_groups]
    assert all(group["betas"] == (0.8, 0.95) and group["lr"] == 0.1 for group in groups)
    assert decayed(module, named(name), vocab=96) == PROJECTIONS


def test_8_bit_is_trained_by_the_loop(recorded, tmp_path):
    settings = optim(optimizer="adamw_8bit", learning_rate=1e-2, epochs=10)
    fit(transformer(), tmp_path, supervised(), settings)
    losses = logged(tmp_path, "loss")
    assert len(recorded) == 2 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_without_its_package_is_an_error_with_the_pip_line(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's mark of one that is missing
    line = r'pip install .*\[bitsandbytes\]"'
    with pytest.raises(ConfigError, match=line):
        check_optimizer(Recurrent(), named(name))
    with pytest.raises(ConfigError, match=line):
        fit(Recurrent(), tmp_path, supervised(), named(name))


def test_what_a_later_stage_needs_is_asked_for_before_the_first(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    stages = [sft(), sft(optim=QUICK.model_copy(update={"optimizer": "adamw_8bit"}))]
    with pytest.raises(ConfigError, match="bitsandbytes"):
        trainer_of(tmp_path, stages)()
    assert not (tmp_path / "01-sft" / "rows.jsonl").exists()


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_bitsandbytes_takes_adams_first_step_and_keeps_a_byte_a_number(name):
    module = lively(tiny("llama", hidden_size=64, intermediate_size=96))
    start = [p.detach().clone() for p in module.parameters()]
    give_gradients(module)
    eight, wide = make_optimizers(module, optim(optimizer=name, learning_rate=0.01), 96)
    eight.step(), wide.step()
    for new, old in zip(module.parameters(), start, strict=True):
        assert torch.allclose(new, old - 0.01 * new.grad.sign(), atol=1e-5)
    of_embedding = wide.state[module.model.embed_tokens.weight]
    assert of_embedding["state1"].dtype == torch.float32
    matrix = module.model.layers[0].mlp.up_proj.weight
    assert eight.state[matrix]["state1"].dtype == torch.uint8
    assert eight.state[matrix]["state1"].shape == matrix.shape


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_bitsandbytes_decays_matrices_and_lowers_the_loss(name, tmp_path):
    module = lively(tiny("llama", hidden_size=64, tie_word_embeddings=True))
    assert decayed(module, named(name), vocab=96) == PROJECTIONS
    fit(module, tmp_path, supervised(), optim(optimizer=name, learning_rate=1e-3, epochs=10))
    losses = logged(tmp_path, "loss")
    assert losses[-1] < losses[0]


# learning rates


def rates(total: int, **changes) -> list[float]:
    return [learning_rate_at(i, total, optim(**changes)) for i in range(total)]


COSINE = {"schedule": "cosine", "learning_rate": 3.0, "final_learning_rate": 1.0}


def test_the_learning_rate_warms_up_and_falls_to_its_last_value():
    assert rates(5, **COSINE) == pytest.approx([3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 1])
    linear = {**COSINE, "schedule": "linear"}
    assert rates(5, **linear) == pytest.approx([3, 2.5, 2, 1.5, 1])
    assert rates(5, **linear, warmup_steps=2) == pytest.approx([1.5, 3, 3, 2, 1])
    assert rates(3, **{**COSINE, "schedule": "constant"}) == [3, 3, 3]
    assert rates(1, **COSINE) == [3]


@pytest.mark.parametrize(("total", "warmup"), [(2, 0), (7, 0), (50, 1), (50, 10), (1000, 333)])
def test_schedules_are_those_of_torch(total, warmup):
    """LinearLR up to the rate, then LinearLR or CosineAnnealingLR to the last step."""
    rising = {"start_factor": 1 / max(warmup, 1), "total_iters": max(warmup - 1, 0)}
    left = total - warmup - 1
    for schedule in ("linear", "cosine"):
        by_torch = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
        falling = (
            LinearLR(by_torch, start_factor=1.0, end_factor=1 / 3, total_iters=left)
            if schedule == "linear"
            else CosineAnnealingLR(by_torch, T_max=left, eta_min=1.0)
        )
        parts = [LinearLR(by_torch, **rising), falling] if warmup else [falling]
        whole = SequentialLR(by_torch, parts, milestones=[warmup] if warmup else [])
        expected = []
        for _ in range(total):
            expected.append(by_torch.param_groups[0]["lr"])
            by_torch.step(), whole.step()
        found = rates(total, **{**COSINE, "schedule": schedule}, warmup_steps=warmup)
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("total", "warmup"), [(9, 0), (40, 5), (41, 40), (10, 10)])
def test_rates_are_those_of_a_line_and_of_a_squared_cosine(total, warmup):
    steps = np.arange(total)
    rising = 3.0 * (steps + 1) / max(warmup, 1)
    way = np.clip((steps - warmup) / max(total - 1 - warmup, 1), 0, 1)
    line = np.where(steps < warmup, rising, 3 * (1 - way) + 1 * way)
    cosine = np.where(steps < warmup, rising, 1 + 2 * np.cos(np.pi * way / 2) ** 2)
    constant = np.where(steps < warmup, rising, 3.0)
    for schedule, expected in (("linear", line), ("cosine", cosine), ("constant", constant)):
        settings = {**COSINE, "schedule": schedule, "warmup_steps": warmup}
        assert rates(total, **settings) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_first_the_warmed_up_and_the_last_rate_are_as_documented(schedule):
    found = rates(20, **{**COSINE, "schedule": schedule}, warmup_steps=4)
    assert found[0] == pytest.approx(3 / 4)
    assert found[3] == found[4] == 3  # all of it in the last step of the warm-up
    assert found[19] == pytest.approx(3 if schedule == "constant" else 1)


def test_a_single_step_behind_the_warm_up_has_the_first_rate():
    assert rates(3, **COSINE, warmup_steps=2) == pytest.approx([1.5, 3, 3])


@pytest.mark.parametrize(
    ("given", "total", "steps"),
    [
        (0, 10, 0),
        (0.0, 10, 0),
        (0.1, 30, 3),
        (0.07, 100, 7),
        (0.03, 10, 1),
        (0.5, 1, 1),
        (0.99, 3, 3),
    ],
)
def test_a_warm_up_below_1_is_a_share_of_all_steps_rounded_up(given, total, steps):
    settings = optim(warmup_steps=given)
    assert warmup_steps_of(total, settings) == steps
    as_steps = rates(total, **COSINE, warmup_steps=steps)
    assert rates(total, **COSINE, warmup_steps=given) == as_steps


@pytest.mark.parametrize("given", [0, 1, 1.0, 5, 0.25, 0.3, 0.9])
def test_the_warm_up_is_as_long_as_in_transformers(given):
    arguments = pytest.importorskip("transformers").TrainingArguments
    theirs = types.SimpleNamespace(warmup_steps=given)
    for total in (1, 7, 64):
        expected = arguments.get_warmup_steps(theirs, total)
        assert warmup_steps_of(total, optim(warmup_steps=given)) == expected


@pytest.mark.parametrize("given", [1.5, 10.25, math.inf, math.nan, -1, -0.1])
def test_a_warm_up_that_is_no_number_of_steps_is_refused(given):
    with pytest.raises(ConfigError, match="warmup_steps"):
        OptimConfig(warmup_steps=given)


def test_the_optimiser_is_given_the_steps_learning_rate(tmp_path):
    settings = optim(schedule="linear", learning_rate=0.3, final_learning_rate=0.1)
    fit(Recurrent(), tmp_path, supervised(), settings, num_train_steps=3)
    assert logged(tmp_path, "learning_rate") == pytest.approx([0.3, 0.2, 0.1])


@pytest.mark.parametrize("micro", [1, None])
def test_rates_are_counted_in_optimiser_steps_not_in_micro_batches(micro, tmp_path):
    taken = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            taken.append(self.param_groups[0]["lr"])

    settings = optim(
        optimizer=lambda parameters: Noting(parameters, lr=0.0),
        schedule="linear",
        learning_rate=0.4,
        final_learning_rate=0.1,
        warmup_steps=0.25,
        epochs=2,
        batch_size=3,
        micro_batch_size=micro,
    )
    assert fit(Recurrent(), tmp_path, supervised(), settings) == 4  # 6 rows, twice
    assert taken == pytest.approx([0.4, 0.4, 0.25, 0.1])
    assert logged(tmp_path, "learning_rate") == pytest.approx(taken)


def test_each_stage_has_its_own_learning_rate_and_dropout(tmp_path):
    module, seen = Recurrent(TEXT_VOCAB, dropout=0.3), []
    module.dropout.register_forward_hook(
        lambda part, args, out: seen.append(part.p) if part.training else None
    )
    stages = [
        sft(name="one", dropout=0.0, optim=QUICK.model_copy(update={"learning_rate": 1e-2})),
        sft(name="two", dropout=0.5, optim=QUICK.model_copy(update={"learning_rate": 1e-3})),
        sft(name="own", dropout=0.2, optim=OptimConfig(batch_size=4, schedule="constant")),
    ]
    run = trainer_of(tmp_path, stages, module)(rehearse=False)
    first = [run.metrics(name)[-1]["learning_rate"] for name in ("one", "two", "own")]
    assert first == pytest.approx([1e-3, 1e-4, 5.5e-6])  # the last step's; the stage's own default
    assert [p for i, p in enumerate(seen) if i == 0 or seen[i - 1] != p] == [0.0, 0.5, 0.2]
    assert module.dropout.p == 0.3


@pytest.mark.parametrize("micro", [1, 4, None])
def test_what_is_clipped_is_the_gradient_of_the_whole_step(micro, tmp_path):
    module, start = Recurrent().double(), Recurrent().double()
    gradients = torch.autograd.grad(sft_by_hand(start, ROWS), list(start.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    fit(module, tmp_path, supervised(), optim(max_grad_norm=norm / 4, micro_batch_size=micro))
    for new, old, gradient in zip(module.parameters(), start.parameters(), gradients, strict=True):
        assert torch.allclose(old - new, gradient / 4, rtol=1e-4, atol=1e-9)


# updates that are rounded away


def parameter(values, dtype=torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_an_update_below_half_the_distance_to_the_next_number_is_lost():
    """Below 1.0 the next bfloat16 is 1 - 1/256."""
    assert updates_vanish([parameter([1.0])], 0.49 / 256) == 1.0
    assert updates_vanish([parameter([1.0])], 0.51 / 256) == 0.0
    assert updates_vanish([parameter([-1.0])], 0.99 / 256) == 1.0  # above it 1 + 2/256
    assert updates_vanish([parameter([1.0, 0.01, 0.0, -0.01])], 1e-4) == 0.25
    assert updates_vanish([parameter([1.0, 0.01]), parameter([2.0] * 6)], 1e-4) == 7 / 8
    assert updates_vanish([parameter([1.0, 0.01], torch.float32)], 1e-4) == 0.0
    assert updates_vanish([parameter([1.0], torch.float32)], 1e-8) == 1.0
    assert updates_vanish([parameter([1.0], torch.float64)], 1e-8) == 0.0
    assert updates_vanish([], 1.0) == 0.0


def test_updates_below_a_512th_of_a_bfloat16_weight_are_lost_and_above_a_256th_are_not():
    weights = torch.logspace(-9, 2, 3000).bfloat16()
    for rate in (1e-6, 3e-5, 1e-3):
        small, large = weights[weights * (1 / 256) < rate], weights[weights * (1 / 512) > rate]
        assert len(small) and len(large)
        for sign in (-1, 1):
            assert updates_vanish([nn.Parameter(sign * small)], rate) == 0.0
            assert updates_vanish([nn.Parameter(sign * large)], rate) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rate", [1e-8, 1e-6, 1e-4, 1e-3])
def test_the_share_is_that_of_a_step_of_adamw(rate, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.05 * torch.randn(20_000, generator=generator)).to(dtype))
    before, share = weight.detach().clone(), updates_vanish([weight], rate)
    (adamw,) = make_optimizers(nn.ParameterList([weight]), named("adamw"), VOCAB)
    adamw.param_groups[0]["lr"] = rate
    weight.grad = torch.ones_like(weight)
    adamw.step()
    assert (weight == before).double().mean().item() == pytest.approx(share, abs=2e-3)


def test_of_a_large_weight_numbers_all_over_it_are_looked_at():
    count = 3 * SAMPLED_NUMBERS
    values = torch.full((count,), 1.0)
    values[count // 4 :] = 1e-3
    large, small = nn.Parameter(values.bfloat16()), parameter([1e-3] * 7)
    assert updates_vanish([large, small], 1e-5) == pytest.approx(0.25, abs=1e-3)


def test_frozen_weights_do_not_count():
    frozen = parameter([1.0]).requires_grad_(False)
    assert updates_vanish([frozen, parameter([1e-3])], 1e-5) == 0.0
    assert updates_vanish([frozen], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("dtype", "name", "rate", "said"),
    [
        (torch.bfloat16, "adamw", 1e-6, True),
        (torch.bfloat16, "muon", 1e-6, True),
        (torch.bfloat16, "adamw_8bit", 1e-6, True),
        (torch.bfloat16, "adamw", 1e-2, False),
        (torch.float32, "adamw", 1e-6, False),
        (torch.bfloat16, "sgd", 1e-6, False),  # its step is the gradient's, which nobody knows
        (torch.bfloat16, sgd, 1e-6, False),
    ],
)
def test_a_stage_that_would_learn_nothing_is_warned_of(dtype, name, rate, said, caplog):
    settings = optim(optimizer=name, learning_rate=rate)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        warn_of_lost_updates(Recurrent().to(dtype), settings, "02-dpo")
    found = [r.getMessage() for r in caplog.records]
    assert len(found) == said
    if said:
        assert found[0].startswith("02-dpo: a step of learning rate 1e-06 does not change ")
        assert "(bfloat16)" in found[0]


def test_the_loop_says_it_once_when_it_begins(tmp_path, caplog):
    settings = optim(optimizer="adamw", learning_rate=1e-6, epochs=3)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        fit(Recurrent().bfloat16(), tmp_path, supervised(), settings)
    assert len([r for r in caplog.records if "does not change" in r.getMessage()]) == 1


def test_weights_of_which_most_do_not_move_learn_nothing(tmp_path):
    """The warning is right: a model of bfloat16 at 1e-6 stays as it is where one of float32 moves."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        module = Recurrent().to(dtype)
        before = [p.detach().clone() for p in module.parameters()]
        settings = optim(optimizer="adamw", learning_rate=1e-6, epochs=5)
        fit(module, tmp_path / str(dtype), supervised(), settings)
        pairs = list(zip(module.parameters(), before, strict=True))
        still = sum((new == old).sum().item() for new, old in pairs)
        moved[dtype] = 1 - still / sum(old.numel() for _, old in pairs)
    assert moved[torch.bfloat16] < 0.05 < 0.5 < moved[torch.float32]
