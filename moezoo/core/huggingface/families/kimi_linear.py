"""Kimi Linear. Source: Kimi Team 2025, arXiv 2510.26692; transformers, `kimi_linear`."""

from collections.abc import Mapping
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.axk1 import dense_by_frequency
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor, beside
from moezoo.core.spec import AttentionSpec, GatedDeltaAttentionSpec, ModelSpec, NoPositionSpec

# Names that transformers 5 writes, for those of DeepSeek.
NAMES: Mapping[str, str] = {
    "n_group": "num_expert_group",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "num_experts_per_tok": "num_experts_per_token",
}
LINEAR, CONV = "linear_attn_config", "linear_conv_kernel_dim"


def spec(fields: Fields) -> ModelSpec:
    norm, number = parts.rms_norm(fields, 1e-5), fields.count("num_hidden_layers")
    mixers, listed = _mixers(fields), _listed(fields, number)
    by_default = ["full_attention" if layer and layer % 4 == 0 else "linear_attention" for layer in range(number)]
    moe = parts.grouped_sigmoid(
        fields, names=NAMES, num_experts=("num_experts", "num_local_experts"), groups=(1, 1), scale=2.446
    )
    fields.expect("moe_router_activation_func", "sigmoid")
    fields.expect("use_grouped_topk", True)
    fields.expect("moe_layer_freq", 1)  # transformers ignores it
    dense = parts.swiglu(fields, fields.count("intermediate_size", 9216))
    dense_layers = parts.dense_by_type(
        fields, number, dense_by_frequency(fields, number), older={"first_k_dense_replace": None}
    )
    types = parts.layer_types(fields, number, listed or by_default, tuple(mixers))
    layers = [
        parts.layer(mixers[kind], dense if is_dense else moe)
        for kind, is_dense in zip(types, dense_layers, strict=True)
    ]
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    return parts.model(fields, layers, norm=norm)


def _listed(fields: Fields, number: int) -> list[str] | None:
    """Return each layer's kind from the lists of `linear_attn_config`, which count from 1, or None without them."""
    inner = fields.inside(LINEAR)
    if inner is None or "full_attn_layers" not in inner or "kda_layers" not in inner:
        return None
    kinds = {"full_attention": inner.integers("full_attn_layers"), "linear_attention": inner.integers("kda_layers")}
    if sorted(layer for layers in kinds.values() for layer in layers) != list(range(1, number + 1)):
        raise fields.refuse(LINEAR, f"full_attn_layers and kda_layers to have each layer from 1 to {number} once")
    return [kind for layer in range(1, number + 1) for kind, layers in kinds.items() if layer in layers]


def _mixers(fields: Fields) -> dict[str, AttentionSpec]:
    fields.expect("mla_use_nope", True)
    names = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim", "short_conv_kernel_size": CONV}
    sizes = {name: fields.count(outer, base) for (name, outer), base in zip(names.items(), (32, 128, 4), strict=True)}
    inner = fields.inside(LINEAR)
    if inner is not None:
        sizes = {name: inner.count(name, value) for name, value in sizes.items()}
        inner.finish(("full_attn_layers", "kda_layers"))
        for name, outer in names.items():
            fields.expect(outer, sizes[name])
    heads, width = sizes["num_heads"], sizes["head_dim"]
    return {
        "full_attention": parts.latent_attention(fields, NoPositionSpec(), queries=None),
        "linear_attention": GatedDeltaAttentionSpec(
            num_key_heads=heads,
            num_value_heads=heads,
            key_head_dim=width,
            value_head_dim=width,
            conv_width=sizes["short_conv_kernel_size"],
            norm=parts.rms_norm(fields, 1e-5),
            gate="sigmoid",
            gate_rank=width,
            decay="channel",
            decay_rank=width,
        ),
    }


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json that mlx-lm requires."""
    mixers = [layer.attention for layer in spec.all_layers]
    linear = [isinstance(mixer, GatedDeltaAttentionSpec) for mixer in mixers]
    delta = mixers[linear.index(True)] if True in linear else None
    sizes = {}
    if isinstance(delta, GatedDeltaAttentionSpec):
        sizes = {
            "num_heads": delta.num_value_heads,
            "head_dim": delta.key_head_dim,
            "short_conv_kernel_size": delta.conv_width,
        }
    return {
        "first_k_dense_replace": parts.leading_dense(spec),
        LINEAR: {
            **sizes,
            "kda_layers": [index + 1 for index, each in enumerate(linear) if each],
            "full_attn_layers": [index + 1 for index, each in enumerate(linear) if not each],
        },
        # Required there, without effect.
        **{"head_dim": sizes.get("head_dim", 0), "model_max_length": 1048576, "rope_theta": 10000.0},
    }


BLOCK = f"{LAYER}.block_sparse_moe"
LATENT = (f"{OURS}.attention.w_latent", "k z")

FAMILY = Family(
    model_types=("kimi_linear",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.channel_delta(f"{LAYER}.self_attn", low_rank=True, rates="1 1 n 1"),
        *beside(*LATENT, parts.latent()),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.feed_forward(BLOCK, f"{OURS}.feed_forward"),  # as transformers 5.23 saves it
        *parts.router(f"{BLOCK}.gate"),
        *parts.experts(f"{BLOCK}.experts", ("w1", "w3", "w2")),
        *parts.feed_forward(f"{BLOCK}.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(
        *parts.mlx_convolutions(f"{LAYER}.self_attn", "conv.conv"),
        *beside(*LATENT, parts.absorbed()),
        Tensor(f"{LAYER}.mlp.gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
        Tensor(f"{LAYER}.mlp.e_score_correction_bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
        *parts.switch(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx_lm=MlxLM(config=mlx_config),
    kept=parts.VISION,
    later_layers_kept=True,
    harmless=(
        *("head_dim", "max_position_embeddings", "model_max_length", "qk_head_dim"),
        *("num_nextn_predict_layers", "rope_theta", "rope_scaling"),  # there is no rotation
    ),
)
