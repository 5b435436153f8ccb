"""Short descriptions of model parts, for the page of `moezoo describe`; defaults are left out."""

from typing import assert_never

from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.errors import counted
from moezoo.core.reports.router_words import choice_in_words, weights_in_words
from moezoo.core.reports.text import count
from moezoo.core.spec import (
    AttentionSpec,
    BlockAttentionResidualSpec,
    BlockFactorsSpec,
    BlockIndexerSpec,
    CapacitySpec,
    CompressedAttentionSpec,
    CompressionSpec,
    DepthScaledResidualSpec,
    DroplessSpec,
    FeedForwardSpec,
    GatedDeltaAttentionSpec,
    GatedFeedForwardSpec,
    GatedStreamsSpec,
    GroupedQueryAttentionSpec,
    HeadConvolutionSpec,
    HeadSpec,
    HyperConnectionsSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionsSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    MoESpec,
    NGramEmbeddingsSpec,
    NoAttentionSpec,
    NoPositionSpec,
    NormSpec,
    ParallelFeedForwardSpec,
    PositionSpec,
    RelativePositionSpec,
    ResidualConvolutionSpec,
    ResidualSpec,
    RMSNormSpec,
    RoPESpec,
    ScaledResidualSpec,
    SharedExpertsSpec,
    ShortConvolutionSpec,
    SinusoidalPositionsSpec,
    SumResidualSpec,
)

_FEED_FORWARDS = {
    "swiglu": "SwiGLU",
    "geglu": "GeGLU",
    "exact_geglu": "exact GeGLU",
    "reglu": "ReGLU",
    "relu_squared_glu": "ReLU-squared GLU",
    "clamped_swiglu": "clamped SwiGLU",
    "softcapped_swiglu": "softcapped SwiGLU",
    "relu": "ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "relu_squared": "ReLU-squared",
}


def model_in_brief(spec: ModelSpec) -> str:
    """Describe a model in a few words: `2 layers of width 20, 2 of 5 experts; 5.12 k parameters, 3.10 k active`."""
    depth, counts = len(spec.all_layers), parameter_counts(spec)
    experts = dict.fromkeys(f", {choice_in_words(moe)} of {moe.num_experts} experts" for _, moe in spec.moes)
    active = f", {count(counts.active)} active" if experts else ""
    layers = f"{counted(depth, 'layer')} of width {spec.embed_dim}"
    return f"{layers}{''.join(experts)}; {count(counts.total)} parameters{active}"


def model_in_words(spec: ModelSpec) -> str:
    """Describe model-wide parts: `learned positions for 64 tokens, layer norm, dropout 10%`; may be empty."""
    multipliers = [(name, value) for name, value in spec.multipliers.model_dump().items() if value != 1]
    learned = spec.position.max_length if isinstance(spec.position, LearnedPositionsSpec) else None
    words = (
        (f"learned positions for {learned} tokens", learned is not None),
        (
            f"inputs of {spec.layer_inputs.dim} for each layer" if spec.layer_inputs else "",
            spec.layer_inputs is not None,
        ),
        ("sinusoidal positions", isinstance(spec.position, SinusoidalPositionsSpec)),
        (_norm(spec.norm), _norm(spec.norm) != _norm(RMSNormSpec())),
        ("norm of the embedding", spec.embedding_norm),
        *((f"{name} times {value:g}", True) for name, value in multipliers),
        (_residual(spec.residual), not isinstance(spec.residual, SumResidualSpec)),
        (f"softcap {spec.softcap}", spec.softcap is not None),
        (f"dropout {spec.dropout:.0%}", spec.dropout > 0),
    )
    return ", ".join(word for word, there in words if there)


def _residual(spec: ResidualSpec) -> str:
    match spec:
        case SumResidualSpec():
            return "plain residual"
        case DepthScaledResidualSpec():
            return "depth-scaled residual"
        case ScaledResidualSpec(terms=terms):
            return "scaled residual" if terms == "both" else "scaled residual stream"
        case HyperConnectionsSpec(num_streams=streams, sinkhorn_iterations=iterations):
            merged = ", averaged at the end" if spec.final_read == "mean" else ""
            return f"{streams} residual streams, {'separate' if iterations is None else 'mixed'}{merged}"
        case GatedStreamsSpec(num_streams=streams, rank=rank):
            return f"{streams} residual streams, gated at rank {rank}"
        case BlockAttentionResidualSpec(layers_per_block=layers):
            return f"attention over depth, by blocks of {layers} layers"
        case _:
            assert_never(spec)


def head_in_words(spec: HeadSpec) -> str:
    """Describe the head: `tied` or `untied`, `biased` if it has a bias, and ids without logits."""
    words = ((spec.kind, True), ("biased", spec.bias), (f"{spec.unused} ids without logits", spec.unused > 0))
    return ", ".join(word for word, there in words if there)


def attention_in_words(spec: AttentionSpec) -> str:
    """Describe an attention layer: `8 heads of 32, 2 key/value, RoPE 10,000, qk norm`."""
    match spec:
        case GroupedQueryAttentionSpec():
            parts = _grouped_query(spec)
        case LatentAttentionSpec():
            query = "" if spec.query_latent_dim is None else f", query latent {spec.query_latent_dim}"
            rotated = f" + {spec.rope_head_dim}" if spec.rope_head_dim else ""
            heads = f"{spec.num_heads} heads of {spec.head_dim}{rotated}, values of {spec.value_head_dim}"
            parts = [f"{heads}, latent {spec.latent_dim}{query}", _position(spec.position)]
            if spec.indexer is not None:
                pools = "" if spec.indexer.pool_size is None else f" in pools of {spec.indexer.pool_size}"
                parts.append(f"indexer top {spec.indexer.top_k}{pools}")
            if spec.indexer_of_layer is not None:
                parts.append(f"tokens chosen in layer {spec.indexer_of_layer}")
            extra = (
                ("" if spec.scale is None else f"scale {spec.scale:g}", spec.scale is not None),
                (f"latent times {spec.latent_multiplier:g}", spec.latent_multiplier != 1),
                ("biases", spec.bias),
                ("temperature by position", spec.temperature_tuning is not None),
                (f"window {spec.window}", spec.window is not None),
                ("norm of the rotated key", spec.rope_key_norm),
                (f"{spec.gate} gate", spec.gate is not None),
                ("sinks", spec.sinks),
                ("queries of the raw latent too", spec.raw_query_latent),
                ("gate of the query latent", spec.query_gate),
            )
            parts.extend(word for word, there in extra if there)
        case CompressedAttentionSpec():
            parts = [f"{spec.num_heads} heads of {spec.head_dim}, 1 key as value, query latent {spec.query_latent_dim}"]
            parts += [_position(spec.position), f"window {spec.window}", *_compression(spec.compression)]
            parts.append(f"output in {spec.output_groups} groups of {spec.output_latent_dim}")
        case GatedDeltaAttentionSpec():
            parts = _gated_delta(spec)
        case Mamba2Spec():
            groups = "" if spec.num_groups == 1 else f", {spec.num_groups} groups"
            parts = [f"Mamba-2, {spec.num_heads} heads of {spec.head_dim}, state of {spec.state_dim}{groups}"]
            parts += [f"convolution of {spec.conv_width}", *(["biases"] * spec.bias)]
        case LightningAttentionSpec():
            parts = [f"lightning, {spec.num_heads} heads of {spec.head_dim}, decays times {spec.decay_scale:g}"]
        case ShortConvolutionSpec():
            parts = [f"short convolution of {spec.conv_width}", *(["biases"] if spec.bias else [])]
        case MambaSpec():
            parts = [f"Mamba, {spec.inner_dim} channels, state of {spec.state_dim}, steps of rank {spec.step_rank}"]
            parts.append(f"convolution of {spec.conv_width}")
            parts += ["norms"] * (spec.norm is not None) + ["biases"] * spec.bias
        case NoAttentionSpec():
            parts = ["no attention"]
        case _:
            assert_never(spec)
    return ", ".join(parts)


def _compression(spec: CompressionSpec | None) -> list[str]:
    if spec is None:
        return []
    chosen = "" if spec.indexer is None else f", top {spec.indexer.top_k} by an indexer"
    return [f"entries of {spec.ratio} tokens{' and those before' if spec.overlap else ''}{chosen}"]


def feed_forward_in_words(layer: LayerSpec) -> str:
    """Describe a feed-forward, `SwiGLU 512`, or an MoE layer with router, dispatch and losses; and norm placement."""
    if layer.shortcut:
        assert layer.feed_forward is not None
        assert layer.moe is not None
        text = f"{_feed_forward(layer.feed_forward)}; into the next layer: {_moe(layer.moe)}"
    elif layer.mixer_only:
        text = "no feed-forward" if layer.routed is None else f"no feed-forward; {_heads(layer.routed)}"
    elif layer.moe is not None:
        text = _moe(layer.moe)
    else:
        assert layer.feed_forward is not None
        text = _feed_forward(layer.feed_forward)
    text = text if layer.norm_placement == "pre" else f"{text}; {layer.norm_placement} norms"
    for name, factors in (("attention", layer.attention_factors), ("feed-forward", layer.feed_forward_factors)):
        if factors != BlockFactorsSpec():
            text = f"{text}; stream times {factors.stream:g}, {name} times {factors.block:g}"
    ranks = {"attention": layer.attention_norm_gate, "feed-forward": layer.feed_forward_norm_gate}
    text = f"{text}; times a learned scale" if layer.feed_forward_scale else text
    text = f"{text}; separate inputs of queries, keys and values" if layer.separate_inputs else text
    if layer.output_convolution is not None:
        text = f"{text}; outputs in a {_convolution(layer.output_convolution)}"
    gates = [name for name, rank in ranks.items() if rank is not None]
    text = f"{text}; gated norm of {' and '.join(gates)}" if gates else text
    text = f"{text}; output scaled" if layer.output_scale else text
    ngrams = layer.ngram_embeddings
    return text if ngrams is None else f"{text}; before it {_ngrams(ngrams)}"


def _ngrams(spec: NGramEmbeddingsSpec) -> str:
    until = f" to {spec.largest}" if spec.largest > 2 else ""
    tables = f"{spec.num_heads} tables of {spec.table_size:,} rows"
    return f"embeddings of 2{until} tokens, {spec.dim} features from {tables}, convolution of {spec.conv_width}"


def _feed_forward(spec: FeedForwardSpec) -> str:
    usual = type(spec).model_fields["bias"].default
    biases = "" if spec.bias == usual else " with biases" if spec.bias else " without biases"
    bounded = f" at most {spec.limit:g}" if isinstance(spec, GatedFeedForwardSpec) and spec.limit is not None else ""
    return f"{_FEED_FORWARDS[spec.kind]} {spec.hidden_dim}{bounded}{biases}"


def _norm(spec: NormSpec) -> str:
    match spec:
        case LayerNormSpec(bias=bias):
            return "layer norm" if bias else "layer norm without bias"
        case RMSNormSpec(scale=scale):
            words = {"learned": "RMS norm", "zero_centred": "zero-centred RMS norm", "none": "RMS norm without scale"}
            return words[scale]
        case _:
            assert_never(spec)


def _gated_delta(spec: GatedDeltaAttentionSpec) -> list[str]:
    values = f"{spec.num_value_heads} value heads of {spec.value_head_dim}"
    keys = f"{spec.num_key_heads} key heads of {spec.key_head_dim}"
    parts = [f"gated delta, {values}, {keys}, convolution of {spec.conv_width}"]
    floor, rank = spec.log_decay_floor, spec.decay_rank
    extra = (
        ("decays per channel", spec.decay == "channel"),
        (f"decays of rank {rank}", rank is not None),
        (f"log decays above {floor}", floor is not None),
        (f"gate of rank {spec.gate_rank}", spec.gate_rank is not None),
        ("sigmoid gate", spec.gate == "sigmoid"),
    )
    parts.extend(word for word, there in extra if there)
    return parts


def _position(spec: PositionSpec) -> str:
    match spec:
        case RoPESpec(base=base, layout=layout, fraction=fraction, fraction_of=fraction_of, scaling=scaling):
            of = "" if fraction_of == "features" else " of the pairs"
            part = "" if fraction == 1 else f" on {fraction:.0%}{of}"
            pairs = "" if layout == "half_split" else " interleaved"
            return f"RoPE {base:,.0f}{part}{pairs}" + ("" if scaling is None else f", {scaling.kind} scaling")
        case NoPositionSpec():
            return "no positions"
        case _:
            assert_never(spec)


def _grouped_query(spec: GroupedQueryAttentionSpec) -> list[str]:
    n, m, h = spec.num_heads, spec.num_kv_heads, spec.head_dim
    heads = f"{n} {'head' if n == 1 else 'heads'} of {h}" if n == m else f"{n} heads of {h}, {m} key/value"
    if spec.value_dim != h:
        heads += f", values of {spec.value_dim}"
    over = "" if spec.qk_norm_over == "head" else " of projections"
    after = " after rotation" if spec.qk_norm_after_rotation else ""
    extra = (
        (f"window {spec.window}", spec.window is not None),
        (f"chunks of {spec.chunk}", spec.chunk is not None),
        (f"qk norm{over}{after}", spec.qk_norm is not None),
        ("qkv bias", spec.qkv_bias),
        ("output bias", spec.output_bias),
        (_head_convolution(spec.convolution), spec.convolution is not None),
        ("temperature of keys", spec.key_temperature),
        (f"clipped to {spec.clip}", spec.clip is not None),
        ("sinks", spec.sinks),
        (f"{spec.gate} {'' if spec.gate_function == 'sigmoid' else 'softplus '}gate", spec.gate is not None),
        (f"{spec.gate_bias} gate bias", spec.gate_bias is not None),
        ("" if spec.indexer is None else _indexer(spec.indexer), spec.indexer is not None),
        (
            "" if spec.dynamic_mask is None else f"dynamic mask of {spec.dynamic_mask.keep}",
            spec.dynamic_mask is not None,
        ),
        (f"softcap {spec.softcap}", spec.softcap is not None),
        (f"scale {spec.scale}", spec.scale is not None),
        ("" if spec.relative is None else _relative(spec.relative), spec.relative is not None),
        ("projected sinks", spec.projected_sinks),
        (f"queries and keys of norm up to {spec.qk_l2_clip}", spec.qk_l2_clip is not None),
        (
            "" if spec.kv_convolution is None else f"keys and values in a {_convolution(spec.kv_convolution)}",
            spec.kv_convolution is not None,
        ),
        ("temperature by position", spec.temperature_tuning is not None),
        ("values are keys", spec.values_from_keys),
        ("value norm", spec.value_norm is not None),
        (f"values times {spec.value_multiplier:g}", spec.value_multiplier != 1),
        ("value residual", spec.value_residual),
        (f"keys and values of layer {spec.keys_of_layer}", spec.keys_of_layer is not None),
    )
    return [heads, _position(spec.position), *(word for word, there in extra if there)]


def _head_convolution(spec: HeadConvolutionSpec | None) -> str:
    return "" if spec is None else f"convolutions of {spec.conv_width} and {spec.mix_width}"


def _indexer(spec: BlockIndexerSpec) -> str:
    per_head = " for each key/value head" if spec.pooled == "scores" else ""
    return f"indexer top {spec.top_k} blocks of {spec.block_size}{per_head}"


def _relative(spec: RelativePositionSpec) -> str:
    norm = "" if spec.l2_clip is None else f", of norm up to {spec.l2_clip}"
    return f"relative position logits of {spec.dim} profiles over {spec.extent} tokens{norm}"


def _convolution(spec: ResidualConvolutionSpec) -> str:
    kind = "dynamic residual convolution" if spec.dynamic else "residual convolution"
    return f"{kind} of {spec.width}" + (" of unit variance" if spec.unit_variance else "")


def _heads(spec: MoESpec) -> str:
    parts = [f"{choice_in_words(spec)} of {spec.num_experts} query heads per key", weights_in_words(spec.router)]
    return "; ".join([*parts, *(f"{loss.kind} {loss.coefficient:g}" for loss in spec.losses)])


def _moe(spec: MoESpec) -> str:
    parts = [f"{choice_in_words(spec)} of {spec.num_experts} experts, {_feed_forward(spec.experts)}"]
    if spec.latent_dim is not None:
        parts.append(f"in a latent space of {spec.latent_dim}" + (" with a bias" if spec.latent_bias else ""))
    if spec.zero_computation is not None:
        free = spec.zero_computation
        parts.append(f"{free.num_zero} zero, {free.num_copy} copy, {free.num_constant} constant")
    match spec.shared:
        case SharedExpertsSpec(num_experts=number, hidden_dim=width, kind=kind):
            how = "" if kind == "sum" else f", {kind.replace('_', ' ')}"
            parts.append(f"{number} shared, {_FEED_FORWARDS[spec.shared_feed_forward.kind]} {width}{how}")
        case ParallelFeedForwardSpec(feed_forward=feed_forward):
            parts.append(f"{_feed_forward(feed_forward)} in parallel")
        case None:
            pass
        case _:
            assert_never(spec.shared)
    if spec.output_norm is not None:
        parts.append("normalized output")
    if spec.output_bias:
        parts.append("biased output")
    parts.append(weights_in_words(spec.router))
    match spec.dispatch:
        case DroplessSpec():
            parts.append("dropless")
        case CapacitySpec(factor=factor, priority=priority, group=group):
            of = " of a sequence" if group == "sequence" else ""
            parts.append(f"capacity {factor:g}{of}" + (" by score" if priority == "score" else ""))
        case _:
            assert_never(spec.dispatch)
    parts.extend(f"{loss.kind} {loss.coefficient:g}" for loss in spec.losses)
    return "; ".join(parts)
