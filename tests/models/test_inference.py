"""Products in narrow types on machines without instructions for them, and the mode of forwards.

Weights and inputs are small whole numbers, so that the exact product is known and sums in float32
are exact in any order.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models import inference
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import (
    WORTH,
    WideProducts,
    inferring,
    is_slow,
    product_dtype,
    products_unused,
)
from self_rewarding_lm.models.interface import Plan
from tests.support.hf_models import tiny
from tests.support.models import Recurrent, last_logits

CPU = torch.device("cpu")
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one of a kind and with some instructions."""

    def become(kind: str, *instructions: str) -> None:
        known = {"architecture": kind, **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        inference._has_products.cache_clear()

    yield become
    monkeypatch.undo()
    inference._has_products.cache_clear()


@pytest.mark.parametrize(
    ("kind", "instructions", "changes", "told"),
    [
        ("x86_64", ("amx_bf16",), {}, True),
        ("x86_64", ("avx512_bf16",), {}, True),
        ("x86_64", ("avx2",), {}, False),
        ("aarch64", ("amx_bf16",), {}, False),  # such machines do not tell
        ("x86_64", ("amx_bf16",), {"mixed": True}, False),
        ("x86_64", ("amx_bf16",), {"kind": "cuda"}, False),
        ("x86_64", ("amx_bf16",), {"dtype": torch.bfloat16}, False),
        ("x86_64", ("amx_bf16",), {"dtype": torch.float64}, False),
        ("x86_64", ("amx_bf16",), {"numbers": WORTH - 1}, False),
    ],
)
def test_where_products_in_bfloat16_would_be_faster_and_are_not_used_it_is_told(
    machine, kind, instructions, changes, told
):
    machine(kind, *instructions)
    run = {"kind": "cpu", "dtype": torch.float32, "numbers": WORTH, "mixed": False, **changes}
    words = products_unused(**run)
    assert (words is not None) == told
    assert words is None or 'accelerate_kwargs={"mixed_precision": "bf16"}' in words


def whole_numbers(*shape: int, seed: int, most: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator)


class Products(TorchFunctionMode):
    """The types of the weights of all linear products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.dtypes.append(args[1].dtype)
            self.sizes.append(args[1].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "instructions", "slow"),
    [
        ("x86_64", (), NARROW),
        ("x86_64", ("avx2", "amx_int8"), NARROW),
        ("x86_64", ("avx512_bf16",), [torch.float16]),
        ("x86_64", ("amx_bf16",), [torch.float16]),
        ("x86_64", ("avx512_fp16",), [torch.bfloat16]),
        ("x86_64", ("avx512_bf16", "avx512_fp16"), []),
        ("aarch64", (), []),
    ],
)
def test_which_types_are_slow_where(machine, kind, instructions, slow):
    machine(kind, *instructions)
    every = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]
    assert [d for d in every if is_slow(d, CPU)] == slow
    assert not any(is_slow(d, torch.device("cuda")) for d in every)
    for dtype in every:
        wide = torch.float32 if dtype in slow else dtype
        assert product_dtype(torch.zeros(1, dtype=dtype)) == wide


def test_a_version_that_does_not_tell_is_taken_as_it_is(machine, monkeypatch):
    machine("x86_64")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not is_slow(torch.bfloat16, CPU)


@pytest.mark.parametrize("at_once", [1, 64 * 3, 64 * 10, 4_194_304])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_product_is_the_exact_one_rounded_once(
    machine, monkeypatch, dtype, with_bias, shape, at_once
):
    """64 columns of numbers up to 9 sum to at most 5184, which neither type holds exactly."""
    machine("x86_64")
    monkeypatch.setattr(inference, "WIDENED_AT_ONCE", at_once)
    x, weight = whole_numbers(*shape, seed=0), whole_numbers(10, 64, seed=1)
    bias = whole_numbers(10, seed=2, most=99) if with_bias else None
    exact = (x[..., None, :] * weight).sum(-1) + (0 if bias is None else bias)
    with Products() as seen, WideProducts():
        found = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    assert found.dtype == dtype and torch.equal(found, exact.to(dtype))
    assert set(seen.dtypes) == {torch.float32}
    assert sum(seen.sizes) == weight.numel() and max(seen.sizes) <= max(64, at_once)


def test_a_weight_of_one_output_may_have_one_axis(machine):
    machine("x86_64")
    x, weight = whole_numbers(3, 64, seed=0), whole_numbers(64, seed=1)
    with WideProducts():
        found = F.linear(x.bfloat16(), weight.bfloat16())
    assert torch.equal(found, (x * weight).sum(-1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_types_are_left_as_they_are(machine, dtype):
    machine("x86_64")
    layer = nn.Linear(7, 5).to(dtype)
    x = torch.randn(3, 7, dtype=dtype)
    with Products() as seen, WideProducts():
        found = layer(x)
    assert torch.equal(found, layer(x)) and seen.dtypes == [dtype]


def test_a_machine_with_the_instructions_uses_them(machine):
    machine("x86_64", "avx512_bf16")
    layer, x = nn.Linear(7, 5).bfloat16(), torch.randn(3, 7).bfloat16()
    with Products() as seen, WideProducts():
        found = layer(x)
    assert torch.equal(found, layer(x)) and seen.dtypes == [torch.bfloat16]


def test_outside_the_context_nothing_is_widened_also_after_an_error(machine):
    machine("x86_64")
    layer, x = nn.Linear(7, 5).bfloat16(), torch.randn(3, 7).bfloat16()
    with Products() as seen:
        layer(x)
        with pytest.raises(ZeroDivisionError), WideProducts():
            layer(x)
            raise ZeroDivisionError
        layer(x)
    assert seen.dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "instructions", "expected"),
    [
        (torch.bfloat16, (), torch.float32),
        (torch.bfloat16, ("avx512_bf16",), torch.bfloat16),
        (torch.float32, (), torch.float32),
        (torch.float64, (), torch.float64),
    ],
    ids=str,
)
def test_all_products_of_a_model_and_its_keys_are_in_the_type_of_the_machine(
    machine, dtype, instructions, expected
):
    machine("x86_64", *instructions)
    module = tiny("llama", dtype=dtype)
    model = adapt(module)
    assert model.caches
    with Products() as seen, inferring(module):
        session = model.session(Plan((), 3, max_new=2, max_rows=1))
        logits = session.prefill([[1, 2, 3]])
    # 2 layers of q, k, v, o, gate, up, down, and the head
    assert seen.dtypes == [expected] * 15
    assert logits.dtype == dtype
    kept = session.memory.layers
    assert {t.dtype for la in kept.values() for pair in (la.root, la.stems, la.own) for t in pair} == {expected}  # fmt: skip
    # 2 layers of keys and values of 2 heads of 8
    assert model.bytes_per_token == 2 * 2 * 2 * 8 * expected.itemsize
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("instructions", [(), ("avx512_bf16",)], ids=["widened", "as it is"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_greedy_tokens_in_bfloat16_are_the_likeliest_but_for_rounding(machine, kind, instructions):
    machine("x86_64", *instructions)
    module = tiny(kind, dtype=torch.bfloat16)
    prompts = [(3, 1, 4), (3, 1, 4, 1, 5, 9, 2, 6), (9,)]
    model = adapt(module)
    requests = [Request(ids, 0, 8) for ids in prompts]
    for i, done in LocalEngine(max_rows=2).generate(model, requests, Decoding(temperature=0.0)):
        for step, token in enumerate(done.ids):
            logits = last_logits(module, [*prompts[i], *done.ids[:step]]).float()
            assert logits[token] >= logits.max() - 0.05 * logits.abs().max()


def test_a_forward_is_without_gradients_and_in_evaluation_mode_and_all_is_as_before_afterwards():
    module = Recurrent().train()
    module.head.eval()
    before = [part.training for part in module.modules()]
    with pytest.raises(ZeroDivisionError), inferring(module):
        assert not torch.is_grad_enabled() and not any(p.training for p in module.modules())
        raise ZeroDivisionError
    assert torch.is_grad_enabled() and [part.training for part in module.modules()] == before
