"""ERNIE 4.5 VL, text model: text uses the text experts alone; those for images, with a router of their own, are kept.
Source: Baidu 2025, ERNIE 4.5 Technical Report; transformers, `ernie4_5_vl_moe`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import ModelSpec, MoESpec, RouterSpec, SelectionBiasSpec, SharedExpertsSpec

WIDTHS = "moe_intermediate_size"


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    bias = fields.flag("use_bias", False)  # everywhere except in routed experts and the head
    # For text, the three positions of multimodal RoPE are equal.
    position = parts.rope(fields, base=5e5, layout="interleaved", harmless=("mrope_section",))
    if position.scaling is not None:
        raise fields.refuse("rope_parameters", "rope_type default")
    attention = parts.attention(fields, position, kv_heads=4, qkv_bias=bias, output_bias=bias)
    widths = fields.integers(WIDTHS, (1536, 512))
    if len(widths) != 2:
        raise fields.refuse(WIDTHS, "two numbers, of text experts and of those for images")
    least, shared = fields.number("moe_norm_min", 1e-12), fields.integer("moe_num_shared_experts", 2)
    moe = MoESpec(
        num_experts=fields.count(fields.either("moe_num_experts", "num_experts"), 64),
        router=RouterSpec(
            top_k=fields.count(fields.either("moe_k", "num_experts_per_tok"), 6),
            selection_bias=SelectionBiasSpec(),
            renormalize_epsilon=least,
            renormalize_floor=least > 0,
        ),
        experts=parts.swiglu(fields, widths[0]),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=widths[0], bias=bias or None) if shared else None,
        losses=parts.pooled_balance(fields),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size"), bias=bias)
    dense_layers = parts.dense_by_type(fields, num_layers, [index == 0 for index in range(num_layers)])
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in dense_layers]
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5), tied=True)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """Return the widths, of which the second is that of experts that the model does not have."""
    widths = [moe.experts.hidden_dim for _, moe in spec.moes]
    return {WIDTHS: [widths[0], widths[0]]} if widths else {}


FAMILY = Family(
    model_types=("ernie4_5_vl_moe_text", "ernie4_5_vl_moe"),
    architecture="Ernie4_5_VLMoeForConditionalGeneration",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        Tensor(f"{LAYER}.mlp.gate.weight", "d e", f"{OURS}.moe.router.w_router", "d e"),
        Fused(  # one row for text, one for images
            f"{LAYER}.mlp.moe_statics.e_score_correction_bias",
            "x e",
            (Part(f"{OURS}.moe.router.selection_bias", "", "e"),),
            kept=1,
        ),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    kept=(
        *("*.rotary_emb.inv_freq", "*vision_model.*", "*resampler_model.*"),
        # Experts for images have the numbers after those of the text experts.
        *("*.mlp.gate.weight_1", "*.mlp.experts.*"),
    ),
    harmless=("max_position_embeddings",),
    config=_config,
)
