"""Jamba. Source: Lieber et al. 2024, arXiv 2403.19887; transformers, `jamba`."""

import math
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside
from moezoo.core.spec import MambaSpec, ModelSpec, MoESpec, NoPositionSpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    norm = parts.rms_norm(fields)
    attention = parts.attention(fields, NoPositionSpec(), kv_heads=8)
    mamba = _mamba(fields).model_copy(update={"norm": norm})
    width, experts = fields.count("intermediate_size", 14336), fields.count("num_experts", 16)
    dense = parts.swiglu(fields, width)
    moe = MoESpec(
        num_experts=experts,
        router=RouterSpec(top_k=fields.count("num_experts_per_tok", 2), renormalize="none"),
        experts=dense,
        losses=parts.pooled_balance(fields),
    )
    attends, routes = _every(fields, "attn_layer", (8, 4)), _every(fields, "expert_layer", (2, 1))
    layers = [
        parts.layer(
            attention if index % attends[0] == attends[1] else mamba,
            moe if index % routes[0] == routes[1] and experts > 1 else dense,
        )
        for index in range(fields.count("num_hidden_layers"))
    ]
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    fields.expect("sliding_window")
    return parts.model(fields, layers, norm=norm)


def _every(fields: Fields, name: str, default: tuple[int, int]) -> tuple[int, int]:
    """Return period and offset of a kind of layer."""
    period = fields.count(f"{name}_period", default[0])
    offset = fields.integer(f"{name}_offset", default[1])
    if offset >= period:
        raise fields.refuse(f"{name}_offset", f"an integer below {name}_period = {period}")
    return period, offset


def _mamba(fields: Fields) -> MambaSpec:
    embed_dim, rank = fields.count("hidden_size"), "mamba_dt_rank"
    by_default = fields.get(rank, "auto") == "auto"
    return MambaSpec(
        inner_dim=fields.count("mamba_expand", 2) * embed_dim,
        state_dim=fields.count("mamba_d_state", 16),
        step_rank=math.ceil(embed_dim / 16) if by_default else fields.count(rank),
        conv_width=fields.count("mamba_d_conv", 4),
        conv_bias=fields.flag("mamba_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
    )


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json that mlx-lm has no defaults for."""
    routes = list(spec.moe_layers)
    mamba = next((each.attention for each in spec.layers if isinstance(each.attention, MambaSpec)), None)
    found = {} if mamba is None else {"mamba_expand": mamba.inner_dim // spec.embed_dim}
    if routes:
        period = routes[1] - routes[0] if routes[1:] else len(spec.all_layers)
        found |= {"expert_layer_offset": routes[0], "expert_layer_period": period}
    return found


MAMBA, OWN, BLOCK = f"{LAYER}.mamba", f"{OURS}.attention", f"{LAYER}.feed_forward"
VALUE_AND_GATE = ("value", "gate")
CONVOLUTION = Tensor(f"{MAMBA}.conv1d.weight", "f 1 w", f"{OWN}.conv", "w f")

MIXER: tuple[Fused, ...] = (
    Fused(f"{MAMBA}.in_proj.weight", "x d", tuple(Part(f"{OWN}.w_{which}", "f", "d f") for which in VALUE_AND_GATE)),
    Fused(f"{MAMBA}.in_proj.bias", "x", tuple(Part(f"{OWN}.b_{which}", "f", "f") for which in VALUE_AND_GATE)),
    CONVOLUTION,
    Tensor(f"{MAMBA}.conv1d.bias", "f", f"{OWN}.b_conv", "f"),
    Fused(
        f"{MAMBA}.x_proj.weight",
        "x f",
        (
            Part(f"{OWN}.w_step_down", "h", "f h"),
            Part(f"{OWN}.w_key", "z", "f z"),
            Part(f"{OWN}.w_query", "z", "f z"),
        ),
    ),
    Tensor(f"{MAMBA}.dt_layernorm.weight", "h", f"{OWN}.step_down_norm.scale", "h"),
    Tensor(f"{MAMBA}.b_layernorm.weight", "z", f"{OWN}.key_norm.scale", "z"),
    Tensor(f"{MAMBA}.c_layernorm.weight", "z", f"{OWN}.query_norm.scale", "z"),
    Tensor(f"{MAMBA}.dt_proj.weight", "f h", f"{OWN}.w_step", "h f"),
    Tensor(f"{MAMBA}.dt_proj.bias", "f", f"{OWN}.step_bias", "f"),
    Tensor(f"{MAMBA}.A_log", "f z", f"{OWN}.log_decay_rate", "f z"),
    Tensor(f"{MAMBA}.D", "f", f"{OWN}.skip", "f"),
    Tensor(f"{MAMBA}.out_proj.weight", "d f", f"{OWN}.w_output", "f d"),
    Tensor(f"{MAMBA}.out_proj.bias", "d", f"{OWN}.b_output", "d"),
)

NORMS = (
    Tensor("model.final_layernorm.weight", "d", "final_norm.scale", "d"),
    Tensor(f"{LAYER}.pre_ff_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
)

FAMILY = Family(
    model_types=("jamba",),
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            *parts.PRE_NORMS,
            *beside(f"{OWN}.w_key", "d m h", parts.grouped_query()),
            *beside(f"{OWN}.log_decay_rate", "f z", MIXER),
            *parts.feed_forward(BLOCK, f"{OURS}.feed_forward"),
            *parts.router(f"{BLOCK}.router"),
            *parts.experts(f"{BLOCK}.experts"),
        ),
        NORMS,
    ),
    mlx=(
        *beside(f"{OWN}.log_decay_rate", "f z", [Tensor(CONVOLUTION.theirs, "f w 1", f"{OWN}.conv", "w f")]),
        *parts.switch(f"{BLOCK}.switch_mlp"),
    ),
    mlx_lm=MlxLM(config=mlx_config),
    harmless=(
        *("max_position_embeddings", "num_logits_to_keep", "use_mamba_kernels", "use_mambapy"),
        *("use_associative_scan", "calc_logits_for_entire_prompt"),
    ),
)
