"""Mixtral. Source: Jiang et al. 2024, arXiv 2401.04088; transformers, `mixtral`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER
from moezoo.core.spec import LayerSpec, ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        attention=parts.attention(
            fields, parts.rope(fields, base=1e6), kv_heads=8, window=fields.count_or_null("sliding_window")
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 8),
            router=RouterSpec(top_k=fields.count("num_experts_per_tok", 2), jitter=parts.jitter(fields)),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            losses=parts.pooled_balance(fields),
        ),
    )
    return parts.model(fields, [layer], norm=parts.rms_norm(fields, 1e-5))


FAMILY = Family(
    model_types=("mixtral",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(f"{LAYER}.block_sparse_moe.gate"),
        *parts.experts(f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
        *parts.router(),  # the name in transformers 5
        *parts.experts(),
    ),
    mlx=parts.switch(f"{LAYER}.block_sparse_moe.switch_mlp"),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
)
