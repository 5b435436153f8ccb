"""GLM-4.5, 4.6, 4.7, and the same text model inside GLM-4.5V and 4.6V. Source: GLM-4.5 Team 2025, arXiv 2508.06471;
GLM-V Team 2025, arXiv 2507.01006; transformers, `glm4_moe`, `glm4v_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec

VISION = ("glm4v_moe_text", "glm4v_moe")


def spec(fields: Fields) -> ModelSpec:
    norm, in_wrapper = parts.rms_norm(fields, 1e-5), fields.model_type in VISION
    attention = parts.attention(
        fields,
        # For text, the three positions of multimodal RoPE are equal.
        parts.rope(fields, fraction=0.5, harmless=("mrope_section",)),
        kv_heads=8,
        qk_norm=norm if fields.flag("use_qk_norm", False) else None,
        qkv_bias=fields.flag("attention_bias", in_wrapper),
    )
    moe = parts.grouped_sigmoid(fields)
    if in_wrapper:
        fields.expect("use_qk_norm", False)  # transformers ignores it
        moe = moe.model_copy(update={"losses": parts.pooled_balance(fields, 1e-4)})
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=norm)


FAMILY = Family(
    model_types=("glm4_moe", *VISION),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(floats=("*.mlp.gate",), without=VISION),
    kept=("*.rotary_emb.inv_freq", "*visual.*"),
    later_layers_kept=True,
    harmless=("max_position_embeddings", "num_mtp_layers", "num_nextn_predict_layers"),
)
