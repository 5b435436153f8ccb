"""Beam. Source: Reflection AI 2026, the released model; transformers, `beam`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import DepthScaledResidualSpec, ModelSpec, NoPositionSpec, PositionSpec, TemperatureTuningSpec

TEMPERATURE = TemperatureTuningSpec(form="power", floor_length=2048, scale=0.1)
"""Of queries in layers without RoPE."""


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers", 52)
    norm, bias = parts.rms_norm(fields), fields.flag("attention_bias", False)
    full = [(index + 1) % 6 == 0 or index == number - 1 for index in range(number)]
    types = ["full_attention" if each else "sliding_attention" for each in full]
    windows = parts.windows(fields, number, types, window=512)
    dense = parts.dense_by_type(fields, number, [index < 3 for index in range(number)])
    moe = parts.grouped_sigmoid(
        fields, num_experts=("num_experts",), num_shared=("n_shared_experts", 0), groups=(8, 4), scale=2.5
    )
    feed_forward = parts.swiglu(fields, fields.count("intermediate_size", 20480))
    layers = [
        parts.layer(
            parts.attention(
                fields,
                _position(fields, window is None),
                kv_heads=8,
                head_dim=128,
                window=window,
                qk_norm=norm,
                qkv_bias=bias,
                output_bias=bias,
                gate="elementwise",
                gate_bias="headwise",
                temperature_tuning=None if _has_rope(fields, window is None) else TEMPERATURE,
            ),
            feed_forward if is_dense else moe,
        ).model_copy(update={"norm_placement": "sandwich"})
        for window, is_dense in zip(windows, dense, strict=True)
    ]
    cap = "final_logit_softcapping"
    softcap = None if fields.null(cap) else fields.number(cap, 30.0)
    model = parts.model(fields, layers, norm=norm)
    return model.model_copy(update={"residual": DepthScaledResidualSpec(), "softcap": softcap})


def _has_rope(fields: Fields, is_full: bool) -> bool:
    """Return False if a kind of layers has null in `rope_parameters`, as full attention has by default."""
    inner = fields.inside("rope_parameters")
    kind = _kind(is_full)
    if inner is None:
        return not is_full
    if kind not in inner and not inner.null(kind):
        raise fields.refuse("rope_parameters", f"an object with {kind}")
    return kind in inner


def _position(fields: Fields, is_full: bool) -> PositionSpec:
    return parts.rope(fields, layer_type=_kind(is_full)) if _has_rope(fields, is_full) else NoPositionSpec()


def _kind(is_full: bool) -> str:
    return "full_attention" if is_full else "sliding_attention"


FAMILY = Family(
    model_types=("beam",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.attention_output_norm.scale", "d"),
        Tensor(f"{LAYER}.pre_feedforward_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        Tensor(f"{LAYER}.post_feedforward_layernorm.weight", "d", f"{OURS}.feed_forward_output_norm.scale", "d"),
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.gate_proj.weight", "(n h) d", f"{OURS}.attention.w_gate", "d n h"),
        Tensor(f"{LAYER}.self_attn.gate_bias", "n", f"{OURS}.attention.b_gate", "n"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
    ),
    harmless=("max_position_embeddings",),
)
