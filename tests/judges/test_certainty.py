"""Certainty as a judge: its numbers against an oracle, and that they depend on nothing else."""

import math

import numpy as np
import pytest
import torch

from self_rewarding_lm import CertaintyJudge, EnsembleJudge, ImplicitJudge, Run
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.certainty import MEASURES
from self_rewarding_lm.models.logprobs import kl_from_uniform, negative_entropy
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runtime import Runtime
from tests.support.hf_models import tiny
from tests.support.models import Fixed, Recurrent, context, lively, transformer, transformer64
from tests.test_trainer import external, model64, same, sft, trainer_of, weights_of

ROWS = [(3, 4), (5,), (1, 2, 3, 4), (4, 4, 4, 1, 2, 3, 5, 6)]
PROMPT = (1, 2)


def group(rows=ROWS, row: int = 0, prompt=PROMPT):
    name = f"s/{row}/0"
    candidates = [
        Candidate(f"{name}/{i}", name, tuple(ids), None, True, 9) for i, ids in enumerate(rows)
    ]
    return Prompt(name, row, prompt), candidates


def judged(judge, ctx, *groups):
    prompts, candidates_PG = [p for p, _ in groups], [c for _, c in groups]
    return list(judge.judge(ctx, prompts, candidates_PG))


def scores_of(judge, ctx, *groups):
    return [judgement.score for judgement in judged(judge, ctx, *groups)]


def by_hand(module, prompt, response, measure):
    """The mean over a response's tokens, in numpy and float64, one forward of the one row."""
    with torch.no_grad():
        logits = module(torch.tensor([[*prompt, *response]]))[0].double().numpy()  # (t, v)
    values = []
    for i, token in enumerate(response):
        row = logits[len(prompt) + i - 1]
        p = np.exp(row - row.max())
        p /= p.sum()
        if measure == "logprob":
            values.append(math.log(p[token]))
        elif measure == "entropy":
            values.append(sum(x * math.log(x) for x in p))
        else:
            values.append(sum(math.log((1 / len(p)) / x) / len(p) for x in p))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "model", [lambda: Recurrent(9).double(), lambda: transformer64(vocab=9)], ids=["plain", "head"]
)
def test_a_score_is_the_mean_over_the_tokens_as_computed_by_hand(model):
    module = model()
    ctx = context(module)
    for measure in MEASURES:
        found = scores_of(CertaintyJudge(measure), ctx, group())
        wanted = [by_hand(module, PROMPT, row, measure) for row in ROWS]
        assert found == pytest.approx(wanted, rel=1e-10)
        assert len(set(found)) == len(ROWS)


def test_measures_of_distributions_that_are_known():
    v = 8
    flat, sure = torch.zeros(v).double(), torch.full((v,), -1e4).double()
    sure[3] = 0.0
    half = torch.tensor([0.5, 0.5]).double().log()
    assert float(negative_entropy(flat)) == pytest.approx(-math.log(v))
    assert float(negative_entropy(sure)) == 0.0
    assert float(negative_entropy(half)) == pytest.approx(math.log(0.5))
    assert float(kl_from_uniform(flat)) == pytest.approx(0.0, abs=1e-12)
    assert float(kl_from_uniform(half + 7)) == pytest.approx(0.0, abs=1e-12)
    assert float(kl_from_uniform(sure)) == pytest.approx(1e4 * (v - 1) / v - math.log(v))
    quarter = torch.tensor([0.25, 0.75]).double().log()
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_from_uniform(quarter)) == pytest.approx(wanted)


def test_a_token_without_any_probability_makes_only_self_certainty_infinite():
    module = Fixed([0.0, 1.0, -math.inf, 2.0])
    one = group([(1, 3), (3, 3)])
    found = judged(CertaintyJudge(), context(module), one)
    assert [(j.score, j.reason) for j in found] == [(None, "not_finite")] * 2
    p = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    wanted = float((p * np.log(p)).sum())
    assert scores_of(CertaintyJudge("entropy"), context(module), one) == pytest.approx([wanted] * 2)
    found = judged(CertaintyJudge("logprob"), context(module), group([(2,), (3,)]))
    assert found[0].reason == "not_finite" and found[1].score == pytest.approx(math.log(p[2]))


def test_what_has_no_token_or_no_room_has_no_score():
    module = Fixed([0.0, 1.0, 2.0, 0.5, 0.5, 0.1], max_seq_len=4)
    found = judged(CertaintyJudge(), context(module), group([(3, 4), (), (1, 2, 3)]))
    assert [j.reason for j in found] == [None, "empty", "too_long"]
    assert [j.id for j in found] == ["s/0/0/0/j0", "s/0/0/1/j0", "s/0/0/2/j0"]
    assert {(j.judge, j.text, j.source) for j in found} == {("certainty:kl_uniform", None, "given")}


def test_the_mean_log_prob_is_the_implicit_reward_without_a_reference():
    ctx = context(transformer64(vocab=9))
    mine = scores_of(CertaintyJudge("logprob"), ctx, group())
    assert mine == pytest.approx(scores_of(ImplicitJudge(reference=None), ctx, group()), rel=1e-14)


@pytest.mark.parametrize(
    "model", [lambda: lively(Recurrent(9)), lambda: transformer(vocab=9)], ids=["plain", "head"]
)
def test_scores_are_bit_for_bit_the_same_whatever_else_is_asked(model):
    ctx = context(model())  # float32
    groups = [group([(i, 3, i), (i, 2), (5,)], row=i, prompt=(i,) * i) for i in range(1, 6)]
    for judge in map(CertaintyJudge, MEASURES):
        together = scores_of(judge, ctx, *groups)
        assert together == [score for one in groups for score in scores_of(judge, ctx, one)]


def test_neither_padding_nor_micro_batches_change_a_score():
    ctx = context(transformer64(vocab=9))
    alone = [scores_of(CertaintyJudge(), ctx, group([row]))[0] for row in ROWS]
    for budget in (1, 7, 20, 1000):
        found = scores_of(CertaintyJudge(micro_batch_tokens=budget), ctx, group())
        assert found == pytest.approx(alone, rel=1e-12)


def test_pieces_of_the_vocabulary_change_no_score(monkeypatch):
    ctx = context(transformer64(vocab=9))
    whole = scores_of(CertaintyJudge(), ctx, group())
    monkeypatch.setattr("self_rewarding_lm.models.logprobs.LEAST_LOGITS", 1)
    monkeypatch.setattr(type(ctx.model), "vocab", 200, raising=False)
    assert scores_of(CertaintyJudge(), ctx, group()) == pytest.approx(whole, rel=1e-12)


def test_a_measure_that_there_is_not_is_refused():
    with pytest.raises(JudgeError, match="measure must be 'kl_uniform', 'entropy', 'logprob'; got"):
        CertaintyJudge("perplexity")


def test_a_stage_is_judged_by_its_first_weights_and_an_ensemble_keeps_each_score(tmp_path):
    model = model64()
    both = EnsembleJudge([(CertaintyJudge(), 3), CertaintyJudge("entropy")])
    stage = external(reward_model=both, pairing={"pick": "best_worst"})
    run = trainer_of(tmp_path, [sft(), stage], model)(rehearse=False)
    trained = model64()
    run.load_weights(trained, "sft")
    assert not same(weights_of(trained), weights_of(model64()))
    prompts = {p.id: p for p in run.prompts("external_reward")}
    candidates = {c.id: c for c in run.candidates("external_reward")}
    judgements = list(run.judgements("external_reward"))
    assert {j.judge for j in judgements} == {"m0:certainty:kl_uniform", "m1:certainty:entropy"}
    wanted = {}
    for judgement in judgements:
        response = candidates[judgement.candidate_ids[0]]
        measure = judgement.judge.rpartition(":")[2]
        of_one = by_hand(trained, prompts[response.prompt_id].ids, response.ids, measure)
        assert judgement.score == pytest.approx(of_one, abs=1e-9)
        wanted.setdefault(response.id, {})[measure] = of_one
    for pair in run.pairs("external_reward"):
        mine = wanted[pair.chosen_id]
        mean = (3 * mine["kl_uniform"] + mine["entropy"]) / 4
        assert pair.chosen_score == pytest.approx(mean, abs=1e-9)
        best, worst = pair.chosen_score, pair.rejected_score
        assert best is not None and worst is not None and best > worst


class StopError(Exception):
    pass


class Stopping(CertaintyJudge):
    """Stops at the n-th judgement."""

    left = -1

    def judge(self, ctx, prompts, candidates_PG):
        for judgement in super().judge(ctx, prompts, candidates_PG):
            if self.left == 0:
                raise StopError
            self.left -= 1
            yield judgement


def test_a_stage_that_was_stopped_while_it_judged_has_the_scores_of_one_that_was_not(
    tmp_path,
):
    def run_of(folder, left):
        judge, model = Stopping(), model64()
        judge.left = left
        # float32, in which nothing is forgiven
        stage = external(reward_model=judge)
        trainer_of(tmp_path / folder, [stage], model.float())(rehearse=False)
        return Run.open(tmp_path / folder), weights_of(model)

    wanted, weights = run_of("straight", -1)
    with pytest.raises(StopError):
        run_of("stopped", 9)
    found, resumed = run_of("stopped", -1)
    assert list(found.judgements(0)) == list(wanted.judgements(0))
    assert list(found.pairs(0)) == list(wanted.pairs(0))
    assert same(weights, resumed)


def test_mixed_precision_scores_as_the_same_forward_in_bf16():
    """The model's products are in bf16, the measure of its logits is not."""
    module = transformer(vocab=9)
    exact = scores_of(CertaintyJudge(), context(module), group())
    runtime = Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)
    try:
        found = scores_of(CertaintyJudge(), context(module, runtime=runtime), group())
    finally:
        Runtime({"cpu": True, "mixed_precision": "no"}, quiet=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = [by_hand(module, PROMPT, row, "kl_uniform") for row in ROWS]
    assert found != exact and found == pytest.approx(wanted, rel=0.02)


def test_an_adapter_counts_and_its_base_is_not_what_is_asked():
    peft = pytest.importorskip("peft")
    module = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    before = scores_of(CertaintyJudge(), context(module), group())
    lively(module)
    found = scores_of(CertaintyJudge(), context(module), group())
    assert found != before
    wanted = [by_hand(lambda ids: module(ids).logits, PROMPT, row, "kl_uniform") for row in ROWS]
    assert found == pytest.approx(wanted, rel=1e-5)
    with module.disable_adapter():
        assert scores_of(CertaintyJudge(), context(module), group()) != pytest.approx(found)
