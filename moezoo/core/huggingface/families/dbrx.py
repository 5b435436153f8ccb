"""DBRX. Source: Mosaic Research 2024 (the announcement of DBRX); transformers, `dbrx`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    RoPESpec,
    RouterSpec,
)


def spec(fields: Fields) -> ModelSpec:
    width, heads = fields.count("d_model"), fields.count("n_heads")
    layer = LayerSpec(repeat=fields.count("n_layers"), attention=_attention(fields, width, heads), moe=_moe(fields))
    fields.only_in_training("resid_pdrop")
    fields.only_in_training("emb_pdrop")
    fields.expect("tie_word_embeddings", False)
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=width,
        layers=(layer,),
        norm=LayerNormSpec(bias=False),
        head=parts.head(fields),
    )


def _attention(fields: Fields, width: int, heads: int) -> GroupedQueryAttentionSpec:
    inner = fields.inside("attn_config", {})
    assert inner is not None
    kv_heads = inner.count("kv_n_heads", 1)
    fields.expect("num_key_value_heads", kv_heads)
    # Trap: released files have rope_theta only in attn_config, where transformers 5.23 ignores it and uses 10,000.
    base = inner.number("rope_theta", 10_000.0)
    position = parts.rope(fields, base=base)
    if "rope_theta" in inner and position.base != base:
        raise inner.refuse("rope_theta", f"{position.base:g}, as outside attn_config")
    inner.only_in_training("attn_pdrop")
    fields.notes += inner.notes
    clip = inner.get("clip_qkv")
    inner.finish()
    return GroupedQueryAttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, position=position, clip=clip
    )


def _moe(fields: Fields) -> MoESpec:
    inner = fields.inside("ffn_config", {})
    assert inner is not None
    activation = inner.inside("ffn_act_fn", {})
    assert activation is not None
    experts = parts.swiglu(activation, inner.count("ffn_hidden_size", 3584), name="name")
    activation.finish()
    name = "moe_normalize_expert_weights"
    order = None if inner.null(name) else inner.number(name, 1.0)
    coefficient = inner.number("moe_loss_weight", 0.01)
    moe = MoESpec(
        num_experts=inner.count("moe_num_experts", 4),
        router=RouterSpec(
            top_k=inner.count("moe_top_k", 1),
            renormalize="none" if order is None else "p_norm",
            renormalize_order=1.0 if order is None else order,
            jitter=parts.jitter(inner, "moe_jitter_eps"),
        ),
        experts=experts,
        losses=(PooledBalanceLossSpec(coefficient=coefficient),) if coefficient else (),
    )
    inner.finish(("hidden_size",))  # transformers always uses d_model
    return moe


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the base of RoPE where transformers and mlx-lm require it, beside the one that is read."""
    attention = spec.layers[0].attention
    position = attention.position if isinstance(attention, GroupedQueryAttentionSpec) else None
    return {"attn_config": {"rope_theta": position.base}} if isinstance(position, RoPESpec) else {}


BLOCK = "transformer.blocks.{layer}"
EXPERTS = f"{BLOCK}.ffn.experts.mlp"
EXPERT = f"{BLOCK}.ffn.experts.{{expert}}"

FAMILY = Family(
    model_types=("dbrx",),
    spec=spec,
    tensors=(
        Tensor("transformer.wte.weight", "v d", "embedding.weight", "v d"),
        Tensor("transformer.norm_f.weight", "d", "final_norm.scale", "d"),
        Tensor("lm_head.weight", "v d", "head.w_head", "d v"),
        Tensor(f"{BLOCK}.norm_attn_norm.norm_1.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{BLOCK}.norm_attn_norm.norm_2.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        Fused(
            f"{BLOCK}.norm_attn_norm.attn.Wqkv.weight",
            "x d",
            (
                Part(f"{OURS}.attention.w_query", "n h", "d n h"),
                Part(f"{OURS}.attention.w_key", "m h", "d m h"),
                Part(f"{OURS}.attention.w_value", "m h", "d m h"),
            ),
        ),
        Tensor(f"{BLOCK}.norm_attn_norm.attn.out_proj.weight", "d (n h)", f"{OURS}.attention.w_output", "n h d"),
        *parts.router(f"{BLOCK}.ffn.router.layer"),
        Tensor(f"{EXPERTS}.w1", "(e f) d", f"{OURS}.moe.experts.w_gate", "e d f"),
        Tensor(f"{EXPERTS}.v1", "(e f) d", f"{OURS}.moe.experts.w_up", "e d f"),
        Tensor(f"{EXPERTS}.w2", "(e f) d", f"{OURS}.moe.experts.w_down", "e f d"),
    ),
    mlx=(
        Tensor(f"{EXPERT}.w1.weight", "f d", f"{OURS}.moe.experts.w_gate", "e d f"),
        Tensor(f"{EXPERT}.v1.weight", "f d", f"{OURS}.moe.experts.w_up", "e d f"),
        Tensor(f"{EXPERT}.w2.weight", "d f", f"{OURS}.moe.experts.w_down", "e f d"),
    ),
    kept=("*.rotary_emb.inv_freq",),
    config=config,
    harmless=("max_seq_len",),
)
