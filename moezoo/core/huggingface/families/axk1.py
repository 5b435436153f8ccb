"""A.X-K1: DeepSeek-V3 with a norm of the MoE layer's output. Source: SK Telecom 2026; transformers, `axk1`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v3 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    norm, number = parts.rms_norm(fields), fields.count("num_hidden_layers")
    attention = parts.latent_attention(fields)
    moe = parts.grouped_sigmoid(fields, groups=(8, 4), scale=2.5).model_copy(update={"output_norm": norm})
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    dense_layers = parts.dense_by_type(
        fields,
        number,
        dense_by_frequency(fields, number),
        older={"first_k_dense_replace": None, "moe_layer_freq": None},
    )
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in dense_layers]
    return parts.model(fields, layers, norm=norm)


def dense_by_frequency(fields: Fields, num_layers: int) -> list[bool]:
    """Return a flag per layer, true if it is dense, from `first_k_dense_replace` and `moe_layer_freq`."""
    first, step = fields.integer("first_k_dense_replace", 1), fields.count("moe_layer_freq", 1)
    return [index < first or index % step > 0 for index in range(num_layers)]


_OURS = f"{OURS}.moe.output_norm.scale"

FAMILY = Family(
    model_types=("axk1",),
    architecture="AXK1ForCausalLM",
    spec=spec,
    tensors=(
        *DEEPSEEK.tensors,
        Tensor(f"{LAYER}.post_mlp_layernorm.weight", "d", _OURS, "d"),
        Tensor(f"{LAYER}.mlp.post_mlp_layernorm.weight", "d", _OURS, "d"),  # the name in transformers 5
    ),
    kept=(*DEEPSEEK.kept, "*.post_mlp_layernorm.weight"),  # of dense layers, where it has no use
    may_lack=("selection_bias", ".e_score_correction_bias"),
    later_layers_kept=True,
    harmless=DEEPSEEK.harmless,
)
