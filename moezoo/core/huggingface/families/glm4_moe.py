"""GLM-4.5, 4.6, 4.7. Source: GLM-4.5 Team 2025, arXiv 2508.06471; transformers, `glm4_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    norm = parts.rms_norm(fields, 1e-5)
    attention = parts.attention(
        fields,
        parts.rope(fields, fraction=0.5),
        kv_heads=8,
        qk_norm=norm if fields.flag("use_qk_norm", False) else None,
        qkv_bias=fields.flag("attention_bias", False),
    )
    moe = parts.grouped_sigmoid(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=norm)


FAMILY = Family(
    model_types=("glm4_moe",),
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
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=("max_position_embeddings", "num_mtp_layers", "num_nextn_predict_layers"),
)
