"""Losses of pairs as they are trained on: cut into micro-batches, weighted, summed, of a stage."""

from dataclasses import replace

import pytest
import torch
from torch import tensor

from self_rewarding_lm.data.rows import preference_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.models.batching import pad_masks, pad_rows
from self_rewarding_lm.models.policy import response_logprobs
from self_rewarding_lm.recipes.reader import Reader
from self_rewarding_lm.recipes.yaml_nodes import parse_yaml
from self_rewarding_lm.records import PreferencePair, ReferenceLogprobs, from_json, to_json
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.training.loss_config import LossConfig
from self_rewarding_lm.training.losses import PAIR_LOSSES, reads
from self_rewarding_lm.training.objectives import PreferenceObjective
from self_rewarding_lm.training.reference import PairSums
from tests.support.models import Recurrent, context, stage_dir

IDS = [  # (prompt, chosen, rejected)
    ([3, 1], [4, 1, 5], [9]),
    ([2], [6, 5], [3, 5, 8, 9, 2]),
    ([7, 9, 3, 1], [2], [3, 8]),
]


def pairs(**fields):
    return [
        PreferencePair(f"stage/{i}/0", tuple(prompt), tuple(good), tuple(bad), **fields)
        for i, (prompt, good, bad) in enumerate(IDS)
    ]


def made_up(count, scale):
    """Log-probs of a response's tokens, another number for each."""
    return tuple(-scale * (1 + k) / 8 for k in range(count))


REFERENCE = [
    ReferenceLogprobs(f"stage/{i}/0/r0", made_up(len(good), 1.5), made_up(len(bad), 2.5))
    for i, (_, good, bad) in enumerate(IDS)
]


def objective(*losses, of=None, nll_weight=0.0):
    sums = [PairSums(sum(r.chosen), sum(r.rejected)) for r in REFERENCE]
    chosen = [LossConfig(one) if isinstance(one, str) else one for one in losses]
    return PreferenceObjective(of or pairs(), sums, 0.3, nll_weight, chosen, REFERENCE)


def of_rows(objective, rows, padding=0):
    """The loss of some rows, whose sequences have log-probs of their own, wherever they stand."""
    sequences = [one for row in rows for one in objective.sequences(row)]
    ids, _ = pad_rows([[*ids, *[0] * padding] for ids, _ in sequences])
    targets = pad_masks([[*own, *[False] * padding] for _, own in sequences])
    numbers = tensor(
        [[(7 * i + 3 * k) % 11 + 1 for k, i in enumerate(row)] for row in ids.tolist()]
    )
    return objective.loss(rows, -numbers.double() / 8, targets)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_padding_and_micro_batches_change_no_loss(name):
    one = objective(name, of=[replace(pair, label_smoothing=0.25) for pair in pairs()])
    whole = of_rows(one, [0, 1, 2])
    for rows in ([[0], [1], [2]], [[0, 1], [2]]):
        parts = [number for part in rows for number in of_rows(one, part).losses.tolist()]
        assert whole.losses.tolist() == pytest.approx(parts, abs=1e-12)
    assert of_rows(one, [0, 1, 2], padding=5).losses.tolist() == whole.losses.tolist()
    assert of_rows(one, [2, 0]).losses.tolist() == pytest.approx(
        [whole.losses[2].item(), whole.losses[0].item()], abs=1e-12
    )


def test_the_per_token_values_are_those_of_the_responses():
    seen = []

    @reads(tokens=True)
    def look(batch):
        seen.append(batch)
        return batch.margins()

    one = objective(LossConfig(look))
    of_rows(one, [1])
    (batch,) = seen
    for side, ids in ((batch.chosen, IDS[1][1]), (batch.rejected, IDS[1][2])):
        numbers = [
            -((7 * i + 3 * (k + 1)) % 11 + 1) / 8 for k, i in enumerate(ids)
        ]  # one prompt id
        assert side.tokens.tolist() == [numbers]
        assert side.logprobs.item() == pytest.approx(sum(numbers))
        assert side.lengths.item() == len(ids)
    assert batch.rejected.reference_tokens.tolist() == [list(REFERENCE[1].rejected)]
    assert batch.rejected.reference.item() == pytest.approx(sum(REFERENCE[1].rejected))


def test_losses_are_summed_by_their_weights_and_told_one_by_one():
    rows = [0, 1, 2]
    alone = {name: of_rows(objective(name), rows) for name in ("dpo", "ipo", "nll")}
    both = of_rows(objective(LossConfig("dpo", 0.5), LossConfig("ipo", 2.0), "nll"), rows)
    expected = 0.5 * alone["dpo"].losses + 2 * alone["ipo"].losses + alone["nll"].losses
    assert both.losses.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert both.metrics["losses/dpo"].tolist() == alone["dpo"].losses.tolist()
    assert both.metrics["losses/ipo"].tolist() == alone["ipo"].losses.tolist()
    assert both.metrics["nll"].tolist() == alone["nll"].losses.tolist()
    assert "losses/dpo" not in alone["dpo"].metrics


def test_nll_weight_is_the_loss_nll_with_that_weight():
    rows = [0, 1, 2]
    found = of_rows(objective("dpo", nll_weight=0.25), rows)
    same = of_rows(objective("dpo", LossConfig("nll", weight=0.25)), rows)
    assert found.losses.tolist() == same.losses.tolist()
    assert found.metrics.keys() == same.metrics.keys()


def test_a_pairs_weight_multiplies_all_of_its_loss_and_no_divisor():
    rows, weights = [0, 1, 2], (0.5, None, 0.0)
    plain = of_rows(objective("dpo", nll_weight=1.0), rows)
    of = [replace(pair, weight=w) for pair, w in zip(pairs(), weights, strict=True)]
    found = of_rows(objective("dpo", of=of, nll_weight=1.0), rows)
    by_hand = [0.5 * plain.losses[0].item(), plain.losses[1].item(), 0.0]
    assert found.losses.tolist() == pytest.approx(by_hand)
    assert found.counts.tolist() == [1.0, 1.0, 1.0]
    ones = of_rows(objective("dpo", of=pairs(weight=1.0), nll_weight=1.0), rows)
    assert ones.losses.tolist() == plain.losses.tolist()


def test_win_probabilities_of_pairs_reach_sppo():
    rows = [0, 1, 2]
    hard = of_rows(objective(LossConfig("sppo", hard=True)), rows).losses
    assert of_rows(objective("sppo"), rows).losses.tolist() == hard.tolist()  # nobody said more
    one = of_rows(objective("sppo", of=pairs(win_probability=0.75)), rows).losses
    same = pairs(win_probability=0.75, rejected_win_probability=0.25)
    assert of_rows(objective("sppo", of=same), rows).losses.tolist() == one.tolist()
    other = pairs(win_probability=0.75, rejected_win_probability=0.5)
    assert of_rows(objective("sppo", of=other), rows).losses.tolist() != one.tolist()


def test_rewards_are_beta_times_what_was_gained_on_the_reference():
    found = of_rows(objective("hinge"), [0]).metrics
    gain = found["logps/chosen"].item() - sum(REFERENCE[0].chosen)
    loss = found["logps/rejected"].item() - sum(REFERENCE[0].rejected)
    assert found["rewards/chosen"].item() == pytest.approx(0.3 * gain)
    assert found["rewards/rejected"].item() == pytest.approx(0.3 * loss)
    assert found["rewards/margins"].item() == pytest.approx(0.3 * (gain - loss))
    assert found["rewards/accuracies"].item() == float(gain > loss)


def made(config, tmp_path, **fields):
    """A stage's objective on three pairs, and the folder it wrote to."""
    ctx = context(Recurrent())
    out = stage_dir(ctx, tmp_path)
    return ctx, config.objective(ctx, out, pairs(), **fields)


def test_a_loss_without_a_reference_computes_none(tmp_path):
    forwards = []
    ctx = context(Recurrent())
    ctx.policy.register_forward_pre_hook(lambda *_: forwards.append(1))
    out = stage_dir(ctx, tmp_path)
    config = DPOConfig(train_dataset=[], loss=["simpo"], nll_weight=0.5)
    found = config.objective(ctx, out, pairs())
    assert not forwards and not (tmp_path / "reference.jsonl").exists()
    metrics = of_rows(found, [0, 1, 2]).metrics
    assert {name for name in metrics if name.startswith("rewards")} == {"rewards/accuracies"}
    means = [
        [
            -sum((7 * i + 3 * (k + len(p))) % 11 + 1 for k, i in enumerate(ids)) / len(ids)
            for ids in row
        ]
        for p, *row in IDS
    ]
    assert metrics["rewards/accuracies"].tolist() == [float(w > v) for w, v in means]


def test_per_token_reference_log_probs_are_the_stored_ones(tmp_path):
    config = DPOConfig(train_dataset=[], loss="ld_dpo")
    ctx, found = made(config, tmp_path)
    assert found.reference_tokens is not None and found.reference is not None
    for pair, stored, sums in zip(pairs(), found.reference_tokens, found.reference, strict=True):
        of = response_logprobs(ctx.policy, [(pair.prompt_ids, pair.chosen_ids)])[0]
        assert stored.chosen == pytest.approx(of, abs=1e-6)
        assert sums.chosen == pytest.approx(sum(of), abs=1e-6)


def betas(config, tmp_path, **fields):
    _, found = made(config, tmp_path, **fields)
    return [one.parameters.get("beta") for one in found.losses], found.beta


def test_dpo_beta_is_the_beta_of_every_loss_that_has_none_of_its_own(tmp_path):
    loss = [LossConfig("dpo", beta=0.7), "simpo", "nll"]
    assert betas(DPOConfig(train_dataset=[], loss=loss, dpo_beta=0.4), tmp_path) == (
        [0.7, 0.4, None],
        0.7,
    )
    assert betas(DPOConfig(train_dataset=[], loss=loss[1:]), tmp_path) == ([2.0, None], 2.0)
    assert betas(DPOConfig(train_dataset=[]), tmp_path) == ([0.1], 0.1)
    spin = SelfPlayConfig(train_dataset=[], loss="hinge")
    assert betas(spin, tmp_path, beta=spin.spin_lambda) == ([0.1], 0.1)


def test_a_stage_refuses_a_loss_that_there_is_not():
    with pytest.raises(ConfigError, match="did you mean 'hinge'"):
        DPOConfig(train_dataset=[], loss="hing")
    with pytest.raises(ConfigError, match="nll_weight adds the loss 'nll'"):
        DPOConfig(train_dataset=[], loss=["dpo", "nll"], nll_weight=1.0)


def test_a_recipe_names_losses_with_their_parameters(tmp_path):
    text = "{train_dataset: 'json:dumps', loss: [{name: dpo, label_smoothing: 0.1}, ipo]}"
    reader = Reader()
    found = reader.settings(DPOConfig, parse_yaml(text, "recipe", tmp_path), ())
    assert reader.problems == []
    _, made_of_it = made(found, tmp_path)
    assert [(one.name, one.parameters) for one in made_of_it.losses] == [
        ("dpo", {"label_smoothing": 0.1, "beta": 0.1}),
        ("ipo", {"beta": 0.1}),
    ]
    reader.settings(
        DPOConfig, parse_yaml("{train_dataset: 'json:dumps', loss: dpoo}", "recipe", tmp_path), ()
    )
    assert "did you mean 'dpo'" in reader.problems[0]


def test_numbers_of_pairs_are_read_from_rows_and_kept_in_records():
    tokens = Tokens(None, eos_id=None, vocab=16)
    row = {"prompt": [1], "chosen": [2, 3], "rejected": [4]}
    plain = preference_row(row, "row 0", tokens)
    assert (plain.weight, plain.win_probability, plain.label_smoothing) == (None, None, None)
    found = preference_row({**row, "weight": 2, "win_probability": 0.75}, "row 0", tokens)
    assert (found.weight, found.win_probability) == (2.0, 0.75)
    assert from_json(PreferencePair, to_json(found)) == found
    old = {k: v for k, v in to_json(plain).items() if k not in ("weight", "win_probability")}
    assert from_json(PreferencePair, old) == plain  # written before there were such numbers
    for wrong in ({"weight": -1}, {"weight": "1"}, {"win_probability": 1.5}, {"weight": True}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} must be a number"):
            preference_row({**row, **wrong}, "row 0", tokens)
    for value in (torch.inf, 10**400):  # of the second no float can be made
        with pytest.raises(DataError, match="weight must be a number 0 or more"):
            preference_row({**row, "weight": value}, "row 0", tokens)
