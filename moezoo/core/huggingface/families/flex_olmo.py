"""FlexOlmo. Source: Shi et al. 2025, arXiv 2507.07024; transformers, `flex_olmo`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import LayerSpec, ModelSpec, MoESpec, RouterSpec


def spec(fields: Fields) -> ModelSpec:
    norm = parts.rms_norm(fields)
    bias = fields.flag("attention_bias", False)
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        norm_placement="post",
        attention=parts.attention(
            fields,
            parts.rope(fields, base=5e5),
            qk_norm=norm,
            qk_norm_over="projection",
            qkv_bias=bias,
            output_bias=bias,
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 7),
            router=RouterSpec(
                top_k=fields.count("num_experts_per_tok", 5),
                renormalize="sum" if fields.flag("norm_topk_prob", False) else "none",
            ),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            losses=parts.pooled_balance(fields, 0.01),
        ),
    )
    return parts.model(fields, [layer], norm=norm)


FAMILY = Family(
    model_types=("flex_olmo",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.grouped_query(),
        *parts.qk_norm(over="projection"),
        Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{LAYER}.post_feedforward_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        *parts.router(),
        *parts.experts(),
    ),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
)
