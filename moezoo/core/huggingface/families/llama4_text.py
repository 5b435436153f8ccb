"""Llama 4 (Scout, Maverick), alone or inside its multimodal wrapper. Source: Meta 2025, the released models;
transformers, `llama4`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    RMSNormSpec,
    RouterSpec,
    SharedExpertsSpec,
    TemperatureTuningSpec,
)


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields, 1e-5)
    width = fields.count("intermediate_size")
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 16),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 1),
            score="none",
            weight="sigmoid_of_chosen",
            renormalize="none",
            apply_to="input",
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(hidden_dim=width),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size_mlp", 16384))
    sparse = _moe_layers(fields, num_layers)
    layers = [
        parts.layer(attention, moe if index in sparse else dense)
        for index, attention in enumerate(_attentions(fields, num_layers, norm.epsilon))
    ]
    return parts.model(fields, layers, norm=norm)


def _attentions(fields: Fields, num_layers: int, epsilon: float) -> list[GroupedQueryAttentionSpec]:
    """Return each layer's attention: RoPE with normalized queries and keys, mostly chunked, or NoPE, mostly full."""
    step = fields.count("no_rope_layer_interval", 4)
    # Trap: 1 in no_rope_layers means a layer with RoPE. The released files have an empty list, which means the default.
    rotated = fields.integers("no_rope_layers") or [min((index + 1) % step, 1) for index in range(num_layers)]
    if len(rotated) < num_layers:
        raise fields.refuse("no_rope_layers", f"a list of {num_layers} items")
    default = ["chunked_attention" if rotates else "full_attention" for rotates in rotated[:num_layers]]
    kinds = parts.layer_types(fields, num_layers, default, known=("full_attention", "chunked_attention"))
    chunk = fields.count_or_null("attention_chunk_size", 8192)
    if chunk is None and "chunked_attention" in kinds:
        raise fields.refuse("attention_chunk_size", "a number, because a layer has chunked_attention")
    bias = fields.flag("attention_bias", False)
    with_rope: dict[str, Any] = {"position": parts.rope(fields, base=5e5, layout="interleaved")}
    if fields.flag("use_qk_norm", True):
        with_rope |= {"qk_norm": RMSNormSpec(epsilon=epsilon, scale="none"), "qk_norm_after_rotation": True}
    without: dict[str, Any] = {"position": NoPositionSpec()}
    length, scale = fields.count("floor_scale", 8192), fields.number("attn_scale", 0.1)
    if fields.get("attn_temperature_tuning", True):  # 4 in some released files, treated as true
        without |= {"temperature_tuning": TemperatureTuningSpec(floor_length=length, scale=scale)}
    return [
        parts.attention(
            fields,
            kv_heads=8,
            head_dim=128,
            qkv_bias=bias,
            output_bias=bias,
            chunk=chunk if kind == "chunked_attention" else None,
            **(with_rope if rotates else without),
        )
        for rotates, kind in zip(rotated[:num_layers], kinds, strict=True)
    ]


def _moe_layers(fields: Fields, num_layers: int) -> list[int]:
    step = fields.count("interleave_moe_layer_step", 1)
    by_step = list(range(step - 1, num_layers, step))
    fields.agree("moe_layers", by_step, {"interleave_moe_layer_step": 1})
    return fields.integers("moe_layers", by_step)


_THEIRS = f"{LAYER}.feed_forward"
_OURS = f"{OURS}.moe.experts"


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    return {"interleave_moe_layer_step": parts.leading_dense(spec) + 1} if spec.moes else {}


def _mlx_refuses(spec: ModelSpec) -> str | None:
    step, number = parts.leading_dense(spec) + 1, len(spec.all_layers)
    regular = [index for index, _ in spec.moes] == list(range(step - 1, number, step))
    return None if regular else "its MoE layers are not the last ones of groups of one size"


FAMILY = Family(
    model_types=("llama4_text", "llama4"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.feed_forward(_THEIRS, f"{OURS}.feed_forward"),
        *parts.router(f"{_THEIRS}.router"),
        parts.gate_and_up(f"{_THEIRS}.experts.gate_up_proj", "e d x", _OURS),
        Tensor(f"{_THEIRS}.experts.down_proj", "e f d", f"{_OURS}.w_down", "e f d"),
        *parts.feed_forward(f"{_THEIRS}.shared_expert", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(f"{LAYER}.feed_forward.experts"),
    mlx_lm=MlxLM(wrapper="llama4", config=_mlx_config, replaces=("interleave_moe_layer_step",), refuses=_mlx_refuses),
    kept=("*.rotary_emb.inv_freq", "vision_model.*", "multi_modal_projector.*"),
    harmless=(
        "cache_implementation",
        "for_llm_compressor",
        "max_position_embeddings",
        "router_aux_loss_coef",  # the family's own code has neither this loss nor the jitter
        "router_jitter_noise",
    ),
)
