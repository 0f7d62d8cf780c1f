"""Dropout is a row's own: the cut of a step into micro-batches changes nothing but rounding."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from self_rewarding_lm.models.noise import RowNoise
from self_rewarding_lm.records import PreferencePair, stable_hash
from self_rewarding_lm.training.fit import Fit
from self_rewarding_lm.training.objectives import PreferenceObjective
from self_rewarding_lm.training.reference import PairSums
from tests.support.hf_models import tiny
from tests.support.models import (
    VOCAB,
    Recurrent,
    context,
    lively,
    run_of_format_1,
    stage_dir,
    transformer,
    transformer64,
)
from tests.training.test_fit import PAIRS, fit, optim, pairs, supervised, weights_of

RATE = 0.4
DIM = 8
CUTS = [{"micro_batch_size": 1}, {"micro_batch_tokens": 20}]


class Attending(nn.Module):
    """One layer of causal attention and a feed-forward part; `attend` is a method of each kind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, DIM)
            self.qkv = nn.Linear(DIM, 3 * DIM)
            self.layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=True)
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(DIM, VOCAB)
        lively(self)

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden + self.attend(hidden))

    def attend(self, hidden):
        return self.dropout(hidden)

    def heads(self, hidden):
        q, k, v = self.qkv(hidden).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v  # (b, h, t, d) each


class Eager(Attending):
    def attend(self, hidden):
        q, k, v = self.heads(hidden)
        sees = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        shares = (q @ k.mT).masked_fill(~sees, -torch.inf).softmax(dim=-1)
        return (self.dropout(shares) @ v).transpose(1, 2).flatten(2)


class SingleHead(Attending):
    """Its scores (b, t, t) have the shape of hidden states of rows of DIM tokens."""

    def attend(self, hidden):
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        sees = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        shares = (q @ k.mT).masked_fill(~sees, -torch.inf).softmax(dim=-1)
        return F.dropout(shares, self.dropout.p, self.training) @ v


class HeadsFirst(Eager):
    def attend(self, hidden):
        q, k, v = (t.flatten(0, 1) for t in self.heads(hidden))  # (b h, t, d)
        sees = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        shares = self.dropout((q @ k.mT).masked_fill(~sees, -torch.inf).softmax(dim=-1))
        return (shares @ v).unflatten(0, (len(hidden), -1)).transpose(1, 2).flatten(2)


class Fused(Attending):
    def attend(self, hidden):
        rate = self.dropout.p if self.training else 0.0
        q, k, v = self.heads(hidden)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Masked(Attending):
    def attend(self, hidden):
        rate = self.dropout.p if self.training else 0.0
        sees = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        mask = sees.expand(len(hidden), 1, -1, -1)
        out = F.scaled_dot_product_attention(*self.heads(hidden), mask, rate)
        return out.transpose(1, 2).flatten(2)


class OfTorch(Attending):
    def attend(self, hidden):
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1]).to(hidden)
        return self.layer(hidden, mask, is_causal=True)


class TimeFirst(Attending):
    def attend(self, hidden):
        return self.dropout(hidden.transpose(0, 1)).transpose(0, 1)


class Flat(Attending):
    def attend(self, hidden):
        return self.dropout(hidden.flatten(0, 1)).view_as(hidden)


class Whole(Attending):
    """Whole channels are dropped, and whole tokens."""

    def attend(self, hidden):
        channels = F.dropout1d(hidden.mT, self.dropout.p, self.training).mT
        return channels + F.dropout1d(hidden, self.dropout.p, self.training)


class InPlace(Attending):
    def attend(self, hidden):
        return F.dropout(hidden * 2, self.dropout.p, self.training, inplace=True)


class Checkpointed(Eager):
    def attend(self, hidden):
        first = checkpoint(super().attend, hidden, use_reentrant=False)
        return checkpoint(super().attend, first, use_reentrant=False)


def lora(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.1, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively(peft.get_peft_model(tiny("llama", VOCAB, dtype=torch.float64), config))


KINDS = {
    **{kind.__name__: kind for kind in Attending.__subclasses__()},
    **{kind.__name__: kind for kind in (Attending, HeadsFirst, Checkpointed)},
    "recurrent": lambda: Recurrent(dropout=0.1),
    "x-transformers": lambda: transformer64(attn_dropout=0.1, ff_dropout=0.1),
    "x-transformers, its own attention": lambda: transformer(
        attn_dropout=0.1, ff_dropout=0.1, attn_pre_talking_heads=True
    ),
    "llama": lambda: tiny("llama", VOCAB, dtype=torch.float64),
    "gpt2": lambda: tiny("gpt2", VOCAB, dtype=torch.float64),
    "lora": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(target_modules=["q_proj", "down_proj"], use_dora=True),
}


def preferences():
    reference = [PairSums(-3.0 - i, -4.0 + i) for i in range(len(PAIRS))]
    return PreferenceObjective(pairs(), reference, 0.3)


def trained(kind, folder, objective, dropout=RATE, **cut):
    module = KINDS[kind]().double()
    fit(module, folder, objective, optim(**cut), dropout=dropout)
    return weights_of(module)


def largest(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_with_dropout_is_the_same_for_any_cut(kind, tmp_path, caplog):
    whole = trained(kind, tmp_path / "whole", supervised())
    for i, cut in enumerate(CUTS):
        assert largest(trained(kind, tmp_path / str(i), supervised(), **cut), whole) < 1e-9
    assert largest(trained(kind, tmp_path / "none", supervised(), dropout=0.0), whole) > 1e-4
    assert "cannot be drawn for each row" not in caplog.text


@pytest.mark.parametrize("kind", ["Eager", "x-transformers", "lora"])
def test_pairs_with_dropout_are_the_same_for_any_cut(kind, tmp_path):
    whole = trained(kind, tmp_path / "whole", preferences())
    for i, cut in enumerate(CUTS):
        assert largest(trained(kind, tmp_path / str(i), preferences(), **cut), whole) < 1e-9


def test_pairs_of_one_prompt_share_it_within_a_pair_alone(tmp_path):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]  # long enough to be shared
    alike = [PreferencePair(f"stage/{i}/0", (*prompt,), (i, i), (i + 1,)) for i in range(4)]

    def moved(name, **cut):
        objective = PreferenceObjective(alike, [PairSums(-3.0, -4.0)] * 4, 0.3)
        return trained("x-transformers", tmp_path / name, objective, **cut)

    assert largest(moved("cut", **CUTS[0]), moved("whole")) < 1e-9


@pytest.mark.parametrize("cut", [{}, CUTS[0]], ids=str)
def test_gradient_checkpointing_drops_the_same_units(cut, tmp_path):
    plain = trained("lora", tmp_path / "plain", supervised())
    again = trained("lora", tmp_path / "again", supervised(), gradient_checkpointing=True, **cut)
    assert largest(again, plain) < 1e-9


class Noisy(Attending):
    def attend(self, hidden):
        return hidden + torch.randn_like(hidden) if self.training else hidden


class OverParts(Attending):
    """Dropout of something in which no row can be told."""

    def attend(self, hidden):
        return hidden + self.dropout(hidden.flatten()).view_as(hidden)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Noisy, "random numbers are drawn beside those of dropout layers"),
        (OverParts, r"dropout of a tensor of shape \(384,\)"),
        (lambda: transformer64(layer_dropout=0.1), "layer_dropouts? leaves out more than units"),
    ],
)
def test_what_cannot_be_a_rows_own_is_said_once(make, words, tmp_path, caplog):
    fit(make().double(), tmp_path, supervised(), optim(epochs=2), dropout=RATE)
    said = [r.message for r in caplog.records if "cannot be drawn for each row" in r.message]
    assert len(said) == 1 and re.search(words, said[0])


def test_units_are_dropped_at_the_rate_and_the_others_made_larger():
    noise = RowNoise(1, pytest.fail)
    noise.begin([(0, 0), (7, 0)])
    noise.lay_out(2, 500, [(0, 0, 500), (1, 500, 300)], padded=True)
    x = torch.ones(2, 500, 64)
    with noise:
        first, second = F.dropout(x, 0.25), F.dropout(x, 0.25)
    for out in (first, second):
        assert out[0].unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert float((out[0] == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(first, second) and not torch.equal(first[0, :300], first[1, :300])


def test_a_run_of_an_earlier_version_draws_as_it_did(tmp_path):
    """Its noise came from the global random state of a step, whatever row a unit is of."""
    module = Recurrent(dropout=RATE).double()
    ctx = replace(context(module), run=run_of_format_1())
    seen = []
    module.dropout.register_forward_hook(lambda part, args, out: seen.append((args[0], out)))
    Fit(ctx, stage_dir(ctx, tmp_path), supervised(), optim(), dropout=RATE).run()
    with torch.random.fork_rng():
        torch.manual_seed(stable_hash(0, "stage", "dropout", 0, 0, 0))
        assert torch.equal(seen[0][1], F.dropout(seen[0][0], RATE))


def test_another_kernel_of_attention_is_used_and_stays_where_it_was_put(monkeypatch):
    """Libraries of kernels put theirs in the place of torch's function."""
    torchs, asked = F.scaled_dot_product_attention, []

    def kernel(*args, **options):
        asked.append(args[0].shape)
        return torchs(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    noise = RowNoise(1, pytest.fail)
    noise.begin([(0, 0), (7, 0)])
    noise.lay_out(2, 5, [(0, 0, 5), (1, 5, 3)], padded=True)
    q = torch.ones(2, 1, 5, 4)
    with noise:
        F.scaled_dot_product_attention(q, q, q, dropout_p=RATE)
        F.scaled_dot_product_attention(q, q, q)
    assert asked == [(1, 1, 5, 4), (1, 1, 3, 4), (2, 1, 5, 4)]
    assert F.scaled_dot_product_attention is kernel
