"""The training loop: its gradient, its steps, its order, its reference and its early end."""

import logging
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import ConfigError, TrainingError
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs, TrainingRow
from self_rewarding_lm.runs.lines import read_lines
from self_rewarding_lm.runs.weights import read_weights
from self_rewarding_lm.runtime import Runtime, random_numbers_kept
from self_rewarding_lm.training.early_stopping import EarlyStopping
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import PreferenceObjective, SupervisedObjective
from self_rewarding_lm.training.reference import PairSums, StoredReference
from tests.support.models import (
    VOCAB,
    Recurrent,
    context,
    last_logits,
    stage_dir,
    started,
    transformer,
    transformer64,
    untrained,
)

ROWS = [  # (ids, length of the prompt)
    ([3, 1, 4, 1, 5], 2),
    ([9, 2, 6], 1),
    ([5, 3, 5, 8, 9, 7, 9], 4),
    ([0, 3, 0, 0], 1),
    ([2, 3, 8], 2),
    ([4, 6, 2, 6, 4, 3, 3, 8], 3),
]
PAIRS = [  # (prompt, chosen, rejected)
    ([3, 1], [4, 1, 5], [9]),
    ([2], [6, 5], [3, 5, 8, 9]),
    ([7, 9, 3], [2], [3, 8]),
    ([0], [4, 6, 2, 6], [4, 3, 3, 8]),
    ([3, 2], [7, 9], [5, 0]),
]
SAME_LENGTH = [([i % VOCAB, i // VOCAB, 1], 1) for i in range(30)]


def plain64() -> nn.Module:
    return Recurrent().double()


MODELS64 = {"plain": plain64, "transformer": transformer64}


@dataclass(frozen=True)
class Noted(SupervisedObjective):
    """Notes the rows of each forward; the loss of the rows named `broken` is not a number."""

    seen: list[list[int]] = field(default_factory=list)
    broken: frozenset[int] = frozenset()

    def loss(self, rows, logprobs, targets):
        self.seen.append(list(rows))
        return super().loss(
            rows, logprobs * math.nan if self.broken & {*rows} else logprobs, targets
        )


def supervised(rows=ROWS, **fields) -> Noted:
    return Noted(
        [
            TrainingRow(f"stage/{i}", tuple(ids), tuple(j >= prompt for j in range(len(ids))))
            for i, (ids, prompt) in enumerate(rows)
        ],
        **fields,
    )


def pairs() -> list[PreferencePair]:
    return [
        PreferencePair(f"stage/{i}/0", tuple(prompt), tuple(chosen), tuple(rejected))
        for i, (prompt, chosen, rejected) in enumerate(PAIRS)
    ]


def preferences(nll_weight: float = 0.0) -> PreferenceObjective:
    """Against a made-up reference, so that the loss is not log 2."""
    reference = [PairSums(-3.0 - i, -4.0 + i) for i in range(len(PAIRS))]
    return PreferenceObjective(pairs(), reference, 0.3, nll_weight)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def optim(**changes) -> OptimConfig:
    """One pass by plain SGD at rate 1: the weights move by minus the gradient."""
    values = {
        "learning_rate": 1.0,
        "final_learning_rate": 0.0,
        "schedule": "constant",
        "epochs": 1,
        "max_grad_norm": None,
        "optimizer": sgd,
    }
    return OptimConfig(**{**values, **changes})


def fit(module, folder, objective, settings=None, *, stage="stage", seed=0, **fields) -> int:
    """Train a module in place; the number of steps."""
    ctx = context(module, stage=stage, seed=seed)
    return Fit(ctx, stage_dir(ctx, folder), objective, settings or optim(), **fields).run()


def logged(folder, name: str) -> list[float]:
    return [line[name] for line in read_lines(folder / "metrics.jsonl") if name in line]


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def logprob(module: nn.Module, ids, start: int) -> torch.Tensor:
    """log p(ids[start:] | ids[:start]) of one row alone."""
    scores = module(torch.tensor([list(ids)]))[0].log_softmax(dim=-1)
    return sum(scores[i - 1, ids[i]] for i in range(start, len(ids)))


def sft_by_hand(module: nn.Module, rows) -> torch.Tensor:
    """The mean over the target tokens of all rows."""
    total = sum(logprob(module, ids, prompt) for ids, prompt in rows)
    return -total / sum(len(ids) - prompt for ids, prompt in rows)


def preference_by_hand(module: nn.Module, objective: PreferenceObjective) -> torch.Tensor:
    """Eq. 7 of arXiv:2305.18290, the mean over the pairs; plus the winner's NLL per token."""
    losses = []
    for (prompt, chosen, rejected), ref in zip(PAIRS, objective.reference, strict=True):
        good = logprob(module, prompt + chosen, len(prompt))
        bad = logprob(module, prompt + rejected, len(prompt))
        margin = objective.beta * ((good - ref.chosen) - (bad - ref.rejected))
        losses.append(torch.log1p(torch.exp(-margin)) - objective.nll_weight * good / len(chosen))
    return sum(losses) / len(losses)


def assert_moved_by_gradient(module: nn.Module, start: nn.Module, loss: torch.Tensor) -> None:
    """The module's weights are those of `start` minus the gradient of the loss there."""
    gradients = torch.autograd.grad(loss, list(start.parameters()), allow_unused=True)
    for new, old, gradient in zip(module.parameters(), start.parameters(), gradients, strict=True):
        moved = torch.zeros_like(old) if gradient is None else gradient
        assert torch.allclose(old - new, moved, atol=1e-10, rtol=0)


MICRO = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 4},
    {"micro_batch_size": None},
    {"micro_batch_tokens": 1},
    {"micro_batch_tokens": 20},
]


@pytest.mark.parametrize("micro", MICRO, ids=str)
@pytest.mark.parametrize("kind", MODELS64)
def test_the_sft_gradient_is_the_whole_batchs_for_any_micro_batch(kind, micro, tmp_path):
    module, start = MODELS64[kind](), MODELS64[kind]()
    loss = sft_by_hand(start, ROWS)
    fit(module, tmp_path, supervised(), optim(**micro))
    assert logged(tmp_path, "loss") == pytest.approx([loss.item()], abs=1e-10)
    assert_moved_by_gradient(module, start, loss)


@pytest.mark.parametrize("micro", MICRO, ids=str)
@pytest.mark.parametrize("kind", MODELS64)
def test_the_dpo_gradient_is_the_whole_batchs_for_any_micro_batch(kind, micro, tmp_path):
    module, start = MODELS64[kind](), MODELS64[kind]()
    loss = preference_by_hand(start, preferences())
    fit(module, tmp_path, preferences(), optim(**micro))
    assert logged(tmp_path, "loss") == pytest.approx([loss.item()], abs=1e-10)
    assert_moved_by_gradient(module, start, loss)


@pytest.mark.parametrize("micro", MICRO[:3], ids=str)
def test_the_nll_term_joins_the_dpo_gradient(micro, tmp_path):
    module, start, objective = plain64(), plain64(), preferences(nll_weight=0.7)
    fit(module, tmp_path, objective, optim(**micro))
    assert_moved_by_gradient(module, start, preference_by_hand(start, objective))


@pytest.mark.parametrize(
    ("micro", "forwards"),
    [
        ({"micro_batch_size": 1}, [1, 1, 1, 1, 1, 1]),
        ({"micro_batch_size": 4}, [4, 2]),
        ({}, [6]),
        # lengths 3 3 4 5 7 8 under 10 padded tokens: 2 x 3, 2 x 5, 7, 8
        ({"micro_batch_tokens": 10}, [2, 2, 1, 1]),
    ],
    ids=str,
)
def test_rows_go_through_the_model_in_micro_batches(micro, forwards, tmp_path):
    objective = supervised()
    fit(Recurrent(), tmp_path, objective, optim(**micro))
    assert [len(rows) for rows in objective.seen] == forwards


class Large(Recurrent):
    """From a moment on it runs out of memory where more than `most` rows go through it at once."""

    is_full = False
    most = 0

    def forward(self, ids):
        if self.is_full and len(ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return super().forward(ids)


@pytest.mark.parametrize("what", ["training", "asking the reference"])
def test_memory_that_is_used_up_is_said_with_what_bounds_it(what, tmp_path):
    module = Large(VOCAB)
    ctx = context(module)
    module.is_full = True
    out = stage_dir(ctx, tmp_path)

    def go(tokens):
        if what == "training":
            settings = optim(batch_size=4, micro_batch_tokens=tokens).completed(0.1, 0.1, 1)
            Fit(ctx, out, supervised(), settings, num_train_steps=1).run()
        else:
            StoredReference(ctx, out, token_budget=tokens).sums(pairs())

    words = rf"out of memory while {what}: CUDA out of memory.*micro_batch_tokens \(now [\d,]+\)"
    with pytest.raises(ConfigError, match=words):
        go(1000)
    module.most = 2
    go(1)


def test_a_step_that_memory_does_not_hold_is_tried_again_with_half(tmp_path, caplog):
    """The result is the same, it is said once, and what fits is kept for the steps that come."""

    def trained(name, most):
        module = Large(dropout=0.1).double()
        ctx = context(module)
        module.is_full, module.most = True, most
        objective = supervised(ROWS * 2)
        settings = optim(epochs=2, batch_size=6, micro_batch_tokens=1000)
        Fit(ctx, stage_dir(ctx, tmp_path / name), objective, settings, valid=supervised()).run()
        return module, objective.seen

    whole, _ = trained("whole", 99)
    caplog.clear()
    small, seen = trained("small", 2)
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert "out of memory while training" in caplog.text and "Tried again" in caplog.text
    for one, other in zip(whole.parameters(), small.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    events = list(read_lines(tmp_path / "small" / "events.jsonl"))
    assert [line["tokens"] for line in events if line["event"] == "micro_batch"][-1] == 7
    assert max(map(len, seen)) <= 2  # the loss is computed of what went through alone


def test_a_reference_that_memory_does_not_hold_is_asked_again_by_halves(tmp_path, caplog):
    def sums(name, most):
        module = Large().double()
        ctx = context(module)
        module.is_full, module.most = True, most
        asked = StoredReference(ctx, stage_dir(ctx, tmp_path / name), token_budget=1000)
        return list(asked.sums(pairs()))

    whole, caplog_before = sums("whole", 99), len(caplog.records)
    for one, other in zip(whole, sums("small", 2), strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-12)
        assert one.rejected == pytest.approx(other.rejected, abs=1e-12)
    said = [r.message for r in caplog.records[caplog_before:] if "Tried again" in r.message]
    assert len(said) == 1 and "out of memory while asking the reference" in said[0]


def test_the_last_smaller_batch_counts_by_its_own_rows(tmp_path):
    module, by_hand, objective = plain64(), plain64(), supervised(ROWS[:5])
    settings = optim(batch_size=4, learning_rate=0.1)
    assert fit(module, tmp_path, objective, settings) == 2
    assert [len(batch) for batch in objective.seen] == [4, 1]
    for batch in objective.seen:
        loss = sft_by_hand(by_hand, [ROWS[i] for i in batch])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for found, expected in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_batch_still_train(count, tmp_path):
    module, start = plain64(), plain64()
    assert fit(module, tmp_path, supervised(ROWS[:count]), optim(batch_size=16)) == 1
    assert_moved_by_gradient(module, start, sft_by_hand(start, ROWS[:count]))


@pytest.mark.parametrize(
    ("epochs", "num_train_steps", "steps"),
    [(1, None, 3), (4, None, 12), (None, 2, 2), (None, 7, 7)],
)
def test_the_number_of_steps_is_that_of_epochs_or_as_given(
    epochs, num_train_steps, steps, tmp_path
):
    objective = supervised(ROWS[:5])  # three batches of two rows or one
    settings = optim(epochs=epochs, batch_size=2, learning_rate=0.01)
    done = fit(Recurrent(), tmp_path, objective, settings, num_train_steps=num_train_steps)
    assert done == steps == len(objective.seen) == len(logged(tmp_path, "loss"))


def test_every_epoch_sees_every_row_once(tmp_path):
    objective = supervised(SAME_LENGTH)
    fit(Recurrent(), tmp_path, objective, optim(epochs=3, batch_size=7, learning_rate=0.01))
    rows = [row for batch in objective.seen for row in batch]
    epochs = [rows[start : start + 30] for start in (0, 30, 60)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(30))] * 3


def test_sft_raises_the_responses_probability(tmp_path):
    module = transformer()
    before = [logprob(module.eval(), ids, prompt).item() for ids, prompt in ROWS]
    settings = optim(optimizer="adamw", learning_rate=3e-3, epochs=10)
    fit(module, tmp_path, supervised(), settings)
    after = [logprob(module.eval(), ids, prompt).item() for ids, prompt in ROWS]
    assert all(new > old for new, old in zip(after, before, strict=True))


def test_sft_learns_every_target_and_no_other_token(tmp_path):
    rows = [TrainingRow("stage/0", (3, 1, 4, 1, 5), (False, False, True, False, True))]
    module = plain64()
    scores = module(torch.tensor([rows[0].ids]))[0].log_softmax(dim=-1)
    expected = -(scores[1, 4] + scores[3, 5]).item() / 2  # tokens 2 and 4 alone
    fit(module, tmp_path, SupervisedObjective(rows))
    assert logged(tmp_path, "loss") == pytest.approx([expected])


def test_dpo_raises_the_margin_of_every_pair(tmp_path):
    module = transformer()
    ctx = context(module)
    out = stage_dir(ctx, tmp_path)
    reference = StoredReference(ctx, out, token_budget=1000).sums(pairs())
    settings = optim(optimizer="adamw", learning_rate=3e-3, epochs=10)
    Fit(ctx, out, PreferenceObjective(pairs(), reference, 0.5), settings).run()
    module.eval()
    for (prompt, chosen, rejected), ref in zip(PAIRS, reference, strict=True):
        good = logprob(module, prompt + chosen, len(prompt)).item()
        bad = logprob(module, prompt + rejected, len(prompt)).item()
        assert good - bad > ref.chosen - ref.rejected


@pytest.mark.parametrize("kind", MODELS64)
def test_dpo_starts_at_log_2_against_the_stored_reference(kind, tmp_path):
    ctx = context(MODELS64[kind]())
    out = stage_dir(ctx, tmp_path)
    reference = StoredReference(ctx, out, token_budget=20).sums(pairs())
    Fit(ctx, out, PreferenceObjective(pairs(), reference, 0.1), optim()).run()
    assert logged(tmp_path, "loss") == pytest.approx([math.log(2)], abs=1e-10)
    assert logged(tmp_path, "rewards/margins") == pytest.approx([0.0], abs=1e-10)


@pytest.mark.parametrize("budget", [1, 16, 10_000])
def test_the_stored_reference_is_each_response_under_the_first_weights(budget, tmp_path):
    module = Recurrent(dropout=0.9).double().train()
    ctx = context(module)
    out = stage_dir(ctx, tmp_path)
    sums = StoredReference(ctx, out, token_budget=budget).sums(pairs())
    module.eval()
    for (prompt, chosen, rejected), found in zip(PAIRS, sums, strict=True):
        good = logprob(module, prompt + chosen, len(prompt)).item()
        bad = logprob(module, prompt + rejected, len(prompt)).item()
        assert (found.chosen, found.rejected) == pytest.approx((good, bad), abs=1e-10)
    stored = {record.id: record for record in out.read(ReferenceLogprobs)}
    assert [len(stored["stage/1/0/r0"].chosen), len(stored["stage/1/0/r0"].rejected)] == [2, 4]


def test_the_reference_stays_bit_for_bit_while_the_policy_moves(tmp_path):
    ctx = context(transformer())
    out = stage_dir(ctx, tmp_path)
    first = StoredReference(ctx, out, token_budget=1000).sums(pairs())
    before = (tmp_path / "reference.jsonl").read_bytes()
    settings = optim(optimizer="adamw", learning_rate=1e-2, epochs=5)
    Fit(ctx, out, PreferenceObjective(pairs(), first, 0.1), settings).run()
    assert (tmp_path / "reference.jsonl").read_bytes() == before
    forwards = []
    hook = ctx.policy.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert StoredReference(ctx, out, token_budget=1000).sums(pairs()) == first
    hook.remove()
    assert not forwards  # it was read, not computed
    policy = response_logprobs(ctx.policy, [(p.prompt_ids, p.chosen_ids) for p in pairs()])
    assert all(abs(sum(now) - then.chosen) > 1e-3 for now, then in zip(policy, first, strict=True))


def test_a_new_round_has_a_reference_of_its_own(tmp_path):
    module = Recurrent()
    ctx = context(module)
    out = stage_dir(ctx, tmp_path)
    first = StoredReference(ctx, out, token_budget=1000).sums(pairs())
    with torch.no_grad():
        module.head.bias[0] += 1.0
    second = StoredReference(ctx, out, token_budget=1000, round=1).sums(pairs())
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert StoredReference(ctx, out, token_budget=1000).sums(pairs()) == first


@pytest.mark.parametrize("kind", MODELS64)
def test_the_dpo_objective_is_the_hand_formula(kind):
    module, objective = MODELS64[kind](), preferences(nll_weight=0.25)
    ctx = context(module)
    losses = []
    for row in range(len(PAIRS)):
        (chosen, good), (rejected, bad) = objective.sequences(row)
        width = max(len(chosen), len(rejected))
        ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in (chosen, rejected)])
        targets = torch.tensor([[*t, *[False] * (width - len(t))] for t in (good, bad)])
        losses.append(objective.loss([row], ctx.policy(ids), targets).mean())
    by_hand = preference_by_hand(module, objective)
    assert torch.stack(losses).mean().item() == pytest.approx(by_hand.item(), abs=1e-10)


@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(good_steps, tmp_path):
    order = supervised(SAME_LENGTH)
    settings = optim(batch_size=10, learning_rate=0.1)
    fit(plain64(), tmp_path / "order", order, settings)
    row = order.seen[good_steps][3]

    module, expected = plain64(), plain64()
    if good_steps:
        fit(expected, tmp_path / "good", supervised(SAME_LENGTH), settings, num_train_steps=2)
    objective = supervised(SAME_LENGTH, broken=frozenset([row]))
    with pytest.raises(TrainingError) as caught:
        fit(module, tmp_path / "broken", objective, settings)
    said = str(caught.value)
    assert f"stage 'stage', step {good_steps + 1} of 3: the loss is nan" in said
    assert all(f"stage/{i}" in said for i in order.seen[good_steps][:8])
    assert same(weights_of(module), weights_of(expected))
    assert all(p.grad is None for p in module.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    module = Recurrent()
    module.head.bias.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(module)
    with pytest.raises(TrainingError, match="step 1 of 1: the gradient norm is"):
        fit(module, tmp_path, supervised())
    assert same(weights_of(module), before)


def orders(folder, **fields) -> list[int]:
    objective = supervised(SAME_LENGTH)
    fit(Recurrent(), folder, objective, optim(epochs=2, learning_rate=0.01), **fields)
    return [row for batch in objective.seen for row in batch]


def test_the_row_order_is_a_function_of_seed_stage_round_and_epoch(tmp_path):
    first = orders(tmp_path / "a")
    torch.manual_seed(99)
    assert orders(tmp_path / "b") == first
    assert first[:30] != first[30:]
    assert orders(tmp_path / "c", seed=1) != first
    assert orders(tmp_path / "d", stage="other") != first
    assert orders(tmp_path / "e", round=1) != first


def test_training_leaves_torchs_random_state(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(Recurrent(dropout=0.1), tmp_path, supervised(), dropout=0.3)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_are_kept_also_when_the_work_inside_fails():
    before = torch.get_rng_state(), random.getstate()
    with random_numbers_kept():
        torch.manual_seed(1), random.seed(1)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    with pytest.raises(ZeroDivisionError), random_numbers_kept():
        torch.manual_seed(1), random.seed(1)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_dropout_at_a_step_is_the_same_every_time(tmp_path):
    def trained(name, rate, **fields):
        module = Recurrent(dropout=0.1)
        fit(module, tmp_path / name, supervised(), optim(epochs=3), dropout=rate, **fields)
        assert module.dropout.p == 0.1
        return weights_of(module)

    torch.manual_seed(1)
    first = trained("a", 0.5)
    torch.manual_seed(2)
    assert same(trained("b", 0.5), first)
    assert not same(trained("c", 0.0), first)
    assert not same(trained("d", 0.5, round=1), first)


def test_dropout_is_another_at_each_step(tmp_path):
    module, masks = Recurrent(dropout=0.1), []
    module.dropout.register_forward_hook(lambda part, args, out: masks.append(out == 0))
    ctx = context(module)
    masks.clear()
    training = Fit(
        ctx, stage_dir(ctx, tmp_path), supervised(ROWS[2:3]), optim(epochs=3), dropout=0.5
    )
    training.run()
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_without_dropout_a_model_in_training_mode_is_exact(tmp_path):
    module, start = Recurrent(dropout=0.9).double(), plain64()
    fit(module, tmp_path, supervised(), dropout=0.0)
    assert_moved_by_gradient(module, start, sft_by_hand(start, ROWS))


def test_gradients_are_clipped_to_the_norm_and_the_whole_norm_is_logged(tmp_path):
    module, start = plain64(), plain64()
    gradients = torch.autograd.grad(sft_by_hand(start, ROWS), list(start.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    fit(module, tmp_path, supervised(), optim(max_grad_norm=norm / 4))
    moved = torch.cat(
        [
            (old - new).flatten()
            for old, new in zip(start.parameters(), module.parameters(), strict=True)
        ]
    )
    assert moved.norm().item() == pytest.approx(norm / 4, rel=1e-4)
    assert logged(tmp_path, "grad_norm") == pytest.approx([norm], rel=1e-6)


def test_held_out_rows_are_evaluated_without_dropout_and_not_learnt(tmp_path):
    module, start = Recurrent(dropout=0.1).double(), plain64()
    settings = optim(epochs=1, batch_size=2, eval_every=2, micro_batch_size=2)
    held_out, train = ROWS[3:], ROWS[:3]
    objective = supervised(train)
    fit(module, tmp_path, objective, settings, valid=supervised(held_out), dropout=0.5)
    assert logged(tmp_path, "eval/loss") == pytest.approx(
        [sft_by_hand(module.eval(), held_out).item()], abs=1e-10
    )
    assert not same(weights_of(module), weights_of(start))


class Script:
    """An evaluation that gives scores one after the other and keeps what it saw."""

    def __init__(self, *scores) -> None:
        self.scores = list(scores)
        self.weights: list[list[torch.Tensor]] = []

    def __call__(self, module: nn.Module):
        assert not module.training and not torch.is_grad_enabled()
        self.weights.append(weights_of(module))
        return self.scores[len(self.weights) - 1]


def stopped(tmp_path, script, *, steps=6, every=1, **settings) -> tuple[int, list[torch.Tensor]]:
    """The steps that were done, and the weights at the end."""
    module = Recurrent()
    done = fit(
        module,
        tmp_path,
        supervised(),
        optim(learning_rate=0.1, eval_every=every),
        num_train_steps=steps,
        early_stopping=EarlyStopping(script, **settings),
    )
    return done, weights_of(module)


@pytest.mark.parametrize(
    ("mode", "patience", "scores", "steps", "best"),
    [
        ("max", 1, [0.1, 0.5, 0.4], 2, 1),
        ("max", 2, [0.1, 0.5, 0.4, 0.6, 0.2, 0.3], 5, 3),
        ("min", 1, [0.5, 0.4, 0.1, 0.2], 3, 2),
        ("max", 1, [0.5, 0.5], 1, 0),  # the same again is not better
        ("max", 1, [9.0, 1.0], 1, 0),  # the weights before training were the best
        ("max", 3, [0, 1, 2, 3, 4, 5, 6], 6, 6),
    ],
)
def test_early_stopping_restores_the_best_weights(mode, patience, scores, steps, best, tmp_path):
    script = Script(*scores)
    done, final = stopped(tmp_path, script, mode=mode, patience=patience)
    assert done == steps and len(script.weights) == steps + 1
    assert same(final, script.weights[best])
    assert not same(script.weights[0], script.weights[1])
    assert logged(tmp_path, "early_stopping/score") == scores


def test_early_stopping_looks_every_so_many_steps_and_at_the_end(tmp_path):
    script = Script(1, 2, 3, 4)
    done, final = stopped(tmp_path, script, steps=5, every=2)
    checks = [
        line["step"]
        for line in read_lines(tmp_path / "metrics.jsonl")
        if "early_stopping/score" in line
    ]
    assert (done, checks) == (5, [0, 2, 4, 5])
    assert same(final, script.weights[3])


def test_early_stopping_counts_its_steps_on_like_the_other_metrics(tmp_path):
    script = Script(1, 2, 3)
    fit(
        Recurrent(),
        tmp_path,
        supervised(),
        optim(eval_every=1, learning_rate=0.1),
        num_train_steps=2,
        early_stopping=EarlyStopping(script),
        first_step=10,
    )
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == [11, 12]
    assert [line["step"] for line in lines if "early_stopping/score" in line] == [10, 11, 12]


@pytest.mark.parametrize("score", [torch.tensor(0.5), torch.tensor([0.5]), 1, True], ids=str)
def test_an_evaluation_may_give_a_number_of_any_kind(score, tmp_path):
    assert stopped(tmp_path, Script(score, score), steps=1)[0] == 1


@pytest.mark.parametrize("score", [None, "good", torch.ones(2), {"accuracy": 1.0}], ids=str)
def test_an_evaluation_that_gives_no_number_is_refused_before_any_step(score, tmp_path):
    module, objective = Recurrent(), supervised()
    with pytest.raises(ConfigError, match="must give one number"):
        fit(module, tmp_path, objective, early_stopping=EarlyStopping(lambda module: score))
    assert objective.seen == []


def test_an_evaluation_that_gives_nan_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="nan"):
        stopped(tmp_path, Script(math.nan))


def test_checkpoints_are_kept_every_so_many_steps(tmp_path):
    module = Recurrent()
    settings = optim(learning_rate=0.1, checkpoint_every=2)
    fit(module, tmp_path, supervised(), settings, num_train_steps=4, first_step=10)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-14",
    ]
    half, whole = Recurrent(), Recurrent()
    fit(half, tmp_path / "half", supervised(), optim(learning_rate=0.1), num_train_steps=2)
    for module_then, name in ((half, "checkpoint-12"), (module, "checkpoint-14")):
        read_weights(whole, tmp_path / name / "model.safetensors")
        assert same(weights_of(whole), weights_of(module_then))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_cache_that_seemed_right_before_training_is_right_after_it(name, tmp_path):
    module = untrained(shift_tokens=1, zero_init_branch_output=True)
    ctx = context(module)  # every branch gives zero now, so any cache would seem right
    settings = optim(optimizer=name, learning_rate=3e-2, epochs=20)
    Fit(ctx, stage_dir(ctx, tmp_path), supervised(), settings).run()
    rows = [[3, 1, 4, 1, 5, 9], [2, 6]]
    with torch.no_grad(), evaluating(module):
        ctx.model.refresh()  # as the engine does before each generation
        _, cache = started(ctx.model, rows)
        logits = cache.extend(torch.tensor([2, 2]))
    whole = torch.stack([last_logits(module, [*row, 2]) for row in rows])
    assert torch.allclose(logits, whole, atol=1e-4)


def test_each_stage_has_a_fresh_optimiser_and_none_is_kept(tmp_path):
    made = []

    def make(parameters):
        made.append(torch.optim.AdamW(parameters, lr=0.0))
        assert not made[-1].state  # no momentum of an earlier stage
        return made[-1]

    ctx = context(Recurrent())
    out = stage_dir(ctx, tmp_path)
    held = ctx.runtime.accelerator._optimizers
    before = len(held)
    for round_ in range(3):
        Fit(ctx, out, supervised(), optim(optimizer=make, learning_rate=0.01), round=round_).run()
    assert len(made) == 3 and len(held) == before


def test_no_optimiser_is_kept_after_a_failure(tmp_path):
    ctx = context(Recurrent())
    held = ctx.runtime.accelerator._optimizers
    before = len(held)
    with pytest.raises(TrainingError):
        Fit(ctx, stage_dir(ctx, tmp_path), supervised(broken=frozenset([0])), optim()).run()
    assert len(held) == before


def test_a_runtime_has_the_precision_it_asks_for_and_not_an_earlier_ones():
    Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)
    try:
        assert Runtime({"cpu": True}, quiet=True).accelerator.mixed_precision == "no"
    finally:
        Runtime({"cpu": True, "mixed_precision": "no"}, quiet=True)


def test_dropout_that_has_no_effect_is_said_once_a_stage(tmp_path, caplog):
    module = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB))
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        fit(module, tmp_path, supervised(), optim(epochs=3), dropout=0.1)
    assert len([r for r in caplog.records if "no effect" in r.message]) == 1
