"""Token log-probs against a double loop over a softmax in plain Python."""

import math

import pytest
import torch
from torch import tensor

from self_rewarding_lm.models import logprobs
from self_rewarding_lm.models.logprobs import (
    Head,
    kl_from_uniform,
    label_logprobs,
    label_measures,
    masked_sum,
    token_logprobs,
)

RAGGED = [[3, 0, 6, 2, 1, 5], [4, 4, 0], [2]]  # vocabulary of 7
LONGEST = max(map(len, RAGGED))


def random_logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def padded(rows, pad_id):
    return tensor([[*row, *[pad_id] * (LONGEST - len(row))] for row in rows])


def by_hand(logits, ids):
    """The log-probs of one unpadded row: a loop over positions, a softmax at each."""
    found = [0.0]
    for i in range(1, len(ids)):
        scores = [float(x) for x in logits[i - 1]]
        total = math.fsum(math.exp(score - max(scores)) for score in scores)
        found.append(scores[ids[i]] - max(scores) - math.log(total))
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
@pytest.mark.parametrize("pad_id", [0, 6])
def test_log_probs_of_ragged_rows_equal_a_double_loop_over_a_softmax(dtype, tolerance, pad_id):
    """Low-precision logits lose nothing beyond their own rounding: the softmax is in float32."""
    logits = random_logits(len(RAGGED), LONGEST, 7, dtype=dtype)
    found = token_logprobs(logits, padded(RAGGED, pad_id))
    for row, ids, values in zip(logits, RAGGED, found, strict=True):
        assert values[: len(ids)].tolist() == pytest.approx(by_hand(row, ids), abs=tolerance)


def test_results_are_float32_and_float64_only_for_float64_logits():
    ids = tensor([[1, 2]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert token_logprobs(torch.zeros(1, 2, 3, dtype=dtype), ids).dtype == torch.float32
    assert token_logprobs(torch.zeros(1, 2, 3).double(), ids).dtype == torch.float64


def test_uniform_logits_give_minus_log_of_the_vocabulary_size():
    found = token_logprobs(torch.full((1, 4, 5), 2.5, dtype=torch.float64), tensor([[4, 0, 2, 2]]))
    assert found[0].tolist() == pytest.approx([0.0] + [-math.log(5)] * 3, abs=1e-15)


def test_column_0_is_zero_because_nothing_predicts_it():
    found = token_logprobs(random_logits(3, LONGEST, 7), padded(RAGGED, 0))
    assert found[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_a_row_of_one_token_has_the_log_prob_zero_alone():
    assert token_logprobs(random_logits(1, 1, 7), tensor([[5]])).tolist() == [[0.0]]


def sure_of(ids, vocab=7):
    """Logits (1, t, v) with all mass on `ids`, column by column."""
    return 1e4 * torch.nn.functional.one_hot(tensor([ids]), vocab).float()


def test_a_model_sure_of_the_next_token_has_log_prob_zero():
    ids = [3, 0, 6, 2, 1]
    following = [*ids[1:], 5]
    assert token_logprobs(sure_of(following), tensor([ids])).tolist() == [[0.0] * 5]


def test_trap_1_a_model_sure_of_the_token_it_just_read_is_not_rewarded_for_it():
    ids = [3, 0, 6, 2, 1]
    assert token_logprobs(sure_of(ids), tensor([ids]))[0, 1:].tolist() == [-1e4] * 4


def test_a_token_has_no_influence_on_log_probs_left_of_it():
    """Column i depends on logits left of i and on ids up to i."""
    logits, ids = random_logits(1, 6, 7), tensor([RAGGED[0]])
    changed_logits, changed_ids = logits.clone(), ids.clone()
    changed_logits[:, 3:] += random_logits(1, 3, 7, seed=1)
    changed_ids[:, 4:] = 6
    found = token_logprobs(changed_logits, changed_ids)
    assert torch.equal(found[:, :4], token_logprobs(logits, ids)[:, :4])
    assert not torch.equal(found[:, 4:], token_logprobs(logits, ids)[:, 4:])


def test_trap_22_token_0_is_a_token_like_any_other():
    """Renaming the tokens of a vocabulary, 0 among them, changes no log-prob."""
    logits, ids = random_logits(1, 6, 7), tensor([RAGGED[0]])
    renamed = tensor([4, 0, 1, 2, 3, 6, 5])  # old name -> new name
    moved = torch.empty_like(logits)
    moved[..., renamed] = logits
    assert token_logprobs(moved, renamed[ids])[0].tolist() == pytest.approx(
        token_logprobs(logits, ids)[0].tolist(), abs=1e-12
    )


def test_ids_of_another_integer_type_give_the_same_log_probs():
    logits = random_logits(1, 6, 7)
    expected = token_logprobs(logits, tensor([RAGGED[0]]))
    assert torch.equal(token_logprobs(logits, tensor([RAGGED[0]], dtype=torch.int32)), expected)


def test_large_logits_do_not_overflow():
    found = token_logprobs(tensor([[[3e38, 0.0, -3e38]] * 3]), tensor([[0, 0, 1]]))
    assert found.tolist() == [[0.0, 0.0, pytest.approx(-3e38)]]


def test_the_gradient_is_one_hot_minus_softmax_at_the_column_before():
    logits = random_logits(1, 3, 4).requires_grad_()
    token_logprobs(logits, tensor([[1, 3, 0]]))[0, 2].backward()
    assert logits.grad is not None
    probabilities = [math.exp(x) for x in logits[0, 1].tolist()]
    share = [p / math.fsum(probabilities) for p in probabilities]
    expected = [1 - share[0], -share[1], -share[2], -share[3]]
    assert logits.grad[0, 1].tolist() == pytest.approx(expected, abs=1e-12)
    assert logits.grad[0, [0, 2]].abs().max().item() == 0.0


def test_masked_sum_adds_up_what_the_mask_shows():
    values = tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
    mask = tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert masked_sum(values, mask).tolist() == [5.0, 0.0, 448.0]


def test_masked_sum_ignores_even_infinities_and_nan_behind_the_mask():
    values = tensor([[1.0, -math.inf, 2.0], [math.nan, 4.0, math.inf]])
    mask = tensor([[True, False, True], [False, True, False]])
    assert masked_sum(values, mask).tolist() == [3.0, 4.0]


def head_of(weight, bias=None, *, scale=1.0, softcap=None, linear=True) -> Head:
    """linear: the fast path of a plain layer; else any function, whose pieces are checkpointed."""

    def project(hidden):
        return torch.nn.functional.linear(hidden, weight, bias)

    given = (weight, bias) if linear else (None, None)
    return Head(project, *given, scale=scale, softcap=softcap)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "all": {"bias": True, "scale": -1.7, "softcap": 2.0},
}


@pytest.mark.parametrize("columns", [1, 3, 7, 1024])
@pytest.mark.parametrize("at_once", [1, 7 * 3, 10_000], ids=["a row", "three rows", "all"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "any"])
@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_in_pieces_equal_those_of_whole_logits_in_value_and_gradient(
    kind, linear, at_once, columns, monkeypatch
):
    """float64; the truth is log_softmax of all logits, differentiated by autograd."""
    monkeypatch.setattr(logprobs, "LEAST_COLUMNS", columns)
    options = dict(HEADS[kind])
    hidden, weight = random_logits(8, 5, seed=1), random_logits(7, 5, seed=2)
    bias = random_logits(7, seed=3) if options.pop("bias", False) else None
    labels = tensor([3, 0, 6, 2, 1, 5, 4, 4])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    slopes = random_logits(8, seed=4)

    head = head_of(weight, bias, linear=linear, **options)
    found = label_logprobs(hidden, labels, head, vocab=7, logits_at_once=at_once)
    got = torch.autograd.grad(found @ slopes, leaves)

    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    truth = logits.log_softmax(-1)[torch.arange(8), labels]
    assert torch.allclose(found, truth, atol=1e-12, rtol=0)
    for one, other in zip(got, torch.autograd.grad(truth @ slopes, leaves), strict=True):
        assert torch.allclose(one, other, atol=1e-11, rtol=0)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the products of matrices that are made within it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "forward", "backward"), [((True, True), 2, 2), ((True, False), 2, 0)]
)
def test_logits_are_made_again_for_the_gradient_of_a_trained_weight_alone(
    trained, forward, backward
):
    """Two products make the log-probs and their gradient by the hidden states: the logits, and the
    weights by their probabilities. The weight's own gradient needs the logits and a product."""
    hidden, weight = (
        t.requires_grad_(is_trained)
        for t, is_trained in zip((random_logits(4, 5), random_logits(7, 5)), trained, strict=True)
    )
    with Products() as products:
        found = label_logprobs(hidden, tensor([1, 2, 3, 4]), head_of(weight), vocab=7)
        assert products.count == forward
        found.sum().backward()
        assert products.count == forward + backward
    assert hidden.grad is not None and (weight.grad is not None) == trained[1]


def test_a_part_of_the_vocabulary_that_no_row_can_have_changes_nothing(monkeypatch):
    """Its bias is -inf, as heads are padded; it is a tile of its own, once first and once last."""
    monkeypatch.setattr(logprobs, "LEAST_COLUMNS", 3)
    hidden, weight = random_logits(4, 5).requires_grad_(), random_logits(9, 5).requires_grad_()
    labels = tensor([3, 4, 5, 3])
    bias = torch.zeros(9, dtype=torch.float64)
    bias[[0, 1, 2, 6, 7, 8]] = -torch.inf
    found = label_logprobs(hidden, labels, head_of(weight, bias), vocab=9, logits_at_once=1)
    got = torch.autograd.grad(found.sum(), (hidden, weight))
    truth = (hidden @ weight.T)[:, 3:6].log_softmax(-1)[torch.arange(4), labels - 3]
    assert torch.allclose(found, truth, atol=1e-12, rtol=0)
    for one, other in zip(got, torch.autograd.grad(truth.sum(), (hidden, weight)), strict=True):
        assert torch.allclose(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "any"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_heads_log_probs_and_weight_gradients_lose_only_its_own_rounding(dtype, linear):
    """512 pieces of one row each: summed in the narrow type, half of the weight's gradient is lost."""
    hidden = torch.ones(512, 1, dtype=dtype)
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.long)
    found = label_logprobs(
        hidden, labels, head_of(weight, linear=linear), vocab=2, logits_at_once=2
    )
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([-math.log(2)] * 512, abs=1e-6)
    found.sum().backward()
    if linear:
        assert weight.grad.flatten().tolist() == [256.0, -256.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_a_token_that_is_nearly_certain_is_as_exact_as_others(dtype, monkeypatch):
    """Its probability is 0.98 or more; the truth is float64's, of the same rounded numbers."""
    monkeypatch.setattr(logprobs, "LEAST_COLUMNS", 16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 64, generator=generator)
    weight = (4 * torch.nn.functional.normalize(weight)).to(dtype)
    labels = torch.arange(20)
    hidden = (0.6 * weight[labels]).requires_grad_()
    found = label_logprobs(hidden, labels, head_of(weight), vocab=50, logits_at_once=1)
    (got,) = torch.autograd.grad(found.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    truth = (exact @ weight.double().T).log_softmax(-1)[labels, labels]
    (expected,) = torch.autograd.grad(truth.sum(), exact)
    assert truth.min() > math.log(0.98)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < max(1e-3, 8 * torch.finfo(dtype).eps)


def test_the_logits_of_a_piece_are_all_that_lives_at_once():
    """The largest tensor of the way there and back has the numbers asked for, and no more."""
    sizes: list[int] = []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "numel")
            )
            return out

    hidden, weight = random_logits(200, 4).requires_grad_(), random_logits(50, 4).requires_grad_()
    labels = torch.arange(200) % 50
    with Noting():
        found = label_logprobs(hidden, labels, head_of(weight), vocab=50, logits_at_once=1000)
        found.sum().backward()
    assert max(sizes) == 1000 < 200 * 50


def test_no_rows_give_no_log_probs_and_a_gradient_of_zeros():
    weight = random_logits(7, 5).requires_grad_()
    found = label_logprobs(
        torch.zeros(0, 5, dtype=torch.float64),
        tensor([], dtype=torch.long),
        head_of(weight),
        vocab=7,
    )
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_under_autocast_products_are_narrow_and_log_probs_are_not():
    hidden, weight = random_logits(6, 5).float(), random_logits(7, 5).float().requires_grad_()
    labels = tensor([0, 1, 2, 3, 4, 5])
    exact = label_logprobs(hidden, labels, head_of(weight), vocab=7)
    with torch.autocast("cpu", torch.bfloat16):
        found = label_logprobs(hidden, labels, head_of(weight), vocab=7)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 64 * 2**-8  # logits of about 50, a product of 5 terms
    found.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", HEADS)
def test_under_autocast_measures_cast_the_head_once_and_are_those_of_its_layer(kind, monkeypatch):
    """Four pieces of five rows each; the layer itself casts for each."""
    monkeypatch.setattr(logprobs, "LEAST_LOGITS", 1)
    options = dict(HEADS[kind])
    hidden, weight = random_logits(20, 5).float(), random_logits(7, 5, seed=1).float()
    bias = random_logits(7, seed=2).float() if options.pop("bias", False) else None
    head, casts = head_of(weight, bias, **options), []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                casts.append(args[0] is weight)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        whole = torch.cat([head.logits(hidden[i : i + 5]) for i in range(0, 20, 5)])
        with Noting():
            found = label_measures(hidden, head, kl_from_uniform, vocab=7)
    assert sum(casts) == 1
    assert whole.dtype == torch.bfloat16
    assert torch.equal(found, kl_from_uniform(whole.float()))
