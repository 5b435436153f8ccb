"""DeepSeek-V3.2: V3 with sparse attention. Source: DeepSeek-AI 2025 (V3.2-Exp); transformers, `deepseek_v32`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import IndexerSpec, ModelSpec

_THEIRS, _INDEXER = f"{LAYER}.self_attn.indexer", f"{OURS}.attention.indexer"


def spec(fields: Fields) -> ModelSpec:
    fields.expect("rope_interleave", True)  # of the attention; the indexer uses half-split
    attention = parts.latent_attention(
        fields,
        indexer=IndexerSpec(
            num_heads=fields.count("index_n_heads", 64),
            head_dim=fields.count("index_head_dim", 128),
            top_k=fields.count("index_topk", 2048),
        ),
    )
    moe = parts.grouped_sigmoid(fields, groups=(8, 4), scale=2.5)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    number = fields.count("num_hidden_layers")
    fields.expect("moe_layer_freq", 1)
    parts.layer_types(fields, number, ["indexed_attention"] * number, ("indexed_attention",))
    first = fields.integer("first_k_dense_replace", 3)
    dense_layers = parts.dense_by_type(
        fields, number, [index < first for index in range(number)], older={"first_k_dense_replace": None}
    )
    layers = [parts.layer(attention, dense if is_dense else moe) for is_dense in dense_layers]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the field by which mlx-lm knows the dense layers."""
    return {"first_k_dense_replace": parts.leading_dense(spec)}


FAMILY = Family(
    model_types=("deepseek_v32",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.latent(),
        Tensor(f"{_THEIRS}.wq_b.weight", "(i k) q", f"{_INDEXER}.w_query", "q i k"),
        Tensor(f"{_THEIRS}.wk.weight", "k d", f"{_INDEXER}.w_key", "d k"),
        Tensor(f"{_THEIRS}.k_norm.weight", "k", f"{_INDEXER}.key_norm.scale", "k"),
        Tensor(f"{_THEIRS}.k_norm.bias", "k", f"{_INDEXER}.key_norm.bias", "k"),
        Tensor(f"{_THEIRS}.weights_proj.weight", "i d", f"{_INDEXER}.w_weight", "d i"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(*parts.switch(), *parts.absorbed()),
    mlx_lm=MlxLM(floats=("*.mlp.gate",), config=mlx_config),
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=("head_dim", "max_position_embeddings", "mlp_bias", "qk_head_dim"),  # transformers has no biases there
)
