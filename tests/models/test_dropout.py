"""Without dropout a forward in training is exact, whatever a class calls its rates and noise."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from self_rewarding_lm import OptimConfig, SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.models.policy import dropout_set
from tests.support.hf_models import VOCAB, tiny, word_tokenizer
from tests.support.models import transformer

transformers = pytest.importorskip("transformers")
RATE = 0.2578125
"""A number that no module holds for another reason."""

SMALL = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOISY = re.compile(r"drop|jitter|noise")


def noisy_fields(config: Any) -> dict[str, float]:
    """The numbers of a configuration that make a forward in training a matter of chance."""
    fields = config.to_dict().items()
    return {k: v for k, v in fields if NOISY.search(k) and type(v) in (int, float) and v < 1}


def kinds() -> list[str]:
    """All kinds of causal LMs that transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def noisy_model(kind: str, changes: dict[str, Any]) -> nn.Module | None:
    """A model of a kind, on no device, all of whose rates are RATE; None if it holds none."""
    config = transformers.CONFIG_MAPPING[kind](**changes)
    fields = noisy_fields(config)
    if not fields:
        return None
    for name in fields:
        setattr(config, name, RATE)
    config.is_decoder = True
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def held(module: nn.Module) -> list[str]:
    """Where a module holds RATE, in numbers and in several at once."""
    found = []
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            values = value if isinstance(value, list | tuple) else [value]
            found += [f"{path}.{name}" for v in values if type(v) is float and v == RATE]
    return found


def check_silent(module: nn.Module) -> int:
    before = held(module)
    with dropout_set(module, 0.0) as train:
        train()
        parts = dict(module.named_modules())
        left = [where for where in held(module) if parts[where.rpartition(".")[0]].training]
        assert left == []  # routers with jitter are not in training mode
        own = getattr(module, "config", None)
        fields = noisy_fields(own) if own is not None else {}
        assert not [name for name, v in fields.items() if v == RATE and "jitter" not in name]
    assert held(module) == before
    return len(before)


NAMED = [
    *("opt", "bart", "biogpt", "gpt_bigcode", "starcoder2", "persimmon", "stablelm", "phimoe"),
    *("seed_oss", "gpt_neox", "doge", "prophetnet", "xglm", "mixtral"),
]


@pytest.mark.parametrize("kind", NAMED)
def test_no_rate_of_a_class_of_transformers_stays(kind):
    module = noisy_model(kind, {})
    assert module is not None and check_silent(module) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_no_rate_of_any_causal_model_of_transformers_stays(kind):
    try:
        module = noisy_model(kind, {"num_hidden_layers": 2})
    except Exception as error:  # its configuration has no default that makes a model
        pytest.skip(f"{type(error).__name__}: {error}"[:100])
    if module is None:
        pytest.skip("it holds no rates")
    check_silent(module)


IN_TRAINING = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64},
    "starcoder2": {},
    "persimmon": {},
    "phimoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "seed_oss": {"head_dim": 8},
}


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_a_forward_in_training_without_dropout_is_that_of_evaluation(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[kind](**{**SMALL, **IN_TRAINING[kind]})
        for name in noisy_fields(config):
            setattr(config, name, 0.3)
        module = transformers.AutoModelForCausalLM.from_config(config)
        ids = torch.randint(3, 64, (2, 9))
        with torch.no_grad():
            exact = module.eval()(ids).logits
            module.train()
            assert not torch.allclose(module(ids).logits, exact)
            with dropout_set(module, 0.0) as train:
                train()
                torch.testing.assert_close(module(ids).logits, exact)


@pytest.mark.parametrize(
    "option", ["layer_dropout", "attn_dropout", "ff_dropout", "attn_sublayer_dropout"]
)
def test_no_rate_of_x_transformers_stays(option):
    module = transformer(**{option: RATE}).train()
    assert check_silent(module) > 0


class Own(nn.Module):
    """A module with the other ways of dropping."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=RATE)
        self.alpha, self.channels = nn.AlphaDropout(RATE), nn.Dropout1d(RATE)
        self.layer_drops, self.drop_path = (RATE, RATE), [RATE]
        self.dropped, self.use_dropout, self.p = 3, True, RATE


def test_the_other_layers_of_torch_and_numbers_of_ones_own_are_rates_too():
    module = Own()
    with dropout_set(module, 0.0):
        assert held(module) == [".p"]  # no dropout layer: this number is something else
        assert (module.dropped, module.use_dropout) == (3, True)
    with dropout_set(module, 0.5):
        assert module.rnn.dropout == module.alpha.p == module.channels.p == 0.5
        assert module.drop_path == [RATE]  # how many layers are left out, not units
    assert (module.rnn.dropout, module.layer_drops, module.drop_path) == (
        RATE,
        (RATE, RATE),
        [RATE],
    )


@pytest.mark.parametrize(
    ("said", "of_adapter", "of_model"),
    [({}, 0.05, 0.1), ({"dropout": 0.3}, 0.3, 0.3), ({"dropout": 0.0}, 0.0, 0.0)],
    ids=["not said", "another", "none"],
)
def test_lora_keeps_its_own_rate_unless_the_stage_says_another(
    said, of_adapter, of_model, tmp_path
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"])
    module = peft.get_peft_model(tiny("llama", VOCAB, attention_dropout=0.2), config)
    layer = next(part for part in module.modules() if hasattr(part, "lora_dropout"))
    attention = next(part for part in module.modules() if hasattr(part, "attention_dropout"))
    seen = set()

    def look(part, *_):
        if part.training:
            seen.add((part.p, attention.attention_dropout))

    dropout = layer.lora_dropout["default"]
    dropout.register_forward_hook(look)
    stage = SFTConfig(
        train_dataset=[{"prompt": "a", "completion": "b"}], optim=OptimConfig(batch_size=1), **said
    )
    SelfRewardingTrainer(
        module,
        finetune_configs=[stage],
        tokenizer=word_tokenizer(),
        checkpoints_folder=tmp_path,
        accelerate_kwargs={"cpu": True},
        quiet=True,
        report=False,
    )(rehearse=False)
    assert seen == {(of_adapter, of_model)}
    assert (dropout.p, attention.attention_dropout) == (0.05, 0.2)
