"""Solar Open. Source: Upstage 2026, the released model; transformers, `solar_open`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    attention = parts.attention(
        fields,
        parts.rope(fields, base=1e6, fraction=1.0),
        kv_heads=8,
        head_dim=128,
        qkv_bias=fields.flag("attention_bias", False),
    )
    fields.expect("use_qk_norm", False, because="transformers has no such norm in this family")
    fields.expect("first_k_dense_replace", 0, because="transformers has no dense layers in this family")
    layer = parts.layer(attention, parts.grouped_sigmoid(fields))
    return parts.model(fields, [layer] * fields.count("num_hidden_layers"), norm=parts.rms_norm(fields, 1e-5))


FAMILY = Family(
    model_types=("solar_open",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("intermediate_size", "max_position_embeddings"),
)
