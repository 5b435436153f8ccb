"""GLM-4.7-Flash. Source: Z.ai 2026; transformers, `glm4_moe_lite`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v3 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.families.deepseek_v32 import mlx_config
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    attention = parts.latent_attention(fields, queries=768)
    moe = parts.grouped_sigmoid(fields, scale=1.8)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    if "mlp_layer_types" not in fields:
        fields.expect("first_k_dense_replace", 1)  # transformers ignores it and uses 1
    fields.expect("moe_layer_freq", 1)
    number = fields.count("num_hidden_layers")
    first = fields.integer("first_k_dense_replace", 1)
    by_default = [index < first for index in range(number)]
    dense_layers = parts.dense_by_type(fields, number, by_default, older={"first_k_dense_replace": None})
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in dense_layers]
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5))


FAMILY = Family(
    model_types=("glm4_moe_lite",),
    spec=spec,
    tensors=DEEPSEEK.tensors,
    mlx=DEEPSEEK.mlx,
    mlx_lm=MlxLM(floats=("*.mlp.gate",), config=mlx_config),
    kept=DEEPSEEK.kept,
    later_layers_kept=True,
    harmless=(*DEEPSEEK.harmless, "first_k_dense_replace"),
)
