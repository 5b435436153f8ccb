"""OLMoE. Source: Muennighoff et al. 2024, arXiv 2409.02060; transformers, `olmoe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import LayerSpec, ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    norm, bias = parts.rms_norm(fields, 1e-5), fields.flag("attention_bias", False)
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        attention=parts.attention(
            fields,
            parts.rope(fields),
            qk_norm=norm,
            qk_norm_over="projection",
            qkv_bias=bias,
            output_bias=bias,
            clip=fields.get("clip_qkv"),
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 64),
            router=RouterSpec(
                top_k=fields.count("num_experts_per_tok", 8),
                renormalize="sum" if fields.flag("norm_topk_prob", False) else "none",
            ),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            losses=parts.pooled_balance(fields, 0.01),
        ),
    )
    return parts.model(fields, [layer], norm=norm)


FAMILY = Family(
    model_types=("olmoe",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(over="projection"),
        *parts.router(),
        *parts.experts(),
    ),
    mlx=parts.switch(),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
)
