"""ZAYA1: convolutional attention, an MLP as router, an expert that is skipped, scaled residual.

Source: Anthony et al. 2025, arXiv 2511.17127; transformers, `zaya`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    HeadConvolutionSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RoPESpec,
    RouterMLPSpec,
    RouterSpec,
    ScaledResidualSpec,
    SelectionBiasSpec,
    ZeroComputationSpec,
)

Array = npt.NDArray[Any]

FULL, SLIDING = "hybrid", "hybrid_sliding"
# Trap: the length of a head is at least float32's epsilon; in the mean square that is next to nothing.
QK_NORM = RMSNormSpec(scale="none", epsilon=1e-16)


def spec(fields: Fields) -> ModelSpec:
    number, norm = fields.count("num_hidden_layers"), parts.rms_norm(fields, 1e-5)
    types = parts.layer_types(fields, number, [FULL] * number, (FULL, SLIDING))
    # Has no effect without sliding layers.
    window = fields.count("sliding_window") if SLIDING in types else fields.get("sliding_window")
    attentions = {kind: _attention(fields, kind, window if kind == SLIDING else None) for kind in set(types)}
    moe = _moe(fields, norm, depth_average=number > 1)
    layers = [parts.layer(attentions[kind], moe) for kind in types]
    bias = fields.flag("lm_head_bias", False)
    model = parts.model(fields, layers, norm=norm, tied=True, head_bias=bias)
    return model.model_copy(update={"residual": ScaledResidualSpec()})


def _attention(fields: Fields, kind: str, window: int | None) -> GroupedQueryAttentionSpec:
    bias = fields.flag("attention_bias", False)
    return parts.attention(
        fields,
        _rope(fields, kind),
        kv_heads=2,
        head_dim=128,
        window=window,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QK_NORM,
        key_temperature=True,
        convolution=HeadConvolutionSpec(
            conv_width=fields.count("cca_time0", 2), mix_width=fields.count("cca_time1", 2)
        ),
    )


def _rope(fields: Fields, kind: str) -> RoPESpec:
    """Return the RoPE of a kind of layers; without `rope_parameters`, on half of each head."""
    if "rope_parameters" in fields:
        return parts.rope(fields, fraction=1.0, layer_type=kind)
    return RoPESpec(base=5e6 if kind == FULL else 1e4, fraction=0.5)


def _moe(fields: Fields, norm: RMSNormSpec, *, depth_average: bool) -> MoESpec:
    """Return the MoE layer; the first router averages over a depth of one."""
    fields.expect("num_experts_per_tok", 1)  # transformers 5.23 refuses more
    return MoESpec(
        num_experts=fields.count("num_experts", 16),
        router=RouterSpec(
            top_k=1,
            mlp=RouterMLPSpec(
                hidden_dim=fields.count("router_hidden_size", 256), depth_average=depth_average, norm=norm
            ),
            # Kept as loaded: transformers 5.23 sets that of the skipped expert to -1, whatever a file says.
            selection_bias=SelectionBiasSpec(rate=0.0),
            renormalize="none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 2048)),
        zero_computation=ZeroComputationSpec(num_zero=1, ffn_share=1.0),
    )


_ATTENTION, _CONVOLUTION = f"{LAYER}.self_attn", f"{OURS}.attention.convolution"
_GATE, _ROUTER = f"{LAYER}.mlp.gate", f"{OURS}.moe.router"


def _projections() -> tuple[Fused, ...]:
    theirs, ours = f"{_ATTENTION}.qkv_proj", f"{OURS}.attention"
    found: list[Fused] = []
    for name, parameter, axes, our_axes in (
        ("q_proj", f"{ours}.w_query", "(n h)", "n h"),
        ("k_proj", f"{ours}.w_key", "(m h)", "m h"),
        ("v_proj_current", f"{_CONVOLUTION}.w_value", "z", "z"),
        ("v_proj_delayed", f"{_CONVOLUTION}.w_value_before", "z", "z"),
    ):
        found.append(Tensor(f"{theirs}.{name}.weight", f"{axes} d", parameter, f"d {our_axes}"))
        found.append(Tensor(f"{theirs}.{name}.bias", axes, parameter.replace(".w_", ".b_"), our_axes))
    found.append(Tensor(f"{_ATTENTION}.o_proj.weight", "d (n h)", f"{ours}.w_output", "n h d"))
    found.append(Tensor(f"{_ATTENTION}.o_proj.bias", "d", f"{ours}.b_output", "d"))
    found.append(Tensor(f"{_ATTENTION}.qk_norm.temp", "m", f"{ours}.key_temperature", "m"))
    return tuple(found)


def _convolutions() -> tuple[Fused, ...]:
    """Queries and keys, one after the other."""

    def both(theirs: str, axes: str, ours: str, takes: str, our_axes: str) -> Fused:
        which = (("query", "n"), ("key", "m"))
        parts_of = tuple(
            Part(f"{_CONVOLUTION}.{each}.{ours}", takes.replace("n", head), our_axes.replace("n", head))
            for each, head in which
        )
        return Fused(f"{_ATTENTION}.qkv_proj.{theirs}", axes, parts_of)

    return (
        both("conv_qk_depthwise.weight", "x 1 w", "conv", "n h", "w n h"),
        both("conv_qk_depthwise.bias", "x", "b_conv", "n h", "n h"),
        both("conv_qk_grouped.weight", "x h w", "mix", "n z", "w n h z"),
        both("conv_qk_grouped.bias", "x", "b_mix", "n z", "n z"),
    )


def _residual() -> tuple[Fused, ...]:
    found = [
        Tensor(f"model.input_hidden_states_{part}", "d", f"first_residual.stream_{part}", "d")
        for part in ("scale", "bias")
    ]
    for theirs, ours in (("attention", "attention"), ("mlp", "feed_forward")):
        for term, own in (("hidden_states", "block"), ("residual", "stream")):
            for part in ("scale", "bias"):
                name = f"{LAYER}.post_{theirs}_residual_scale.{term}_{part}"
                found.append(Tensor(name, "d", f"{OURS}.{ours}_residual.{own}_{part}", "d"))
    return tuple(found)


def _router() -> tuple[Fused, ...]:
    mlp = f"{_ROUTER}.mlp"
    return (
        Tensor(f"{_GATE}.down_proj.weight", "z d", f"{mlp}.w_down", "d z"),
        Tensor(f"{_GATE}.down_proj.bias", "z", f"{mlp}.b_down", "z"),
        Tensor(f"{_GATE}.router_states_scale", "z", f"{mlp}.state_scale", "z"),
        Tensor(f"{_GATE}.router_mlp.norm.weight", "z", f"{mlp}.norm.scale", "z"),
        Tensor(f"{_GATE}.router_mlp.fc1.weight", "f z", f"{mlp}.w_first", "z f"),
        Tensor(f"{_GATE}.router_mlp.fc1.bias", "f", f"{mlp}.b_first", "f"),
        Tensor(f"{_GATE}.router_mlp.fc2.weight", "f z", f"{mlp}.w_second", "z f"),
        Tensor(f"{_GATE}.router_mlp.fc2.bias", "f", f"{mlp}.b_second", "f"),
        Tensor(f"{_GATE}.router_mlp.out_proj.weight", "e z", f"{_ROUTER}.w_router", "z e"),
        Tensor(f"{_GATE}.balancing_biases", "e", f"{_ROUTER}.selection_bias", "e"),
    )


def equivalent(parameters: Mapping[str, Array]) -> dict[str, Array]:
    """Return the selection biases with -1 for the skipped expert, the last one: transformers sets it so in any file.

    All of a router are shifted, so that the expert with the largest sum, which alone is chosen, stays the same.
    """
    biases = {name: parameters[name] for name in parameters if name.endswith(".router.selection_bias")}
    return {name: (bias - bias[-1].astype(np.float64) - 1).astype(bias.dtype) for name, bias in biases.items()}


FAMILY = Family(
    model_types=("zaya",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *_projections(),
        *_convolutions(),
        *_residual(),
        *_router(),
        *parts.fused_experts(),
        *parts.experts()[:-2],
    ),
    harmless=("max_position_embeddings",),
    equivalent=equivalent,
)
