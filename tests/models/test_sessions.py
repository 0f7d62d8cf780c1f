"""Sessions: whatever is shared, packed, reordered or added later, logits are those of whole rows.

The oracle is the bare module on one whole row, without padding and without a cache. What goes
through a model is counted at its embedding, where each id that is computed passes once.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers

from self_rewarding_lm import SamplingConfig, generate
from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.score_trie import build_trie
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Plan, TokenModel
from tests.support.hf_models import KINDS, SLIDING_WINDOW, tiny
from tests.support.models import (
    IN_FLOAT64,
    LIMIT,
    POSITIONS,
    Recurrent,
    last_logits,
    lively,
    transformer,
    transformer64,
)

VOCAB = 96
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
FOREVER = Decoding(temperature=0.0)


def documented() -> dict:
    """What the one block of code in docs/adapters.md defines."""
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


def own(kind: type[nn.Module] | None = None) -> nn.Module:
    """The model of docs/adapters.md, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively((kind or documented()["Decoder"])(VOCAB).double().eval())


def lora() -> nn.Module:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # else it would change nothing
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny("qwen2"), config).double().eval()


def drawn(name: str, size: float = 0.3, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A tiny random model of a class of transformers; size: of its weights."""
    config = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, f"{name}ForCausalLM")(config(**{**sizes, **options})).eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


MIXED = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA2 = {"attn_logit_softcapping": 5.0, "sliding_window": SLIDING_WINDOW, "head_dim": 8}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
CHUNKED = {
    "attention_chunk_size": 4,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
    "head_dim": 8,
    "attn_temperature_tuning": False,
}
LATENT = {  # heads whose values are narrower than their keys
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
}
LINEAR = {
    "head_dim": 8,
    "layer_types": MIXED,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    **EXPERTS,
}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
SINKS = {
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
GRIFFIN = {"lru_width": 32, "attention_window_size": 5, "block_types": ["recurrent", "attention"]}

HF = {kind: (lambda k=kind: tiny(k, dtype=torch.float64)) for kind in KINDS} | {
    "lora": lora,
    "dynamic rope": lambda: drawn("Llama", dtype=torch.float64, **DYNAMIC),
}
ATTENDING = {**HF, "own": own}
PADDED = {
    "soft-capped": lambda: drawn("Gemma2", **GEMMA2),
    "chunked": lambda: drawn("Llama4", dtype=torch.float64, **CHUNKED),
}
HYBRID = {
    "qwen3-next": lambda **kw: drawn("Qwen3Next", **kw, **LINEAR),
    "lfm2": lambda **kw: drawn("Lfm2", **kw, layer_types=["conv", "full_attention"]),
    "jamba": lambda **kw: drawn("Jamba", **kw, **JAMBA),
    "recurrent gemma": lambda **kw: drawn("RecurrentGemma", **kw, **GRIFFIN),
    "falcon-h1": lambda **kw: drawn("FalconH1", **kw, **FALCON),
}
FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}


@contextmanager
def tokens_through(module: nn.Module) -> Iterator[list[int]]:
    """How many ids each forward computes, padding included, from here on."""
    counts: list[int] = []
    parts = [p for p in module.modules() if isinstance(p, nn.Embedding)]
    ids = next(p for p in parts if p.num_embeddings in (VOCAB, SMALL))
    handle = ids.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    yield counts
    handle.remove()


def nodes_of(prompts: Sequence[Sequence[int]]) -> int:
    """Different beginnings of some prompts: the tokens that must be computed if all is shared."""
    return len({tuple(p[: n + 1]) for p in prompts for n in range(len(p))})


def worst(module: nn.Module, rows: Sequence[Sequence[int]], logits: Tensor) -> float:
    whole = torch.stack([last_logits(module, list(row)) for row in rows])
    return float((whole.double() - logits.double()).abs().max())  # the max of a NaN is NaN


# prompts with a common beginning, after which there are two families

ROOT = [(7 * i + 3) % VOCAB for i in range(20)]
ONE, OTHER = [5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [6, 1, 8, 0, 3, 3, 9, 8, 8]
PROMPTS = [
    ROOT + ONE,
    ROOT + ONE + [1],  # the one before is its beginning
    ROOT + ONE + [1, 5, 6],
    ROOT + ONE + [2],  # another last token
    ROOT + OTHER + [3],
    ROOT + OTHER + [4, 4],
    [*ROOT, 70],
]


@pytest.mark.parametrize("root", [0, 3, 20])
@pytest.mark.parametrize("kind", ATTENDING)
def test_prompts_that_share_beginnings_give_the_logits_of_whole_rows(kind, root):
    """The windows of gemma3 hold 5 tokens: less than a root of 20 and more than one of 3."""
    module = ATTENDING[kind]()
    model, generator = adapt(module), torch.Generator().manual_seed(0)
    with inferring(module), tokens_through(module) as counts:
        session = model.session(Plan(tuple(ROOT[:root]), 33, max_new=8, max_rows=14))
        first = session.prefill(PROMPTS[:3])
        logits = torch.cat([first, session.prefill(PROMPTS[3:])])
        session.add([n for n in range(len(PROMPTS)) for _ in range(2)])
        assert sum(counts) == nodes_of(PROMPTS)
        errors, rows = [], [list(p) for p in PROMPTS for _ in range(2)]
        logits = logits.repeat_interleave(2, dim=0)
        for step in range(6):
            errors.append(worst(module, rows, logits))
            tokens = torch.randint(VOCAB, (len(rows),), generator=generator)
            counts.clear()
            logits = session.extend(tokens)
            assert counts == [len(rows)], step
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        errors.append(worst(module, rows, logits))
    assert max(errors) < 1e-10 and not any(e != e for e in errors)


@pytest.mark.parametrize("kind", ["gemma3", "own"])
def test_a_prompt_that_comes_again_costs_one_token_for_its_logits(kind):
    module = ATTENDING[kind]()
    with inferring(module), tokens_through(module) as counts:
        session = adapt(module).session(Plan(tuple(ROOT), 33, max_new=1, max_rows=4))
        counts.clear()
        logits = session.prefill([PROMPTS[2], PROMPTS[2], PROMPTS[0]])
        assert counts == [13 + 1 + 1]  # its 13 tokens after the root; the last of ONE
        assert worst(module, [PROMPTS[2], PROMPTS[2], PROMPTS[0]], logits) < 1e-10


@pytest.mark.parametrize(
    "limits", [{}, {"max_rows": 2}, {"max_rows": 1}, {"max_prefill_tokens": 9}]
)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "lora", "own"])
def test_the_engine_computes_each_shared_beginning_once(kind, limits):
    """Three requests a prompt, in disorder. The first new token comes from the prompt's own
    logits, and after the last one nothing is computed."""
    module = ATTENDING[kind]()
    requests = [Request(tuple(p), 0, 1 + i % 3) for i, p in enumerate(PROMPTS * 3)]
    random.Random(0).shuffle(requests)
    model = adapt(module)
    with tokens_through(module) as counts:
        model.refresh()
        trial = sum(counts)  # which a module of one's own has before each generation
        done = list(LocalEngine(**limits).generate(model, requests, FOREVER))
    assert sorted(i for i, _ in done) == list(range(len(requests)))
    needed = nodes_of(PROMPTS) + sum(r.max_new_tokens - 1 for r in requests)
    assert sum(counts) == 2 * trial + needed


def test_samples_of_one_prompt_share_its_forward_in_x_transformers():
    module = transformer64("rotary", max_seq_len=64, vocab=VOCAB)
    requests = [Request(tuple(PROMPTS[0]), key, 3) for key in range(5)]
    model = adapt(module)
    with tokens_through(module) as counts:
        model.refresh()
        trial = sum(counts)  # which is made before each generation
        list(LocalEngine(max_rows=2).generate(model, requests, FOREVER))
    assert sum(counts) == 2 * trial + len(PROMPTS[0]) + 5 * 2


@pytest.mark.parametrize("kind", ["qwen3", "own"])
def test_a_rubric_is_computed_once_for_the_chances_of_scores_too(kind):
    """Scores 1, 12 and 13: paths (5), (5, 6) and (5, 7), so one node below the first is inner."""
    module = ATTENDING[kind]()
    trie = build_trie({1.0: (5,), 12.0: (5, 6), 13.0: (5, 7), 2.0: (8,)})
    rows = [tuple(p) for p in PROMPTS * 2]
    model = adapt(module)
    with tokens_through(module) as counts:
        model.refresh()
        trial = sum(counts)
        found = dict(LocalEngine(max_rows=3).chances(model, rows, trie, frozenset({6, 7})))
    needed = nodes_of(PROMPTS) + len(PROMPTS)  # a row after each prompt, token 5
    assert sum(counts) == 2 * trial + needed
    for i, row in enumerate(rows):
        first = last_logits(module, list(row)).softmax(-1)
        second = last_logits(module, [*row, 5]).softmax(-1)
        assert found[i][()].tokens == pytest.approx({5: float(first[5]), 8: float(first[8])})
        assert found[i][(5,)].tokens == pytest.approx({6: float(second[6]), 7: float(second[7])})
        assert found[i][(5,)].stop == pytest.approx(1 - float(second[6] + second[7]))


# rows that are repeated, dropped, put in another order and added later

SMALL = 17
SHORT = LIMIT - 10


def wandered(module: nn.Module, vocab: int, seed: int, model: TokenModel | None = None) -> float:
    """The largest error of a session with which all is done in turn that may be done with it."""
    model, draw = model or adapt(module), random.Random(seed)
    root = draw.choices(range(vocab), k=3)
    stems = [root + draw.choices(range(vocab), k=k) for k in (1, 4, 6)]
    prompts = [[*draw.choice(stems), *draw.choices(range(vocab), k=draw.randint(1, 5))] for _ in range(14)]  # fmt: skip
    held: dict[int, tuple[list[int], int]] = {}  # ids, and the forward in which they came
    rows: list[tuple[list[int], int]] = []
    errors = []
    with inferring(module):
        session = model.session(Plan(tuple(root), SHORT, max_new=10, max_rows=6))
        for _ in range(45):
            action = draw.choice(["prefill", "add", "add", "select", "extend", "extend", "extend"])
            if action == "prefill" and prompts and session.room():
                count = min(draw.randint(1, 3), len(prompts), session.room())
                some = [prompts.pop() for _ in range(count)]
                first = session.held
                errors.append(worst(module, some, session.prefill(some)))
                held |= {n: (ids, first) for n, ids in enumerate(some, first)}
            elif action == "add" and held and len(rows) < 6 and (session.joins or not rows):
                numbers = draw.choices(sorted(held), k=draw.randint(1, 6 - len(rows)))
                if not session.joins:  # those of one forward
                    numbers = [n for n in numbers if held[n][1] == held[numbers[0]][1]]
                session.add(numbers)
                rows += [([*held[n][0]], 0) for n in numbers]
                if draw.random() < 0.5:
                    session.release([numbers[0]])
                    del held[numbers[0]]
            elif action == "select" and rows:
                chosen = draw.choices(range(len(rows)), k=draw.randint(1, 6))
                chosen = chosen if draw.random() < 0.85 else []
                session.select(chosen)
                rows = [([*rows[i][0]], rows[i][1]) for i in chosen]
            elif action == "extend" and rows and all(n < 10 for _, n in rows):
                tokens = draw.choices(range(vocab), k=len(rows))
                logits = session.extend(torch.tensor(tokens))
                rows = [([*r, t], n + 1) for (r, n), t in zip(rows, tokens, strict=True)]
                errors.append(worst(module, [r for r, _ in rows], logits))
    assert len(errors) > 5
    return float(torch.tensor(errors).max())


@pytest.mark.parametrize("kind", ATTENDING)
def test_rows_may_be_repeated_dropped_reordered_and_added_later(kind):
    module = ATTENDING[kind]()
    model = adapt(module)
    assert model.caches
    for seed in range(2):
        assert wandered(module, VOCAB, seed, model) < 1e-10


def test_values_may_be_narrower_than_keys():
    module = drawn("DeepseekV3", dtype=torch.float64, **LATENT)
    model = adapt(module)
    assert model.attends
    assert wandered(module, VOCAB, 0, model) < 1e-5  # norms in float32


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_of_x_transformers_may_be_repeated_dropped_and_reordered(positions):
    exact = positions in IN_FLOAT64
    module = (transformer64 if exact else transformer)(positions)
    model = adapt(module)
    assert model.caches
    for seed in range(3):
        assert wandered(module, SMALL, seed, model) < (1e-10 if exact else 1e-5)


def test_rows_of_a_plain_module_may_be_repeated_dropped_and_reordered():
    module = Recurrent().double()
    assert max(wandered(module, SMALL, seed) for seed in range(3)) < 1e-10


# what cannot use our cache


def warnings_of(caplog, module: nn.Module) -> tuple[TokenModel, list[str]]:
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model = adapt(module)
        list(LocalEngine().generate(model, [Request((1, 2), 0, 2)] * 2, FOREVER))
    return model, [r.message for r in caplog.records if r.name.startswith("self_rewarding_lm")]


def greedy(module: nn.Module, prompt: Sequence[int], new: int) -> tuple[int, ...]:
    """The oracle: the likeliest token by whole forwards of one row."""
    row = list(prompt)
    for _ in range(new):
        row.append(int(last_logits(module, row).argmax()))
    return tuple(row[len(prompt) :])


def generated(module: nn.Module, prompts: Sequence[Sequence[int]], new: int):
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=new)
    found = generate(module, [torch.tensor(p) for p in prompts], sampling=sampling)
    return [c.ids for (c,) in found]


SEVERAL = [[3, 1, 4], [3, 1, 4, 1, 5, 9, 2, 6, 5], [9]]


@pytest.mark.parametrize("kind", PADDED)
def test_attention_of_another_kind_goes_by_transformers_own_cache(kind, caplog):
    module = PADDED[kind]()
    before = module.config._attn_implementation
    model, messages = warnings_of(caplog, module)
    assert ["transformers' own cache" in m for m in messages] == [True]
    assert model.caches and not model.attends and not model.session(Plan((), 3, 1, 1)).joins
    assert wandered(module, VOCAB, 0, model) < 5e-5
    assert generated(module, SEVERAL, 8) == [greedy(module, p, 8) for p in SEVERAL]
    assert module.config._attn_implementation == before


@pytest.mark.parametrize("kind", HYBRID)
def test_a_model_with_recurrent_layers_is_decoded_without_a_cache(kind, caplog):
    module = HYBRID[kind]()
    model, messages = warnings_of(caplog, module)
    assert ["cannot be decoded with a cache" in m for m in messages] == [True]
    assert not model.caches
    assert generated(module, SEVERAL, 5) == [greedy(module, p, 5) for p in SEVERAL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*HYBRID, "sinks"])
def test_a_cache_that_is_wrong_is_not_used_however_small_the_weights_were_at_first(kind, dtype):
    """Weights of the size that transformers draws hide what a cache leaves out until training."""
    if kind == "sinks":
        module = drawn("GptOss", size=0.02, dtype=dtype, **SINKS)
    else:
        module = HYBRID[kind](size=0.02, dtype=dtype)
    model = adapt(module)
    lively(module)
    model.refresh()  # as the engine does before each generation
    spread = last_logits(module, [3, 1, 4]).float().std()
    rounding = 1e-4 if dtype == torch.float32 else 0.1
    assert wandered(module, VOCAB, 0, model) < rounding * spread


class FailsError(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lora"])
def test_flags_are_as_before_also_when_a_forward_raises(kind):
    module = HF[kind]().train()
    model, calls = adapt(module), []
    base = module.get_base_model() if kind == "lora" else module
    base.model.layers[1].eval()
    modes = [part.training for part in module.modules()]
    before = (base.config._attn_implementation, base.config.use_cache)

    def third(*_):
        calls.append(base.config._attn_implementation)
        if len(calls) == 3:
            raise FailsError

    base.model.layers[0].register_forward_pre_hook(third)
    with pytest.raises(FailsError):
        list(LocalEngine().generate(model, [Request((1, 2), 0, 9)] * 2, FOREVER))
    assert len(calls) == 3 and before[0] not in calls  # ours was in use
    assert (base.config._attn_implementation, base.config.use_cache) == before
    assert [part.training for part in module.modules()] == modes
    assert torch.is_grad_enabled()
    found = generated(module, SEVERAL, 4)  # and it goes on working
    assert found == [greedy(module.eval(), p, 4) for p in SEVERAL]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "own"])
def test_in_bfloat16_each_token_is_the_likeliest_but_for_rounding(kind):
    module = ATTENDING[kind]().to(torch.bfloat16)
    model = adapt(module)
    assert model.caches
    requests = [Request(tuple(p), 0, 12) for p in PROMPTS]
    for i, done in LocalEngine(max_rows=3).generate(model, requests, FOREVER):
        for step, token in enumerate(done.ids):
            logits = last_logits(module, [*PROMPTS[i], *done.ids[:step]]).float()
            assert logits[token] >= logits.max() - 0.05 * logits.abs().max()


# a module of one's own


def test_the_documented_model_takes_about_30_lines():
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 32


def test_the_documented_model_is_decoded_with_its_cache_and_says_nothing(caplog):
    module = own()
    model, messages = warnings_of(caplog, module)
    assert model.caches and messages == []
    with tokens_through(module) as counts:
        found = generated(model.module, SEVERAL, 8)
    assert found == [greedy(module, p, 8) for p in SEVERAL]
    # after the trial of generate's own adapter: 9 tokens, the last of their first 3, which come
    # again as a prompt, and 1; then a token a row
    assert counts[-8:] == [9 + 1 + 1, *[3] * 7]


class Hidden(nn.Module):
    """The same model, which does not say that it has a cache."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_uncached_generation_agree_token_by_token(temperature):
    module = own()
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=20)
    prompts = [torch.tensor(p) for p in [*PROMPTS, *SEVERAL]]
    cached = generate(module, prompts, sampling=sampling, num_samples=2)
    assert not adapt(Hidden(module)).caches
    assert cached == generate(Hidden(module), prompts, sampling=sampling, num_samples=2)


class Pretending:
    """A cache whose `needed` leaves nothing out."""

    def __init__(self, cache) -> None:
        self.attend = cache.attend

    def needed(self, hidden):
        return hidden


def wrong(name: str) -> type[nn.Module]:
    """The documented model with one mistake."""
    base = documented()["Decoder"]

    class Wrong(base):
        def forward(self, ids, positions=None, cache=None):
            if name == "positions from the place in ids":
                positions = None
            if name == "all logits" and cache is not None:
                cache = Pretending(cache)
            positions = torch.arange(ids.shape[1]) if positions is None else positions
            x = self.embed(ids) + self.places(positions)
            for block in self.blocks:
                skips = name == "a layer without the cache" and block.layer == 1
                x = block(x, None if skips else cache)
            return self.head(x if cache is None else cache.needed(x))

    return Wrong


@pytest.mark.parametrize(
    "mistake",
    ["positions from the place in ids", "a layer without the cache", "all logits", "one number"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_wrong_cache_of_ones_own_is_refused_once_and_decoding_is_right(mistake, dtype, caplog):
    module = own(wrong(mistake)).to(dtype)
    if mistake == "one number":
        module.blocks[1].layer = 0  # two layers that keep their keys under the same number
    model, messages = warnings_of(caplog, module)
    assert ["takes positions and a cache" in m for m in messages] == [True]
    assert not model.caches
    if dtype == torch.float64:
        assert generated(module, SEVERAL, 8) == [greedy(module, p, 8) for p in SEVERAL]


def test_a_wrong_cache_of_ones_own_that_training_brings_to_light_is_not_used():
    """A branch that starts at zero, as is usual, hides at first what a cache leaves out."""
    module = own(wrong("a layer without the cache"))
    with torch.no_grad():
        module.blocks[1].out.weight.zero_()
    model = adapt(module)
    lively(module)
    model.refresh()  # as the engine does before each generation
    assert wandered(module, VOCAB, 0, model) < 1e-10
