"""Which models of x-transformers our own attention stands in for: what their parts are and hold.

Numbers cannot tell: parts that begin at zero hide what they will do once they are trained. So each
part must be of a type that is known here, and hold nothing that is not: settings and weights that
are unknown make a model unknown, unless they are None, False or 0. Attention itself must be a
softmax over scaled scores of the past; all else must work on each token alone.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn
from x_transformers import Decoder, TransformerWrapper, x_transformers
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention

MAY_HOLD: dict[type, str] = {
    TransformerWrapper: """
        emb_dim num_tokens num_cls_tokens max_seq_len max_mem_len emb_frac_gradient
        train_max_recycle_steps train_max_looped_steps can_cache_kv can_cache_kv_outside_max_seq_len
        token_emb pos_emb post_emb_norm emb_dropout project_emb attn_layers to_logits l2norm_embed
        tie_embedding_scale input_not_include_cache add_continuous_pred_head to_next_embed_pred
        ff_deep_embed
    """,
    Decoder: """
        dim causal attn_heads attn_dim_head num_residual_streams stream_emb pre_norm sandwich_norm
        pre_and_post_norm dim_condition len_default_block layer_types layers_execute_order
        num_attn_layers num_ff_layers depth layer_dropouts softclamp_output softclamp_output_value
        can_cache_kv layers layer_integrators adaptive_mlp final_norm skip_combines
        disable_abs_pos_emb rotary_pos_emb polar_pos_emb has_custom_layer_types depth_scale_residual
        residual_scale unet_skips reinject_input reinject_input_proj learned_reinject_input_gate
        add_value_residual
    """,
    Attention: """
        scale heads causal kv_heads groups to_latent_q to_latent_kv to_rotateable_k use_latent_q
        use_latent_kv split_rotateable_k_heads to_q to_k to_v split_q_heads split_k_heads
        split_v_heads merge_heads qkv_receive_diff_residuals laser laser_softclamp_value
        gate_values_headwise output_gate_headwise to_v_gate_activation to_v_gate to_output_gate
        to_head_space_headwise to_head_space_dimwise to_v_gate_head_space to_output_gate_head_space
        to_v_head_gate qk_norm qk_norm_groups qk_norm_dim_scale qk_norm_q_scale qk_norm_k_scale
        qk_norm_scale q_rmsnorm k_rmsnorm value_rmsnorm attend head_scale head_scale_params
        to_value_residual_mix attn_on_attn to_out sublayer_dropout rotate_num_heads can_cache_kv
    """,
    Attend: """
        scale causal create_causal_mask attn_fn dropout attn_dropout flash sdp_context_manager
        logit_softclamp_value
    """,
}
"""What a part may hold, whatever it is, for our attention to stand in."""


ALONE = {
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity, nn.Linear, nn.Embedding),
    *(nn.Dropout, nn.LayerNorm, nn.GLU, nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh),
    *(nn.Softmax, nn.GRUCell, Rearrange),
}
"""Types of parts that work on each token alone, whatever the shape of its positions.

PolarEmbedding is none: it takes positions (b, t) of b rows for those of b heads.
"""


for _name in (
    *("TokenEmbedding", "AbsolutePositionalEmbedding", "RotaryEmbedding"),
    *("LayerNorm", "ScaleNorm", "RMSNorm", "SimpleRMSNorm", "MultiheadRMSNorm", "DynamicTanh"),
    *("Derf", "LayerScale", "Scale", "Residual", "GRUGating", "AttentionResidual", "DynamicLIMe"),
    *("HyperConnection", "GatedMultiResidual", "ConcatCombine", "FeedForward", "GLU", "SoLU"),
    *("ReluSquared", "LoRALinear", "Identity", "Sequential"),
):
    if hasattr(x_transformers, _name):  # not every version has all of them
        ALONE.add(getattr(x_transformers, _name))


def unknown_part(transformer: nn.Module) -> str | None:
    """What in a model our attention does not know, in words; None if it knows all of it."""
    for name, part in transformer.named_modules():
        where = f"{name or 'the model'} ({type(part).__name__})"
        if "forward" in vars(part):
            return f"{where} has a forward of its own"
        if type(part) in MAY_HOLD:
            known = MAY_HOLD[type(part)].split()
            strange = next((n for n, v in _held(part) if n not in known and _acts(v)), None)
            if strange is not None:
                return f"{where} has {strange}"
        elif type(part) not in ALONE:
            return f"{where} is of a type that is not known here"
        reason = _at_odds(part)
        if reason is not None:
            return f"{where} {reason}"
    return None


def _at_odds(part: Any) -> str | None:
    """What a part of a known type holds that cannot be ours."""
    kind = type(part)
    if kind is Attend:
        if part._forward_hooks or part._forward_pre_hooks:
            return "has hooks"
        function: Any = part.attn_fn
        is_softmax = isinstance(function, partial) and function.func is F.softmax
        if not is_softmax or function.keywords.get("dim") != -1:
            return "turns scores into shares by something else than a softmax over the past"
        return None if part.causal else "is not causal"
    if kind is Attention and 1 < part.kv_heads < part.heads:
        return "repeats heads of keys in an order of its own"
    if kind is x_transformers.RotaryEmbedding and part.scale is not None:
        return "scales by the place of a row's last token (xpos)"
    return None


def _held(part: nn.Module) -> list[tuple[str, Any]]:
    """A part's settings, weights, buffers and parts, by name."""
    own = [item for item in vars(part).items() if item[0] not in vars(nn.Module())]
    return [*own, *part._parameters.items(), *part._buffers.items(), *part._modules.items()]


def _acts(value: Any) -> bool:
    """Whether a value may change something: all but None, False and 0."""
    return value is not None and not (isinstance(value, int | float) and value == 0)
