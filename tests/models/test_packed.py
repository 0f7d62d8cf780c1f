"""Products by packed matrices are those of `F.linear`, and packed ones follow the weights.

Oracle: the same products by matrices that are not packed.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models import packed
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import is_slow
from self_rewarding_lm.models.packed import PACKS, PackedMatrices
from tests.models.test_sessions import own

CPU = torch.device("cpu")


@pytest.fixture(params=list(PACKS), ids=str)
def dtype(request) -> torch.dtype:
    if not packed._works(request.param) or is_slow(request.param, CPU):
        pytest.skip("this CPU or build packs no matrices of this type")
    return request.param


@pytest.fixture
def used(monkeypatch) -> Iterator[list[Tensor]]:
    """What is multiplied by packed matrices; modules of any size have them."""
    seen: list[Tensor] = []

    def watched(pack):
        def packing(layer, rows):
            product = pack(layer, rows)
            return lambda x: seen.append(x) or product(x)

        return packing

    monkeypatch.setattr(packed, "WORTH", 0)
    monkeypatch.setattr(packed, "PACKS", {dtype: watched(pack) for dtype, pack in PACKS.items()})
    yield seen


def two_layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 200, bias=False)).to(dtype)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("shape", [(1, 7), (7,), (2, 9)])
def test_products_are_those_of_the_matrices(dtype, rows, shape, used):
    module = two_layers(dtype)
    x = torch.randn(*shape, 96).to(dtype)
    copies = PackedMatrices(module)
    copies.prepare(rows)
    with torch.no_grad():
        expected = module(x)
        with copies.used():
            found = module(x)
    assert len(used) == (0 if dtype == torch.float32 and rows == 1 else 2)
    torch.testing.assert_close(found, expected)
    assert not any("forward" in vars(part) for part in module.modules())


def test_changed_weights_are_packed_anew_and_never_used_as_they_were(dtype, used):
    module, x = two_layers(dtype), torch.randn(4, 96).to(dtype)
    copies = PackedMatrices(module)
    copies.prepare(4)
    with torch.no_grad():
        module[0].weight.mul_(2)
        module[2].weight = nn.Parameter(torch.randn_like(module[2].weight))
        expected = module(x)
        with copies.used():
            torch.testing.assert_close(module(x), expected)
            assert not used
        copies.prepare(4)
        with copies.used():
            torch.testing.assert_close(module(x), expected)
            assert len(used) == 2


def test_gradients_and_mixed_precision_go_their_own_way(dtype, used):
    module, x = two_layers(dtype), torch.randn(4, 96).to(dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float16
    copies = PackedMatrices(module)
    copies.prepare(4)
    with copies.used():
        assert module(x).requires_grad
        with torch.no_grad(), torch.autocast("cpu", dtype=other):
            assert module(x).dtype == other
    assert not used


def test_nothing_is_packed_under_autocast_in_little_memory_or_for_a_small_module(
    dtype, used, monkeypatch
):
    module, x = two_layers(dtype), torch.randn(4, 96).to(dtype)

    def packs() -> bool:
        used.clear()
        copies = PackedMatrices(module)
        copies.prepare(4)
        with copies.used(), torch.no_grad():
            module(x)
        return bool(used)

    assert packs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not packs()
    with monkeypatch.context() as patch:
        patch.setattr(packed, "free_bytes", lambda _: 0)
        assert not packs()
    with monkeypatch.context() as patch:
        patch.setattr(packed, "WORTH", 96 * 64 + 64 * 200 + 1)
        assert not packs()


def test_a_build_that_packs_wrongly_or_not_at_all_is_not_used(monkeypatch):
    def missing(layer, rows):
        raise AttributeError("no such operation")

    wrong = {torch.bfloat16: lambda layer, rows: lambda x: x @ layer.weight.T + 1}
    wrong[torch.float32] = missing
    monkeypatch.setattr(packed, "PACKS", wrong)
    before = torch.get_rng_state()
    packed._works.cache_clear()
    try:
        assert not packed._works(torch.bfloat16) and not packed._works(torch.float32)
    finally:
        packed._works.cache_clear()
    assert torch.equal(before, torch.get_rng_state())


def test_the_engine_samples_the_same_and_gives_the_copies_back(used):
    if not packed._works(torch.float32):
        pytest.skip("this build packs no matrices in float32")
    model = adapt(own().float())
    requests = [Request((i, 2, 3), i, 6) for i in range(5)]

    def sampled() -> dict:
        return dict(engine.generate(model, requests, Decoding(temperature=1.0)))

    engine = LocalEngine(max_rows=3)
    found = sampled()
    assert used and not engine._copies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "WORTH", 10**9)
        used.clear()
        assert sampled() == found and not used
