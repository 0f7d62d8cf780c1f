"""A tiny GGUF file of a Llama with random weights, as llama.cpp's own converter lays it out."""

from pathlib import Path

import numpy as np

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NORMAL, CONTROL = 1, 3
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path, seed: int = 0) -> Path:
    """Two layers of width 32, a token a byte and five special ones; </s> ends a text."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    width, heads, inner, layers = 32, 4, 48, 2
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(width // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        numbers = random.normal(0, 0.3, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", numbers.astype(np.float32))

    add("token_embd", len(tokens), width)
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}", width, width)
        add(f"blk.{layer}.ffn_gate", inner, width)
        add(f"blk.{layer}.ffn_up", inner, width)
        add(f"blk.{layer}.ffn_down", width, inner)
        add(f"blk.{layer}.attn_norm", width)
        add(f"blk.{layer}.ffn_norm", width)
    add("output_norm", width)
    add("output", len(tokens), width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
