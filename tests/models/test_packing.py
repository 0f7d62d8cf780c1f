"""Rows without padding and shared beginnings against each row alone; hidden states and heads."""

import logging
from unittest.mock import patch

import pytest
import torch
from torch import nn
from x_transformers import AutoregressiveWrapper

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models import packing
from self_rewarding_lm.models import policy as policies
from self_rewarding_lm.models.batching import grouped, pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.logprobs import token_logprobs
from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.models.packing import Packing, packed_length, shared_beginnings
from self_rewarding_lm.models.policy import Policy, dropout_set
from tests.support.hf_models import KINDS, tiny
from tests.support.models import KINDS64, VOCAB, Recurrent, transformer, transformer64

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
ROWS = [  # two that share a prompt, one alone, one that is another's beginning, one of two tokens
    [*PROMPT, 8, 9, 7],
    [*PROMPT, 9, 3, 2, 3, 8, 4],
    [2, 7, 1, 8],
    [*PROMPT, 5, 0, 2, 8],
    [*PROMPT],
    [7, 7],
]
CPU = torch.device("cpu")


def test_a_row_shares_with_the_earlier_one_with_which_it_begins_alike_the_longest():
    ids, lengths = pad_rows(ROWS)
    assert shared_beginnings(ids, lengths) == [(0, 0), (0, 10), (2, 0), (0, 10), (0, 10), (5, 0)]
    assert shared_beginnings(ids, lengths, least=11) == [(i, 0) for i in range(6)]
    assert packed_length(ROWS) == 13 + 6 + 4 + 4 + 0 + 2


SYSTEM = [2, 3, 5, 7, 1, 1, 0, 6, 4]  # what the prompts of all pairs begin with
PAIRS = [
    [*SYSTEM, *PROMPT, 8, 9, 7],
    [*SYSTEM, *PROMPT, 9, 3],
    [*SYSTEM, 8, 8, 8, 8, 1],
    [*SYSTEM, 8, 8, 8, 8, 2, 5],
    [*SYSTEM, 8, 8, 8, 8, 2, 6],
]


def test_a_pair_shares_its_prompt_also_where_all_prompts_begin_alike():
    """The third row has the system prompt of the first, the fourth the whole prompt of the third."""
    ids, lengths = pad_rows(PAIRS)
    assert shared_beginnings(ids, lengths) == [(0, 0), (0, 19), (0, 9), (2, 13), (3, 14)]
    assert packed_length(PAIRS) == 22 + 2 + 5 + 2 + 1
    in_turns = pad_rows([PAIRS[0], PAIRS[2], PAIRS[1], PAIRS[3]])
    assert shared_beginnings(*in_turns) == [(0, 0), (0, 9), (0, 19), (1, 13)]
    owners = [0, 0, 1, 1, 2]
    expected = [(0, 0), (0, 19), (2, 0), (2, 13), (4, 0)]
    assert shared_beginnings(ids, lengths, owners=owners) == expected


def test_runs_of_the_first_version_share_with_the_last_row_that_stands_whole():
    """Their dropout is drawn in the order and the sizes of the parts that this gives."""
    ids, lengths = pad_rows(ROWS)
    first = [(0, 0), (0, 10), (2, 0), (3, 0), (3, 10), (5, 0)]
    assert shared_beginnings(ids, lengths, with_whole=True) == first
    ids, lengths = pad_rows(PAIRS)
    first = [(0, 0), (0, 19), (0, 9), (0, 9), (0, 9)]
    assert shared_beginnings(ids, lengths, with_whole=True) == first
    counts = []
    for rate in (0.0, 0.1):
        module = tiny("llama", attention_dropout=rate).train()
        with patch.object(policies, "Packing", side_effect=Packing) as made:
            Policy(adapt(module)).train()(ids, lengths)
        counts.append(made.call_args.kwargs["with_whole"])
    assert counts == [False, True]


def test_padding_never_counts_as_a_beginning():
    """Rows that differ in length alone, padded by the tokens of the longer one."""
    ids, lengths = torch.tensor([[5] * 12, [5] * 12]), torch.tensor([9, 12])
    assert shared_beginnings(ids, lengths) == [(0, 0), (0, 9)]
    assert shared_beginnings(ids.flip(0), lengths.flip(0)) == [(0, 0), (0, 9)]


@pytest.mark.parametrize("width", [None, 5, 7, 100])
def test_every_token_of_a_row_has_its_place_and_its_position(width):
    ids, lengths = pad_rows(ROWS)
    packing = Packing(ids, lengths, CPU, width=width)
    tokens, positions = packing.ids.flatten(), packing.positions.flatten()
    assert packing.count == packed_length(ROWS) == 29
    assert len(tokens) - packing.count == packing.filled < len(packing.ids)
    assert width is None or packing.ids.shape[1] <= width
    for row, places in zip(ROWS, packing.where, strict=True):
        assert tokens[places[: len(row)]].tolist() == row
        assert positions[places[: len(row)]].tolist() == list(range(len(row)))


def alone(module: nn.Module, rows) -> list[torch.Tensor]:
    """The oracle: the bare model on each row, whole and alone."""
    bare = module.net if isinstance(module, AutoregressiveWrapper) else module
    found = []
    for row in rows:
        ids = torch.tensor([row])
        output = bare(ids)
        found.append(token_logprobs(getattr(output, "logits", output), ids)[0])
    return found


def hugging_face(kind: str, **changes) -> nn.Module:
    pytest.importorskip("transformers")
    return tiny(kind, dtype=torch.float64, **changes)


def ours(kind: str) -> nn.Module:
    return hugging_face(kind) if kind in KINDS else KINDS64[kind]()


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["rows", "pairs"])
@pytest.mark.parametrize("kind", [*KINDS, *KINDS64])
def test_the_policy_gives_each_rows_log_probs_and_gradients(kind, rows):
    """In float64, norms of transformers in float32; the loss takes part of the tokens, weighted."""
    module = ours(kind).eval()
    rounding = 1e-5 if kind in KINDS else 1e-8
    ids, lengths = pad_rows(rows)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        targets[i, min(3 * i, len(row) - 1) : len(row)] = True
    slopes = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0)).double()

    truth = alone(module, rows)
    loss = sum((v * slopes[i, : len(v)] * targets[i, : len(v)]).sum() for i, v in enumerate(truth))
    parameters = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)

    found = Policy(adapt(module)).eval()(ids, lengths, targets)
    for i, values in enumerate(truth):
        wanted = targets[i, : len(values)]
        assert torch.allclose(found[i, : len(values)][wanted], values[wanted], atol=1e-9, rtol=0)
    got = torch.autograd.grad((found * slopes * targets).sum(), parameters, allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_train_on_packed_rows(kind):
    training = adapt(hugging_face(kind)).training
    assert training is not None and training.packs


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_x_transformers_train_on_packed_rows_also_when_they_outgrow_its_positions(positions):
    module = transformer64(positions) if positions != "absolute" else transformer64()
    model = adapt(module)
    assert model.training is not None and model.training.packs
    rows = [[(7 * i + j) % VOCAB for j in range(model.max_len - i)] for i in range(4)]
    ids, lengths = pad_rows(rows)
    found = Policy(model).eval()(ids, lengths)
    for row, values, truth in zip(rows, found, alone(module.eval(), rows), strict=True):
        assert torch.allclose(values[: len(row)], truth, atol=1e-9, rtol=0)


def test_attention_that_is_not_ours_trains_on_padded_rows_with_its_head_apart():
    model = adapt(transformer("alibi"))
    assert model.training is not None and not model.training.packs


def test_tied_heads_have_one_gradient_from_both_ends():
    module = hugging_face("llama", tie_word_embeddings=True).eval()
    ids, lengths = pad_rows(ROWS)
    found = Policy(adapt(module))(ids, lengths)
    weight = module.get_input_embeddings().weight
    assert weight is module.get_output_embeddings().weight
    (got,) = torch.autograd.grad(found.sum(), [weight])
    truth = sum(values.sum() for values in alone(module, ROWS))
    assert torch.allclose(got, torch.autograd.grad(truth, [weight])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Granite", {"logits_scaling": 8.0}),
    ],
)
def test_softcaps_and_scales_of_heads_are_respected(kind, changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, f"{kind}ForCausalLM")(config).eval().double()
    model = adapt(module)
    assert model.training is not None
    ids, lengths = pad_rows(ROWS)
    found = Policy(model)(ids, lengths)
    for row, values, truth in zip(ROWS, found, alone(module, ROWS), strict=True):
        assert torch.allclose(values[: len(row)], truth, atol=1e-6, rtol=0)


class Doubled(nn.Module):
    """A head that transformers' own code would not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) * 2


def test_a_head_of_any_kind_is_called_as_it_is():
    module = hugging_face("llama").eval()
    module.lm_head = Doubled(module.lm_head)
    model = adapt(module)
    assert model.training is not None and model.training.head().weight is None
    ids, lengths = pad_rows(ROWS)
    found = Policy(model)(ids, lengths)
    for row, values, truth in zip(ROWS, found, alone(module, ROWS), strict=True):
        assert torch.allclose(values[: len(row)], truth, atol=1e-9, rtol=0)


def test_logits_that_are_changed_behind_the_head_are_taken_whole():
    """The class's own forward caps them; nothing in the configuration says so."""
    transformers = pytest.importorskip("transformers")

    class Capped(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2.0 * torch.tanh(output.logits / 2.0)
            return output

    module = Capped(hugging_face("llama").config).double().eval()
    model = adapt(module)
    assert model.training is None
    ids, lengths = pad_rows(ROWS)
    found = Policy(model)(ids, lengths)
    for row, values, truth in zip(ROWS, found, alone(module, ROWS), strict=True):
        assert torch.allclose(values[: len(row)], truth, atol=1e-9, rtol=0)


def test_no_targets_give_zeros_and_gradients_of_zero_for_all_weights():
    """Siblings wait for a gradient of each weight, whatever this process's rows are."""
    module = hugging_face("llama")
    ids, lengths = pad_rows(ROWS)
    found = Policy(adapt(module))(ids, lengths, torch.zeros_like(ids, dtype=torch.bool))
    found.sum().backward()
    assert not found.any()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_only_the_tokens_that_are_wanted_meet_the_head():
    module, seen = hugging_face("llama"), []
    model = adapt(module)
    module.lm_head = Doubled(module.lm_head)  # not linear: it is called, and can be watched
    module.lm_head.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    ids, lengths = pad_rows(ROWS)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, 4] = targets[1, 12] = targets[5, 1] = True
    Policy(model)(ids, lengths, targets)
    assert seen == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient_and_keeps_fewer_tensors(kind):
    module = hugging_face(kind).train()
    ids, lengths = pad_rows(ROWS)
    model = adapt(module)
    policy = Policy(model)

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept: dict[int, int] = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with dropout_set(module, 0.0):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = policy(ids, lengths).sum()
            found = torch.autograd.grad(loss, list(module.parameters()))
        return list(found), sum(kept.values())

    plain, all_bytes = gradients()
    with model.checkpointing():
        again, fewer_bytes = gradients()
    after, _ = gradients()
    assert fewer_bytes < 0.8 * all_bytes
    for one, two, three in zip(plain, again, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


@pytest.mark.parametrize("module", [Recurrent(), transformer()], ids=["plain", "x-transformers"])
def test_models_that_cannot_compute_layers_again_say_so(module):
    with pytest.raises(AdapterError, match=r"gradient_checkpointing.*transformers"):
        adapt(module).checkpointing()


def test_attention_dropout_reaches_packed_rows_while_training_alone():
    module = hugging_face("llama")
    ids, lengths = pad_rows(ROWS)
    policy = Policy(adapt(module))
    with dropout_set(module, 0.5), torch.no_grad():
        module.eval()
        assert torch.equal(policy(ids, lengths), policy(ids, lengths))
        module.train()
        assert not torch.equal(policy(ids, lengths), policy(ids, lengths))


def test_groups_of_packed_rows_hold_as_many_tokens_as_they_may():
    """Pairs of 19, 14 and 4 tokens that go through the model, the prompt of the first once."""
    rows = [[ROWS[0], ROWS[1]], [ROWS[3], ROWS[4]], [ROWS[2]]]
    model = adapt(hugging_face("llama"))
    assert grouped(model, rows, token_budget=37) == [[2, 1, 0]]
    assert grouped(model, rows, token_budget=36) == [[2, 1], [0]]
    assert grouped(model, rows, token_budget=37, max_rows=2) == [[2, 1], [0]]
    assert grouped(model, rows, token_budget=1) == [[2], [1], [0]]


def test_groups_of_padded_rows_count_their_padding(caplog):
    """Two sequences a row, so half the budget: 16 columns for pairs of 16, two rows are 32."""
    rows = [[ROWS[0], ROWS[1]], [ROWS[3], ROWS[4]]]
    with caplog.at_level(logging.ERROR):
        model = adapt(transformer("alibi"))
    assert grouped(model, rows, token_budget=64) == [[1, 0]]
    assert grouped(model, rows, token_budget=63) == [[1], [0]]


@pytest.mark.parametrize(
    ("given", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
)
def test_short_rows_attend_in_float32_where_products_are_narrow(given, autocast):
    """Values and gradients are those of float64 but for the rounding of what comes and goes."""
    generator = torch.Generator().manual_seed(0)
    rows = [list(range(60 + i)) for i in range(2)] + [list(range(9, 70))]
    ids, lengths = pad_rows(rows)
    count = packed_length(rows)
    shapes = [(1, 4, count, 16), (1, 2, count, 16), (1, 2, count, 16), (1, 4, count, 16)]
    *inputs, slopes = (torch.randn(s, generator=generator).bfloat16() for s in shapes)

    def attended(dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        q, k, v = (t.to(dtype).requires_grad_() for t in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = Packing(ids, lengths, CPU).attend(0, q, k, v)
        return [out, *torch.autograd.grad(out, [q, k, v], slopes.to(out.dtype))]

    found, truth = attended(given, autocast), attended(torch.float64, False)
    assert [t.dtype for t in found] == [torch.bfloat16, given, given, given]
    for value, exact in zip(found, truth, strict=True):
        assert (value - exact).norm() < 1.3 * (exact.bfloat16() - exact).norm()


def test_only_narrow_attention_of_short_rows_on_a_cpu_is_widened(monkeypatch):
    """Float64 stays what it is, under autocast too; a row of more than SHORT keys stays narrow."""
    seen = []
    monkeypatch.setattr(
        packing, "causal_attention", lambda q, k, v, *_, **__: (seen.append(q.dtype), v)[1]
    )
    for dtype, autocast, length in [
        (torch.bfloat16, False, packing.SHORT),
        (torch.bfloat16, False, packing.SHORT + 1),
        (torch.float32, False, 4),
        (torch.float64, True, 4),
        (torch.float16, False, 4),
    ]:
        ids = torch.zeros(1, length, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            qkv = torch.randn(3, 1, 1, length, 2).to(dtype)
            Packing(ids, torch.tensor([length]), CPU).attend(0, *qkv)
    f32, f64 = torch.float32, torch.float64
    assert seen == [f32, torch.bfloat16, f32, f64, f32]


def test_attention_with_noise_of_its_own_drops_by_blocks_on_a_cpu(monkeypatch):
    """Runs of version 0.1.0 have none, and draw as they did."""
    counted = []

    def dropped(q, k, v, mask, **settings):
        counted.append(settings["dropout"])
        return v

    monkeypatch.setattr(packing, "dropped_attention", dropped)
    ids = torch.zeros(1, 5, dtype=torch.long)
    qkv = torch.randn(3, 1, 1, 5, 2)
    for dropout, noise in [
        (0.5, None),
        (0.0, RowNoise(1, pytest.fail)),
        (0.5, RowNoise(1, pytest.fail)),
    ]:
        if noise is not None:
            noise.begin([(0, 0)])
        Packing(ids, torch.tensor([5]), CPU, noise=noise).attend(0, *qkv, dropout=dropout)
        assert counted == [0.5] * (noise is not None and dropout > 0)
