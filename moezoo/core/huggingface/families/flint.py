"""Flint. Source: Recursive 2026, the released model; transformers, `flint`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, MoESpec, NoPositionSpec, RouterSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm, bias, rope = parts.rms_norm(fields), fields.flag("attention_bias", False), parts.rope(fields)
    options: dict[str, Any] = {"qk_norm": norm, "qkv_bias": bias, "output_bias": bias, "sinks": True}
    moe = _moe(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    # Layers with full attention have no RoPE.
    layers = [
        parts.layer(
            parts.attention(
                fields,
                NoPositionSpec() if window is None else rope,
                kv_heads=4,
                head_dim=128,
                window=window,
                **options,
            ),
            dense if is_dense else moe,
        )
        for window, is_dense in zip(
            parts.windows(fields, number, _types(number), window=513),
            parts.dense_layers(fields, number, only=(0, 1)),
            strict=True,
        )
    ]
    return parts.model(fields, layers, norm=norm)


def _types(number: int) -> list[str]:
    """Return full attention in the first two layers, every fourth one and the last; windows elsewhere."""
    full = [index < 2 or index % 4 == 1 or index == number - 1 for index in range(number)]
    return ["full_attention" if each else "sliding_attention" for each in full]


def _moe(fields: Fields) -> MoESpec:
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 256),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 6),
            score="sigmoid",
            renormalize="sum" if fields.flag("norm_topk_prob", True) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 512)),
        shared=SharedExpertsSpec(hidden_dim=fields.count("shared_expert_intermediate_size", 1024)),
        losses=parts.pooled_balance(fields, 0.0005),
    )


FAMILY = Family(
    model_types=("flint",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.softmax_offset", "n", f"{OURS}.attention.sink", "n"),
        Tensor(f"{LAYER}.self_attn.sinks", "n", f"{OURS}.attention.sink", "n"),  # as transformers has it in memory
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_expert", f"{OURS}.moe.shared"),
    ),
    harmless=("max_position_embeddings",),
)
