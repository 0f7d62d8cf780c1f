"""Matrices cast once for mixed precision: the numbers of `torch.autocast`, for less work."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
import peft

from self_rewarding_lm import DPOConfig, EMAReference, OptimConfig, RewardConfig
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.score_trie import ScoreTrie
from self_rewarding_lm.models import fused, narrow
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.fused import cast_once
from self_rewarding_lm.models.loading import with_adapter
from self_rewarding_lm.models.narrow import SURVIVES, NarrowMatrices
from self_rewarding_lm.models.policy import Policy, dropout_set, response_logprobs
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.training.reference import LiveReference
from tests.support.hf_models import KINDS, tiny
from tests.support.models import TEXT_VOCAB, Recurrent, text_tokens, transformer
from tests.test_trainer import JUDGE, self_reward, trainer_of

BF16, FP16 = torch.bfloat16, torch.float16
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SMALL, LARGE = 0.001, 0.3
"""What an adapter adds, as a share of the weights."""


def adapted(share: float, kind: str = "llama", **options) -> nn.Module:
    """A model with a LoRA that adds this share of each matrix's norm to it."""
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    module = with_adapter(tiny(kind), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if hasattr(part, "lora_B"):
            up = part.lora_B["default"].weight
            up.data.normal_(generator=generator)
            up.data *= share * part.base_layer.weight.norm() / delta_of(part).norm()
    return module


def delta_of(part) -> torch.Tensor:
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    return part.scaling["default"] * b.detach() @ a.detach()


def layers_of(module) -> list:
    return [part for part in module.modules() if hasattr(part, "lora_B")]


@torch.no_grad()
def logits_of(module, dtype=BF16, copies: NarrowMatrices | None = None) -> torch.Tensor:
    with torch.autocast("cpu", dtype), nullcontext() if copies is None else copies.used():
        output = module(IDS)
    return getattr(output, "logits", output)


class WithExactPart(nn.Module):
    """A part of it computes in float32 whatever is around."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate, self.head = nn.Embedding(17, 8), nn.Linear(8, 8), nn.Linear(8, 17)

    def forward(self, ids):
        hidden = self.embed(ids)
        with torch.autocast("cpu", enabled=False):
            gates = self.gate(hidden.float()) * self.gate.weight.norm()
        return self.head(hidden * gates)


MODELS = {
    "llama": lambda: tiny("llama"),
    "tied": lambda: tiny("llama", tie_word_embeddings=True),
    "gemma3": lambda: tiny("gemma3"),
    "gpt2": lambda: tiny("gpt2"),
    "x-transformers": transformer,
    "recurrent": Recurrent,
    "exact part": WithExactPart,
    "adapter": lambda: adapted(SMALL),
    "new adapter": lambda: adapted(0.0),
    "adapter on gpt2": lambda: adapted(SMALL, "gpt2", fan_in_fan_out=True),
    "adapter with dropout": lambda: adapted(SMALL, lora_dropout=0.5),
    "adapter on the head": lambda: adapted(SMALL, target_modules=["lm_head", "q_proj"]),
}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_autocast_and_all_is_as_before_afterwards(name, dtype):
    module = MODELS[name]().eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    tensors = {key: id(value) for key, value in module.named_parameters()}
    wanted = logits_of(module, dtype)
    copies = NarrowMatrices(module)
    assert torch.equal(logits_of(module, dtype, copies), wanted)
    assert copies._copies
    assert {key: id(value) for key, value in module.named_parameters()} == tensors
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in module.modules())
    assert torch.equal(logits_of(module, dtype), wanted)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_adapters_give_the_logits_of_autocast_but_for_rounding(options):
    module = with_adapter(tiny("gpt2"), peft.LoraConfig(r=4, fan_in_fan_out=True, **options))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    module.eval()
    exact, slow = module(IDS).logits, logits_of(module)
    found = logits_of(module, BF16, NarrowMatrices(module))
    assert (found - exact).norm() < 1.5 * (slow - exact).norm()
    assert not any(part.merged for part in layers_of(module))


# small and large adapters


def told(module, caplog) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "self_rewarding_lm"):
        logits_of(module, BF16, NarrowMatrices(module))
    return caplog.text


def test_a_small_adapter_stays_apart_as_a_merge_would_lose_it(caplog):
    module = adapted(SMALL)
    assert "the adapter is kept apart from 14 layers (0% of it would survive" in told(
        module, caplog
    )
    same = [
        (part.base_layer.weight.to(BF16) == (part.base_layer.weight + delta_of(part)).to(BF16))
        for part in layers_of(module)
    ]
    assert 0.6 < torch.cat([s.flatten() for s in same]).float().mean() < 0.95  # most stay the same
    with module.disable_adapter():
        alone = logits_of(module)
    assert not torch.equal(logits_of(module, BF16, NarrowMatrices(module)), alone)


@pytest.mark.parametrize("share", [0.02, 0.04, 0.08, LARGE])
def test_an_adapter_is_merged_where_all_but_a_twentieth_of_it_survives(share, caplog):
    module = adapted(share)
    words, merged = told(module, caplog), 0
    for part in layers_of(module):
        wide, delta = part.base_layer.weight.detach().double(), delta_of(part).double()
        kept = (wide + delta).to(BF16).double() - wide.to(BF16).double()
        merged += bool(1 - (kept - delta).norm() / delta.norm() >= SURVIVES)
    assert (f"merged into {merged} layers" in words) == (merged > 0)
    assert f"apart from {14 - merged} layers" in words if merged < 14 else "apart" not in words
    exact, slow = module(IDS).logits, logits_of(module)
    found = logits_of(module, BF16, NarrowMatrices(module))
    assert (found - exact).norm() < 1.5 * (slow - exact).norm()


def test_the_copies_follow_the_weights():
    module = adapted(SMALL)
    copies = NarrowMatrices(module)
    found = [logits_of(module, BF16, copies)]

    def train():
        loss = module(IDS, labels=IDS).loss
        loss.backward()
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()

    def load():
        module.load_state_dict({k: 1.1 * v for k, v in module.state_dict().items()})

    def replace():
        part = layers_of(module)[0].base_layer
        part.weight = nn.Parameter(2 * part.weight.detach(), False)

    for change in (train, load, replace):
        change()
        found.append(logits_of(module, BF16, copies))
        assert torch.equal(found[-1], logits_of(module))
        assert not torch.equal(found[-1], found[-2])
    with torch.no_grad():
        for part in layers_of(module):
            part.lora_B["default"].weight.mul_(LARGE / SMALL)
    assert torch.equal(
        logits_of(module, BF16, copies), logits_of(module, BF16, NarrowMatrices(module))
    )
    assert all(copy.is_merged for copy in copies._copies.values() if copy.added)


# the engine


class Casts(TorchDispatchMode):
    """Counts how often each of some matrices is cast to bfloat16."""

    def __init__(self, matrices) -> None:
        super().__init__()
        self.counts = {matrix.data_ptr(): 0 for matrix in matrices}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == BF16:
            place = args[0].data_ptr()
            self.counts[place] = self.counts.get(place, 0) + 1
        return out


def answers(module, engine=None):
    requests = [Request((3, 1, 4), key, 8) for key in range(4)]
    engine = engine or LocalEngine(max_rows=3)
    with torch.autocast("cpu", BF16):
        found = dict(engine.generate(adapt(module), requests, Decoding()))
    return [found[i].ids for i in range(4)]


def bases_of(module):
    return [part.base_layer.weight for part in layers_of(module)]


def test_the_frozen_base_is_cast_once_and_not_at_every_step():
    module = adapted(SMALL)
    model, engine = adapt(module), LocalEngine(max_rows=3)
    requests = [Request((3, 1, 4), key, 8) for key in range(4)]
    serving = engine.serving(lambda folder: None, text_tokens())
    with torch.autocast("cpu", BF16), Casts(bases_of(module)) as casts, serving:
        for _ in range(3):
            list(engine.generate(model, requests, Decoding()))
    measured = 2  # once for the copy, and a few columns of it
    assert all(0 < casts.counts[base.data_ptr()] <= measured for base in bases_of(module))


@pytest.mark.parametrize("share", [0.0, SMALL])
def test_the_engine_gives_what_it_gave_before(share, monkeypatch):
    module = adapted(share)
    found = answers(module)
    monkeypatch.setattr(NarrowMatrices, "_dtype", lambda self: None)
    assert found == answers(module)


def test_copies_are_given_back_at_the_end_of_serving_and_of_a_call_outside():
    module, engine = adapted(SMALL), LocalEngine()
    answers(module, engine)
    assert not engine._copies
    with engine.serving(lambda folder: None, text_tokens()):
        answers(module, engine)
        with engine.serving(lambda folder: None, text_tokens()):
            answers(module, engine)
        assert list(engine._copies) == [module]
    assert not engine._copies


def test_all_is_as_before_between_results_after_an_early_end_and_after_an_error():
    module = adapted(LARGE)
    tensors = {name: id(p) for name, p in module.named_parameters()}
    model, requests = adapt(module), [Request((3, 1, 4), key, key + 1) for key in range(4)]

    def is_as_before():
        assert {name: id(p) for name, p in module.named_parameters()} == tensors
        assert not any(part.merged for part in layers_of(module))
        assert not any(part._forward_hooks for part in module.modules())

    engine = LocalEngine()
    with torch.autocast("cpu", BF16):
        results = engine.generate(model, requests, Decoding())
        next(results)
    is_as_before()
    results.close()
    assert not engine._copies

    def fail(part, args):
        raise ZeroDivisionError

    handle = layers_of(module)[3].lora_A["default"].register_forward_pre_hook(fail)
    norm = module.get_base_model().model.norm.register_forward_pre_hook(fail)
    with torch.autocast("cpu", BF16), pytest.raises(ZeroDivisionError):
        list(engine.generate(model, requests, Decoding()))
    handle.remove(), norm.remove()
    is_as_before()


def test_without_autocast_nothing_is_copied():
    module, copies = adapted(SMALL), None
    copies = NarrowMatrices(module)
    with torch.no_grad():
        wanted = module(IDS).logits
        with copies.used():
            assert torch.equal(module(IDS).logits, wanted)
    assert not copies._copies


def test_without_room_in_memory_the_weights_are_cast_as_autocast_does(monkeypatch):
    module = adapted(SMALL)
    monkeypatch.setattr(narrow, "free_bytes", lambda device: 1000)
    copies = NarrowMatrices(module)
    assert torch.equal(logits_of(module, BF16, copies), logits_of(module))
    assert not copies._copies


def test_probabilities_of_texts_are_those_of_autocast(monkeypatch):
    module, trie = adapted(SMALL), ScoreTrie((), ((1.0, (4, 5)), (2.0, (4, 6)), (3.0, (7,))))
    rows = [(1, 2, 3), (4, 5, 6, 7)]

    def chances():
        with torch.autocast("cpu", BF16):
            return dict(LocalEngine().chances(adapt(module), rows, trie, frozenset()))

    found = chances()
    monkeypatch.setattr(NarrowMatrices, "_dtype", lambda self: None)
    assert found == chances()


# whole runs


class StopError(Exception):
    pass


def records_of(folder, stop_after: int | None = None):
    """The records of two rounds of an adapter in mixed precision, stopped once if asked for."""
    asked = []

    def score(text: str) -> float:
        asked.append(text)
        if len(asked) == stop_after:
            raise StopError
        return float(len(set(text)))

    def run():
        optim = OptimConfig(batch_size=4, learning_rate=1e-4)
        reward = RewardConfig(prompt_template=JUDGE.prompt_template, parse_reward=score)
        return trainer_of(
            folder,
            [self_reward(optim=optim), self_reward(optim=optim)],
            tiny("llama", vocab=TEXT_VOCAB),
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            self_reward_prompt_config=reward,
            accelerate_kwargs={"cpu": True, "mixed_precision": "bf16"},
            report=False,
        )(rehearse=False)

    if stop_after is not None:
        with pytest.raises(JudgeError, match="StopError"):
            run()
    done = run()
    return [(done.candidates(i), done.judgements(i), done.pairs(i)) for i in range(2)]


def test_a_run_gives_the_same_stopped_while_it_samples_and_without_copies(tmp_path, monkeypatch):
    records = records_of(tmp_path / "whole")
    assert all(len(candidates) >= 8 for candidates, _, _ in records)
    assert records_of(tmp_path / "stopped", stop_after=5) == records
    dtype = NarrowMatrices._dtype  # training keeps its copies, for it rounds otherwise with them
    monkeypatch.setattr(NarrowMatrices, "_dtype", lambda self: dtype(self) if self.trains else None)
    assert records_of(tmp_path / "cast each time") == records


# training


def gradients_of(module, policy):
    """Log-probs of two forwards with gradients, and the gradients."""
    with torch.autocast("cpu", BF16):
        found = [policy(IDS), policy(IDS.flip(0))]
    trained = [p for p in module.parameters() if p.requires_grad]
    return [*found, *torch.autograd.grad(torch.stack(found).sum(), trained)]


def test_training_casts_each_frozen_matrix_once_and_gives_what_autocast_gives():
    module = adapted(LARGE, "gpt2", fan_in_fan_out=True, lora_dropout=0.0).train()
    policy = Policy(adapt(module))
    with dropout_set(policy, 0.0) as train:
        train()
        wanted = gradients_of(module, policy)
        runtime = Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)
        with Casts(bases_of(module)) as casts, cast_once(policy, runtime):
            found = gradients_of(module, policy)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert {casts.counts[base.data_ptr()] for base in bases_of(module)} == {1}
    assert not any(part.merged for part in layers_of(module))
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in module.modules())


def test_weights_that_a_callback_puts_in_while_a_model_trains_are_used():
    module = adapted(SMALL)
    policy, base = Policy(adapt(module)), bases_of(module)[0]
    runtime = Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)
    with cast_once(policy, runtime), torch.no_grad(), torch.autocast("cpu", BF16):
        before = policy(IDS)
        base.mul_(1.5)
        written = policy(IDS)
        base.data = base.data / 1.5
        replaced = policy(IDS)
    assert not torch.equal(before, written)
    assert torch.allclose(before, replaced, atol=0.1) and not torch.equal(written, replaced)


def test_matrices_that_are_trained_have_no_copy():
    module = tiny("llama")
    module.model.layers[0].requires_grad_(False)
    copies = NarrowMatrices(module, trains=True)
    with torch.autocast("cpu", BF16), copies.used():
        frozen = sum(p.numel() for p in module.model.layers[0].parameters() if p.ndim == 2)
        assert copies.nbytes == 2 * frozen


# the head, by which a policy multiplies without its layer


def vectors_trained(module):
    """All matrices are frozen, the embeddings too."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim < 2)
    return module


def with_bias(module):
    """A head with a bias, which is trained."""
    old = module.lm_head
    module.lm_head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        module.lm_head.weight.copy_(old.weight)
        module.lm_head.bias.normal_(generator=torch.Generator().manual_seed(3))
    return module


HEADS = {
    **{kind: (lambda kind=kind: tiny(kind)) for kind in KINDS},
    **{
        f"{kind}, {'tied' if tied else 'untied'}": (
            lambda kind=kind, tied=tied: tiny(kind, tie_word_embeddings=tied)
        )
        for kind, tied in [("llama", True), ("qwen3", True), ("gemma3", False)]
    },
    "softcap": lambda: tiny("gemma3", final_logit_softcapping=3.0),
    "bias": lambda: with_bias(tiny("llama")),
    "x-transformers": transformer,
}


def head_of(module) -> nn.Module:
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    return base.lm_head if hasattr(base, "lm_head") else base.to_logits


def bf16() -> Runtime:
    return Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)


def equal(found, wanted) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_frozen_matrix_is_cast_once_and_all_is_what_autocast_gives(name):
    module = vectors_trained(HEADS[name]())
    policy, matrix = Policy(adapt(module)), head_of(module).weight
    wanted = gradients_of(module, policy)
    with Casts([matrix]) as casts, cast_once(policy, bf16()):
        found = gradients_of(module, policy)
    assert equal(found, wanted)
    assert casts.counts[matrix.data_ptr()] == 1
    with Casts([matrix]) as casts:
        assert equal(gradients_of(module, policy), wanted)
    assert casts.counts[matrix.data_ptr()] == 2  # no copy is left


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_beside_adapters_the_head_is_cast_once_for_references_and_training(
    kind, is_fused, monkeypatch
):
    if not is_fused:
        monkeypatch.setattr(fused, "_only_adapter", lambda layer: None)
    module = adapted(LARGE, kind, fan_in_fan_out=kind == "gpt2")
    policy, matrix = Policy(adapt(module)), head_of(module).weight

    def outcome() -> list[torch.Tensor]:
        sequences = [((3, 1, 4), (1, 5)), ((2, 7), (1, 8, 2, 8))]
        with cast_once(policy, bf16()), torch.autocast("cpu", BF16):
            of_reference = [response_logprobs(policy, [one])[0] for one in sequences]
            return [*map(torch.tensor, of_reference), *gradients_of(module, policy)]

    with Casts([matrix]) as casts:
        found = outcome()
    assert casts.counts[matrix.data_ptr()] == 1
    monkeypatch.setattr(Policy, "head_narrowed", lambda self, narrow: nullcontext())
    with Casts([matrix]) as casts:
        assert equal(found, outcome())
    assert casts.counts[matrix.data_ptr()] == 5


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_a_head_that_peft_wraps_gives_what_autocast_gives(options):
    targets = ["q_proj"] if "modules_to_save" in options else ["q_proj", "lm_head"]
    module = adapted(LARGE, target_modules=targets, **options)
    policy = Policy(adapt(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_only_adapter", lambda layer: None)  # which rounds otherwise
        wanted = gradients_of(module, policy)
        with cast_once(policy, bf16()):
            assert equal(gradients_of(module, policy), wanted)


def written(module, name, layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def given_other_numbers(module, name, layer):
    layer.weight.data = 1.5 * layer.weight.data


def given_another_parameter(module, name, layer):
    layer.weight = nn.Parameter(1.5 * layer.weight.detach(), False)


def replaced(module, name, layer):
    other = nn.Linear(layer.in_features, layer.out_features, bias=False)
    other.weight = nn.Parameter(1.5 * layer.weight.detach(), False)
    module.set_submodule(name, other)


def trained(module, name, layer):
    layer.weight.requires_grad_(True)


CHANGES = [written, given_other_numbers, given_another_parameter, replaced, trained]


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_a_callback_changes_while_a_model_trains_is_as_it_left_it(change, name):
    module = vectors_trained(tiny("llama"))
    policy = Policy(adapt(module))
    with cast_once(policy, bf16()):
        before = gradients_of(module, policy)
        change(module, name, module.get_submodule(name))
        changed = module.get_submodule(name).weight
        found = gradients_of(module, policy)
        assert module.get_submodule(name).weight is changed
    assert equal(found, gradients_of(module, policy))
    assert change is trained or not torch.equal(found[0], before[0])
    assert len(found) == len(before) + (change is trained)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_reference_that_moves_is_asked_with_its_own_head(is_trained):
    module = vectors_trained(tiny("llama", tie_word_embeddings=True))
    module.lm_head.requires_grad_(is_trained)
    policy = Policy(adapt(module))
    live = LiveReference(EMAReference())
    live.begin(policy)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)

    def outcome() -> list[torch.Tensor]:
        found = gradients_of(module, policy)
        with live.in_place(policy), torch.autocast("cpu", BF16):
            reference = policy(IDS)
        return [reference, *found, *gradients_of(module, policy)]

    wanted = outcome()
    with cast_once(policy, bf16()):
        assert equal(outcome(), wanted)
    assert not torch.equal(wanted[0], wanted[1])


def test_where_weights_are_whole_within_a_forward_alone_each_forward_casts_the_head():
    runtime = bf16()
    runtime.shards = True
    module = vectors_trained(tiny("llama"))
    policy, matrix = Policy(adapt(module)), module.lm_head.weight
    wanted = gradients_of(module, policy)
    with Casts([matrix]) as casts, cast_once(policy, runtime):
        assert equal(gradients_of(module, policy), wanted)
    assert casts.counts[matrix.data_ptr()] == 2


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_stage_casts_the_head_once_for_its_reference_and_once_for_its_training(tmp_path, epochs):
    module = tiny("llama", vocab=TEXT_VOCAB)
    rows = [{"prompt": f"say {i}", "chosen": f"i say {i}", "rejected": "no"} for i in range(4)]
    stage = DPOConfig(train_dataset=rows, optim=OptimConfig(batch_size=2, epochs=epochs))
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    mixed = {"cpu": True, "mixed_precision": "bf16"}
    trainer = trainer_of(tmp_path, [stage], module, peft_config=lora, accelerate_kwargs=mixed)
    with Casts([module.lm_head.weight]) as casts:
        trainer(rehearse=False)
    assert casts.counts[module.lm_head.weight.data_ptr()] == 2
