"""Qwen3-Next. Source: Qwen Team 2025; Yang et al. 2024, arXiv 2412.06464; transformers, `qwen3_next`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside
from moezoo.core.spec import (
    AttentionSpec,
    GatedDeltaAttentionSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RouterSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    renormalize = fields.flag("norm_topk_prob", True)
    return hybrid(fields, renormalize, parts.dense_layers(fields, num_layers), num_experts=512, top_k=10)


def hybrid(fields: Fields, renormalize: bool, dense: list[bool], *, num_experts: int, top_k: int) -> ModelSpec:
    """Return a hybrid of Gated DeltaNet layers and gated attention, in every fourth layer or by `layer_types`.

    `num_experts` and `top_k` are the family's defaults.
    """
    norm = parts.rms_norm(fields).model_copy(update={"scale": "zero_centred"})
    mixers = _mixers(fields, norm)
    interval = fields.count("full_attention_interval", 4)
    kinds = ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(len(dense))]
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), num_experts),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", top_k), renormalize="sum" if renormalize else "none"
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 512)),
        shared=SharedExpertsSpec(kind="sigmoid_gated", hidden_dim=fields.count("shared_expert_intermediate_size", 512)),
        losses=parts.pooled_balance(fields),
    )
    feed_forward = parts.swiglu(fields, fields.count("intermediate_size", 5632))
    types = parts.layer_types(fields, len(dense), kinds, tuple(mixers), older={"full_attention_interval": None})
    layers = [
        parts.layer(mixers[kind], feed_forward if is_dense else moe)
        for kind, is_dense in zip(types, dense, strict=True)
    ]
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    return parts.model(fields, layers, norm=norm)


def gate_biases(bias: bool) -> dict[str, Any]:
    """Return the options of attention whose projections have biases, that of queries and gate among them."""
    return {"qkv_bias": bias, "output_bias": bias, "gate_bias": "elementwise" if bias else None}


def _mixers(fields: Fields, norm: RMSNormSpec) -> dict[str, AttentionSpec]:
    bias = fields.flag("attention_bias", False)
    fields.expect("attn_output_gate", True)
    return {
        "full_attention": parts.attention(
            fields,
            # For text only, the three positions of multimodal RoPE are equal.
            parts.rope(fields, fraction=0.25, harmless=("mrope_section", "mrope_interleaved")),
            kv_heads=2,
            head_dim=256,
            qk_norm=norm,
            gate="elementwise",
            **gate_biases(bias),
        ),
        "linear_attention": GatedDeltaAttentionSpec(
            num_key_heads=fields.count("linear_num_key_heads", 16),
            num_value_heads=fields.count("linear_num_value_heads", 32),
            key_head_dim=fields.count("linear_key_head_dim", 128),
            value_head_dim=fields.count("linear_value_head_dim", 128),
            conv_width=fields.count("linear_conv_kernel_dim", 4),
            norm=RMSNormSpec(epsilon=norm.epsilon),
        ),
    }


DELTA, FULL, ATTENTION = f"{LAYER}.linear_attn", f"{LAYER}.self_attn", f"{OURS}.attention"
# Parameters that only one of the two kinds of layer has.
QUERY_NORM, BIAS = (f"{ATTENTION}.query_norm.scale", "h"), (f"{ATTENTION}.decay_bias", "n")

CONVOLVED = (
    Part(f"{ATTENTION}.conv_query", "m h", "w m h"),
    Part(f"{ATTENTION}.conv_key", "m h", "w m h"),
    Part(f"{ATTENTION}.conv_value", "n z", "w n z"),
)

# Shared with Qwen3.5: all but prefixes and two projections of Gated DeltaNet.
SHARED_TENSORS: tuple[Fused, ...] = (
    *parts.MODEL,
    *parts.PRE_NORMS,
    *beside(
        *QUERY_NORM,
        (
            Fused(
                f"{FULL}.q_proj.weight",
                "(n x) d",
                (Part(f"{ATTENTION}.w_query", "h", "d n h"), Part(f"{ATTENTION}.w_gate", "h", "d n h")),
            ),
            Tensor(f"{FULL}.k_proj.weight", "(m h) d", f"{ATTENTION}.w_key", "d m h"),
            Tensor(f"{FULL}.v_proj.weight", "(m h) d", f"{ATTENTION}.w_value", "d m h"),
            Tensor(f"{FULL}.o_proj.weight", "d (n h)", f"{ATTENTION}.w_output", "n h d"),
        ),
    ),
    Fused(
        f"{FULL}.q_proj.bias",
        "(n x)",
        (Part(f"{ATTENTION}.b_query", "h", "n h"), Part(f"{ATTENTION}.b_gate", "h", "n h")),
    ),
    Tensor(f"{FULL}.k_proj.bias", "(m h)", f"{ATTENTION}.b_key", "m h"),
    Tensor(f"{FULL}.v_proj.bias", "(m h)", f"{ATTENTION}.b_value", "m h"),
    Tensor(f"{FULL}.o_proj.bias", "d", f"{ATTENTION}.b_output", "d"),
    *parts.qk_norm(),
    Fused(f"{DELTA}.conv1d.weight", "x 1 w", CONVOLVED),
    Tensor(f"{DELTA}.dt_bias", "n", f"{ATTENTION}.decay_bias", "n"),
    Tensor(f"{DELTA}.A_log", "n", f"{ATTENTION}.log_decay_rate", "n"),
    Tensor(f"{DELTA}.norm.weight", "z", f"{ATTENTION}.output_norm.scale", "z"),
    *beside(*BIAS, [Tensor(f"{DELTA}.out_proj.weight", "d (n z)", f"{ATTENTION}.w_output", "n z d")]),
    *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
    *parts.router(),
    *parts.experts(),
    *parts.feed_forward(f"{LAYER}.mlp.shared_expert", f"{OURS}.moe.shared"),
    Tensor(f"{LAYER}.mlp.shared_expert_gate.weight", "u d", f"{OURS}.moe.w_shared_gate", "d u"),
)

MLX_TENSORS: tuple[Fused, ...] = (*parts.switch(), Fused(f"{DELTA}.conv1d.weight", "x w 1", CONVOLVED))


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json that mlx-lm requires: its layers repeat, with full attention at the end."""
    full = [not isinstance(layer.attention, GatedDeltaAttentionSpec) for layer in spec.all_layers]
    return {"full_attention_interval": full.index(True) + 1 if True in full else len(full) + 1}


FAMILY = Family(
    model_types=("qwen3_next",),
    spec=spec,
    tensors=(
        *SHARED_TENSORS,
        # Per key head: its query and key, and the values and gates of its value heads.
        *beside(
            f"{ATTENTION}.conv_query",
            "w m h",
            (
                Fused(
                    f"{DELTA}.in_proj_qkvz.weight",
                    "(m x) d",
                    (
                        Part(f"{ATTENTION}.w_query", "h", "d m h"),
                        Part(f"{ATTENTION}.w_key", "h", "d m h"),
                        Part(f"{ATTENTION}.w_value", "g z", "d (m g) z"),
                        Part(f"{ATTENTION}.w_gate", "g z", "d (m g) z"),
                    ),
                ),
                Fused(
                    f"{DELTA}.in_proj_ba.weight",
                    "(m x) d",
                    (Part(f"{ATTENTION}.w_beta", "g", "d (m g)"), Part(f"{ATTENTION}.w_decay", "g", "d (m g)")),
                ),
            ),
        ),
    ),
    mlx=MLX_TENSORS,
    mlx_lm=MlxLM(config=mlx_config),
    kept=("mtp.*", "*.rotary_emb.inv_freq"),
    harmless=("max_position_embeddings", "mtp_*", "num_nextn_predict_layers"),
)
