"""Models of x-transformers: which our attention stands in for, before and after training."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan
from self_rewarding_lm.models.logprobs import token_logprobs
from self_rewarding_lm.models.policy import Policy
from tests.support.models import VOCAB, lively, transformer, untrained

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
ROWS = [[*PROMPT, 8, 9, 7], [*PROMPT, 9, 3, 2, 3, 8, 4], [2, 7, 1, 8], [7, 7]]
KNOWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"attn_flash": True},
    "rotary": {"rotary_pos_emb": True},
    "one head of keys": {"attn_one_kv_head": True},
    "latent keys": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
    "normed": {"attn_qk_norm": True, "sandwich_norm": True, "use_rmsnorm": True},
    "gates": {"attn_gate_values": True, "gate_residual": True, "ff_glu": True, "ff_swish": True},
    "streams": {"num_residual_streams": 2},
    "values of the first layer": {"add_value_residual": True, "attn_laser": True},
    "views of layers": {"integrate_layers": True},
    "scales": {"use_layerscale": True, "reinject_input": True, "softclamp_output": True},
    "skips": {"unet_skips": True},
    "layers with the same weights": {"weight_tie_layers": True},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "polar": {"polar_pos_emb": True},
    "sigmoid": {"attn_sigmoid": True},
    "hard": {"attn_hard": True},
    "a function of one's own": {"attn_custom_attn_fn": lambda scores: scores.exp() / 9},
    "selective": {"attn_selective": True},
    "heads of keys": {"heads": 4, "attn_kv_heads": 2},
    "heads of keys, flash": {"heads": 4, "attn_kv_heads": 2, "attn_flash": True},
    "contextual positions": {"attn_use_cope": True},
    "talking heads before": {"attn_pre_talking_heads": True},
    "talking heads behind": {"attn_post_talking_heads": True},
    "talking heads around": {"attn_pre_scale_post_talking_heads": True},
    "sinks": {"attn_head_learned_sink": True},
    "l2 distance": {"attn_l2_distance": True},
    "signs": {"attn_cog_signed": True},
    "zero keys": {"attn_add_zero_kv": True},
    "clamped": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
    "window": {"attn_max_attend_past": 4},
    "scores of the layer before": {"residual_attn": True},
    "distances": {"attn_use_rel_proj_pos_bias": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "shifted": {"shift_tokens": 1},
    "xpos": {"rotary_xpos": True},
}


class Mixing(nn.Module):
    """A recurrent layer beside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(16, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


@torch.no_grad()
def errors(module: nn.Module, model: Any) -> tuple[float, float]:
    """The largest errors of log-probs in training and of logits in a session, row by row."""
    ids, lengths = pad_rows(ROWS)
    found = Policy(model).eval()(ids, lengths)
    truth = [token_logprobs(module(torch.tensor([row])), torch.tensor([row]))[0] for row in ROWS]
    trained = [(t - f[: len(t)]).abs().max() for t, f in zip(truth, found, strict=True)]
    decoded, rows = [], [list(row) for row in ROWS]
    session = model.session(Plan((), 16, max_new=2, max_rows=len(rows)))
    logits = session.prefill(rows)
    session.add(range(len(rows)))
    for step in range(3):
        for row, of_row in zip(rows, logits, strict=True):
            decoded.append((module(torch.tensor([row]))[0, -1] - of_row).abs().max())
        if step < 2:
            tokens = torch.tensor([(5 * i + step) % VOCAB for i in range(len(rows))])
            rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
            logits = session.extend(tokens)
    return float(max(trained)), float(max(decoded))


@pytest.mark.parametrize("kind", [*KNOWN, *UNKNOWN])
def test_a_model_is_right_however_its_weights_change_after_it_was_tried(kind):
    """With branches that begin at zero, attention of any kind gives the same logits."""
    module = untrained(zero_init_branch_output=True, **(KNOWN | UNKNOWN)[kind]).eval()
    model = adapt(module)
    assert model.attends is (kind in KNOWN)
    assert ("attends" in model.refused) is not model.attends
    lively(module)
    trained, decoded = errors(module, model)
    assert trained < 5e-5 and decoded < 5e-5
    model.refresh()
    assert model.attends is (kind in KNOWN)


def hooked(module: TransformerWrapper) -> None:
    attend = module.attn_layers.layers[0][1].attend
    attend.register_forward_hook(lambda _, args, out: (out[0] * 2, out[1]))


def overridden(module: TransformerWrapper) -> None:
    attention: Any = module.attn_layers.layers[0][1]
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def of_a_class_of_ones_own(module: TransformerWrapper) -> None:
    attend = module.attn_layers.layers[0][1].attend
    attend.__class__ = type("MyAttend", (type(attend),), {})


def with_a_flag_of_a_later_version(module: TransformerWrapper) -> None:
    module.attn_layers.layers[0][1].attend.sees_the_future = True


def with_a_layer_beside(module: TransformerWrapper) -> None:
    attention = module.attn_layers.layers[0][1]
    attention.hybrid_module = Mixing()
    attention.hybrid_norms = nn.ModuleList([nn.Identity(), nn.Identity()])


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        overridden,
        of_a_class_of_ones_own,
        with_a_flag_of_a_later_version,
        with_a_layer_beside,
    ],
)
def test_parts_that_are_changed_by_hand_are_unknown(change: Callable[[TransformerWrapper], None]):
    module = transformer()
    change(module)
    assert not adapt(module).attends


def test_the_reason_names_the_part_and_the_setting(caplog):
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model = adapt(untrained(attn_head_learned_sink=True))
    reason = "attn_layers.layers.0.1.attend (Attend) has head_learned_sink"
    assert model.refused == {"attends": reason}
    assert reason in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_trial_costs_no_model_its_fast_way(dtype):
    module = transformer("rotary", attn_flash=True)
    with torch.autocast("cpu", dtype):
        model = adapt(module)
        model.refresh()
    assert model.attends and model.training is not None and model.training.packs


def test_weights_that_give_other_logits_refuse_the_way_and_lesser_ones_are_named(
    monkeypatch, caplog
):
    from self_rewarding_lm.models import x_transformers

    for error, attends, warned in ((0.9, True, False), (19.0, True, True), (21.0, False, False)):
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "self_rewarding_lm"):
            patch.setattr(x_transformers, "session_error", lambda model, error=error: error)
            model = adapt(transformer())
        assert model.attends is attends
        assert ("used all the same" in caplog.text) is warned
        assert ("rounding" in model.refused.get("attends", "")) is not attends


@pytest.mark.parametrize("scale", [None, 0.7])
def test_tied_embeddings_keep_their_head_which_is_computed_in_pieces(scale):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TransformerWrapper(
            num_tokens=VOCAB,
            max_seq_len=24,
            attn_layers=Decoder(dim=16, depth=1, heads=2, attn_dim_head=8),
            tie_embedding=True,
            tie_embedding_scale=scale,
        ).eval()
    model = adapt(lively(module))
    assert model.training is not None and model.training.packs
    assert model.training.head().weight is module.token_emb.emb.weight
    ids, lengths = pad_rows(ROWS)
    found = Policy(model)(ids, lengths)
    weights = [p for p in module.parameters() if p.requires_grad]
    truth = [token_logprobs(module(torch.tensor([row])), torch.tensor([row]))[0] for row in ROWS]
    for one, other in zip(found, truth, strict=True):
        assert torch.allclose(one[: len(other)], other, atol=1e-5)
    got = torch.autograd.grad(found.sum(), weights, allow_unused=True)
    expected = torch.autograd.grad(sum(t.sum() for t in truth), weights, allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
