"""Phi-3.5-MoE. Source: Abdin et al. 2024, arXiv 2404.14219, and Liu et al. 2024, 2409.12136; transformers, `phimoe`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.inverse.rotations import rope_fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    LongRoPEScalingSpec,
    ModelSpec,
    MoESpec,
    RoPESpec,
    RouterSpec,
    SparseMixerChoiceSpec,
)


def spec(fields: Fields) -> ModelSpec:
    bias, head_bias = fields.flag("attention_bias", False), fields.flag("lm_head_bias", False)
    fields.expect("num_experts_per_tok", 2)
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        attention=parts.attention(
            fields,
            parts.rope(fields, base=1e6),
            kv_heads=8,
            window=fields.count_or_null("sliding_window"),
            qkv_bias=bias,
            output_bias=bias,
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 16),
            router=RouterSpec(
                top_k=2,
                choice=SparseMixerChoiceSpec(jitter=fields.number("router_jitter_noise", 0.01)),
                renormalize="none",
                jitter=parts.jitter(fields, "input_jitter_noise"),
            ),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            losses=parts.pooled_balance(fields),
        ),
    )
    for name in ("attention_dropout", "hidden_dropout"):
        fields.only_in_training(name)
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=fields.count("hidden_size"),
        layers=(layer,),
        norm=LayerNormSpec(epsilon=fields.number("rms_norm_eps", 1e-5)),
        head=parts.head(fields, bias=head_bias),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return LongRoPE with the attention factors of this family, for the short and for the long length."""
    attention = spec.layers[0].attention
    position = attention.position if isinstance(attention, GroupedQueryAttentionSpec) else None
    if not isinstance(position, RoPESpec) or not isinstance(position.scaling, LongRoPEScalingSpec):
        return {}
    factor = position.scaling.attention_factor
    return {"rope_parameters": {**rope_fields(position), "short_mscale": factor, "long_mscale": factor}}


FAMILY = Family(
    model_types=("phimoe",),
    spec=spec,
    config=config,
    tensors=(
        *parts.MODEL,
        Tensor("model.norm.bias", "d", "final_norm.bias", "d"),
        *parts.PRE_NORMS,
        Tensor(f"{LAYER}.input_layernorm.bias", "d", f"{OURS}.attention_norm.bias", "d"),
        Tensor(f"{LAYER}.post_attention_layernorm.bias", "d", f"{OURS}.feed_forward_norm.bias", "d"),
        *parts.grouped_query(),
        *parts.router(f"{LAYER}.block_sparse_moe.gate"),
        *parts.experts(f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
        *parts.router(f"{LAYER}.mlp.router"),  # the name in transformers 5
        *parts.experts(),
    ),
    mlx=parts.switch(f"{LAYER}.block_sparse_moe.switch_mlp"),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings", "original_max_position_embeddings"),
)
