"""DeepSeek-V3, R1, Kimi-K2, Moonlight. Source: DeepSeek-AI 2024, arXiv 2412.19437; transformers, `deepseek_v3`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    attention = parts.latent_attention(fields)
    moe = parts.grouped_sigmoid(fields, groups=(8, 4), scale=2.5)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 3)
    fields.expect("moe_layer_freq", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


FAMILY = Family(
    model_types=("deepseek_v3", "kimi_k2", "joyai_llm_flash"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.latent(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(*parts.switch(), *parts.absorbed()),
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq", *parts.VISION),
    later_layers_kept=True,
    harmless=(
        "head_dim",
        "max_position_embeddings",
        "qk_head_dim",
    ),
)
