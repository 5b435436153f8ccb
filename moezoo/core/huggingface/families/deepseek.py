"""DeepSeekMoE, with grouped-query attention, and the text model of DeepSeek-OCR 2. Source: Dai et al. 2024, arXiv
2401.06066; mlx-lm, `deepseek`; transformers, `deepseek_ocr2`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v2 import mixture
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    LinearScalingSpec,
    ModelSpec,
    RoPESpec,
    TopKChoiceSpec,
)


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    first = fields.integer("first_k_dense_replace", 0)
    fields.expect("moe_layer_freq", 1)
    older = {"first_k_dense_replace": None}
    dense = parts.dense_by_type(fields, number, [index < first for index in range(number)], older=older)
    bias = fields.flag("attention_bias", False)
    attention = parts.attention(fields, parts.rope(fields), qkv_bias=bias, output_bias=bias)
    fields.expect("head_dim", attention.head_dim)  # transformers computes it
    moe = mixture(fields)
    feed_forward = parts.swiglu(fields, fields.count("intermediate_size"), bias=fields.flag("mlp_bias", False))
    layers = [parts.layer(attention, feed_forward if is_dense else moe) for is_dense in dense]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    dense = [layer.moe is None for layer in spec.all_layers]
    return {"first_k_dense_replace": dense.index(False), "moe_layer_freq": 1} if spec.moes else {}


def _refuses(spec: ModelSpec) -> str | None:
    """Return what mlx-lm does not have, of what the family has."""
    if not spec.moes:
        return "it has no model without experts"
    dense, moe = [layer.moe is None for layer in spec.all_layers], spec.moes[0][1]
    if dense != sorted(dense, reverse=True):
        return "its dense layers are the first ones"
    if spec.head.kind == "tied":
        return "its head is not tied"
    if moe.router.scale != 1 or not isinstance(moe.router.choice, TopKChoiceSpec):
        return "it has neither groups of experts nor a scale of their weights"
    if moe.shared is None:
        return "it has shared experts"
    blocks = [layer.feed_forward or moe.shared_feed_forward for layer in spec.all_layers]
    if any(block.bias for block in blocks):
        return "its feed-forwards have no biases"
    attentions = [
        layer.attention for layer in spec.all_layers if isinstance(layer.attention, GroupedQueryAttentionSpec)
    ]
    rotations = [each.position for each in attentions if isinstance(each.position, RoPESpec)]
    if not all(isinstance(each.scaling, LinearScalingSpec | None) for each in rotations):
        return "it scales its rotation linearly or not at all"
    return None


FAMILY = Family(
    model_types=("deepseek", "deepseek_ocr2_text", "deepseek_ocr2"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(
        floats=("*.mlp.gate",),
        config=_mlx_config,
        refuses=_refuses,
        lacks=("deepseek_ocr2_text", "deepseek_ocr2"),
    ),
    kept=(
        "*.rotary_emb.inv_freq",
        *parts.VISION,
        "*sam_model.*",
        "*qwen2_model.*",
        "*projector.*",
        "*view_seperator",
        "*view_separator",
    ),
    harmless=(
        "aux_loss_alpha",  # of a balance loss that neither mlx-lm nor transformers has
        "max_position_embeddings",
        "n_group",  # unused with topk_method greedy
        "seq_aux",
        "topk_group",
    ),
)
