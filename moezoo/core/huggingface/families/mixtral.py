"""Mixtral. Source: Jiang et al. 2024, arXiv 2401.04088; transformers, `mixtral`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER
from moezoo.core.spec import GroupedQueryAttentionSpec, LayerSpec, ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        attention=GroupedQueryAttentionSpec(
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", 8),
            head_dim=fields.count("head_dim", width // heads),
            position=parts.rope(fields, base=1e6),
            window=fields.get("sliding_window"),
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 8),
            router=RouterSpec(top_k=fields.count("num_experts_per_tok", 2)),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            losses=parts.pooled_balance(fields),
        ),
    )
    fields.only_in_training("attention_dropout")
    fields.only_in_training("router_jitter_noise")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=width,
        layers=(layer,),
        norm=parts.rms_norm(fields, 1e-5),
        head=parts.head(fields),
    )


FAMILY = Family(
    model_types=("mixtral",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(f"{LAYER}.block_sparse_moe.gate"),
        *parts.experts(f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
        *parts.router(),  # as transformers 5 has it in memory
        *parts.experts(),
    ),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
)
