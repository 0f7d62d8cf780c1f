"""Stages in rounds: what each round samples from and trains on, and stops at any moment."""

import copy

import pytest
import torch
from torch.nn.functional import softplus

from self_rewarding_lm import ExternalRewardDPOConfig, MixedReference, OptimConfig
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, PairingError, StoreError
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.runs.weights import weights_hash
from self_rewarding_lm.stages.pair_maker import PairMaker
from self_rewarding_lm.training.losses import dpo_loss
from tests.runs.test_resume import Killed
from tests.support.models import TEXT_VOCAB, encode
from tests.test_trainer import PROMPTS, SHORT, decode, external, model64, trainer_of
from tests.training.test_fit import logprob

RATES = dict(learning_rate=1e-2, final_learning_rate=1e-3, schedule="linear", max_grad_norm=None)


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def stage(**options):
    optim = OptimConfig(**{"batch_size": 16, "epochs": 2, "optimizer": adamw, **RATES})
    defaults = dict(num_generated_preference_pairs=None, rounds=3, prompts_per_round=4, optim=optim)
    return external(**{**defaults, **options})


class AsBefore(ExternalRewardDPOConfig):
    """A stage without rounds, in as few words as there were."""

    def run(self, ctx, out):
        pairs = self.trained(ctx, out, self.made(PairMaker, ctx, out))
        out.summary["pairs"] = len(pairs)
        out.summary["steps"] = self.fit(ctx, out, self.objective(ctx, out, pairs))


def test_one_round_is_a_stage_without_rounds(tmp_path):
    one, other = model64(), model64()
    settings = {k: getattr(external(), k) for k in external().model_fields_set}
    run = trainer_of(tmp_path / "one", [external(name="x")], one)()
    plain = trainer_of(tmp_path / "other", [AsBefore(**settings, name="x")], other)()
    assert weights_hash(one) == weights_hash(other)
    assert run.metrics(0) == plain.metrics(0)
    assert run.summary(0) == plain.summary(0)
    assert list(run.reference(0)) == list(plain.reference(0))


def by_hand(run, *, fresh=False, betas=(0.1,), reference="start", optimizer=adamw, rates=RATES):
    """The rounds of a run in plain torch, on the pairs that it recorded; the weights after each."""
    module, first = model64(), model64()
    optim, after, step = optimizer(list(module.parameters())), [], 0
    for round in range(3):
        pairs = [p for p in run.pairs(0) if prompt_number(p.id) // 4 == round]
        assert 0 < len(pairs) <= 4
        if reference == "round":
            first = copy.deepcopy(module)
        if fresh:
            optim = optimizer(list(module.parameters()))
        for _ in range(2):
            losses = []
            for pair in pairs:
                gains = []
                for answer in (pair.chosen_ids, pair.rejected_ids):
                    row, start = (*pair.prompt_ids, *answer), len(pair.prompt_ids)
                    with torch.no_grad():
                        before = logprob(first, row, start)
                    gains.append(logprob(module, row, start) - before)
                beta = betas[min(round, len(betas) - 1)]
                losses.append(softplus(-beta * (gains[0] - gains[1])))
            for group in optim.param_groups:
                peak, last = rates["learning_rate"], rates["final_learning_rate"]
                constant = rates["schedule"] == "constant"
                group["lr"] = peak if constant else peak + (last - peak) * step / 5
            optim.zero_grad()
            (sum(losses) / len(losses)).backward()
            optim.step()
            step += 1
        after.append(copy.deepcopy(module))
    return after


def prompt_number(record_id):
    """Of all that were worked, counted over the passes."""
    _, row, passed = record_id.split("/")
    return int(passed) * len(PROMPTS) + int(row)


def close(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in pairs)


def test_rounds_are_one_training_whose_optimiser_and_schedule_go_on(tmp_path):
    """Also: each round's candidates are those that the weights before it sample."""
    model = model64()
    run = trainer_of(tmp_path, [stage()], model)()
    after = by_hand(run)
    assert close(model, after[-1]) and not close(model, by_hand(run, fresh=True)[-1])
    assert not close(model, by_hand(run, reference="round")[-1])
    tokens = Tokens(CallableTokenizer(encode, decode), eos_id=None, vocab=TEXT_VOCAB)
    for round, weights in enumerate([model64(), *after[:-1]]):
        asked = [p for p in run.prompts(0) if prompt_number(p.id) // 4 == round]
        assert len(asked) == 4
        token_model = adapt(weights)
        made = sample_candidates(
            token_model, asked, SHORT, 4,
            engine=LocalEngine(), tokens=tokens, seed=0, limit=token_model.max_len,
        )  # fmt: skip
        expected = {c.id: c.ids for c in made}
        found = {c.id: c.ids for c in run.candidates(0) if c.prompt_id in {p.id for p in asked}}
        assert found == expected
    rates = [m["learning_rate"] for m in run.metrics(0) if "loss" in m]
    assert rates == pytest.approx([1e-2 - 9e-3 * k / 5 for k in range(6)])


@pytest.mark.parametrize("reference", ["start", "round"])
def test_betas_and_references_of_rounds(reference, tmp_path):
    model, constant = model64(), {**RATES, "schedule": "constant"}
    plain = OptimConfig(batch_size=16, epochs=2, optimizer=plain_sgd, **constant)
    betas = (0.1, 0.7)
    run = trainer_of(tmp_path, [stage(reference=reference, dpo_beta=betas, optim=plain)], model)()
    options = dict(betas=betas, reference=reference, optimizer=plain_sgd, rates=constant)
    assert close(model, by_hand(run, **options)[-1])
    kept = by_hand(run, **{**options, "fresh": True})[-1]
    assert close(model, kept)  # plain SGD remembers nothing


def test_each_round_says_what_it_made_with_its_number_and_step(tmp_path):
    run = trainer_of(tmp_path, [stage()])()
    said = [m for m in run.metrics(0) if "pairs/kept" in m]
    assert [(m["round"], m["step"]) for m in said] == [(0, 0), (1, 2), (2, 4)]
    assert sum(m["pairs/kept"] for m in said) == len(run.pairs(0)) == run.summary(0)["pairs"]
    assert all(m["completions/mean_length"] > 0 for m in said)
    steps = [(m["round"], m["step"]) for m in run.metrics(0) if "loss" in m]
    assert steps == [(k // 2, k + 1) for k in range(6)]
    assert run.summary(0)["next_prompt"] == 12 and run.summary(0)["rounds"] == 3


def score(ids):
    return ids.double().sum(dim=-1)


class Ending:
    """A loss or a reward that ends it all at its n-th call; 0: never."""

    def __init__(self, function, call=0):
        self.function, self.call, self.calls = function, call, 0

    def __call__(self, given, beta=0.1):
        self.calls += 1
        if self.calls == self.call:
            raise Killed
        return (
            self.function(given, beta=beta) if self.function is dpo_loss else self.function(given)
        )


@pytest.mark.parametrize(
    "every",
    [None, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("loss", "reward"), [(1, 0), (3, 0), (4, 0), (6, 0), (0, 2), (0, 3)])
def test_stopped_at_any_moment_rounds_go_on_to_the_same_bits(every, loss, reward, tmp_path):
    def made(loss=0, reward=0):
        optim = OptimConfig(
            batch_size=16, epochs=2, optimizer=adamw, save_state_every=every, **RATES
        )
        return stage(
            optim=optim,
            dropout=0.1,
            loss=Ending(dpo_loss, loss),
            reward_model=Ending(score, reward),
            reference=MixedReference(alpha=0.5, every=3),
        )

    straight, resumed = model64(), model64()
    before = trainer_of(tmp_path / "a", [made()], straight)(rehearse=False)
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [made(loss, reward)])(rehearse=False)
    after = trainer_of(tmp_path / "b", [made()], resumed)(rehearse=False)
    assert weights_hash(straight) == weights_hash(resumed)
    for kind in ("metrics", "candidates", "judgements", "pairs"):
        assert list(getattr(before, kind)(0)) == list(getattr(after, kind)(0)), kind
    assert before.summary(0) == after.summary(0)


def test_records_of_a_trained_round_are_not_made_by_other_weights(tmp_path):
    def made(loss=0):
        optim = OptimConfig(batch_size=16, save_state_every=1, optimizer=adamw, **RATES)
        return stage(optim=optim, loss=Ending(dpo_loss, loss))

    with pytest.raises(Killed):
        trainer_of(tmp_path, [made(3)])(rehearse=False)
    path = tmp_path / "01-external_reward" / "candidates.jsonl"
    path.unlink()
    with pytest.raises(StoreError, match=r"records of a round .* delete state.safetensors"):
        trainer_of(tmp_path, [made()], copy.deepcopy(model64()))(rehearse=False)
    path.with_name("state.safetensors").unlink()
    trainer_of(tmp_path, [made()])(rehearse=False)


def no_pair_of(*digits):
    """A reward that says nothing on prompts "tell <digit>"."""
    codes = {int(encode(str(d))[0]) for d in digits}

    def reward(ids):
        said = torch.tensor([int(row[5]) not in codes for row in ids])
        return ids.double().sum(dim=-1) * said

    return reward


def test_a_round_without_a_pair_is_left_out_and_counted(tmp_path, caplog):
    run = trainer_of(tmp_path / "some", [stage(reward_model=no_pair_of(4, 5, 6, 7))])()
    assert run.summary(0)["rounds_without_pairs"] == 1 and run.summary(0)["steps"] == 4
    assert "round 2 of 3 is left out" in caplog.text
    assert [m["round"] for m in run.metrics(0) if "loss" in m] == [0, 0, 2, 2]
    with pytest.raises(PairingError, match="no preference pair"):
        trainer_of(tmp_path / "none", [stage(reward_model=no_pair_of(*range(10)))])()


def test_lengths_that_rounds_do_not_have_are_refused():
    with pytest.raises(ConfigError, match="num_train_steps is the length of one training"):
        external(rounds=2, num_train_steps=3)
    with pytest.raises(ConfigError, match="cannot be used with rounds"):
        external(rounds=2, early_stopper_eval_module=lambda model: 0.0)
    with pytest.raises(ConfigError, match="3 values, one a round, and the stage has 2"):
        external(rounds=2, dpo_beta=(0.1, 0.2, 0.3))


def test_pairs_wanted_are_those_of_each_round(tmp_path):
    one = trainer_of(tmp_path, [external(rounds=2, num_generated_preference_pairs=3)])()
    assert len(one.pairs(0)) == 6
