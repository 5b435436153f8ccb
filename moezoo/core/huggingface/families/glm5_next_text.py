"""GLM-5.3, text model: linear attention, sparse latent attention by pools, several residual streams. Source: Z.ai 2026;
transformers, `glm5_next`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v32 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.families.glm_moe_dsa import indexer_types
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Tensor, beside
from moezoo.core.spec import (
    AttentionSpec,
    ClampedSwiGLUSpec,
    GatedDeltaAttentionSpec,
    HyperConnectionsSpec,
    IndexerSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
)

SPARSE, DELTA = "indexed_attention", "linear_attention"
NESTED = "linear_attn_config"
# Names of transformers 5 and defaults, for those in `linear_attn_config`, which go before.
SIZES = {
    "num_heads": ("linear_num_heads", 64),
    "head_dim": ("linear_head_dim", 128),
    "short_conv_kernel_size": ("linear_conv_kernel_dim", 4),
}


def spec(fields: Fields) -> ModelSpec:
    number, norm = fields.count("num_hidden_layers"), parts.rms_norm(fields, 1e-5)
    fields.expect("hidden_act", "silu", "swish", because="clamped experts have SiLU, and so have causal convolutions")
    for name, value in {"mhc": True, "moe_layer_freq": 1, "moe_router_dtype": "float32"}.items():  # of released files
        fields.expect(name, value)
    dense, moe = _clamped(fields, fields.count("intermediate_size")), _moe(fields)
    if "mlp_layer_types" not in fields:
        fields.expect("first_k_dense_replace", 3, because="transformers ignores it")
    first = fields.integer("first_k_dense_replace", 3)
    dense_layers = parts.dense_by_type(
        fields, number, [index < first for index in range(number)], older={"first_k_dense_replace": None}
    )
    layers = [
        parts.layer(mixer, dense if is_dense else moe)
        for mixer, is_dense in zip(_mixers(fields, number), dense_layers, strict=True)
    ]
    streams = HyperConnectionsSpec(
        num_streams=fields.count("hc_mult", 4),
        sinkhorn_iterations=fields.count("hc_sinkhorn_iters", 20),
        final_read="mean",
        epsilon=fields.number("hc_eps", 1e-6),
        norm_epsilon=norm.epsilon,
    )
    return parts.model(fields, layers, norm=norm).model_copy(update={"residual": streams})


def _mixers(fields: Fields, number: int) -> list[AttentionSpec]:
    """Return each layer's mixer; a `shared` layer attends to what the layer before it chose."""
    by_default = [DELTA if index % 4 < 3 else SPARSE for index in range(number)]
    types = parts.layer_types(fields, number, by_default, (DELTA, SPARSE, "full_attention"))
    delta, attention = _delta(fields, types), _attention(fields)
    found: list[AttentionSpec] = []
    for index, (kind, chooses) in enumerate(zip(types, indexer_types(fields, number), strict=True)):
        if kind == DELTA:
            found.append(delta)
        elif chooses == "full":
            found.append(attention)
        elif index and found[-1] == attention:
            found.append(attention.model_copy(update={"indexer": None, "indexer_of_layer": index - 1}))
        else:
            raise fields.refuse("indexer_types", f"full in layer {index}, since the layer before it has no indexer")
    return found


def _attention(fields: Fields) -> AttentionSpec:
    fields.expect("mla_use_nope", True)
    fields.expect("qk_rope_head_dim", 0)  # transformers refuses any other
    fields.expect("index_kpool_compress", True)
    fields.expect("index_kpool_always_select_tail", True, because="the first tokens would attend to none")
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 32),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 2048),
        pool_size=fields.count("index_kpool", 16),
    )
    norm = parts.rms_norm(fields, 1e-5)
    return parts.latent_attention(fields, NoPositionSpec(), norm=norm, rope_head_dim=0, indexer=indexer)


def _delta(fields: Fields, types: list[str]) -> GatedDeltaAttentionSpec:
    sizes = {name: fields.count(outer, base) for name, (outer, base) in SIZES.items()}
    floor = None if fields.null("linear_lower_bound") else fields.number("linear_lower_bound", -5.0)
    inner = fields.inside(NESTED)
    if inner is not None:
        sizes = {name: inner.count(name, value) for name, value in sizes.items()}
        for name, (outer, _) in SIZES.items():
            fields.expect(outer, sizes[name])
        if "gate_lower_bound" in inner:
            floor = inner.number("gate_lower_bound")
            fields.expect("linear_lower_bound", floor)
        elif inner.null("gate_lower_bound"):
            floor = None
        if inner.flag("safe_gate", True) and floor is None:
            floor = -5.0
        listed = {"kda_layers": (DELTA,), "full_attn_layers": (SPARSE, "full_attention")}
        for name, kinds in listed.items():
            inner.expect(name, [index for index, kind in enumerate(types) if kind in kinds])
        inner.finish()
    return GatedDeltaAttentionSpec(
        num_key_heads=sizes["num_heads"],
        num_value_heads=sizes["num_heads"],
        key_head_dim=sizes["head_dim"],
        value_head_dim=sizes["head_dim"],
        conv_width=sizes["short_conv_kernel_size"],
        norm=parts.rms_norm(fields, 1e-5),
        gate="sigmoid",
        gate_rank=sizes["head_dim"],
        decay="channel",
        decay_rank=sizes["head_dim"],
        log_decay_floor=floor,
    )


def _clamped(fields: Fields, width: int) -> ClampedSwiGLUSpec:
    limit = fields.number("swiglu_limit", 10.0)
    return ClampedSwiGLUSpec(hidden_dim=width, alpha=1.0, limit=limit, up_offset=0.0, bias=False)


def _moe(fields: Fields) -> MoESpec:
    """Return the MoE layer, whose shared expert is clamped too."""
    moe = parts.grouped_sigmoid(fields, scale=2.5)
    experts = _clamped(fields, moe.experts.hidden_dim)
    return moe.model_copy(update={"experts": experts, "losses": parts.pooled_balance(fields)})


MIXER, OWN = f"{LAYER}.self_attn", f"{OURS}.attention"


def _latent() -> tuple[Fused, ...]:
    """Return rules for latent attention, whose latent has no rotated key beside."""
    return (
        *(rule for rule in parts.latent() if "kv_a_proj_with_mqa" not in rule.theirs),
        Tensor(f"{MIXER}.kv_a_proj_with_mqa.weight", "z d", f"{OWN}.w_latent", "d z"),
        Tensor(f"{MIXER}.kv_a_proj_with_mqa.bias", "z", f"{OWN}.b_latent", "z"),
    )


def _streams(name: str, ours: str) -> tuple[Fused, ...]:
    fn, base, scale = (f"{LAYER}.hc_{name}_{which}" for which in ("fn", "base", "scale"))
    return parts.hyper_connection((fn, base, scale), f"{OURS}.{ours}_residual", mixed=True)


FAMILY = Family(
    model_types=("glm5_next_text", "glm5_next"),
    architecture="Glm5NextForConditionalGeneration",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *_streams("attn", "attention"),
        *_streams("ffn", "feed_forward"),
        *parts.channel_delta(MIXER, low_rank=True),
        *beside(f"{OWN}.w_latent", "k z", _latent()),
        *(rule for rule in DEEPSEEK.tensors if f"{MIXER}.indexer." in rule.theirs),
        Tensor(f"{MIXER}.indexer.index_kpool_compress_gate", "k d", f"{OWN}.indexer.w_gate", "d k"),
        Tensor(f"{MIXER}.indexer.index_kpool_compress_ape", "s k", f"{OWN}.indexer.position_bias", "s k"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    kept=("*visual.*",),
    later_layers_kept=True,
    harmless=(
        *("head_dim", "index_share_for_mtp*", "indexer_rope_interleave", "max_position_embeddings", "mlp_bias"),
        *("num_nextn_predict_layers", "qk_head_dim"),
        *("rope_parameters", "rope_scaling", "rope_theta"),  # there is no rotation
    ),
)
