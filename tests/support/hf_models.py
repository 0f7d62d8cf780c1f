"""Tiny random models of transformers and tokenizers made on the spot."""

import torch

KINDS = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]
SLIDING_WINDOW = 5


def tiny(kind: str, vocab: int = 96, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random causal LM of a kind; weights large enough that logits differ.

    changes: of the configuration, except for gpt2. The global random state stays as it is.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _drawn(kind, vocab, changes).eval()
    for parameter in model.parameters():  # buffers of positions stay as from_pretrained has them
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _drawn(kind: str, vocab: int, changes: dict):
    import transformers as t

    common = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**common))
    if kind == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**common))
    if kind == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=8))
    if kind == "phi3":
        return t.Phi3ForCausalLM(t.Phi3Config(**common))
    if kind == "gemma3":
        config = t.Gemma3TextConfig(
            **common,
            head_dim=8,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        )
        return t.Gemma3ForCausalLM(config)
    if kind == "gpt2":
        config = t.GPT2Config(
            vocab_size=vocab,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
        return t.GPT2LMHeadModel(config)
    raise ValueError(kind)


SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = len(SPECIAL)
"""The id of the first of the 256 bytes."""


def word_tokenizer(
    chat_template: str | None = None,
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    prefix_space: bool = False,
    special: tuple[str, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
):
    """A fast tokenizer with a token a byte and chat tokens, built without a download.

    prefix_space: a text begins with a space, as those of sentencepiece do. special: further special
    tokens, whose ids come after the bytes'. merges: pairs of bytes that
    are one token; theirs come after those.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *special])}
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    inner.decoder = decoders.ByteLevel()
    if adds_bos or adds_eos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> " * adds_bos + "$A" + " </s>" * adds_eos,
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *special],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


VOCAB = BYTES + 256
"""Of a model for `word_tokenizer`."""


def only_letters(tokenizer, ends: tuple[int, ...] = ()):
    """A filter_fn for sampling: the letters a, b, c and end tokens, so that texts are plain."""
    kept = [*(tokenizer.encode(c, add_special_tokens=False)[0] for c in "abc"), *ends]

    def filter_fn(logits: torch.Tensor) -> torch.Tensor:
        filtered = torch.full_like(logits, -torch.inf)
        filtered[:, kept] = logits[:, kept]
        return filtered

    return filter_fn


BORDER = 16
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 9.0, 16.0, 30.0],
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": BORDER,
}


def phi3(dtype: torch.dtype = torch.float64):
    """A random model whose rotary factors follow the longest row, with the border at BORDER."""
    return tiny(
        "phi3",
        64,
        dtype,
        max_position_embeddings=64,
        original_max_position_embeddings=BORDER,
        rope_parameters=LONGROPE,
    )
