"""DeepSeek-V4. Source: DeepSeek-AI 2026; transformers, `deepseek_v4`."""

from collections.abc import Mapping, Sequence
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.inverse.rotations import rope_fields
from moezoo.core.huggingface.parts import OURS
from moezoo.core.huggingface.tensors import Fused, Tensor
from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    CompressedAttentionSpec,
    CompressionSpec,
    HashChoiceSpec,
    HyperConnectionsSpec,
    IndexerSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RoPESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    YaRNScalingSpec,
)

WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_OF_RATIO = {0: WINDOW, 4: SPARSE, 128: HEAVY}
_OLDER_RATE = {SPARSE: "compress_rate_csa", HEAVY: "compress_rate_hca"}


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields)
    kinds = parts.layer_types(
        fields, number, _layer_types(fields, number), (WINDOW, SPARSE, HEAVY), older={"compress_ratios": None}
    )
    attentions = {kind: _attention(fields, kind, norm) for kind in kinds}
    hashed, chosen = _moe(fields)
    layers = [
        parts.layer(attentions[kind], hashed if is_hash else chosen)
        for kind, is_hash in zip(kinds, _hash_layers(fields, number), strict=True)
    ]
    streams = HyperConnectionsSpec(
        num_streams=fields.count("hc_mult", 4),
        sinkhorn_iterations=fields.count("hc_sinkhorn_iters", 20),
        epsilon=fields.number("hc_eps", 1e-6),
        norm_epsilon=norm.epsilon,
    )
    return parts.model(fields, layers, norm=norm).model_copy(update={"residual": streams})


def _layer_types(fields: Fields, number: int) -> list[str]:
    """Return the kinds that follow from `compress_ratios`, whose further ones are of predicted tokens; or alternate."""
    if "compress_ratios" in fields:
        ratios = fields.integers("compress_ratios")[:number]
        if any(ratio not in _OF_RATIO for ratio in ratios):
            raise fields.refuse("compress_ratios", "each of 0, 4, 128")
        return [_OF_RATIO[ratio] for ratio in ratios]
    return [SPARSE if index > 2 and index % 2 else HEAVY for index in range(number)]


def _hash_layers(fields: Fields, number: int) -> list[bool]:
    """Return a flag per layer, true if its experts follow from token ids, from `mlp_layer_types`."""
    first = fields.integer("num_hash_layers", 3)
    by_default = ["hash_moe" if index < first else "moe" for index in range(number)]
    types = fields.items("mlp_layer_types", number, by_default)
    if any(kind not in ("hash_moe", "moe") for kind in types):
        raise fields.refuse("mlp_layer_types", "each layer to be one of hash_moe, moe")
    fields.agree("mlp_layer_types", by_default, {"num_hash_layers": None})
    return [kind == "hash_moe" for kind in types]


def _attention(fields: Fields, kind: str, norm: RMSNormSpec) -> CompressedAttentionSpec:
    fields.expect("num_key_value_heads", 1)
    head_dim = fields.count("head_dim", 512)
    position = _rope(fields, "main" if kind == WINDOW else "compress", head_dim)
    return CompressedAttentionSpec(
        num_heads=fields.count("num_attention_heads", 64),
        head_dim=head_dim,
        rope_head_dim=int(head_dim * position.fraction),
        query_latent_dim=fields.count("q_lora_rank", 1024),
        output_groups=fields.count("o_groups", 8),
        output_latent_dim=fields.count("o_lora_rank", 1024),
        window=fields.count("sliding_window", 128),
        position=position.model_copy(update={"fraction": 1.0}),
        norm=norm,
        compression=None if kind == WINDOW else _compression(fields, kind, norm),
    )


def _compression(fields: Fields, kind: str, norm: RMSNormSpec) -> CompressionSpec:
    rates, older = fields.inside("compress_rates"), _OLDER_RATE[kind]
    ratio = {SPARSE: 4, HEAVY: 128}[kind]
    if rates is not None:
        ratio = rates.count(kind, ratio)
        fields.expect(older, ratio)
        rates.finish((SPARSE, HEAVY))
    ratio = fields.count(older, ratio)
    if kind == HEAVY:
        return CompressionSpec(ratio=ratio)
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 64),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 512),
        layout="interleaved",
        rotated="last",
        key_norm=norm,
    )
    return CompressionSpec(ratio=ratio, overlap=True, indexer=indexer)


def _rope(fields: Fields, label: str, head_dim: int) -> RoPESpec:
    """Return the RoPE of layers without entries (`main`) or with them (`compress`), on a fraction of a head.

    Of fields that do not have both, the scaling is that of `compress`, and YaRN does not sharpen attention.
    """
    fraction = fields.count("qk_rope_head_dim", head_dim // 8) / head_dim
    fields.agree("partial_rotary_factor", fraction, {"qk_rope_head_dim": None})
    fraction = fields.number("partial_rotary_factor", fraction)
    theta, base = ("rope_theta", 1e4) if label == "main" else ("compress_rope_theta", 1.6e5)
    both, older = fields.get("rope_parameters") or {}, fields.get("rope_scaling")
    nested = "main" in both and "compress" in both
    scaling = _scaled(fields, (older if nested else older or both) or {}, base, fraction).scaling
    if isinstance(scaling, YaRNScalingSpec) and scaling.attention_factor is None:
        scaling = scaling.model_copy(update={"attention_factor": 1.0})
    if not nested:
        scaling = None if label == "main" else scaling
        return RoPESpec(base=fields.number(theta, base), fraction=fraction, layout="interleaved", scaling=scaling)
    found = _scaled(fields, both[label], base, fraction)
    fields.agree(theta, found.base, {"rope_parameters": None})
    fields.agree("partial_rotary_factor", found.fraction, {"rope_parameters": None})
    if label == "compress" and older is not None and found.scaling != scaling:
        raise fields.refuse("rope_scaling", "the same as in rope_parameters")
    return found


def _scaled(fields: Fields, values: Mapping[str, Any], base: float, fraction: float) -> RoPESpec:
    longest = {"max_position_embeddings": fields.get("max_position_embeddings", 1 << 20)}
    own = Fields({"rope_parameters": values, **longest}, fields.where, fields.max_length)
    return parts.rope(own, base=base, fraction=fraction, layout="interleaved")


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of kinds of layers and their RoPE for a model designed in moezoo."""
    kinds: list[str] = []
    rates: dict[str, int] = {}
    ropes: dict[str, dict[str, Any]] = {}
    widths: dict[str, int] = {}
    for layer in spec.all_layers:
        attention = layer.attention
        if not isinstance(attention, CompressedAttentionSpec):
            return {}
        compression = attention.compression
        kinds.append(WINDOW if compression is None else SPARSE if compression.overlap else HEAVY)
        if compression is not None:
            rates[kinds[-1]] = compression.ratio
            widths |= {} if compression.indexer is None else {"index_head_dim": compression.indexer.head_dim}
        widths["head_dim"] = attention.head_dim
        part = {"partial_rotary_factor": attention.rope_head_dim / attention.head_dim}
        ropes["main" if compression is None else "compress"] = rope_fields(attention.position) | part
    bases = {"main": "rope_theta", "compress": "compress_rope_theta"}
    named = {bases[label]: rope["rope_theta"] for label, rope in ropes.items()}  # nothing reads that of no layer
    ropes = {label: ropes.get(label, next(iter(ropes.values()))) for label in bases}
    hashed = [each.moe is not None and isinstance(each.moe.router.choice, HashChoiceSpec) for each in spec.all_layers]
    return {
        **widths,
        "layer_types": kinds,
        "mlp_layer_types": ["hash_moe" if is_hash else "moe" for is_hash in hashed],
        "compress_rates": {SPARSE: 4, HEAVY: 128} | rates,
        "rope_parameters": ropes,
        **named,
        "partial_rotary_factor": ropes["main"]["partial_rotary_factor"],
    }


def _moe(fields: Fields) -> tuple[MoESpec, MoESpec]:
    """Return the MoE layers that choose experts by token id, and by the router's scores."""
    fields.expect("hidden_act", "silu", "swish", because="clamped experts have SiLU")
    fields.expect("norm_topk_prob", True, because="transformers ignores it")
    fields.expect("topk_method", "noaux_tc")
    scores = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
    router = RouterSpec(
        top_k=fields.count("num_experts_per_tok", 6),
        score=fields.choice("scoring_func", scores, "sqrtsoftplus"),
        renormalize_epsilon=1e-20,
        scale=fields.number("routed_scaling_factor", 1.5),
    )
    width = fields.count("moe_intermediate_size", 2048)
    experts = ClampedSwiGLUSpec(
        hidden_dim=width, alpha=1.0, limit=fields.number("swiglu_limit", 10.0), up_offset=0.0, bias=False
    )
    chosen = MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts"), 256),
        router=router.model_copy(update={"selection_bias": SelectionBiasSpec()}),
        experts=experts,
        shared=SharedExpertsSpec(hidden_dim=width, bias=fields.flag("mlp_bias", False) or None),
        losses=parts.pooled_balance(fields),
    )
    hashed = {"router": router.model_copy(update={"choice": HashChoiceSpec()}), "losses": ()}
    return chosen.model_copy(update=hashed), chosen


def _compressor(theirs: str, ours: str) -> tuple[Fused, ...]:
    return (
        Tensor(f"{theirs}.wkv.weight", "c d", f"{ours}.w_key", "d c"),
        Tensor(f"{theirs}.wgate.weight", "c d", f"{ours}.w_gate", "d c"),
        Tensor(f"{theirs}.ape", "r c", f"{ours}.position_bias", "r c"),
        Tensor(f"{theirs}.norm.weight", "h", f"{ours}.key_norm.scale", "h"),
    )


def _streams(theirs: str, ours: str) -> Sequence[Fused]:
    return parts.hyper_connection((f"{theirs}_fn", f"{theirs}_base", f"{theirs}_scale"), ours, mixed=True)


def _layer(layer: str, norm: str) -> Sequence[Fused]:
    attention, feed_forward, own = f"{layer}.attn", f"{layer}.ffn", f"{OURS}.attention"
    return (
        *_streams(f"{layer}.hc_attn", f"{OURS}.attention_residual"),
        *_streams(f"{layer}.hc_ffn", f"{OURS}.feed_forward_residual"),
        Tensor(f"{layer}.attn_norm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{layer}.ffn_norm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        Tensor(f"{attention}.wq_a.weight", "q d", f"{own}.w_query_down", "d q"),
        Tensor(f"{attention}.q_norm.weight", "q", f"{own}.query_norm.scale", "q"),
        Tensor(f"{attention}.wq_b.weight", "(n h) q", f"{own}.w_query", "q n h"),
        Tensor(f"{attention}.wkv.weight", "h d", f"{own}.w_key", "d h"),
        Tensor(f"{attention}.{norm}.weight", "h", f"{own}.key_norm.scale", "h"),
        Tensor(f"{attention}.attn_sink", "n", f"{own}.sink", "n"),
        Tensor(f"{attention}.wo_a.weight", "(m z) (g h)", f"{own}.w_output_down", "g h m z"),
        Tensor(f"{attention}.wo_b.weight", "d (m z)", f"{own}.w_output", "m z d"),
        *_compressor(f"{attention}.compressor", f"{own}.compressor"),
        *_compressor(f"{attention}.indexer.compressor", f"{own}.indexer.compressor"),
        Tensor(f"{attention}.indexer.wq_b.weight", "(i k) q", f"{own}.indexer.w_query", "q i k"),
        Tensor(f"{attention}.indexer.weights_proj.weight", "i d", f"{own}.indexer.w_weight", "d i"),
        Tensor(f"{feed_forward}.gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
        Tensor(f"{feed_forward}.gate.bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
        Tensor(f"{feed_forward}.gate.tid2eid", "v k", f"{OURS}.moe.router.hash_table", "v k"),
        *parts.experts(f"{feed_forward}.experts", ("w1", "w3", "w2")),
        *parts.feed_forward(f"{feed_forward}.shared_experts", f"{OURS}.moe.shared", ("w1", "w3", "w2")),
    )


def _head(fn: str, base: str, scale: str) -> tuple[Fused, ...]:
    """Return rules for the weights with which the streams are read in the end."""
    ours = "final_residual"
    return (
        Tensor(fn, "i (j d)", f"{ours}.w_read", "j d i"),
        Tensor(base, "i", f"{ours}.b_read", "i"),
        Tensor(scale, "a", f"{ours}.read_scale", "a"),
    )


FAMILY = Family(
    model_types=("deepseek_v4",),
    spec=spec,
    tensors=(  # as DeepSeek names them, then as transformers 5.23 saves them
        Tensor("embed.weight", "v d", "embedding.weight", "v d"),
        Tensor("norm.weight", "d", "final_norm.scale", "d"),
        Tensor("head.weight", "v d", "head.w_head", "d v"),
        Tensor("head.weight", "v d", "embedding.weight", "v d", copy=True),
        *_head("hc_head_fn", "hc_head_base", "hc_head_scale"),
        *_layer("layers.{layer}", "kv_norm"),
        Tensor("model.embed_tokens.weight", "v d", "embedding.weight", "v d"),
        Tensor("model.norm.weight", "d", "final_norm.scale", "d"),
        *_head("model.hc_head.hc_fn", "model.hc_head.hc_base", "model.hc_head.hc_scale"),
        *_layer("model.layers.{layer}", "norm"),
    ),
    kept=("mtp.*", "model.mtp.*"),
    config=config,
    # transformers has neither biases of attention nor more than one shared expert; the shapes of tensors show
    # others, and their dtypes the codes of experts.
    harmless=("attention_bias", "expert_dtype", "max_position_embeddings", "n_shared_experts", "router_jitter_noise"),
)
