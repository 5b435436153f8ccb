"""Qwen3-MoE. Source: Qwen Team 2025, arXiv 2505.09388; transformers, `qwen3_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import GroupedQueryAttentionSpec, LayerSpec, ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    bias = fields.flag("attention_bias", False)
    norm = parts.rms_norm(fields)
    attention = GroupedQueryAttentionSpec(
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", 4),
        head_dim=fields.count("head_dim", width // heads),
        position=parts.rope(fields),
        qk_norm=norm,
        qkv_bias=bias,
        output_bias=bias,
        # Trap: transformers drops a window that use_sliding_window does not ask for, and uses it on every layer else.
        window=fields.get("sliding_window") if fields.flag("use_sliding_window", False) else None,
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
        LayerSpec(attention=attention, feed_forward=dense) if is_dense else LayerSpec(attention=attention, moe=moe)
        for is_dense in parts.dense_layers(fields, fields.count("num_hidden_layers"))
    ]
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=width,
        layers=parts.grouped(layers),
        norm=norm,
        head=parts.head(fields),
    )


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
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings", "max_window_layers", "sliding_window"),
)
