"""Tiny random models of transformers and tokenizers made on the spot."""

import torch

KINDS = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]
SLIDING_WINDOW = 5


def tiny(kind: str, vocab: int = 96, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random causal LM of a kind; weights large enough that logits differ."""
    import transformers as t

    torch.manual_seed(seed)
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
        model = t.LlamaForCausalLM(t.LlamaConfig(**common))
    elif kind == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**common))
    elif kind == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=8))
    elif kind == "gemma3":
        config = t.Gemma3TextConfig(
            **common,
            head_dim=8,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        )
        model = t.Gemma3ForCausalLM(config)
    elif kind == "gpt2":
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
        model = t.GPT2LMHeadModel(config)
    else:
        raise ValueError(kind)
    return model.to(dtype).eval()


def word_tokenizer(chat_template: str | None = None, *, adds_bos: bool = False):
    """A fast tokenizer over bytes-like characters with chat tokens, built without a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer
