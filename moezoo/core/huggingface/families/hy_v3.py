"""Hy3. Source: Tencent 2026, the released model; transformers, `hy_v3`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, MoESpec, RouterSpec, SelectionBiasSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    number, norm = fields.count("num_hidden_layers"), parts.rms_norm(fields, 1e-5)
    bias, feed_forward_bias = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    attention = parts.attention(
        fields,
        parts.rope(fields, base=11_158_840.0),
        kv_heads=8,
        head_dim=128,
        qk_norm=norm,
        qkv_bias=bias,
        output_bias=bias,
    )
    width, shared = fields.count("moe_intermediate_size", 1536), fields.count("num_shared_experts", 1)
    fields.expect("expert_hidden_dim", width)
    for flag in ("moe_router_enable_expert_bias", "moe_router_use_sigmoid", "qk_norm", "route_norm"):
        fields.expect(flag, True)
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 192),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            renormalize_epsilon=1e-20,
            scale=fields.number("router_scaling_factor", 2.826),
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width, bias=feed_forward_bias),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size", 13312), bias=feed_forward_bias)
    if "mlp_layer_types" not in fields:
        fields.expect("first_k_dense_replace", 1)  # transformers ignores it and uses 1
    first = fields.integer("first_k_dense_replace", 1)
    by_default = [index < first for index in range(number)]
    dense_layers = parts.dense_by_type(fields, number, by_default, older={"first_k_dense_replace": None})
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in dense_layers]
    return parts.model(fields, layers, norm=norm)


EXPERT_BIAS = Tensor(f"{LAYER}.mlp.expert_bias", "e", f"{OURS}.moe.router.selection_bias", "e")

FAMILY = Family(
    model_types=("hy_v3",),
    architecture="HYV3ForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            *parts.PRE_NORMS,
            *parts.grouped_query(),
            *parts.qk_norm(),
            *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
            *parts.router(f"{LAYER}.mlp.router.gate"),
            *parts.experts(),
            *parts.feed_forward(f"{LAYER}.mlp.shared_mlp", f"{OURS}.moe.shared"),
            # The names in transformers 5.
            Tensor(f"{LAYER}.mlp.gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
            Tensor(f"{LAYER}.mlp.e_score_correction_bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
            *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
        ),
        (EXPERT_BIAS,),
    ),
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=(
        "enable_attention_fp32_softmax",
        "enable_lm_head_fp32",
        "enable_moe_fp32_combine",  # the sum of two numbers: rounding it once gives the same
        "first_k_dense_replace",
        "max_position_embeddings",
        "use_grouped_mm",
    ),
)
