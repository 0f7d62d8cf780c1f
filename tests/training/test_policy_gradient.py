"""The policy gradient against arithmetic by hand, a float64 oracle token by token, and TRL (slow)."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from self_rewarding_lm import OptimConfig
from self_rewarding_lm.models.batching import pad_masks, pad_rows
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.records import Advantage, ResponseLogprobs
from self_rewarding_lm.stages.grpo import group_advantages
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.policy_gradient import (
    PolicyGradientObjective,
    PolicyLoss,
    StoredResponses,
    policy_gradient_loss,
)
from tests.support.models import Recurrent, context, stage_dir, transformer64

ANSWERS = [  # (prompt, response, advantage)
    ([3, 1], [4, 1, 5], 1.5),
    ([2], [9], -0.5),
    ([7, 9, 3, 1], [2, 6, 5, 3, 8], -1.0),
    ([2, 2, 4], [3, 8], 0.25),
]
SETTINGS = [
    PolicyLoss(normalise=normalise, ratio=ratio, beta=beta, constant=6)
    for normalise in ("sequence", "token", "constant")
    for ratio in ("token", "sequence")
    for beta in (0.0, 0.3)
]


def responses():
    return [
        Advantage(f"s/{i}/0/0", f"s/{i}/0/0", tuple(prompt), tuple(ids), 1.0, advantage)
        for i, (prompt, ids, advantage) in enumerate(ANSWERS)
    ]


def made_up(shift):
    """Stored log-probs, another number for each token, some far from those of `numbers_of`."""
    return [
        ResponseLogprobs(f"{r.id}/r0", tuple(-(1 + (5 * k + i + shift) % 7) / 4 for k in range(n)))
        for i, r in enumerate(responses())
        for n in [len(r.completion_ids)]
    ]


def objective(settings, *, old=True):
    reference = made_up(3) if settings.beta else None
    return PolicyGradientObjective(responses(), settings, made_up(0) if old else None, reference)


def numbers_of(found, rows, padding=0):
    """Log-probs of the sequences of rows, wherever they stand, with their targets."""
    sequences = [one for row in rows for one in found.sequences(row)]
    ids, _ = pad_rows([[*ids, *[0] * padding] for ids, _ in sequences])
    targets = pad_masks([[*own, *[False] * padding] for _, own in sequences])
    numbers = [[(7 * i + 3 * k) % 11 + 1 for k, i in enumerate(row)] for row in ids.tolist()]
    return (-tensor(numbers).double() / 8).requires_grad_(), targets


def by_hand(found, row, values):
    """The loss of a row, one token after the other; values: its tokens' log-probs."""
    settings, gain, count = found.settings, found.responses[row].advantage, len(values)
    old = [v.detach() for v in values] if found.old is None else found.old[row].logprobs
    ratios = [(v - o).exp() for v, o in zip(values, old, strict=True)]
    if settings.ratio == "sequence":
        ratios = [(sum(v - o for v, o in zip(values, old, strict=True)) / count).exp()] * count
    total = 0.0 * values[0]
    for k, ratio in enumerate(ratios):
        least, most = 1 - settings.clip_low, 1 + settings.clip_high
        clipped = least if ratio < least else most if ratio > most else ratio
        total = total - (ratio * gain if ratio * gain < clipped * gain else clipped * gain)
        if found.reference is not None:
            apart = found.reference[row].logprobs[k] - values[k]
            total = total + settings.beta * (apart.exp() - apart - 1)
    return total / count if settings.normalise == "sequence" else total


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("old", [True, False])
def test_losses_and_gradients_are_those_of_an_oracle_that_goes_token_by_token(settings, old):
    found, rows = objective(settings, old=old), [0, 1, 2, 3]
    logprobs, targets = numbers_of(found, rows)
    result = found.loss(rows, logprobs, targets)
    expected = [by_hand(found, r, list(logprobs[r][targets[r]])) for r in rows]
    assert result.losses.tolist() == pytest.approx([e.item() for e in expected], abs=1e-12)
    ours = torch.autograd.grad(result.mean(), logprobs)[0]
    counts = {"sequence": [1] * 4, "token": [3, 1, 5, 2], "constant": [6] * 4}[settings.normalise]
    assert [found.count(row) for row in rows] == counts == result.counts.tolist()
    theirs = torch.autograd.grad(sum(expected) / sum(counts), logprobs)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert not ours[~targets].any()


def test_by_hand():
    """A ratio of 2 and one of 1/2, each with a good and a bad response, and one within the clip."""
    logprobs = tensor([[0.0, math.log(2), -math.log(2), 0.1]] * 2, dtype=torch.float64)
    targets = tensor([[False, True, True, True]] * 2)
    settings = PolicyLoss(normalise="token", clip_low=0.2, clip_high=0.28)
    gains = tensor([1.0, -1.0], dtype=torch.float64)
    result = policy_gradient_loss(
        logprobs, targets, gains, settings, old=torch.zeros_like(logprobs)
    )
    near = math.exp(0.1)
    assert result.losses.tolist() == pytest.approx([-(1.28 + 0.5 + near), 2 + 0.8 + near])
    assert result.metrics["policy/clipped_high"].tolist() == pytest.approx([1 / 3, 0])
    assert result.metrics["policy/clipped_low"].tolist() == pytest.approx([0, 1 / 3])
    assert result.metrics["policy/ratio"].tolist() == pytest.approx([(2.5 + near) / 3] * 2)


def test_without_old_log_probs_the_ratio_is_exactly_1_and_the_gradient_that_of_the_log_probs():
    for settings in SETTINGS:
        found = objective(replace(settings, beta=0.0), old=False)
        logprobs, targets = numbers_of(found, [0, 1, 2, 3])
        result = found.loss([0, 1, 2, 3], logprobs, targets)
        assert result.metrics["policy/ratio"].tolist() == [1.0] * 4
        gradient = torch.autograd.grad(result.losses.sum(), logprobs)[0]
        gains = tensor([a for _, _, a in ANSWERS], dtype=torch.float64)[:, None]
        lengths = targets.sum(dim=-1, keepdim=True)
        per_token = gains / lengths if settings.normalise == "sequence" else gains
        torch.testing.assert_close(gradient, -per_token * targets)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_padding_and_micro_batches_change_no_loss(settings):
    found = objective(settings)
    whole = found.loss([0, 1, 2, 3], *numbers_of(found, [0, 1, 2, 3])).losses.tolist()
    padded = found.loss([0, 1, 2, 3], *numbers_of(found, [0, 1, 2, 3], padding=4))
    assert padded.losses.tolist() == pytest.approx(whole, abs=1e-12)
    for rows in ([2, 0], [1], [3]):
        part = found.loss(rows, *numbers_of(found, rows)).losses.tolist()
        assert part == pytest.approx([whole[row] for row in rows], abs=1e-12)


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
def test_the_step_of_a_training_is_that_of_the_whole_batch_whatever_the_micro_batches(
    normalise, tmp_path
):
    """Responses of other lengths, so that a mean of micro-batches' means would differ."""
    weights = []
    settings = PolicyLoss(normalise=normalise, beta=0.3, constant=6)
    for size in (None, 1, 2):
        model = transformer64()
        ctx = context(model)
        optim = OptimConfig(
            micro_batch_size=size, batch_size=4, learning_rate=0.1, max_grad_norm=None
        ).completed(0.1, 0.1, 1)
        optim = optim.model_copy(update={"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)})
        out = stage_dir(ctx, tmp_path / str(size))
        found = objective(settings)
        if size is None:
            ids = [(r.prompt_ids, r.completion_ids) for r in found.responses]
            before = {n: p.clone() for n, p in model.named_parameters()}
            logprobs, total = values_of(ctx.policy, ids), 0.0
            for row, values in enumerate(logprobs):
                total = total + by_hand(found, row, list(values))
            total = total / sum(found.count(row) for row in range(4))
            names, parameters = zip(*model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            wanted = {
                n: before[n] - 0.1 * (0 if g is None else g)
                for n, g in zip(names, gradients, strict=True)
            }
        Fit(ctx, out, found, optim).run()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for found_weights in weights:
        for name, value in found_weights.items():
            torch.testing.assert_close(value, wanted[name].detach(), rtol=0, atol=1e-10)


def values_of(policy, sequences):
    """The log-probs of each response's tokens, with a gradient."""
    found = []
    for prompt, response in sequences:
        logprobs = policy(tensor([[*prompt, *response]]))[0]
        found.append(logprobs[len(prompt) :])
    return found


def test_old_log_probs_are_stored_once_and_are_those_of_a_forward(tmp_path):
    model = Recurrent(11).double()
    ctx = context(model)
    out = stage_dir(ctx, tmp_path)
    stored = StoredResponses(ctx, out, token_budget=8)
    rows = responses()
    asked = list(stored.tokens(rows))
    assert [r.id for r in asked] == [f"{r.id}/r0" for r in rows]
    alone = response_logprobs(ctx.policy, [(r.prompt_ids, r.completion_ids) for r in rows])
    for record, expected in zip(asked, alone, strict=True):
        assert record.logprobs == pytest.approx(expected, abs=1e-12)
    before = (tmp_path / "logprobs.jsonl").read_bytes()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert list(StoredResponses(ctx, out, token_budget=8).tokens(rows)) == asked
    assert (tmp_path / "logprobs.jsonl").read_bytes() == before
    other = StoredResponses(ctx, out, token_budget=8, round=1).tokens(rows)
    assert other[0].id.endswith("/r1") and other[0].logprobs != asked[0].logprobs


TRL_LOSSES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_losses_and_gradients_equal_those_of_trls_grpo_trainer(settings):
    """TRL's own method, with the model's log-probs put in its place."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    found, rows = objective(settings), [0, 1, 2, 3]
    logprobs, targets = numbers_of(found, rows)
    ours = found.loss(rows, logprobs, targets)

    # completions of one width, as TRL holds them
    width = max(len(r.completion_ids) for r in found.responses)

    def padded(lines):
        return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in lines])

    def stored(records):
        return padded([tensor(r.logprobs, dtype=torch.float64) for r in records])

    values = padded([logprobs[row][targets[row]] for row in rows])
    mask = padded([torch.ones(len(r.completion_ids), dtype=torch.long) for r in found.responses])
    same = SimpleNamespace(
        loss_type=TRL_LOSSES[settings.normalise],
        importance_sampling_level=settings.ratio,
        epsilon_low=settings.clip_low,
        epsilon_high=settings.clip_high,
        beta=settings.beta,
        max_completion_length=settings.constant,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        model=torch.nn.Identity(),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (values, torch.zeros_like(values), None),
    )
    prompts = torch.zeros(4, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.zeros(4, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensor([a for _, _, a in ANSWERS], dtype=torch.float64),
        "old_per_token_logps": stored(found.old),
        "num_items_in_batch": mask.sum(),
    }
    if settings.beta:
        inputs["ref_per_token_logps"] = stored(found.reference)
    theirs = grpo.GRPOTrainer._compute_loss(same, None, inputs)
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [
        torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (ours.mean(), theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_advantages_equal_those_of_trls_formula():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    groups = [[1.0, 2.0, 2.5, 4.0], [0.0, 1.0, 0.0, 0.0]]
    rewards = tensor(groups, dtype=torch.float64)
    deviations = utils.nanstd(rewards, dim=1)
    above = rewards - rewards.mean(dim=1, keepdim=True)
    expected = (above / (deviations[:, None] + 1e-4)).tolist()
    for group, advantages in zip(groups, expected, strict=True):
        found = group_advantages(group, scale="std", baseline="mean")
        assert found == pytest.approx(advantages, abs=1e-7)  # TRL counts in float32
