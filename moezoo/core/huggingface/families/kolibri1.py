"""Kolibri-1. Source: Aleph Alpha 2026, the released model; transformers, `kolibri1`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, MoESpec, NoPositionSpec, RouterSpec, SelectionBiasSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm, rope = parts.rms_norm(fields), parts.rope(fields)
    types = ["sliding_attention" if (index + 1) % 5 else "full_attention" for index in range(number)]
    # Layers with full attention have no RoPE, unless no layer has a sliding window.
    everywhere = fields.count_or_null("sliding_window", 513) is None
    moe = _moe(fields)
    layers = [
        parts.layer(
            parts.attention(
                fields,
                rope if everywhere or window is not None else NoPositionSpec(),
                kv_heads=4,
                head_dim=128,
                window=window,
                qk_norm=norm,
            ),
            moe,
        ).model_copy(update={"norm_placement": "sandwich"})
        for window in parts.windows(fields, number, types, window=513)
    ]
    return parts.model(fields, layers, norm=norm)


def _moe(fields: Fields) -> MoESpec:
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 384),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 6),
            score="sigmoid",
            select_on="logits",  # the bias is added to logits
            selection_bias=SelectionBiasSpec(),
            renormalize="sum" if fields.flag("norm_topk_prob", False) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 512)),
        shared=SharedExpertsSpec(hidden_dim=fields.count("shared_expert_intermediate_size", 512)),
    )


FAMILY = Family(
    model_types=("kolibri1",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        Tensor(f"{LAYER}.post_attn_norm.weight", "d", f"{OURS}.attention_output_norm.scale", "d"),
        Tensor(f"{LAYER}.post_ffn_norm.weight", "d", f"{OURS}.feed_forward_output_norm.scale", "d"),
        Tensor(f"{LAYER}.moe.router.expert_bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
        # as transformers has them in memory
        Tensor(f"{LAYER}.post_self_attn_layernorm.weight", "d", f"{OURS}.attention_output_norm.scale", "d"),
        Tensor(f"{LAYER}.post_mlp_layernorm.weight", "d", f"{OURS}.feed_forward_output_norm.scale", "d"),
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    harmless=("max_position_embeddings",),
)
