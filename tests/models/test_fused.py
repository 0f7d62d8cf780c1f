"""Linear layers with a LoRA in one function against peft's own forward and against float64."""

from copy import deepcopy

import pytest
import torch

pytest.importorskip("peft")
import peft

from self_rewarding_lm.models import fused
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.fused import cast_once
from self_rewarding_lm.models.loading import with_adapter
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.runtime import Runtime
from tests.support.hf_models import tiny

BF16 = torch.bfloat16
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def adapted(kind: str = "llama", **options):
    """A model whose adapters are far from zero, without dropout unless it is asked for."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    module = with_adapter(tiny(kind), peft.LoraConfig(**{**config, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return module


def runtime(precision: str = "bf16") -> Runtime:
    return Runtime({"cpu": True, "mixed_precision": precision}, quiet=True)


def outcome(module, *, narrow: bool = True) -> list[torch.Tensor]:
    """Log-probs and the gradients of what is trained."""
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.autocast("cpu", BF16, enabled=narrow):
        logprobs = Policy(adapt(module))(IDS)
    return [logprobs, *torch.autograd.grad(logprobs.sum(), trained)]


def errors(layer, x, slopes, dtype=torch.float32) -> list[float]:
    """Of a layer's output and gradients in mixed precision, as shares of float64's norms."""

    def computed(layer, x, narrow: bool) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=narrow):
            out = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out, [x, *trained], slopes.to(out.dtype))
        return [t.detach() for t in (out, *gradients)]

    exact = computed(deepcopy(layer).double(), x.double(), narrow=False)
    found = computed(layer, x.to(dtype), narrow=True)
    return [
        float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
    ]


@pytest.fixture
def calls(monkeypatch):
    """How often the function stood in for a layer's own forward."""
    counted, apply = [], fused._Adapted.apply
    monkeypatch.setattr(fused._Adapted, "apply", lambda *args: (counted.append(1), apply(*args))[1])
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_as_near_to_float64_as_that_of_peft(dtype, bias, calls):
    generator = torch.Generator().manual_seed(2)
    module = torch.nn.Sequential(torch.nn.Linear(96, 80, bias=bias))
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["0"])
    layer = peft.get_peft_model(module, config).base_model.model[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1, generator=generator)
    x, slopes = (torch.randn(3, 50, n, generator=generator).bfloat16() for n in (96, 80))
    plain = errors(layer, x, slopes, dtype)
    with cast_once(layer, runtime()):
        found = errors(layer, x, slopes, dtype)
    assert len(calls) == 1
    for one, other in zip(found, plain, strict=True):
        assert one < 1.1 * other


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"bias": "all"}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_all_layers_of_a_model_are_fused_and_all_is_as_before_afterwards(kind, options, calls):
    module = adapted(kind, **options).eval()
    plain = outcome(module)
    assert not calls
    with cast_once(module, runtime()):
        found = outcome(module)
    assert len(calls) == sum(hasattr(part, "lora_A") for part in module.modules())
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() < 0.3 * other.norm()
    assert all(torch.equal(one, other) for one, other in zip(outcome(module), plain, strict=True))
    assert not any("forward" in part.__dict__ for part in module.modules())


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"use_dora": True}, lambda module: module),
        ({"lora_bias": True}, lambda module: module),
        ({"lora_dropout": 0.5}, lambda module: module.train()),
        ({}, lambda module: module.merge_adapter()),
        ({}, lambda module: module.base_model.disable_adapter_layers()),
    ],
    ids=["dora", "bias", "dropout", "merged", "switched off"],
)
def test_what_is_more_than_one_plain_adapter_is_left_to_peft(options, change, calls):
    module = adapted(**options).eval()
    change(module)
    with cast_once(module, runtime()), torch.no_grad(), torch.autocast("cpu", BF16):
        Policy(adapt(module))(IDS)
    assert not calls


def test_without_mixed_precision_nothing_is_fused(calls):
    module = adapted().eval()
    wanted = outcome(module, narrow=False)
    with cast_once(module, runtime("no")):
        found = outcome(module, narrow=False)
    assert not calls
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_layers_that_read_one_tensor_keep_one_cast_of_it():
    module = adapted().eval()
    ids = torch.randint(10, (40, 12), generator=torch.Generator().manual_seed(0))

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(tensor):
            if tensor.untyped_storage().nbytes() > 8192:  # of tokens, not of weights
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        policy = Policy(adapt(module))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", BF16):
            policy(ids)
        return sum(storages.values())

    plain = kept()
    with cast_once(module, runtime()):
        assert kept() < 0.9 * plain


def test_a_copy_of_the_module_has_its_own_weights():
    module = adapted().eval()
    with cast_once(module, runtime()):
        other = deepcopy(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        with torch.autocast("cpu", BF16):
            both = module(IDS).logits, other(IDS).logits
    assert not torch.allclose(*both, atol=0.1)
