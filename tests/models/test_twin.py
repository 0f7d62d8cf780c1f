"""Which ways a model of transformers may go is decided on a small twin of its class, not by weights."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models import hugging_face
from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan, limit_of
from self_rewarding_lm.models.logprobs import token_logprobs
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.models.twin import LONGEST, least_border, same_parts, twin_of
from tests.support.hf_models import KINDS, tiny

FAST = ["apertus", "gemma2", "gpt_oss", "granite", "mixtral", "phi3", "qwen3_moe", "bloom"]
FAST_ATTENDING = {"apertus", "granite", "mixtral", "phi3", "qwen3_moe"}
NEW = 4


def rows() -> list[list[int]]:
    """Rows of different lengths; two begin alike, and tokens come again."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(12, 70, (n,), generator=generator).tolist() for n in (30, 21, 7, 2)]
    return [found[0], [*found[0][:15], *found[0][3:12]], *found[1:]]


def redrawn(module: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(1.3 * noise * parameter.shape[-1] ** -0.5)
    return module


def small(kind: str, **changes: Any) -> nn.Module | None:
    """A small model of a class that transformers knows by a name, with other weights than a twin."""
    try:
        config = transformers.CONFIG_MAPPING[kind](**changes)
        cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    except Exception:
        return None
    hollow = cls.__new__(cls)
    nn.Module.__init__(hollow)
    object.__setattr__(hollow, "config", config)
    twin = twin_of(hollow)
    return None if twin is None else redrawn(twin)


@torch.no_grad()
def errors(model: Any) -> tuple[float, float]:
    """The largest errors of log-probs in training and of logits in a session, row by row."""
    ids, lengths = pad_rows(rows())
    found = Policy(model).eval()(ids, lengths)
    trained, decoded = [], []
    for row, values in zip(rows(), found, strict=True):
        one = torch.tensor([row])
        trained.append((token_logprobs(model.logits(one), one)[0] - values[: len(row)]).abs().max())
    going = rows()
    session = model.session(Plan((), 30, max_new=NEW, max_rows=len(going)))
    logits = session.prefill(going)
    session.add(range(len(going)))
    for step in range(NEW):
        for row, of_row in zip(going, logits, strict=True):
            truth: Tensor = model.logits(torch.tensor([row]))[0, -1]
            decoded.append((truth - of_row).abs().max())
        tokens = torch.tensor([15 + 7 * i + step for i in range(len(going))])
        going = [[*row, token] for row, token in zip(going, tokens.tolist(), strict=True)]
        logits = session.extend(tokens)
    return float(max(trained)), float(max(decoded))


@pytest.mark.parametrize("kind", FAST)
def test_classes_are_decoded_and_trained_as_row_by_row(kind):
    module = small(kind)
    assert module is not None
    model = adapt(module.float())
    assert model.attends is (kind in FAST_ATTENDING)
    assert model.caches and ("attends" in model.refused) is not model.attends
    assert max(errors(model)) < 2e-4


def test_a_model_whose_limit_is_minus_one_takes_rows_of_any_length():
    module = small("xlnet")
    assert module is not None and module.config.max_position_embeddings == -1
    assert limit_of(module) is None
    with pytest.raises(AdapterError, match="not causal"):  # tried, and refused for what it is
        adapt(module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_class_is_decoded_and_trained_as_row_by_row_or_refused(kind):
    module = small(kind)
    if module is None:
        pytest.skip("transformers' default configuration makes no small model here")
    try:
        model = adapt(module)
    except AdapterError as error:
        assert "not causal" in str(error) or "failed" in str(error)
        return
    assert max(errors(model)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neither_weights_nor_type_nor_autocast_decide(kind, dtype):
    module = tiny(kind, dtype=dtype, initializer_range=1e-4) if kind != "gpt2" else tiny(kind)
    with torch.autocast("cpu", torch.bfloat16):
        model = adapt(module)
    assert model.attends and model.caches and not model.refused
    assert model.training is not None and model.training.packs


def test_a_class_is_tried_once_and_the_random_state_stays(monkeypatch):
    built: list[nn.Module] = []

    def building(base: nn.Module) -> nn.Module | None:
        built.append(base)
        return twin_of(base)

    monkeypatch.setattr(hugging_face, "KNOWN_WAYS", {})
    monkeypatch.setattr(hugging_face, "twin_of", building)
    before = torch.get_rng_state()
    for seed in (0, 1):
        adapt(tiny("llama", seed=seed))
    assert len(built) == 1
    adapt(tiny("llama", num_key_value_heads=4))
    assert len(built) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def with_another_layer(module: Any) -> None:
    module.model.layers[1].mlp = nn.Identity()


def with_a_forward_of_its_own(module: Any) -> None:
    inner = module.model.layers[0].self_attn.forward
    module.model.layers[0].self_attn.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def with_a_hook(module: Any) -> None:
    module.model.layers[0].register_forward_hook(lambda _, args, output: output)


@pytest.mark.parametrize(
    "change", [with_another_layer, with_a_forward_of_its_own, with_a_hook], ids=lambda f: f.__name__
)
def test_a_model_of_other_parts_than_its_twin_is_tried_on_its_own_weights(
    change: Callable[[Any], None], caplog
):
    module = tiny("llama", dtype=torch.bfloat16)
    change(module)
    with caplog.at_level(logging.INFO, "self_rewarding_lm"):
        model = adapt(module)
    assert "is tried on its own weights" in caplog.text
    assert model.attends


def test_adapters_of_peft_do_not_make_other_parts():
    peft = pytest.importorskip("peft")
    module = tiny("llama")
    twin = twin_of(module)
    assert twin is not None and same_parts(module, twin) is None
    settings = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(module, settings)
    assert same_parts(wrapped.get_base_model(), twin) is None


def test_rows_beyond_the_floor_of_llama_4_are_decoded_whole():
    """Its own cache scales queries by a place that counts the padding."""
    module = small("llama4_text")
    assert module is not None and module.config.attn_temperature_tuning
    model = adapt(module.float())
    assert least_border(model.config) == model.cache_limit
    assert max(errors(model)) < 2e-4
    model.cache_limit = LONGEST
    assert errors(model)[1] > 1e-2


def test_a_mask_that_ties_of_tokens_change_takes_no_rows_together():
    """Doge keeps the best keys only; which of equal ones these are changes with a row's length."""
    module = small("doge")
    assert module is not None
    model = adapt(module)
    assert not model.attends and not model.pads
    assert max(errors(model)) < 1e-6


@pytest.mark.parametrize("kind", ["cpmant", "bert"])
def test_a_class_that_sees_later_tokens_is_refused(kind):
    module = small(kind)
    assert module is not None
    with pytest.raises(AdapterError, match="not causal"):
        adapt(module)


@pytest.mark.parametrize(
    ("error", "attends", "warned"), [(0.9, True, False), (19.0, True, True), (21.0, False, False)]
)
def test_real_weights_are_compared_once(error, attends, warned, monkeypatch, caplog):
    adapt(tiny("llama"))  # its twin is known from here on
    monkeypatch.setattr(hugging_face, "session_error", lambda model, longest=0.0: error)
    with caplog.at_level(logging.WARNING, "self_rewarding_lm"):
        model = adapt(tiny("llama"))
    assert model.attends is attends
    assert ("used all the same" in caplog.text) is warned
    assert ("rounding" in model.refused.get("attends", "")) is not attends
