"""Losses against arithmetic written out by hand, and against TRL (slow)."""

import math

import pytest
import torch
from torch import tensor

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.logprobs import token_logprobs
from self_rewarding_lm.training.loss_config import LossConfig, losses_in, read_by
from self_rewarding_lm.training.losses import (
    PAIR_LOSSES,
    LossResult,
    PairBatch,
    Reads,
    Responses,
    apo_down_loss,
    apo_zero_loss,
    dpo_loss,
    dpop_loss,
    hinge_loss,
    ipo_loss,
    ld_dpo_loss,
    nll_loss,
    r_dpo_loss,
    reads,
    robust_loss,
    sft_loss,
    simpo_loss,
    sppo_loss,
    wpo_loss,
)

# Per token: the chosen and the rejected responses of three pairs. Policy, then reference.
CHOSEN = [[-0.5, -0.5], [-4.0, -4.0, -4.5], [-1.0, -2.0]]
REJECTED = [[-1.0, -2.0, -0.5, -0.5], [-11.0], [-1.5, -2.0]]
CHOSEN_REFERENCE = [[-1.5, -0.5], [-5.0, -3.0, -4.0], [-1.25, -2.0]]
REJECTED_REFERENCE = [[-2.0, -0.5, -0.25, -0.25], [-12.0], [-1.75, -2.0]]
WINS = [(0.875, 0.25), (0.5, 0.5), (0.75, 0.125)]
SUMS = [  # policy chosen, rejected; reference chosen, rejected; lengths
    (-1.0, -4.0, -2.0, -3.0, 2, 4),
    (-12.5, -11.0, -12.0, -12.0, 3, 1),
    (-3.0, -3.5, -3.25, -3.75, 2, 2),
]
GAINS = [2.0, -1.5, 0.0]  # (chosen - its reference) - (rejected - its reference)


def side(tokens, reference, wins, requires_grad=False):
    width = max(map(len, tokens))

    def padded(rows):
        lines = [[*row, *[0.0] * (width - len(row))] for row in rows]
        return tensor(lines, dtype=torch.float64)

    values = padded(tokens).requires_grad_(requires_grad)
    return Responses(
        values.sum(dim=-1),
        tensor([float(len(row)) for row in tokens], dtype=torch.float64),
        tensor(wins, dtype=torch.float64),
        padded(reference).sum(dim=-1),
        values,
        padded(reference),
    )


def pairs(requires_grad=False, rows=slice(None)):
    chosen_wins, rejected_wins = zip(*WINS, strict=True)
    return PairBatch(
        side(CHOSEN[rows], CHOSEN_REFERENCE[rows], chosen_wins[rows], requires_grad),
        side(REJECTED[rows], REJECTED_REFERENCE[rows], rejected_wins[rows], requires_grad),
    )


def gained(*rows, lengths=(1, 1)):
    """Pairs of one gain each: (D(w), D(l)), the reference being 0; and the tensors of the gains."""
    gains = [tensor([float(r[k]) for r in rows], dtype=torch.float64) for k in (0, 1)]
    zero, ones = torch.zeros_like(gains[0]), torch.ones_like(gains[0])
    for gain in gains:
        gain.requires_grad_(True)
    sides = [
        Responses(gain, n * ones, win * ones, zero)
        for gain, n, win in zip(gains, lengths, (1.0, 0.0), strict=True)
    ]
    return PairBatch(*sides), *gains


def gradients(losses, *of):
    return [g.tolist() for g in torch.autograd.grad(losses.sum(), list(of))]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def by_hand(formula):
    """A formula of policy w, v (the rejected); reference w, v; lengths w, v; on each pair."""
    return [formula(*numbers) for numbers in SUMS]


BY_HAND = [
    ("dpo", {}, lambda w, v, rw, rv, n, m: softplus(-0.1 * ((w - rw) - (v - rv)))),
    (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.25},
        lambda w, v, rw, rv, n, m: (
            0.75 * softplus(-0.5 * ((w - rw) - (v - rv)))
            + 0.25 * softplus(0.5 * ((w - rw) - (v - rv)))
        ),
    ),
    (
        "robust",
        {"beta": 0.5, "label_smoothing": 0.25},
        lambda w, v, rw, rv, n, m: (
            (
                0.75 * softplus(-0.5 * ((w - rw) - (v - rv)))
                - 0.25 * softplus(0.5 * ((w - rw) - (v - rv)))
            )
            / 0.5
        ),
    ),
    ("ipo", {}, lambda w, v, rw, rv, n, m: ((w - rw) / n - (v - rv) / m - 5) ** 2),
    (
        "ipo",
        {"over": "sum", "beta": 0.5},
        lambda w, v, rw, rv, n, m: ((w - rw) - (v - rv) - 1) ** 2,
    ),
    ("hinge", {"beta": 0.5}, lambda w, v, rw, rv, n, m: max(0, 1 - 0.5 * ((w - rw) - (v - rv)))),
    ("dpo_norm", {}, lambda w, v, rw, rv, n, m: softplus(-5 * ((w - rw) / n - (v - rv) / m))),
    ("simpo", {}, lambda w, v, rw, rv, n, m: softplus(-(2 * w / n - 2 * v / m - 1))),
    (
        "simpo",
        {"gamma": 0.0, "beta": 0.5},
        lambda w, v, rw, rv, n, m: softplus(-0.5 * (w / n - v / m)),
    ),
    (
        "r_dpo",
        {"beta": 0.5, "alpha": 0.25},
        lambda w, v, rw, rv, n, m: softplus(-(0.5 * ((w - rw) - (v - rv)) + 0.25 * n - 0.25 * m)),
    ),
    (
        "dpop",
        {"beta": 0.5, "penalty": 3.0},
        lambda w, v, rw, rv, n, m: softplus(-0.5 * ((w - rw) - (v - rv) - 3 * max(0, rw - w))),
    ),
    (
        "apo_zero",
        {},
        lambda w, v, rw, rv, n, m: 1 - sigmoid(0.1 * (w - rw)) + sigmoid(0.1 * (v - rv)),
    ),
    (
        "apo_down",
        {},
        lambda w, v, rw, rv, n, m: (
            sigmoid(0.1 * (w - rw)) + 1 - sigmoid(0.1 * ((w - rw) - (v - rv)))
        ),
    ),
    (
        "sppo",
        {"hard": True, "beta": 0.25},
        lambda w, v, rw, rv, n, m: ((w - rw - 2) ** 2 + (v - rv + 2) ** 2) / 2,
    ),
    (
        "wpo",
        {},
        lambda w, v, rw, rv, n, m: math.exp(w / n + v / m) * softplus(-0.1 * ((w - rw) - (v - rv))),
    ),
    ("nll", {}, lambda w, v, rw, rv, n, m: -w / n),
]


@pytest.mark.parametrize(("name", "parameters", "formula"), BY_HAND)
def test_a_loss_is_its_formula(name, parameters, formula):
    found = PAIR_LOSSES[name](pairs(), **parameters)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand(formula), abs=1e-13)


def test_sppo_with_the_probabilities_of_the_pairs_by_hand():
    expected = [
        ((w - rw - 4 * (p - 0.5)) ** 2 + (v - rv - 4 * (q - 0.5)) ** 2) / 2
        for (w, v, rw, rv, _, _), (p, q) in zip(SUMS, WINS, strict=True)
    ]
    assert sppo_loss(pairs(), beta=0.25).tolist() == pytest.approx(expected, abs=1e-13)


def test_ld_dpo_by_hand_and_per_token():
    """The first pair shares 2 tokens: the rejected one's gains are 1, -1.5 and then -.25, -.25."""
    chosen = [1 + 0, 1 + 0.25 * (-1 - 0.5), 0.25 + 0]
    rejected = [(1 - 1.5) + 0.25 * (-0.25 - 0.25), 1, 0.25 + 0]
    expected = [softplus(-0.5 * (w - v)) for w, v in zip(chosen, rejected, strict=True)]
    found = ld_dpo_loss(pairs(), beta=0.5, alpha=0.25)
    assert found.tolist() == pytest.approx(expected, abs=1e-13)


def test_every_loss_has_a_formula_here():
    assert {name for name, *_ in BY_HAND} | {"ld_dpo"} == set(PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_pair_has_a_loss_of_its_own(name):
    """Cut into single pairs, whose sides are then padded to another width, nothing changes."""
    parts = [PAIR_LOSSES[name](pairs(rows=slice(i, i + 1))).item() for i in range(3)]
    assert PAIR_LOSSES[name](pairs()).tolist() == pytest.approx(parts, abs=1e-13)


def test_dpo_loss_is_log_2_while_policy_equals_reference():
    batch, *_ = gained((0, 0), (0, 0))
    assert dpo_loss(batch).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_loss_stays_finite_where_the_policy_is_sure_of_the_rejected_answer():
    batch, *_ = gained((-1e5, 0), (1e5, 0))
    assert dpo_loss(batch, beta=1.0).tolist() == pytest.approx([1e5, 0.0])
    assert dpo_loss(batch, beta=1.0, label_smoothing=0.25).tolist() == pytest.approx([75e3, 25e3])


def test_dpo_gradient_is_beta_times_sigmoid_of_minus_the_margin():
    """d loss / d log pi(chosen) = -beta sigmoid(-beta gain); the rejected side has the opposite."""
    batch, chosen, rejected = gained((1, -1), (0, 1.5), (0, 0))
    found = gradients(dpo_loss(batch, beta=0.4), chosen, rejected)
    expected = [-0.4 * sigmoid(-0.4 * gain) for gain in GAINS]
    assert found[0] == pytest.approx(expected, abs=1e-15)
    assert found[1] == pytest.approx([-x for x in expected], abs=1e-15)


def test_spin_with_lambda_is_dpo_with_beta_on_real_and_own_answers():
    """Eq. 4.7 of arXiv:2401.01335, l(t) = log(1 + exp(-t)), written out term by term."""
    expected = by_hand(
        lambda w, v, rw, rv, n, m: math.log(1 + math.exp(-(0.7 * (w - rw) - 0.7 * (v - rv))))
    )
    assert dpo_loss(pairs(), beta=0.7).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("loss", [dpo_loss, robust_loss])
def test_without_smoothing_cdpo_and_robust_dpo_are_dpo_bit_for_bit(loss):
    assert torch.equal(loss(pairs(), beta=0.3, label_smoothing=0.0), dpo_loss(pairs(), beta=0.3))


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_cdpo_stops_where_the_policy_is_as_sure_as_the_labels(noise):
    """Its minimum is at sigmoid(beta h) = 1 - e, where the gradient of DPO still pulls."""
    best = math.log((1 - noise) / noise) / 0.5
    batch, chosen, _ = gained((best - 1, 0), (best, 0), (best + 1, 0))
    below, there, above = gradients(dpo_loss(batch, beta=0.5, label_smoothing=noise), chosen)[0]
    assert below < -1e-3 and there == pytest.approx(0, abs=1e-15) and above > 1e-3


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_robust_dpo_over_flipped_labels_is_the_dpo_of_the_true_ones(noise):
    batch = pairs()
    straight = robust_loss(batch, beta=0.5, label_smoothing=noise)
    flipped = robust_loss(batch.swapped(), beta=0.5, label_smoothing=noise)
    mean = (1 - noise) * straight + noise * flipped
    assert mean.tolist() == pytest.approx(dpo_loss(batch, beta=0.5).tolist(), abs=1e-12)


def test_ipo_is_least_at_a_margin_of_half_of_one_over_beta():
    batch, chosen, _ = gained((4, 0), (5, 0), (6, 0))
    losses = ipo_loss(batch, beta=0.1, over="sum")
    assert losses.tolist() == pytest.approx([1, 0, 1])
    assert gradients(losses, chosen)[0] == pytest.approx([-2, 0, 2])


def test_hinge_asks_for_a_margin_of_one_and_no_more():
    batch, chosen, _ = gained((9, 0), (11, 0))
    assert gradients(hinge_loss(batch, beta=0.1), chosen)[0] == pytest.approx([-0.1, 0])


def test_ld_dpo_with_alpha_1_is_dpo_and_with_0_that_of_the_shared_length():
    assert ld_dpo_loss(pairs(), alpha=1.0).tolist() == pytest.approx(dpo_loss(pairs()).tolist())
    shared = [min(map(len, both)) for both in zip(CHOSEN, REJECTED, strict=True)]
    cut = [
        [row[:n] for row, n in zip(rows, shared, strict=True)]
        for rows in (CHOSEN, CHOSEN_REFERENCE, REJECTED, REJECTED_REFERENCE)
    ]
    short = PairBatch(side(*cut[:2], [1.0] * 3), side(*cut[2:], [0.0] * 3))
    assert ld_dpo_loss(pairs(), alpha=0.0).tolist() == pytest.approx(dpo_loss(short).tolist())


def test_r_dpo_learns_less_from_a_longer_chosen_response():
    sizes = []
    for lengths in ((10, 30), (20, 20), (30, 10)):
        batch, chosen, _ = gained((0.5, 0), lengths=lengths)
        sizes.append(-gradients(r_dpo_loss(batch, alpha=0.05), chosen)[0][0])
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert r_dpo_loss(batch, alpha=0.0).tolist() == dpo_loss(batch).tolist()


def test_dpop_is_dpo_until_the_chosen_response_loses_probability():
    batch, chosen, _ = gained((1, 0.5), (-1, -3))  # the margins are 0.5 and 2
    losses, plain = dpop_loss(batch, beta=0.3), dpo_loss(batch, beta=0.3)
    assert losses[0].item() == plain[0].item()
    assert losses[1].item() == pytest.approx(softplus(-0.3 * (2 - 50)))
    # 51 times beta: that of the margin and that of the penalty, and the sigmoid is all but 1
    expected = -0.3 * 51 * sigmoid(0.3 * 48)
    assert gradients(losses, chosen)[0][1] == pytest.approx(expected)


def test_apo_zero_raises_the_chosen_and_lowers_the_rejected_response():
    batch, chosen, rejected = gained((0, 0), (2, -3))
    of_chosen, of_rejected = gradients(apo_zero_loss(batch), chosen, rejected)
    assert of_chosen[0] == pytest.approx(-0.025) and of_rejected[0] == pytest.approx(0.025)
    assert of_chosen[1] < 0 < of_rejected[1]


def test_apo_down_lowers_both_and_the_rejected_response_more():
    """From a start at 0 the rejected one moves first; then the chosen one comes after it."""
    batch, chosen, rejected = gained((0, 0), (0, -3), (-1, -3))
    of_chosen, of_rejected = gradients(apo_down_loss(batch, beta=0.5), chosen, rejected)
    assert of_chosen[0] == pytest.approx(0) and of_rejected[0] == pytest.approx(0.125)
    assert all(one > 0 for one in (*of_chosen[1:], *of_rejected))
    assert of_rejected[2] > 0.5 * sigmoid(1) * sigmoid(-1) - 1e-12  # beta s'(beta h), h = 2


def test_sppo_is_least_where_the_gains_are_what_the_probabilities_say():
    batch, chosen, rejected = gained((500, -500), (400, -500))
    losses = sppo_loss(batch)  # eta 1000, 1 against 0
    assert losses.tolist() == pytest.approx([0, 5000])
    assert gradients(losses, chosen, rejected) == [pytest.approx([0, -100]), pytest.approx([0, 0])]
    assert sppo_loss(batch, hard=True).tolist() == losses.tolist()


def test_simpo_reads_no_reference_and_asks_for_gamma_more():
    bare = PairBatch(
        *(Responses(s.logprobs, s.lengths, s.wins) for s in (pairs().chosen, pairs().rejected))
    )
    assert torch.equal(simpo_loss(bare), simpo_loss(pairs()))
    batch, chosen, _ = gained((0.5, 0))
    assert simpo_loss(batch, beta=2.0, gamma=1.0).item() == pytest.approx(math.log(2))
    assert gradients(simpo_loss(batch), chosen)[0] == pytest.approx([-1.0])  # beta s(0)


def test_a_loss_that_needs_a_reference_says_so_where_there_is_none():
    bare = PairBatch(
        *(Responses(s.logprobs, s.lengths, s.wins) for s in (pairs().chosen, pairs().rejected))
    )
    for name, function in PAIR_LOSSES.items():
        if read_by([LossConfig(name)]).reference:
            with pytest.raises(ConfigError, match="reads"):
                function(bare)
        else:
            assert function(bare).isfinite().all()


def test_no_gradient_flows_through_the_weights_of_wpo():
    batch = pairs(requires_grad=True)
    assert batch.chosen.tokens is not None
    (plain,) = torch.autograd.grad(dpo_loss(batch).sum(), batch.chosen.tokens, retain_graph=True)
    (weighted,) = torch.autograd.grad(wpo_loss(batch).sum(), batch.chosen.tokens)
    weights = by_hand(lambda w, v, rw, rv, n, m: math.exp(w / n + v / m))
    assert torch.allclose(
        weighted, plain * tensor(weights, dtype=torch.float64)[:, None], atol=1e-12, rtol=0
    )


def test_nll_divides_each_sequence_by_its_own_length():
    assert nll_loss(pairs()).tolist() == pytest.approx([0.5, 12.5 / 3, 1.5])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_smoothing_of_a_pair_gives_the_swapped_pair_that_share(name):
    loss, said = LossConfig(name), [0.0, 0.25, 1.0]
    found = loss.of(pairs(), label_smoothing=tensor(said, dtype=torch.float64)).tolist()
    straight, flipped = loss.of(pairs()).tolist(), loss.of(pairs().swapped()).tolist()
    if name == "nll":
        assert found == straight  # it sets nothing against anything
    else:
        assert found == pytest.approx(
            [(1 - e) * a + e * b for e, a, b in zip(said, straight, flipped, strict=True)]
        )


def test_smoothing_of_a_pair_is_cdpo():
    noise = tensor([0.25] * 3, dtype=torch.float64)
    found = LossConfig("dpo", beta=0.5).of(pairs(), label_smoothing=noise)
    expected = dpo_loss(pairs(), beta=0.5, label_smoothing=0.25)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-14)


def mine(batch, *, beta, power: int = 2):
    return (beta * batch.margins()) ** power


@reads(reference=False, tokens=True)
def worst_token(batch):
    return -batch.chosen.tokens.amin(dim=-1)


def test_a_function_of_ones_own_is_a_loss_with_checked_parameters():
    loss = LossConfig(mine, power=4).with_beta(0.5)
    assert loss.of(pairs()).tolist() == pytest.approx([1.0, 0.75**4, 0.0])
    assert loss.label == "mine"
    assert read_by([loss]) == Reads()
    with pytest.raises(ConfigError, match="did you mean 'power'"):
        LossConfig(mine, powr=4)
    with pytest.raises(ConfigError, match="power"):
        LossConfig(mine, power="much")
    assert LossConfig(worst_token).of(pairs()).tolist() == [0.5, 4.5, 2.0]
    assert read_by([LossConfig(worst_token)]) == Reads(reference=False, tokens=True)


def test_a_function_that_gives_no_number_per_pair_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(3,\); got \(\)"):
        LossConfig(lambda batch: batch.margins().mean()).of(pairs())
    with pytest.raises(ConfigError, match="got float"):
        LossConfig(lambda batch: 1.0).of(pairs())
    with pytest.raises(ConfigError, match="PairBatch"):
        LossConfig(lambda: 1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossConfig("dpoo"), "'dpoo' is not a loss; did you mean 'dpo'?"),
        (lambda: LossConfig("dpo", betta=0.1), "did you mean 'beta'?"),
        (lambda: LossConfig("dpo", beta=0), "greater than 0"),
        (lambda: LossConfig("dpo", label_smoothing=0.5), "less than 0.5"),
        (lambda: LossConfig("ipo", over="tokens"), "'mean' or 'sum'"),
        (lambda: LossConfig("nll", beta=0.1), "loss 'nll': 'beta' is not a setting"),
        (lambda: LossConfig("dpo", weight=-1), "weight"),
        (lambda: losses_in([]), "empty"),
        (lambda: losses_in(["dpo", "nll"], 0.5), "nll_weight"),
        (lambda: losses_in({"weight": 2.0}), "'name'"),
        (lambda: losses_in(7), "7 is not a loss"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_what_there_is(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value)


def test_a_choice_of_losses_is_a_list_of_them():
    found = losses_in(["ipo", {"name": "dpo", "weight": 0.5, "label_smoothing": 0.1}, mine], 0.25)
    assert [(one.label, one.weight) for one in found] == [
        ("ipo", 1.0),
        ("dpo", 0.5),
        ("mine", 1.0),
        ("nll", 0.25),
    ]
    assert found[1].parameters == {"label_smoothing": 0.1}


def test_beta_comes_from_the_loss_then_from_the_stage_then_from_the_function():
    assert LossConfig("simpo", beta=3.0).with_beta(0.5).parameters == {"beta": 3.0}
    assert LossConfig("simpo").with_beta(0.5).parameters == {"beta": 0.5}
    assert LossConfig("simpo").with_beta(None).parameters == {"beta": 2.0}
    assert LossConfig("nll").with_beta(0.5).parameters == {}


LOGPROBS = [[0.0, -1.0, -2.0, -4.0], [0.0, -8.0, -16.0, -32.0]]
TARGETS = [[False, False, True, True], [False, True, False, False]]


def test_sft_loss_is_the_mean_over_all_target_tokens():
    result = sft_loss(tensor(LOGPROBS), tensor(TARGETS))
    assert result.losses.tolist() == [6.0, 8.0]
    assert result.counts.tolist() == [2.0, 1.0]
    assert result.mean().item() == pytest.approx((2 + 4 + 8) / 3)  # not (6/2 + 8/1) / 2


def test_trap_2_raising_the_log_prob_of_prompt_tokens_does_not_change_the_sft_loss():
    logprobs, targets = tensor(LOGPROBS), tensor(TARGETS)
    raised = torch.where(targets, logprobs, logprobs + 100)
    assert sft_loss(raised, targets).mean() == sft_loss(logprobs, targets).mean()
    better = torch.where(targets, logprobs + 0.5, logprobs)
    assert sft_loss(better, targets).mean() < sft_loss(logprobs, targets).mean()


def test_sft_gradient_reaches_the_target_tokens_alone():
    logprobs = tensor(LOGPROBS, requires_grad=True)
    sft_loss(logprobs, tensor(TARGETS)).mean().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx(
        [0, 0, -1 / 3, -1 / 3, 0, -1 / 3, 0, 0]
    )


def test_the_mean_of_a_result_is_its_losses_over_its_counts():
    assert LossResult(tensor([3.0, 5.0]), tensor([1.0, 3.0]), {}).mean().item() == 2.0


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_micro_parts_divided_by_the_whole_count_add_up_to_the_whole_sft_loss(cut):
    generator = torch.Generator().manual_seed(cut)
    logprobs = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    targets = torch.rand(4, 6, generator=generator) < 0.5
    whole = sft_loss(logprobs, targets)
    total = whole.counts.sum()
    parts = [sft_loss(logprobs[i:j], targets[i:j]) for i, j in ((0, cut), (cut, 4))]
    assert sum(part.losses.sum() / total for part in parts).item() == pytest.approx(
        whole.mean().item(), abs=1e-12
    )


def response_tokens(model, prompt, response):
    ids = tensor([[*prompt, *response]])
    with torch.no_grad():
        return token_logprobs(model(ids).logits, ids)[0, len(prompt) :]


TRL = [  # ours, TRL's settings, and what TRL's loss is times ours
    (["dpo"], {"loss_type": "sigmoid"}, 1),
    (
        [LossConfig("robust", label_smoothing=0.2)],
        {"loss_type": "robust", "label_smoothing": 0.2},
        1,
    ),
    (["ipo"], {"loss_type": "ipo"}, 1),
    (["hinge"], {"loss_type": "hinge"}, 1),
    (["dpo_norm"], {"loss_type": "sigmoid_norm"}, 1),
    ([LossConfig("ld_dpo", alpha=0.4)], {"loss_type": "sigmoid", "ld_alpha": 0.4}, 1),
    (["apo_zero"], {"loss_type": "apo_zero"}, 1),
    (["apo_down"], {"loss_type": "apo_down"}, 1),
    ([LossConfig("sppo", hard=True)], {"loss_type": "sppo_hard"}, 2),  # it leaves the half out
    (
        [LossConfig("hinge", 0.5), LossConfig("ipo", 2.0)],
        {"loss_type": ["hinge", "ipo"], "loss_weights": [0.5, 2.0]},
        1,
    ),
]


@pytest.mark.slow
def test_losses_and_rewards_equal_those_of_trls_dpo_trainer(tmp_path):
    pytest.importorskip(
        "trl", reason="TRL is not installed: pip install -c constraints.txt .[bench]"
    )
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    eos_id = 63
    words = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": eos_id}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>"
    )
    ids = [
        ([5, 0, 17], [8, 9, 0, 2], [3]),
        ([1], [44, 45], [45, 44, 61, 12, 30]),
        ([20, 21, 22, 23, 24], [7], [0, 0, 0]),
        ([60, 2], [11, 12, 13, 14, 15, 16], [16, 15]),
    ]
    columns = ("prompt", "chosen", "rejected")
    rows = [dict(zip(columns, map(said, row), strict=True)) for row in ids]

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=62,
    )
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in (*policy.parameters(), *reference.parameters()):
            weight.add_(0.2 * torch.randn_like(weight))

    def told(model, place):
        return [response_tokens(model, row[0], [*row[place], eos_id]).tolist() for row in ids]

    batch = PairBatch(
        *(side(told(policy, k), told(reference, k), [w] * 4) for k, w in ((1, 1.0), (2, 0.0)))
    )
    assert abs(dpo_loss(batch).mean().item() - math.log(2)) > 0.01  # the policy does differ

    data = datasets.Dataset.from_list(rows)
    for losses, settings, factor in TRL:
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(
                output_dir=str(tmp_path),
                beta=0.1,
                per_device_eval_batch_size=len(rows),
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        theirs = trainer.evaluate()
        chosen = [one.with_beta(0.1) for one in losses_in(losses)]
        ours = sum(one.weight * one.of(batch).mean().item() for one in chosen)
        assert factor * ours == pytest.approx(theirs["eval_loss"], rel=1e-4, abs=1e-5), settings
        if "ld_alpha" not in settings:  # it makes its rewards of the changed sums
            rewards = [
                0.1 * gains.mean().item()
                for gains in (batch.chosen.gains(), batch.rejected.gains())
            ]
            found = [theirs["eval_rewards/chosen"], theirs["eval_rewards/rejected"]]
            assert rewards == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
def test_simpo_equals_that_of_trls_cpo_trainer():
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is not installed")
    from types import SimpleNamespace

    settings = SimpleNamespace(
        **{"alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.75, "loss_type": "simpo"},
        **{"label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")},
    )
    means = [one.means(one.logprobs) for one in (pairs().chosen, pairs().rejected)]
    theirs, *_ = cpo.CPOTrainer.cpo_loss(settings, *means)
    ours = simpo_loss(pairs(), beta=2.5, gamma=0.75)
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-12)


def said(ids):
    """Ids as a text of one word each, with a space before it, so that texts can be joined."""
    return "".join(f" w{i}" for i in ids)
