"""Every kind of model behind one interface: cached and ragged equals whole and alone."""

import logging

import pytest
import torch
from torch import nn
from x_transformers import AutoregressiveWrapper, Encoder, TransformerWrapper

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models import families
from self_rewarding_lm.models import trial as base
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import evaluating
from self_rewarding_lm.models.interface import Plan
from self_rewarding_lm.models.plain import PlainModel
from self_rewarding_lm.models.policy import Policy, dropout_set
from self_rewarding_lm.models.x_transformers import XTransformersModel
from tests.support.models import (
    KINDS,
    KINDS64,
    LIMIT,
    VOCAB,
    Fixed,
    Recurrent,
    Successor,
    WithLogits,
    last_logits,
    lively,
    started,
    transformer,
    transformer64,
    untrained,
)

CACHED = [kind for kind in KINDS if kind not in ("uncached", "plain", "logits")]
RAGGED = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3]]


def ragged_error(module: nn.Module) -> float:
    """The largest error of cached ragged decoding: rows repeated, dropped and put in other order.

    The third choice drops the row that was the longest at the start.
    """
    generator = torch.Generator().manual_seed(0)
    model = adapt(module)
    rows, errors = [list(row) for row in RAGGED], []
    with torch.no_grad(), evaluating(module):
        logits, cache = started(model, rows)
        for chosen in ([0, 1, 2, 3], [2, 1, 1, 3, 0], [4, 3, 0, 3], [1, 2], [0]):
            cache.select(chosen)
            rows, logits = [list(rows[i]) for i in chosen], logits[chosen]
            for step in range(3):
                whole = torch.stack([last_logits(module, row) for row in rows])
                errors.append((logits - whole).abs().max())
                if step < 2:
                    tokens = torch.randint(VOCAB, (len(rows),), generator=generator)
                    logits = cache.extend(tokens)
                    rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
    return float(torch.stack(errors).max())  # the max of a NaN is NaN


@pytest.mark.parametrize("kind", KINDS)
def test_cached_ragged_rows_give_the_logits_of_whole_rows_alone(kind):
    assert ragged_error(KINDS[kind]()) < 1e-5


@pytest.mark.parametrize("kind", KINDS64)
def test_in_float64_cached_rows_are_exact(kind):
    assert ragged_error(KINDS64[kind]()) < 1e-10


@pytest.mark.parametrize("kind", CACHED)
def test_x_transformers_are_decoded_with_a_cache(kind):
    assert adapt(KINDS[kind]()).caches


@pytest.mark.parametrize("positions", ["absolute", "rotary", "alibi"])
def test_x_transformers_in_float64_are_decoded_with_a_cache(positions):
    assert adapt(transformer64(positions)).caches


def test_a_cached_step_sends_one_token_a_row_through_the_model():
    module = transformer()
    model, shapes = adapt(module), []
    module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad(), evaluating(module):
        _, cache = started(model, RAGGED)
        cache.extend(torch.tensor([1, 2, 3, 4]))
        cache.select([2, 0])
        cache.extend(torch.tensor([1, 2]))
    assert shapes == [(1, sum(map(len, RAGGED))), (1, 4), (1, 2)]  # no padding


@pytest.mark.parametrize("positions", ["absolute", "rotary", "none", "grouped"])
def test_attention_of_x_transformers_is_ours_for_a_forward_alone(positions):
    module = transformer(positions)
    model = adapt(module)
    assert model.attends
    with torch.no_grad(), evaluating(module):
        _, session = started(model, RAGGED)
        with pytest.raises(IndexError):
            session.extend(torch.tensor([1, 2, 3, VOCAB]))  # an id that the model does not have
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("positions", ["alibi", "t5", "dynamic", "memory", "xpos"])
def test_attention_that_is_more_than_causal_stays_with_x_transformers(positions, caplog):
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model = adapt(transformer(positions))
        model.refresh()  # as before each generation
    assert ["with its own cache" in record.message for record in caplog.records] == [True]
    assert model.caches and not model.attends
    assert not model.session(Plan((), 3, 1, 1)).joins


def test_more_rows_than_positions_and_prompts_that_fill_the_model_together():
    """A packed row is no longer than the model's positions; too many rows take the other way."""
    module = transformer64("absolute")
    model = adapt(module)
    assert model.session(Plan((), 3, 1, LIMIT)).joins
    assert not model.session(Plan((), 3, 1, LIMIT + 1)).joins
    rows = [[(3 * i + j) % VOCAB for j in range(10)] for i in range(5)]  # 50 tokens
    with torch.no_grad(), evaluating(module):
        logits, _ = started(model, rows)
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, last_logits(module, row), rtol=0, atol=1e-10)


def test_dropping_the_longest_row_frees_its_columns():
    model = adapt(transformer("alibi"))  # its cache is its own
    with torch.no_grad(), evaluating(model.module):
        _, cache = started(model, RAGGED)
        cache.select([0, 2])
    assert cache._running.state.attn_intermediates[0].cached_kv[0].shape[-2] == 3


def test_dropping_the_longest_row_shortens_the_rows_of_a_plain_model():
    module, shapes = Recurrent(), []
    model = adapt(module)
    module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad(), evaluating(module):
        _, cache = started(model, RAGGED)
        cache.select([0, 2])
        cache.extend(torch.tensor([1, 1]))
    assert shapes == [(4, 7), (2, 4)]


@pytest.mark.parametrize(
    "options",
    [{"shift_tokens": 1}, {"num_memory_tokens": 2}, {"attn_selective": True}],
    ids=str,
)
def test_a_transformer_that_cannot_cache_warns_once_and_is_right(options, caplog):
    module = transformer(**options)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model = adapt(module)
    assert not model.caches
    assert ["cannot be decoded with a cache" in r.message for r in caplog.records] == [True]
    assert ragged_error(module) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"shift_tokens": 1, "zero_init_branch_output": True},
        {"attn_data_dependent_alibi": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_cache_that_was_accepted_before_training_is_right_after_it(options, seed):
    module = untrained(seed=seed, **options)
    model = adapt(module)
    lively(module)
    model.refresh()  # as the engine does before each generation
    rows = [[3, 1, 4, 1, 5, 9], [2, 6]]
    with torch.no_grad(), evaluating(module):
        _, cache = started(model, rows)
        logits = cache.extend(torch.tensor([2, 2]))
    whole = torch.stack([last_logits(module, [*row, 2]) for row in rows])
    assert torch.allclose(logits, whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_gradients_and_flags_are_as_before_after_use(kind):
    module = KINDS[kind]()
    parts = list(module.modules())
    for i, part in enumerate(parts):
        part.training = i % 3 == 0
    parameters = list(module.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    modes = [part.training for part in parts]
    weights = [p.detach().clone() for p in parameters]

    model = adapt(module)
    with torch.no_grad(), evaluating(model.module):
        _, cache = started(model, RAGGED)
        cache.extend(torch.tensor([1, 2, 3, 4]))

    assert [part.training for part in parts] == modes
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(p.grad is None for p in (parameters[0], *parameters[2:]))
    assert all(map(torch.equal, weights, parameters))


def test_modes_are_restored_when_the_work_inside_fails():
    module = Recurrent()
    module.head.eval()
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert not module.training
        raise ZeroDivisionError
    assert module.training and not module.head.training


@pytest.mark.parametrize("kind", KINDS)
def test_logits_carry_gradients_and_ignore_the_padding(kind):
    module = KINDS[kind]().eval()
    short, padded = torch.tensor([[3, 1, 4]]), torch.tensor([[3, 1, 4, 9, 9]])
    logits = adapt(module).logits(padded)
    assert torch.allclose(logits[:, :3], adapt(module).logits(short), atol=1e-5)
    logits.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize(
    ("errors", "least"),
    [([0.5], 0.5), ([9.0, 1.0], 1.0), ([9.0, 7.0, 8.0], 7.0)],
)
def test_rounding_of_one_odd_row_does_not_cost_a_model_its_cache(errors, least, monkeypatch):
    model, left, rows = adapt(transformer()), iter(errors), []
    monkeypatch.setattr(
        base, "_session_against_whole", lambda _, row: rows.append(row) or next(left)
    )
    assert base.session_error(model) == least
    assert len({tuple(row) for row in rows}) == len(rows) == len(errors)
    assert all(0 <= token < VOCAB for row in rows for token in row)


def test_an_autoregressive_wrapper_is_taken_off():
    net = transformer()
    model = adapt(AutoregressiveWrapper(net))
    ids = torch.tensor(RAGGED[1:2])
    assert model.transformer is net
    assert torch.equal(model.logits(ids), net(ids))


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        (transformer(), LIMIT),
        (AutoregressiveWrapper(transformer()), LIMIT),
        (transformer("rotary", max_seq_len=0), None),
        (Recurrent(), None),
        (Successor(VOCAB, max_seq_len=9), 9),
    ],
    ids=["transformer", "wrapped", "endless", "plain", "with a limit"],
)
def test_vocabulary_and_limit_are_found(module, limit):
    model = adapt(module)
    assert (model.vocab, model.max_len) == (VOCAB, limit)


def test_a_config_with_max_position_embeddings_gives_the_limit():
    module = Recurrent()
    module.config = type("Config", (), {"max_position_embeddings": 31})()
    assert adapt(module).max_len == 31


@pytest.mark.parametrize("limit", [2, 3, 6])
def test_a_transformer_with_very_few_positions_can_be_adapted(limit):
    model = adapt(transformer(max_seq_len=limit))
    assert model.max_len == limit


class Bidirectional(nn.Module):
    """Every token sees the mean of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        lively(self)

    def forward(self, ids):
        seen = self.embed(ids)
        return self.head(seen + seen.mean(dim=1, keepdim=True))


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(AdapterError, match="not causal"):
        adapt(Bidirectional())


def test_a_bidirectional_x_transformer_is_refused():
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    module = TransformerWrapper(num_tokens=VOCAB, max_seq_len=LIMIT, attn_layers=layers)
    with pytest.raises(AdapterError, match="not causal"):
        adapt(lively(module))


class Answer(nn.Module):
    """A model whose forward is the function it is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.answer = forward

    def forward(self, ids):
        return self.answer(ids)


@pytest.mark.parametrize(
    ("forward", "came"),
    [
        (lambda ids: torch.zeros(2, VOCAB), rf"\(2, {VOCAB}\)"),
        (lambda ids: torch.zeros(2, 1, VOCAB), rf"\(2, 1, {VOCAB}\)"),
        (lambda ids: torch.zeros(2, VOCAB, 2), rf"\(2, {VOCAB}, 2\)"),
        (lambda ids: (torch.zeros(2, 2, VOCAB), None), "tuple"),
        (lambda ids: None, "NoneType"),
    ],
    ids=["two axes", "last token only", "transposed", "tuple", "nothing"],
)
def test_logits_of_the_wrong_shape_are_refused_with_both_shapes(forward, came):
    with pytest.raises(AdapterError, match=rf"\(2, 2, vocabulary\).*got {came}"):
        adapt(Answer(forward))


def test_a_forward_that_fails_is_an_adapter_error_with_its_cause():
    def needs_floats(ids):
        return torch.nn.functional.linear(ids, torch.zeros(4, 2))

    with pytest.raises(AdapterError, match="RuntimeError") as caught:
        adapt(Answer(needs_floats))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(AdapterError, match="function"):
        adapt(lambda ids: ids)


@pytest.mark.parametrize("kind", KINDS64)
def test_the_policy_gives_log_probs_of_each_token_given_those_before(kind):
    module = KINDS64[kind]()
    ids = torch.tensor([[3, 1, 4, 1], [0, 0, 7, 2]])
    logprobs = Policy(adapt(module)).eval()(ids)
    for row, found in zip(ids.tolist(), logprobs, strict=True):
        by_hand = [0.0]
        for i in range(1, len(row)):
            by_hand.append(last_logits(module, row[:i]).log_softmax(-1)[row[i]].item())
        assert found.tolist() == pytest.approx(by_hand, abs=1e-10)


def test_the_policy_holds_the_users_module_and_no_copy():
    module = Recurrent()
    policy = Policy(adapt(module))
    assert [id(p) for p in policy.parameters()] == [id(p) for p in module.parameters()]


def test_dropout_is_set_and_restored_also_after_an_error():
    module = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.3))
    with pytest.raises(ZeroDivisionError), dropout_set(module, 0.5):
        assert [module[0].p, module[2].p] == [0.5, 0.5]
        raise ZeroDivisionError
    assert [module[0].p, module[2].p] == [0.1, 0.3]


@pytest.mark.parametrize("options", [{}, {"attn_flash": True}], ids=["plain", "flash"])
def test_dropout_acts_on_attention_and_feed_forward_of_x_transformers(options):
    module = transformer(**options).train()
    ids = torch.tensor([RAGGED[1]])
    with dropout_set(module, 0.5):
        assert not torch.allclose(module(ids), module(ids))
    assert torch.allclose(module(ids), module(ids))


def test_dropout_without_layers_for_it_warns_and_zero_does_not(caplog):
    module = WithLogits(Fixed([1.0, 2.0]))
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        with dropout_set(module, 0.0):
            pass
        assert not caplog.records
        with dropout_set(module, 0.1):
            pass
    assert ["no effect" in r.message for r in caplog.records] == [True]


class Halved(PlainModel):
    """A family of one's own: modules that mark themselves, with half of the logits they give."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return hasattr(module, "is_halved")

    def logits(self, ids):
        return super().logits(ids) / 2


def test_a_family_is_one_class_and_one_row(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (Halved, *families.FAMILIES))
    module, ids = transformer(), torch.tensor([[3, 1, 4]])
    assert type(adapt(module)) is XTransformersModel
    module.is_halved = True
    model = adapt(module)
    with torch.no_grad(), evaluating(module):
        assert type(model) is Halved and model.logits(ids).equal(module(ids) / 2)


def test_each_kind_of_module_has_its_family():
    assert [f.__name__ for f in families.FAMILIES] == [
        "HuggingFaceModel",
        "XTransformersModel",
        "PlainModel",
    ]
    assert type(adapt(AutoregressiveWrapper(transformer()))) is XTransformersModel
    assert type(adapt(Recurrent())) is PlainModel
