"""Loss and gradient of training in each number format, against the same model in float64.

Tolerances come from the format. A format rounds a result by at most u = eps / 2 of itself, eps being
`torch.finfo(format).eps`: u is 2^-24 in float32, 2^-11 in float16, 2^-8 in bfloat16.

The loss. A result r that is rounded by u moves the loss by u * r * dL/dr. Roundings are as likely up
as down, so many of them move it by about u * S with S = sqrt(sum of (r * dL/dr)^2) over the weights
and over every result between them and the loss. S is computed here in float64, by autograd. The
tolerance is 2 * u * S, which is what all roundings at their largest would give; they are evenly
spread between none and that.

The gradient. On its way back to the first weight it passes through n operations, each of which
rounds once forward and twice backward (once for each factor): sqrt(3 * n) * u of its norm, where
errors are passed on with the size they have. Norms and softmax subtract and so enlarge them; the
tolerance has a factor of 4 for that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from self_rewarding_lm.errors import ConfigError, TrainingError
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import PreferencePair, TrainingRow
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import PreferenceObjective, SupervisedObjective
from self_rewarding_lm.training.reference import PairSums, StoredReference
from tests.support.hf_models import tiny
from tests.support.models import VOCAB, Recurrent, context, stage_dir, transformer
from tests.training.test_fit import (
    PAIRS,
    ROWS,
    logged,
    logprob,
    optim,
    pairs,
    preference_by_hand,
    preferences,
    sft_by_hand,
    supervised,
    weights_of,
)


@dataclass(frozen=True)
class Format:
    """weights: the type of the trained weights; mixed: accelerate's mixed_precision."""

    weights: torch.dtype
    mixed: str = "no"

    @property
    def unit(self) -> float:
        """u: half of the distance from 1 to the next number."""
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed, self.weights)
        return torch.finfo(narrow).eps / 2


FORMATS = {
    "fp32": Format(torch.float32),
    "bf16-mixed": Format(torch.float32, "bf16"),
    "fp16-mixed": Format(torch.float32, "fp16"),
    "bf16": Format(torch.bfloat16),
    "fp16": Format(torch.float16),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Recurrent,
    "transformer": lambda: transformer(attn_flash=True),
    "llama": lambda: tiny("llama", vocab=VOCAB),
    "gemma3": lambda: tiny("gemma3", vocab=VOCAB),
    "gpt2": lambda: tiny("gpt2", vocab=VOCAB),
}


@pytest.fixture(autouse=True)
def exact_afterwards():
    """accelerate keeps the precision of the last runtime for all of a process."""
    yield
    Runtime({"cpu": True, "mixed_precision": "no"}, quiet=True)


def runtime_of(mixed: str, **scaling) -> Runtime:
    """scaling: of the GradScaler of float16."""
    runtime = Runtime({"cpu": True, "mixed_precision": mixed}, quiet=True)
    if mixed == "fp16" and (runtime.accelerator.scaler is None or scaling):
        # accelerate alone computes in float32 there; on a GPU it has these two itself
        runtime.accelerator.native_amp = True
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", **scaling)
    return runtime


class Results(TorchFunctionMode):
    """Keeps every result that a gradient passes through, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, Tensor) and result.requires_grad and not result._is_view():
                self.found[id(result)] = result
        return out


@dataclass(frozen=True)
class Truth:
    """In float64. sensitivity: S; operations: n, those that one row passes through."""

    loss: float
    gradients: list[Tensor]
    sensitivity: float
    operations: float


class OfLogits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids).logits


def truth_of(module: nn.Module, loss_of: Callable[[nn.Module], Tensor], rows: int) -> Truth:
    """Of a loss, row by row, of a model that is made float64."""
    module = module.double().eval()
    bare = OfLogits(module) if hasattr(module, "lm_head") else module
    with Results() as results:
        loss = loss_of(bare)
    inner, weights = list(results.found.values()), list(module.parameters())
    slopes = torch.autograd.grad(loss, [*weights, *inner], allow_unused=True)
    squares = (
        (result * slope).square().sum().item()
        for result, slope in zip([*weights, *inner], slopes, strict=True)
        if slope is not None
    )
    gradients = [
        torch.zeros_like(w) if g is None else g
        for w, g in zip(weights, slopes[: len(weights)], strict=True)
    ]
    return Truth(loss.item(), gradients, math.sqrt(sum(squares)), len(inner) / rows)


class Noting(torch.optim.SGD):
    """Moves nothing; keeps the gradients of each step."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.0)
        self.seen: list[list[Tensor | None]] = []

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append([None if p.grad is None else p.grad.double() for p in params])


def trained(
    module: nn.Module, folder: Path, objective, runtime: Runtime, *, steps: int = 1, **settings
) -> Noting:
    """An objective's steps that move nothing, in a runtime."""
    made: list[Noting] = []

    def make(parameters):
        made.append(Noting(parameters))
        return made[0]

    ctx = context(module, runtime=runtime)
    options = optim(optimizer=make, **settings)
    Fit(ctx, stage_dir(ctx, folder), objective, options, num_train_steps=steps).run()
    return made[0]


def norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


OBJECTIVES = {
    "sft": (supervised, lambda net: sft_by_hand(net, ROWS), len(ROWS)),
    "dpo": (preferences, lambda net: preference_by_hand(net, preferences()), 2 * len(PAIRS)),
}


@cache
def truth(kind: str, task: str) -> Truth:
    _, by_hand, rows = OBJECTIVES[task]
    return truth_of(MODELS[kind](), by_hand, rows)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("task", OBJECTIVES)
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradient_are_those_of_float64_as_the_format_allows(kind, task, form, tmp_path):
    make, chosen, true = OBJECTIVES[task][0], FORMATS[form], truth(kind, task)
    module = MODELS[kind]().eval().to(chosen.weights)
    runtime = runtime_of(chosen.mixed)
    steps = 8 if chosen.mixed == "fp16" else 1  # the first scales of the loss may be too large
    noting = trained(module, tmp_path, make(), runtime, steps=steps)

    allowed = 2 * chosen.unit * true.sensitivity
    assert logged(tmp_path, "loss") == pytest.approx([true.loss] * steps, abs=allowed)
    found = [
        torch.zeros_like(expected) if gradient is None else gradient
        for gradient, expected in zip(noting.seen[-1], true.gradients, strict=True)
    ]
    wrong = norm([a - b for a, b in zip(found, true.gradients, strict=True)])
    error = wrong / norm(true.gradients)
    passes = math.sqrt(3 * true.operations)
    assert error < 4 * passes * chosen.unit
    if form != "fp32":  # it was computed in the narrow format indeed
        assert error > 4 * passes * FORMATS["fp32"].unit


@cache
def start_of_dpo(kind: str) -> Truth:
    """Against reference sums of the model itself, so that the loss is log 2."""
    exact = MODELS[kind]().double().eval()
    bare = OfLogits(exact) if hasattr(exact, "lm_head") else exact
    sums = [
        PairSums(*(logprob(bare, [*p, *r], len(p)).item() for r in (good, bad)))
        for p, good, bad in PAIRS
    ]
    objective = PreferenceObjective(pairs(), sums, 0.3)
    return truth_of(exact, lambda net: preference_by_hand(net, objective), 2 * len(PAIRS))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "transformer", "llama"])
def test_dpo_starts_at_log_2_in_each_format(kind, form, tmp_path):
    """The reference is rounded like the policy, so both errors count: sqrt(2) times one."""
    chosen, true = FORMATS[form], start_of_dpo(kind)
    assert true.loss == pytest.approx(math.log(2))
    module, runtime = MODELS[kind]().eval().to(chosen.weights), runtime_of(chosen.mixed)
    ctx = context(module, runtime=runtime)
    out = stage_dir(ctx, tmp_path)
    reference = StoredReference(ctx, out, token_budget=1000).sums(pairs())
    objective = PreferenceObjective(pairs(), reference, 0.3)
    Fit(ctx, out, objective, optim(optimizer=Noting)).run()
    allowed = math.sqrt(2) * 2 * chosen.unit * true.sensitivity
    assert logged(tmp_path, "loss") == pytest.approx([math.log(2)], abs=allowed)


# sums of log-probs


class Flat(nn.Module):
    """All tokens are as likely after any others: log p is -log of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return self.bias.expand(*ids.shape, -1)


def flat_transformer() -> nn.Module:
    module = transformer("rotary", max_seq_len=256, attn_flash=True)
    nn.init.zeros_(module.to_logits.weight)
    return module


def flat_llama() -> nn.Module:
    module = tiny("llama", vocab=VOCAB, max_position_embeddings=256)
    nn.init.zeros_(module.lm_head.weight)
    return module


FLAT = {"plain": Flat, "transformer": flat_transformer, "llama": flat_llama}
MANY = 200
LONG = tuple(i % VOCAB for i in range(MANY + 1))
EACH = -math.log(VOCAB)
"""Of which bfloat16 has -2.828 and float16 -2.832: 0.18 % and 0.04 % beside it."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", FLAT)
def test_log_probs_are_summed_in_float32_at_least(kind, form, tmp_path):
    """Equal numbers: rounded to the format, or summed in it, all of them err the same way."""
    chosen = FORMATS[form]
    rounded = torch.tensor(EACH).to(torch.bfloat16).item()
    assert abs(rounded / EACH - 1) > 1e-3  # what a sum of rounded ones would be beside
    exact = 1e-5  # of float32: 200 roundings of 2^-24, if all are to one side

    module, runtime = FLAT[kind]().to(chosen.weights), runtime_of(chosen.mixed)
    objective = SupervisedObjective([TrainingRow("stage/0", LONG, (False, *(True,) * MANY))])
    trained(module, tmp_path / "sft", objective, runtime)
    assert logged(tmp_path / "sft", "loss") == pytest.approx([-EACH], rel=exact)

    pair = PreferencePair("stage/0/0", LONG[:1], LONG[1:], LONG[1:101])
    objective = PreferenceObjective([pair], [PairSums(MANY * EACH, 100 * EACH)], 0.5)
    trained(module, tmp_path / "dpo", objective, runtime)
    assert logged(tmp_path / "dpo", "logps/chosen") == pytest.approx([MANY * EACH], rel=exact)
    assert logged(tmp_path / "dpo", "logps/rejected") == pytest.approx([100 * EACH], rel=exact)
    assert logged(tmp_path / "dpo", "loss") == pytest.approx([math.log(2)], abs=MANY * exact)

    ctx = context(module, runtime=runtime)
    (found,) = response_logprobs(ctx.policy, [(LONG[:1], LONG[1:])])
    assert sum(found) == pytest.approx(MANY * EACH, rel=exact)


@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_of_a_long_row_is_the_softmax_less_the_counts(form, tmp_path):
    """d loss / d logit v is 1 / V less the share of the tokens that are v, a mean over all."""
    chosen = FORMATS[form]
    ids = (0, *(7,) * MANY)
    objective = SupervisedObjective([TrainingRow("stage/0", ids, (False, *(True,) * MANY))])
    module = Flat().to(chosen.weights)
    noting = trained(module, tmp_path, objective, runtime_of(chosen.mixed))
    (gradient,) = noting.seen[-1]
    expected = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    expected[7] -= 1
    # each is rounded on its way, in the same direction
    narrow = torch.finfo(chosen.weights).eps
    assert torch.allclose(gradient, expected, rtol=2 * narrow + 1e-5, atol=0)


# the scale of the loss in float16


class Counting(torch.optim.SGD):
    """Plain descent that counts its steps."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.0)
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def scaled_run(folder, runtime, steps, **settings) -> tuple[nn.Module, Counting]:
    made: list[Counting] = []

    def make(parameters):
        made.append(Counting(parameters))
        return made[0]

    module = transformer(attn_flash=True)
    ctx = context(module, runtime=runtime)
    options = optim(optimizer=make, learning_rate=0.1, **settings)
    Fit(ctx, stage_dir(ctx, folder), supervised(), options, num_train_steps=steps).run()
    return module, made[0]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_whose_float16_gradients_overflow_are_left_out(clip, tmp_path):
    """2^24 times gradients of size 1 is beyond float16's 65504; the scale halves until it fits."""
    start = transformer(attn_flash=True)
    runtime = runtime_of("fp16", init_scale=2.0**24)
    module, optimizer = scaled_run(tmp_path, runtime, 20, max_grad_norm=clip)
    norms = logged(tmp_path, "grad_norm")
    skipped = sum(not math.isfinite(value) for value in norms)
    assert 3 <= skipped < 20
    assert all(not math.isfinite(value) for value in norms[:skipped])  # then they fit
    assert optimizer.steps == 20 - skipped
    assert runtime.accelerator.scaler.get_scale() == 2.0 ** (24 - skipped)
    losses = logged(tmp_path, "loss")
    assert losses[: skipped + 1] == [losses[0]] * (skipped + 1)  # the weights were as before
    assert losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert not all(map(torch.equal, weights_of(module), weights_of(start)))


def test_the_clipped_norm_is_that_of_the_gradient_not_of_the_scaled_one(tmp_path):
    scaled_run(tmp_path, runtime_of("fp16", init_scale=256.0), 1)
    expected = norm(truth("transformer", "sft").gradients)
    assert logged(tmp_path, "grad_norm") == pytest.approx([expected], rel=0.05)


def test_two_optimisers_share_one_scale_of_the_loss(tmp_path):
    """AdamW's first step is the learning rate where gradients are well above its eps of 1e-8."""
    module, start = transformer(attn_flash=True), transformer(attn_flash=True)
    runtime = runtime_of("fp16", init_scale=2.0**12)
    ctx = context(module, runtime=runtime)
    settings = optim(optimizer="muon", learning_rate=1e-3)
    Fit(ctx, stage_dir(ctx, tmp_path), supervised(), settings, num_train_steps=1).run()
    names = [name for name, _ in module.named_parameters()]
    gradient = truth("transformer", "sft").gradients[names.index("to_logits.weight")]
    clear = gradient.abs() > 1e-2
    assert clear.sum() > 10
    moved = (module.to_logits.weight - start.to_logits.weight).abs()[clear]
    assert moved.tolist() == pytest.approx([1e-3] * len(moved), rel=1e-3)


def test_gradients_that_overflow_at_any_scale_are_an_error(tmp_path):
    module = transformer(attn_flash=True)
    module.to_logits.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(module)
    ctx = context(module, runtime=runtime_of("fp16", init_scale=16.0))
    with pytest.raises(TrainingError, match="step 5 of 20: the gradient norm is"):
        Fit(ctx, stage_dir(ctx, tmp_path), supervised(), optim(), num_train_steps=20).run()
    assert all(map(torch.equal, weights_of(module), before))


def test_float16_is_not_left_out_without_a_word_on_a_cpu():
    """Either it is computed in it, with a scale of the loss, or it is refused."""
    try:
        runtime = Runtime({"cpu": True, "mixed_precision": "fp16"}, quiet=True)
    except ConfigError as error:
        assert "bf16" in str(error)
        return
    assert runtime.accelerator.scaler is not None
    layer = runtime.prepare(nn.Linear(2, 2))
    seen = []
    layer.register_forward_hook(lambda part, args, out: seen.append(out.dtype))
    layer(torch.ones(1, 2))
    with runtime.accelerator.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float16
