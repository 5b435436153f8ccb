"""ERNIE 4.5. Source: Baidu 2025, ERNIE 4.5 Technical Report; transformers, `ernie4_5_moe`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, MoESpec, RouterSpec, SelectionBiasSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    bias = fields.flag("use_bias", False)  # everywhere except in routed experts
    position = parts.rope(fields, base=5e5, layout="interleaved")
    attention = parts.attention(fields, position, kv_heads=4, qkv_bias=bias, output_bias=bias)
    least = fields.number("moe_norm_min", 1e-12)
    width, shared = fields.count("moe_intermediate_size", 1536), fields.integer("moe_num_shared_experts", 2)
    moe = MoESpec(
        num_experts=fields.count(fields.either("moe_num_experts", "num_experts"), 64),
        router=RouterSpec(
            top_k=fields.count(fields.either("moe_k", "num_experts_per_tok"), 6),
            selection_bias=SelectionBiasSpec(),
            renormalize_epsilon=least,
            renormalize_floor=least > 0,
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width, bias=bias or None) if shared else None,
        losses=parts.pooled_balance(fields),
    )
    fields.expect("moe_gate", "topk")
    fields.expect("moe_gate_act", "softmax")
    fields.expect("moe_use_aux_free", True)
    fields.expect("compression_ratio", 1.0)
    dense = parts.swiglu(fields, fields.count("intermediate_size"), bias=bias)
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in _dense_layers(fields, num_layers)]
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob", "moe_dropout_prob"):
        fields.only_in_training(name)
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5), tied=True, head_bias=bias)


def _dense_layers(fields: Fields, num_layers: int) -> list[bool]:
    first = fields.integer("moe_layer_start_index", 1)
    last = -1 if fields.get("moe_layer_end_index", -1) == -1 else fields.integer("moe_layer_end_index")
    last = num_layers - 1 if last == -1 else last
    step = fields.count("moe_layer_interval", 1)
    return [(index + 1) % step > 0 or not first <= index <= last for index in range(num_layers)]


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    return {"moe_layer_end_index": spec.moes[-1][0]} if spec.moes else {}  # -1 is no layer to mlx-lm


_BIAS = f"{OURS}.moe.router.selection_bias"

FAMILY = Family(
    model_types=("ernie4_5_moe",),
    architecture="Ernie4_5_MoeForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            *parts.PRE_NORMS,
            *parts.grouped_query(),
            *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
            *parts.router(),
            Tensor(f"{LAYER}.mlp.gate.moe_statics.e_score_correction_bias", "1 e", _BIAS, "e"),  # in transformers 5
            *parts.experts(),
            *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
        ),
        (Tensor(f"{LAYER}.mlp.moe_statics.e_score_correction_bias", "1 e", _BIAS, "e"),),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(
        config=_mlx_config,
        replaces=("moe_layer_end_index",),
        drops=("selection_bias", ".e_score_correction_bias"),
    ),
    kept=("*.rotary_emb.inv_freq", "mtp*", "model.mtp*"),
    harmless=("ignored_index", "max_position_embeddings", "moe_capacity", "num_nextn_predict_layers"),
)
