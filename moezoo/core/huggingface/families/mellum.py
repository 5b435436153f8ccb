"""Mellum 2. Source: JetBrains 2026, the released model; transformers, `mellum`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec, MoESpec, RoPESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields)
    bias = fields.flag("attention_bias", False)
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 64),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            renormalize="sum" if fields.flag("norm_topk_prob", True) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size")),
        losses=parts.pooled_balance(fields),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size", 7168))
    dense_layers = parts.dense_by_type(fields, num_layers, [False] * num_layers)
    layers = [
        parts.layer(
            parts.attention(
                fields,
                _rope(fields, "full_attention" if window is None else "sliding_attention"),
                kv_heads=4,
                head_dim=128,
                window=window,
                qk_norm=norm,
                qkv_bias=bias,
                output_bias=bias,
            ),
            dense if is_dense else moe,
        )
        for window, is_dense in zip(parts.windows(fields, num_layers, window=1024), dense_layers, strict=True)
    ]
    return parts.model(fields, layers, norm=norm)


def _rope(fields: Fields, layer_type: str) -> RoPESpec:
    """Return the RoPE of a layer type; each type has its own."""
    fields.expect("rope_theta")
    inner = fields.inside("rope_parameters")
    if inner is None:
        return RoPESpec(base=5e5 if layer_type == "full_attention" else 1e4)
    if layer_type not in inner:
        raise fields.refuse("rope_parameters", f"an object with {layer_type}")
    inner.finish(("full_attention", "sliding_attention"))
    own = inner.inside(layer_type)
    if own is not None:
        # Trap: transformers 5.23 reads it outside this object, so it truncates regardless of this value.
        own.expect("truncate", True)
    return parts.rope(fields, fraction=1.0, layer_type=layer_type)


FAMILY = Family(
    model_types=("mellum",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
    ),
    mlx=parts.switch(),
    kept=("*.rotary_emb.inv_freq", "mtp.*"),
    harmless=(
        "max_position_embeddings",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "num_mtp_layers",
        "num_nextn_predict_layers",
    ),
)
