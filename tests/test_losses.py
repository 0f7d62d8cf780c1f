"""Losses against arithmetic written out by hand, and against TRL (slow)."""

import math

import pytest
import torch
from torch import tensor

from self_rewarding_lm.logprobs import masked_sum, token_logprobs
from self_rewarding_lm.losses import LossResult, PairLogprobs, dpo_loss, nll_term, sft_loss

POLICY = {"chosen": [-1.0, -12.5, -3.0], "rejected": [-4.0, -11.0, -3.5]}
REFERENCE = {"chosen": [-2.0, -12.0, -3.25], "rejected": [-3.0, -12.0, -3.75]}
GAINS = [2.0, -1.5, 0.0]  # (chosen - its reference) - (rejected - its reference)


def pairs(values, **options):
    return PairLogprobs(
        **{
            side: tensor(numbers, dtype=torch.float64, **options)
            for side, numbers in values.items()
        }
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_loss_is_minus_log_sigmoid_of_beta_times_the_gain(beta):
    found = dpo_loss(pairs(POLICY), pairs(REFERENCE), beta=beta)
    assert found.losses.tolist() == pytest.approx(
        [-math.log(sigmoid(beta * gain)) for gain in GAINS], abs=1e-15
    )


def test_dpo_loss_is_log_2_while_policy_equals_reference():
    same = pairs(POLICY)
    assert dpo_loss(same, same, beta=0.1).losses.tolist() == pytest.approx([math.log(2)] * 3)


def test_dpo_loss_counts_each_pair_as_one():
    result = dpo_loss(pairs(POLICY), pairs(REFERENCE), beta=0.3)
    assert result.counts.tolist() == [1.0, 1.0, 1.0]
    assert result.mean().item() == pytest.approx(
        sum(-math.log(sigmoid(0.3 * gain)) for gain in GAINS) / 3
    )


def test_dpo_loss_stays_finite_where_the_policy_is_sure_of_the_rejected_answer():
    bad = PairLogprobs(tensor([-1e5]), tensor([-1.0]))
    even = PairLogprobs(tensor([-1.0]), tensor([-1.0]))
    assert dpo_loss(bad, even, beta=1.0).losses.item() == pytest.approx(1e5 - 1)


def test_dpo_gradient_is_beta_times_sigmoid_of_minus_the_margin():
    """d loss / d log pi(chosen) = -beta sigmoid(-beta gain); the rejected side has the opposite."""
    beta = 0.4
    policy = pairs(POLICY, requires_grad=True)
    dpo_loss(policy, pairs(REFERENCE), beta=beta).losses.sum().backward()
    expected = [-beta * sigmoid(-beta * gain) for gain in GAINS]
    assert policy.chosen.grad is not None and policy.rejected.grad is not None
    assert policy.chosen.grad.tolist() == pytest.approx(expected, abs=1e-15)
    assert policy.rejected.grad.tolist() == pytest.approx([-x for x in expected], abs=1e-15)


def test_dpo_metrics_by_hand():
    metrics = dpo_loss(pairs(POLICY), pairs(REFERENCE), beta=0.5).metrics
    expected = {
        "rewards/chosen": [0.5, -0.25, 0.125],
        "rewards/rejected": [-0.5, 0.5, 0.125],
        "rewards/margins": [1.0, -0.75, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a margin of nothing is no success
        "logps/chosen": POLICY["chosen"],
        "logps/rejected": POLICY["rejected"],
    }
    assert {name: values.tolist() for name, values in metrics.items()} == expected


def test_spin_with_lambda_is_dpo_with_beta_on_real_and_own_answers():
    """Eq. 4.7 of arXiv:2401.01335, l(t) = log(1 + exp(-t)), written out term by term."""
    spin_lambda = 0.7
    expected = []
    for real, own, real_opponent, own_opponent in zip(
        *POLICY.values(), *REFERENCE.values(), strict=True
    ):
        t = spin_lambda * (real - real_opponent) - spin_lambda * (own - own_opponent)
        expected.append(math.log(1 + math.exp(-t)))
    found = dpo_loss(pairs(POLICY), pairs(REFERENCE), beta=spin_lambda)
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-15)


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


def test_nll_term_divides_each_sequence_by_its_own_length():
    found = nll_term(tensor([-6.0, -1.0, -7.5]), tensor([3.0, 4.0, 1.0]))
    assert found.tolist() == [2.0, 0.25, 7.5]


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


def test_micro_parts_divided_by_the_whole_count_add_up_to_the_whole_dpo_loss():
    whole = dpo_loss(pairs(POLICY), pairs(REFERENCE), beta=0.3)
    parts = []
    for i, j in ((0, 1), (1, 3)):
        policy = pairs({side: values[i:j] for side, values in POLICY.items()})
        reference = pairs({side: values[i:j] for side, values in REFERENCE.items()})
        parts.append(dpo_loss(policy, reference, beta=0.3).losses.sum() / whole.counts.sum())
    assert sum(parts).item() == pytest.approx(whole.mean().item(), abs=1e-12)


def response_logprobs(model, prompt, response):
    ids = tensor([[*prompt, *response]])
    targets = tensor([[False] * len(prompt) + [True] * len(response)])
    with torch.no_grad():
        return masked_sum(token_logprobs(model(ids).logits, ids), targets).item()


@pytest.mark.slow
def test_dpo_loss_and_rewards_equal_those_of_trls_dpo_trainer(tmp_path):
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

    sums = {
        (who, side): tensor(
            [
                response_logprobs(model, prompt, [*{"chosen": good, "rejected": bad}[side], eos_id])
                for prompt, good, bad in ids
            ]
        )
        for who, model in (("policy", policy), ("reference", reference))
        for side in ("chosen", "rejected")
    }
    ours = dpo_loss(
        PairLogprobs(sums["policy", "chosen"], sums["policy", "rejected"]),
        PairLogprobs(sums["reference", "chosen"], sums["reference", "rejected"]),
        beta=0.1,
    )
    assert abs(ours.mean().item() - math.log(2)) > 0.01  # the policy does differ

    data = datasets.Dataset.from_list(rows)
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
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()
    assert ours.mean().item() == pytest.approx(theirs["eval_loss"], abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours.metrics[name].mean().item() == pytest.approx(theirs[f"eval_{name}"], abs=1e-4)


def said(ids):
    """Ids as a text of one word each, with a space before it, so that texts can be joined."""
    return "".join(f" w{i}" for i in ids)
