"""What pairs are compared with: stored references by name, none, and references that move."""

import copy
import math

import pytest
import torch
from torch.nn.functional import softplus

from self_rewarding_lm import DPOConfig, EMAReference, MixedReference, OptimConfig, Run
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.policy import Policy, response_logprobs
from self_rewarding_lm.runs.weights import weights_hash
from self_rewarding_lm.training.objectives import PreferenceObjective
from self_rewarding_lm.training.reference import LiveReference
from tests.runs.test_resume import Killed, StopsAt, kill
from tests.support.models import Recurrent
from tests.test_trainer import model64, sft, trainer_of
from tests.training.test_fit import PAIRS, fit, logged, logprob, optim, pairs, plain64

BETA = 0.3
ROWS = [
    {"prompt": f"tell {i}", "chosen": f"yes {i} it is", "rejected": "no" * (i + 1)}
    for i in range(5)
]
ALONE = OptimConfig(batch_size=2, learning_rate=1e-2, micro_batch_tokens=1)
"""Each pair goes through the model by itself, before and in training: to the same bits."""


def dpo(**options):
    return DPOConfig(**{**dict(train_dataset=ROWS, dropout=0.0, optim=ALONE), **options})


def naive(module, settings, steps):
    """TR-DPO or EMA as a loop of a few lines with a whole second model; its losses."""
    reference, losses = copy.deepcopy(module), []
    adam = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        total = torch.zeros((), dtype=torch.float64)
        for prompt, chosen, rejected in PAIRS:
            gains = []
            for answer in (chosen, rejected):
                with torch.no_grad():
                    before = logprob(reference, prompt + answer, len(prompt))
                gains.append(logprob(module, prompt + answer, len(prompt)) - before)
            total = total + softplus(-BETA * (gains[0] - gains[1])) / len(PAIRS)
        adam.zero_grad()
        total.backward()
        adam.step()
        losses.append(total.item())
        if step % settings.every == 0:
            for ref, own in zip(reference.parameters(), module.parameters(), strict=True):
                if isinstance(settings, EMAReference):
                    mixed = settings.decay * ref + (1 - settings.decay) * own
                else:
                    mixed = settings.alpha * own + (1 - settings.alpha) * ref
                ref.data = mixed.detach()
    return losses


MOVING = [
    EMAReference(decay=0.7),
    EMAReference(decay=0.9, every=2),
    MixedReference(every=3),
    MixedReference(alpha=1.0, every=2),
    MixedReference(alpha=0.0, every=1),
]


@pytest.mark.parametrize("settings", MOVING, ids=repr)
@pytest.mark.parametrize("micro", [1, None])
def test_a_moving_reference_trains_like_a_loop_with_two_models(settings, micro, tmp_path):
    module, by_hand = plain64(), plain64()
    objective = PreferenceObjective(pairs(), {}, BETA, live=settings)
    adam = {"optimizer": lambda p: torch.optim.AdamW(p, weight_decay=0.0), "learning_rate": 1e-2}
    many = optim(**adam, epochs=7, batch_size=5, micro_batch_size=micro)
    assert fit(module, tmp_path, objective, many) == 7
    losses = naive(by_hand, settings, 7)
    assert logged(tmp_path, "loss") == pytest.approx(losses, abs=1e-10)
    for one, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_reference_that_is_the_policy_of_the_last_step_sees_no_gain(tmp_path):
    """alpha = 1 after every step: each step's loss is log 2, and the weights move all the same."""
    module, start = plain64(), plain64()
    objective = PreferenceObjective(pairs(), {}, BETA, live=MixedReference(alpha=1.0, every=1))
    fit(module, tmp_path, objective, optim(epochs=4, batch_size=5))
    assert logged(tmp_path, "loss") == pytest.approx([math.log(2)] * 4, abs=1e-12)
    assert not torch.equal(module.head.weight, start.head.weight)


@pytest.mark.parametrize("loss", ["dpo", "ld_dpo"])
def test_an_average_that_keeps_all_of_itself_is_the_stored_reference_to_the_bit(loss, tmp_path):
    """Also what held-out pairs are compared with."""
    still, stored = model64(), model64()
    often = ALONE.model_copy(update={"epochs": 3, "eval_every": 2})
    options = dict(loss=loss, optim=often, valid_dataset=ROWS[3:])
    live = dpo(reference=EMAReference(decay=1.0), **options)
    one = trainer_of(tmp_path / "live", [live], still)()
    other = trainer_of(tmp_path / "stored", [dpo(**options)], stored)()
    assert weights_hash(still) == weights_hash(stored) != weights_hash(model64())
    assert one.metrics(0) == other.metrics(0)
    assert not one.reference(0) and len(other.reference(0)) == 7


def test_the_copy_is_the_references_own_and_the_policy_is_as_before():
    module = Policy(adapt(Recurrent().double()))
    module.train()
    module.model.head.bias.requires_grad_(False)  # what is not trained is shared
    live = LiveReference(EMAReference(decay=1.0))
    live.begin(module)
    assert len(live.weights) == len(list(module.parameters())) - 1
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    with pytest.raises(ZeroDivisionError), live.in_place(module):
        for name, parameter in module.named_parameters():
            shift = 1.0 if name == "model.head.bias" else 0.0
            assert torch.equal(parameter, before[name] + shift)
        assert not module.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name] + 1.0) for name, p in module.named_parameters())
    assert module.training and torch.is_grad_enabled()


def test_small_steps_of_narrow_weights_are_not_lost():
    """In bfloat16 itself 0.99 * 1 + 0.01 * 1.0078125 is 1, however often."""
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(module.weight, 1.0)
    live = LiveReference(EMAReference(decay=0.99))
    live.begin(module)
    torch.nn.init.constant_(module.weight, 1.0078125)
    for _ in range(100):
        live.follow(module)
    expected = 1 + 0.0078125 * (1 - 0.99**100)
    assert live.weights["weight"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_training_with_a_moving_reference_goes_on_to_the_same_bits(stop, tmp_path):
    def stage(at=None):
        often = ALONE.model_copy(update={"eval_every": 1, "save_state_every": 2})
        return dpo(
            reference=EMAReference(decay=0.8, every=2),
            optim=often,
            dropout=0.1,
            num_train_steps=6,
            early_stopper_eval_module=StopsAt(at, kill),
            early_stopper_patience=99,
            early_stopper_mode="min",
        )

    straight, resumed = model64(), model64()
    before = trainer_of(tmp_path / "a", [stage()], straight)()
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [stage(stop + 1)])()
    after = trainer_of(tmp_path / "b", [stage()], resumed)()
    assert weights_hash(straight) == weights_hash(resumed)
    assert before.metrics(0) == after.metrics(0)


@pytest.mark.parametrize("which", ["initial", "sft", "path"])
def test_a_named_reference_is_those_weights_whatever_the_stage_starts_from(which, tmp_path):
    """Per token as the model with them says; they are kept for it, and training starts as ever."""
    trainer_of(tmp_path / "first", [sft(name="sft")])()
    path = tmp_path / "first" / "01-sft" / "model"
    named = str(path) if which == "path" else which
    stages = [sft(name="sft"), sft(name="more"), dpo(name="dpo", reference=named)]
    run = trainer_of(tmp_path / "run", stages, keep_stages=1)()
    module = model64()
    if which != "initial":
        Run.open(tmp_path / "first").load_weights(module, "sft")
    policy, found = Policy(adapt(module)), {r.id: r for r in run.reference("dpo")}
    assert len(found) == 5
    for pair in run.pairs("dpo"):
        record = found[f"{pair.id}/{named.replace('/', '_')}"]
        for answer, given in (
            (pair.chosen_ids, record.chosen),
            (pair.rejected_ids, record.rejected),
        ):
            (said,) = response_logprobs(policy, [(pair.prompt_ids, answer)])
            assert given == pytest.approx(said, abs=1e-12)
    plain = trainer_of(tmp_path / "plain", [sft(name="sft"), sft(name="more"), dpo(name="dpo")])()
    first, other = (next(m["loss"] for m in r.metrics("dpo") if "loss" in m) for r in (run, plain))
    assert other == pytest.approx(math.log(2)) and abs(first - other) > 1e-6
    logps = [next(m["logps/chosen"] for m in r.metrics("dpo") if "loss" in m) for r in (run, plain)]
    assert logps[0] == logps[1]


@pytest.mark.parametrize("loss", ["dpo", "ld_dpo"])
def test_without_a_reference_the_margin_is_the_policys_own(loss, tmp_path):
    one_step = ALONE.model_copy(update={"batch_size": 5})
    run = trainer_of(tmp_path, [dpo(reference="none", optim=one_step, loss=loss)])()
    policy, losses = Policy(adapt(model64())), []
    for pair in run.pairs(0):
        good, bad = response_logprobs(
            policy, [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]
        )
        losses.append(math.log1p(math.exp(-0.1 * (sum(good) - sum(bad)))))
    (step,) = (m for m in run.metrics(0) if "loss" in m)
    if loss == "dpo":
        assert step["loss"] == pytest.approx(sum(losses) / 5, abs=1e-10)
    else:
        assert math.isfinite(step["loss"])
    assert not run.reference(0)


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"reference must be 'initial', .* \(sft\) or a path; got"
    ):
        trainer_of(tmp_path, [sft(name="sft"), dpo(reference="sfft")])
    with pytest.raises(ConfigError, match=r"no loss here reads a reference \('simpo'\)"):
        dpo(loss="simpo", reference="initial")
    with pytest.raises(ConfigError, match=r"reference must be 'start'.* got int 3"):
        dpo(reference=3)
    with pytest.raises(ConfigError, match="decay"):
        dpo(reference={"decay": 1.5})
    with pytest.raises(
        ConfigError, match=r"dpo_beta has 2 values, one a round, and the stage has 1"
    ):
        dpo(dpo_beta=(0.1, 0.2))
    for bad in (0, -1.0, (), (0.1, 0.0)):
        with pytest.raises(ConfigError, match="dpo_beta must be greater than 0"):
            dpo(dpo_beta=bad)
    assert dpo(dpo_beta=[0.2]).dpo_beta == (0.2,)


def test_a_recipes_mapping_is_a_moving_reference():
    one, other = dpo(reference={"decay": 0.5}), dpo(reference={"alpha": 1, "every": 3})
    assert isinstance(one.reference, EMAReference) and one.reference.decay == 0.5
    assert isinstance(other.reference, MixedReference) and other.reference.every == 3
