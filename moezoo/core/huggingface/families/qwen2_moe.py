"""Qwen1.5-MoE and Qwen2-MoE. Source: Qwen Team 2024, arXiv 2407.10671; transformers, `qwen2_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, MoESpec, RouterSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    bias = fields.flag("qkv_bias", True)
    position = parts.rope(fields)
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 60),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 4),
            renormalize="sum" if fields.flag("norm_topk_prob", False) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 1408)),
        shared=SharedExpertsSpec(
            kind="sigmoid_gated", hidden_dim=fields.count("shared_expert_intermediate_size", 5632)
        ),
        losses=parts.pooled_balance(fields),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size", 5632))
    layers = [
        parts.layer(
            parts.attention(fields, position, kv_heads=16, window=window, qkv_bias=bias), dense if is_dense else moe
        )
        for window, is_dense in zip(_windows(fields, num_layers), parts.dense_layers(fields, num_layers), strict=True)
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def _windows(fields: Fields, num_layers: int) -> list[int | None]:
    last = fields.integer("max_window_layers", 28)
    if fields.flag("use_sliding_window", False):
        # Trap: transformers uses windows in every second layer below max_window_layers, Qwen2's paper in those above.
        default = ["full_attention" if i % 2 or i >= last else "sliding_attention" for i in range(num_layers)]
        return parts.windows(fields, num_layers, default, window=4096, older={"max_window_layers": 28})
    parts.layer_types(fields, num_layers, ["full_attention"] * num_layers, known=("full_attention",))
    return [None] * num_layers


FAMILY = Family(
    model_types=("qwen2_moe",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_expert", f"{OURS}.moe.shared"),
        Tensor(f"{LAYER}.mlp.shared_expert_gate.weight", "s d", f"{OURS}.moe.w_shared_gate", "d s"),
    ),
    mlx=parts.switch(),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings", "sliding_window"),
)
