"""Qwen3-MoE. Source: Qwen Team 2025, arXiv 2505.09388; transformers, `qwen3_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    norm = parts.rms_norm(fields)
    # Trap: transformers ignores sliding_window unless use_sliding_window is true; then it applies to every layer.
    window = fields.count_or_null("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    attention = parts.attention(
        fields, parts.rope(fields), kv_heads=4, qk_norm=norm, qkv_bias=bias, output_bias=bias, window=window
    )
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 128),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            renormalize="sum" if fields.flag("norm_topk_prob", False) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size")),
        losses=parts.pooled_balance(fields),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    layers = [
        parts.layer(attention, dense if is_dense else moe)
        for is_dense in parts.dense_layers(fields, fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=norm)


FAMILY = Family(
    model_types=("qwen3_moe",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
    ),
    mlx=parts.switch(),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings", "max_window_layers", "sliding_window"),
)
