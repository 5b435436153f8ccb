"""GLM-5: sparse attention, in some layers to the tokens chosen in an earlier one. Source: Z.ai 2026; transformers,
`glm_moe_dsa`."""

from functools import cache
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v32 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import IndexerSpec, LatentAttentionSpec, ModelSpec, RoPESpec


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    moe = parts.grouped_sigmoid(fields, num_experts=("n_routed_experts", "num_local_experts", "num_experts"), scale=2.5)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    for name, value in (("moe_layer_freq", 1), ("moe_router_dtype", "float32")):
        fields.expect(name, value)
    parts.layer_types(fields, number, ["indexed_attention"] * number, ("indexed_attention",))
    first = fields.integer("first_k_dense_replace", 3)
    by_default = [index < first for index in range(number)]
    dense_layers = parts.dense_by_type(fields, number, by_default, older={"first_k_dense_replace": None})
    layers = [
        parts.layer(attention, dense if is_dense else moe)
        for attention, is_dense in zip(_attentions(fields, number), dense_layers, strict=True)
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5))


def _attentions(fields: Fields, num_layers: int) -> list[LatentAttentionSpec]:
    """Return each layer's attention; a `shared` layer attends to the tokens that the last `full` one chose."""
    for name in ("rope_interleave", "indexer_rope_interleave"):
        fields.expect(name, True)
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 32),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 2048),
        layout="interleaved",
    )
    attention = parts.latent_attention(fields, queries=2048)
    full, found, chosen_in = attention.model_copy(update={"indexer": indexer}), [], None
    shared = cache(lambda layer: attention.model_copy(update={"indexer_of_layer": layer}))
    for index, kind in enumerate(indexer_types(fields, num_layers)):
        chosen_in = index if kind == "full" else chosen_in
        if chosen_in is None:
            raise fields.refuse("indexer_types", "full in the first layer, from which others share")
        found.append(full if kind == "full" else shared(chosen_in))
    return found


def indexer_types(fields: Fields, num_layers: int) -> list[str]:
    """Return `full` or `shared` for each layer: a list, a pattern of letters, or every `index_topk_freq`-th is full."""
    pattern, letters = fields.get("index_topk_pattern"), {"F": "full", "S": "shared"}
    step, offset = max(fields.integer("index_topk_freq", 1), 1), fields.integer("index_skip_topk_offset", 2)
    by_default = ["shared" if max(index - offset + 1, 0) % step else "full" for index in range(num_layers)]
    if pattern is not None:
        by_default = [letters.get(letter, letter) for letter in pattern]
    types = fields.items("indexer_types", num_layers, by_default, tuple(letters.values()))
    fields.agree("indexer_types", by_default, {"index_topk_pattern": None, "index_topk_freq": None})
    return types


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttentionSpec)
    position = attention.position
    assert isinstance(position, RoPESpec)
    plain = position.scaling is None
    return {
        "attention_bias": attention.bias,
        "first_k_dense_replace": parts.leading_dense(spec),
        "moe_layer_freq": 1,
        "n_group": 1,
        "norm_topk_prob": True,
        "rms_norm_eps": spec.norm.epsilon,
        **({"rope_parameters": {"rope_theta": position.base, "rope_type": "default"}} if plain else {}),
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
    }


def _mlx_refuses(spec: ModelSpec) -> str | None:
    attentions = [layer.attention for layer in spec.all_layers]
    shared = [index for index, each in enumerate(attentions) if getattr(each, "indexer", None) is None]
    return f"layer {shared[0]} has no indexer of its own" if shared else None


FAMILY = Family(
    model_types=("glm_moe_dsa",),
    spec=spec,
    tensors=DEEPSEEK.tensors,
    mlx=DEEPSEEK.mlx,
    mlx_lm=MlxLM(floats=DEEPSEEK.mlx_lm.floats, config=_mlx_config, refuses=_mlx_refuses),
    kept=DEEPSEEK.kept,
    later_layers_kept=True,
    harmless=(*DEEPSEEK.harmless, "index_share_for_mtp*"),
)
