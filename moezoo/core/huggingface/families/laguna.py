"""Laguna. Source: Poolside 2026, the released model; transformers, `laguna`."""

from typing import Any, Literal

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    ModelSpec,
    MoESpec,
    RoPESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    heads = fields.counts("num_attention_heads_per_layer", number, fields.count("num_attention_heads", 48))
    dense = parts.dense_by_type(fields, number, [index == 0 for index in range(number)])
    gate = _gate(fields)
    # In released files: what follows from the fields above, and options that transformers does not have.
    fields.expect("mlp_only_layers", [index for index, is_dense in enumerate(dense) if is_dense])
    fields.expect("gating_types", [{"headwise": "per_head", "elementwise": "per_element"}[gate]] * number)
    fields.expect("decoder_sparse_step", 1)
    fields.expect("swa_attention_sink_enabled", False)
    norm, bias, moe = parts.rms_norm(fields), fields.flag("attention_bias", False), _moe(fields)
    feed_forward = parts.swiglu(fields, fields.count("intermediate_size", 8192))
    fields.expect("qkv_bias", bias)  # read by mlx-lm alone
    options: dict[str, Any] = {"qk_norm": norm, "qkv_bias": bias, "output_bias": bias, "gate": gate}
    layers = [
        parts.layer(
            GroupedQueryAttentionSpec(
                num_heads=count,
                num_kv_heads=fields.count("num_key_value_heads", 8),
                head_dim=fields.count("head_dim", 128),
                position=_rope(fields, "full_attention" if window is None else "sliding_attention"),
                window=window,
                gate_function="softplus",
                **options,
            ),
            feed_forward if is_dense else moe,
        )
        for count, window, is_dense in zip(heads, parts.windows(fields, number, window=512), dense, strict=True)
    ]
    return parts.model(fields, layers, norm=norm)


def _gate(fields: Fields) -> Literal["headwise", "elementwise"]:
    """Return the granularity of the gate, from `gating`."""
    value = fields.get("gating", True, likely=(True, "per-head", "per-element"))
    if value not in (True, "per-head", "per-element"):
        raise fields.refuse("gating", 'true, "per-head" or "per-element"')
    return "elementwise" if value == "per-element" else "headwise"


def _rope(fields: Fields, kind: str) -> RoPESpec:
    """Return the RoPE of a kind of layers; without `rope_parameters`, on half of each head if it is full attention."""
    if "rope_parameters" in fields:
        return parts.rope(fields, fraction=1.0, layer_type=kind)
    full = kind == "full_attention"
    return RoPESpec(base=5e5 if full else 1e4, fraction=0.5 if full else 1.0)


def _moe(fields: Fields) -> MoESpec:
    fields.expect("norm_topk_prob", True)
    fields.expect("moe_apply_router_weight_on_input", False)  # transformers 5.23 refuses it too
    fields.expect("moe_router_score_func", "sigmoid")  # read by mlx-lm alone
    cap = fields.number("moe_router_logit_softcapping", 0.0)
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 256),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            softcap=cap if cap > 0 else None,
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            scale=fields.number("moe_routed_scaling_factor", 1.0),
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 512)),
        shared=SharedExpertsSpec(hidden_dim=fields.count("shared_expert_intermediate_size", 512)),
        losses=parts.pooled_balance(fields),
    )


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    own = [each.attention for each in spec.all_layers if isinstance(each.attention, GroupedQueryAttentionSpec)]
    return {"qkv_bias": own[0].qkv_bias}


BIAS = f"{OURS}.moe.router.selection_bias"
SHARED = f"{OURS}.moe.shared"

FAMILY = Family(
    model_types=("laguna",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.g_proj.weight", "n d", f"{OURS}.attention.w_gate", "d n"),
        Tensor(f"{LAYER}.self_attn.g_proj.weight", "(n h) d", f"{OURS}.attention.w_gate", "d n h"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        Tensor(f"{LAYER}.mlp.experts.e_score_correction_bias", "e", BIAS, "e"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_expert", SHARED),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", SHARED),  # as transformers has it in memory
    ),
    mlx=(
        Tensor(f"{LAYER}.mlp.gate.proj.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
        Tensor(f"{LAYER}.mlp.gate.e_score_correction_bias", "e", BIAS, "e"),
        *parts.switch(),
    ),
    mlx_lm=MlxLM(config=_mlx_config),
    harmless=("max_position_embeddings",),
)
