"""Hunyuan-A13B. Source: Tencent 2025; transformers, `hunyuan_v1_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec, MoESpec, RoPESpec, RouterSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers, dense = fields.count("num_hidden_layers"), fields.count("intermediate_size")
    norm, bias = parts.rms_norm(fields, 1e-5), fields.flag("attention_bias", False)
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = fields.count(fields.either("head_dim", "attention_head_dim"), width // heads)
    normed = fields.flag("use_qk_norm", True)
    attention = parts.attention(
        fields,
        _position(fields, head_dim),
        head_dim=head_dim,
        qk_norm=norm if normed else None,
        qk_norm_after_rotation=normed,
        qkv_bias=bias,
        output_bias=bias,
    )
    num_experts = fields.count(fields.either("num_experts", "num_local_experts"), 1)
    mixed = fields.flag("use_mixed_mlp_moe", True)
    # Lists per layer, or one number for all; transformers uses intermediate_size in place of moe_intermediate_size.
    sizes = list(
        zip(
            fields.counts(fields.either("moe_topk", "num_experts_per_tok"), num_layers, 1),
            fields.counts("moe_intermediate_size", num_layers, dense),
            fields.counts("num_shared_expert", num_layers, 1),
            strict=True,
        )
    )
    moes = {
        (top_k, hidden, shared): MoESpec(
            num_experts=num_experts,
            router=RouterSpec(top_k=top_k),
            experts=parts.swiglu(fields, hidden),
            shared=SharedExpertsSpec(num_experts=shared, hidden_dim=dense) if mixed else None,
        )
        for top_k, hidden, shared in dict.fromkeys(sizes)
    }
    _expect_released(fields)
    return parts.model(fields, [parts.layer(attention, moes[each]) for each in sizes], norm=norm)


def _position(fields: Fields, head_dim: int) -> RoPESpec:
    """Return RoPE; `dynamic` with an alpha is a larger base at any length, and its other fields have no effect."""
    both = [fields.inside(name) for name in ("rope_parameters", "rope_scaling") if name in fields]
    found = [_with_alpha(fields, inner, head_dim) for inner in both if inner is not None]
    if any(position != found[0] for position in found):
        raise fields.refuse("rope_scaling", "the same as in rope_parameters")
    if found and found[0] is not None:
        return found[0]
    return parts.rope(fields, harmless=("alpha",))


def _with_alpha(fields: Fields, inner: Fields, head_dim: int) -> RoPESpec | None:
    alpha = inner.number("alpha", 0.0)
    if not alpha or inner.get("rope_type", inner.get("type")) != "dynamic":
        return None
    if head_dim < 4 or alpha < 0:
        raise inner.refuse("alpha", "a number above 0, and a head_dim of at least 4")
    base = inner.number("rope_theta", fields.number("rope_theta", 10_000.0))
    inner.finish(("type", "rope_type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
    return RoPESpec(base=base * alpha ** (head_dim / (head_dim - 2)))


def _expect_released(fields: Fields) -> None:
    """Check fields of released configs that transformers ignores, using a fixed value."""
    for name in ("mlp_bias", "use_cla", "use_mla", "group_limited_greedy", "moe_drop_tokens"):
        fields.expect(name, False)
    fields.expect("position_embedding_xdrope", False)
    fields.expect("use_rotary_pos_emb", True)
    fields.expect("norm_topk_prob", True)
    fields.expect("norm_type", "rms", "hf_rms")
    fields.expect("moe_layer_num_skipped", 0)
    fields.expect("routed_scaling_factor", 1, False)


FAMILY = Family(
    model_types=("hunyuan_v1_moe", "hunyuan"),
    architecture="HunYuanMoEV1ForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(names=("query_layernorm", "key_layernorm")),
        *parts.router(f"{LAYER}.mlp.gate.wg"),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_mlp", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(without=("hunyuan_v1_moe",)),
    kept=("*.rotary_emb.inv_freq",),
    harmless=(
        *("*_id", "add_classification_head", "capacity_factor", "cla_share_factor", "class_num", "dense_list"),
        *("max_position_embeddings", "moe_random_routing_dropped_token", "org_vocab_size", "pool_type"),
        *("kv_lora_rank", "n_group", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "topk_group", "v_head_dim"),
    ),
)
