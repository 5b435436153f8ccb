"""Doge: a dynamic mask, a scaled residual stream, and experts of one feature by product keys beside a shared one.

Source: Shi et al. 2025, arXiv 2508.02124 (attention); Shi et al. 2024, arXiv 2412.11834 (experts); transformers,
`doge`.
"""

from typing import Any, Literal

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    DynamicMaskSpec,
    GatedFeedForwardSpec,
    ModelSpec,
    MoESpec,
    PlainFeedForwardSpec,
    PooledBalanceLossSpec,
    RouterSpec,
    ScaledResidualSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    norm, bias = parts.rms_norm(fields), fields.flag("attention_bias", False)
    attention = parts.attention(
        fields,
        parts.rope(fields),
        window=fields.count_or_null("sliding_window"),
        qk_norm=norm,
        qkv_bias=bias,
        output_bias=bias,
        dynamic_mask=DynamicMaskSpec(keep=fields.count("keep_window_size", 2048)),
    )
    gated = parts.swiglu(fields, fields.count("intermediate_size", 2048), bias=fields.flag("mlp_bias", False))
    block = _moe(fields, gated) if fields.flag("is_moe", False) else _dense(fields, gated)
    layers = [parts.layer(attention, block)] * fields.count("num_hidden_layers", 32)
    model = parts.model(fields, layers, norm=norm)
    dropout = fields.number("hidden_dropout", 0.0)
    return model.model_copy(update={"residual": ScaledResidualSpec(terms="stream"), "dropout": dropout})


PLAIN: dict[str, Literal["silu", "gelu", "relu", "relu_squared"]] = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "relu_squared_glu": "relu_squared",
}
"""Activation of experts, which have no gate, beside that of the shared one."""


def _moe(fields: Fields, shared: GatedFeedForwardSpec) -> MoESpec:
    """Return the MoE layer; its activation is that of the gate of the shared expert.

    Trap: transformers splits the outputs of the router for all tokens at once, so that of several tokens one has the
    keys of another; with one token, as in decoding, it is right. Here each token has its own.
    """
    if shared.kind not in PLAIN:
        raise fields.refuse("hidden_act", "silu, relu, relu2, or GELU by tanh")
    top_k, coefficient = fields.count("num_experts_per_tok", 64), fields.number("router_aux_loss_coef", 0.001)
    return MoESpec(
        num_experts=fields.count("num_experts", 16384),
        router=RouterSpec(top_k=top_k, product_keys=True, score="none", weight="softmax_of_chosen", renormalize="none"),
        experts=PlainFeedForwardSpec(kind=PLAIN[shared.kind], hidden_dim=1),
        shared=SharedExpertsSpec(hidden_dim=shared.hidden_dim, bias=shared.bias, activation=shared.kind),
        # Its loads are shares of all choices, which add up to 1; those of `pooled_balance` to top_k.
        losses=(PooledBalanceLossSpec(coefficient=coefficient / top_k),) if coefficient else (),
    )


def _dense(fields: Fields, block: GatedFeedForwardSpec) -> GatedFeedForwardSpec:
    for unused in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef"):
        fields.get(unused)  # without experts these have no effect
    return block


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return what cannot be derived by changing one field: a number of experts beside a square is impossible."""
    if not spec.moes:
        return {"is_moe": False}
    moe = spec.moes[0][1]
    return {"is_moe": True, "num_experts": moe.num_experts, "num_experts_per_tok": moe.router.top_k}


_MASK, _EXPERTS = f"{OURS}.attention.dynamic_mask", f"{OURS}.moe.experts"

FAMILY = Family(
    model_types=("doge",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.dt_proj.weight", "i (m h)", f"{_MASK}.w_step", "m h i"),
        Tensor(f"{LAYER}.self_attn.dt_proj.bias", "i", f"{_MASK}.b_step", "i"),
        Tensor(f"{LAYER}.self_attn.A", "i", f"{_MASK}.rate", "i"),
        Tensor(f"{LAYER}.input_residual", "d", f"{OURS}.attention_residual.stream_scale", "d"),
        Tensor(f"{LAYER}.post_attention_residual", "d", f"{OURS}.feed_forward_residual.stream_scale", "d"),
        Tensor(f"{LAYER}.mlp.router_gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
        Tensor(f"{LAYER}.mlp.down_embed.weight", "e (d f)", f"{_EXPERTS}.w_up", "e d f"),
        Tensor(f"{LAYER}.mlp.up_embed.weight", "e (f d)", f"{_EXPERTS}.w_down", "e f d"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.moe.shared"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
    ),
    # Weights that are the softmax of the chosen already add up to 1.
    harmless=("max_position_embeddings", "norm_topk_prob"),
    config=config,
)
