"""Parameter table rows of attention layers."""

from collections.abc import Iterator
from typing import assert_never

from moezoo.core.parameters.convolution import residual_convolution_rows
from moezoo.core.parameters.row import ONES, Initializer, Parameter, Rows
from moezoo.core.parameters.state_space import filters, lightning_rows, mamba2_rows, mamba_rows
from moezoo.core.spec import (
    AttentionSpec,
    BlockIndexerSpec,
    CompressedAttentionSpec,
    CompressionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    HeadConvolutionSpec,
    LatentAttentionSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    NoAttentionSpec,
    NormSpec,
    ShortConvolutionSpec,
)


def attention_rows(rows: Rows, name: str, spec: AttentionSpec, layer: int) -> Iterator[Parameter]:
    """Yield every parameter of the attention of this layer."""
    match spec:
        case GroupedQueryAttentionSpec():
            yield from _grouped_query(rows, name, spec, layer)
        case LatentAttentionSpec():
            yield from _latent(rows, name, spec)
        case CompressedAttentionSpec():
            yield from _compressed(rows, name, spec)
        case GatedDeltaAttentionSpec():
            yield from _gated_delta(rows, name, spec)
        case ShortConvolutionSpec():
            yield from _short_convolution(rows, name, spec)
        case Mamba2Spec():
            yield from mamba2_rows(rows, name, spec)
        case MambaSpec():
            yield from mamba_rows(rows, name, spec)
        case LightningAttentionSpec():
            yield from lightning_rows(rows, name, spec)
        case NoAttentionSpec():
            pass
        case _:
            assert_never(spec)


def _grouped_query(rows: Rows, name: str, spec: GroupedQueryAttentionSpec, layer: int) -> Iterator[Parameter]:
    d, n, m, h, z = rows.embed_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim
    own_keys = spec.keys_of_layer is None
    projected = [("query", n, h, "head")]
    if own_keys:
        projected.append(("key", m, h, "kv_head"))
    if own_keys and not spec.values_from_keys and spec.convolution is None:
        projected.append(("value", m, z, "kv_head"))
    for which, heads, width, axis in projected:
        axes = ("embed", axis, "head_dim")
        yield rows.matrix(f"{name}.w_{which}", (d, heads, width), axes, "attention")
        if spec.qkv_bias:
            yield rows.vector(f"{name}.b_{which}", (heads, width), axes[1:], "attention")
    if spec.convolution is not None:
        yield from _head_convolution(rows, f"{name}.convolution", spec, spec.convolution)
    if spec.indexer is not None:
        yield from _block_indexer(rows, f"{name}.indexer", spec.indexer)
    if spec.dynamic_mask is not None:
        yield from _dynamic_mask(rows, f"{name}.dynamic_mask", spec)
    if spec.qk_norm is not None:
        for which, heads, axis in (("query", n, "head"), ("key", m, "kv_head"))[: 2 if own_keys else 1]:
            if spec.qk_norm_over == "head":
                yield from rows.norm(f"{name}.{which}_norm", spec.qk_norm, (h,), ("head_dim",))
            else:
                yield from rows.norm(f"{name}.{which}_norm", spec.qk_norm, (heads, h), (axis, "head_dim"))
    if spec.key_temperature:
        yield rows.vector(f"{name}.key_temperature", (m,), ("kv_head",), "attention", ONES)
    if spec.qk_l2_clip is not None:
        yield rows.vector(f"{name}.query_scale", (n, h), ("head", "head_dim"), "attention", ONES)
    if spec.kv_convolution is not None:
        for which, width in (("key", h), ("value", z)):
            own = f"{name}.{which}_convolution"
            yield from residual_convolution_rows(rows, own, spec.kv_convolution, (m, width), ("kv_head", "head_dim"))
    if spec.value_norm is not None:
        yield from rows.norm(f"{name}.value_norm", spec.value_norm, (z,), ("head_dim",))
    if spec.value_residual and layer > 0:
        yield rows.vector(f"{name}.value_mix", (1,), ("one",), "attention", Initializer("constant", value=0.5))
    if spec.sinks:
        yield rows.vector(f"{name}.sink", (n,), ("head",), "attention")
    if spec.projected_sinks:
        yield rows.matrix(f"{name}.w_sink", (d, n), ("embed", "head"), "attention")
    if spec.relative is not None:
        r, x, own = spec.relative.dim, spec.relative.extent, f"{name}.relative"
        yield rows.matrix(f"{own}.w_feature", (d, n, r), ("embed", "head", "head_dim"), "attention")
        if spec.relative.l2_clip is not None:
            yield rows.vector(f"{own}.scale", (n, r), ("head", "head_dim"), "attention", ONES)
        yield rows.vector(f"{own}.profile", (r, x), ("head_dim", "source"), "attention", rows.matrix_initializer)
    if spec.gate == "headwise":
        yield rows.matrix(f"{name}.w_gate", (d, n), ("embed", "head"), "attention")
    if spec.gate == "elementwise":
        yield rows.matrix(f"{name}.w_gate", (d, n, z), ("embed", "head", "head_dim"), "attention")
    if spec.gate_bias == "headwise":
        yield rows.vector(f"{name}.b_gate", (n,), ("head",), "attention")
    if spec.gate_bias == "elementwise":
        yield rows.vector(f"{name}.b_gate", (n, z), ("head", "head_dim"), "attention")
    yield rows.output(f"{name}.w_output", (n, z, d), ("head", "head_dim", "embed"), "attention", fan_in=2)
    if spec.output_bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "attention")


def _block_indexer(rows: Rows, name: str, spec: BlockIndexerSpec) -> Iterator[Parameter]:
    d, i, k = rows.embed_dim, spec.num_heads, spec.head_dim
    yield rows.matrix(f"{name}.w_query", (d, i, k), ("embed", "head", "head_dim"), "attention")
    yield rows.matrix(f"{name}.w_key", (d, k), ("embed", "head_dim"), "attention")
    for which in ("query_norm", "key_norm"):
        yield from rows.norm(f"{name}.{which}", spec.norm, (k,), ("head_dim",))


def _dynamic_mask(rows: Rows, name: str, spec: GroupedQueryAttentionSpec) -> Iterator[Parameter]:
    m, z = spec.num_kv_heads, spec.value_dim
    axes = ("kv_head", "head_dim", "mask_head")  # one head name twice would be sharded twice
    yield rows.matrix(f"{name}.w_step", (m, z, m), axes, "attention", fan_in=2)
    if spec.qkv_bias:
        yield rows.vector(f"{name}.b_step", (m,), ("mask_head",), "attention")
    yield rows.vector(f"{name}.rate", (m,), ("mask_head",), "attention")


def _head_convolution(
    rows: Rows, name: str, spec: GroupedQueryAttentionSpec, convolution: HeadConvolutionSpec
) -> Iterator[Parameter]:
    h, z = spec.head_dim, spec.num_kv_heads * spec.value_dim // 2
    for which, heads, axis in (("query", spec.num_heads, "head"), ("key", spec.num_kv_heads, "kv_head")):
        axes, bias = ("source", axis, "head_dim", "head_dim"), (heads, h)
        width, mixed = convolution.conv_width, convolution.mix_width
        yield Parameter(f"{name}.{which}.conv", (width, heads, h), axes[:3], filters(width), True, "attention")
        yield rows.vector(f"{name}.{which}.b_conv", bias, axes[1:3], "attention")
        yield Parameter(f"{name}.{which}.mix", (mixed, heads, h, h), axes, filters(mixed * h), True, "attention")
        yield rows.vector(f"{name}.{which}.b_mix", bias, axes[1:3], "attention")
    for which in ("value", "value_before"):
        yield rows.matrix(f"{name}.w_{which}", (rows.embed_dim, z), ("embed", "latent"), "attention")
        if spec.qkv_bias:
            yield rows.vector(f"{name}.b_{which}", (z,), ("latent",), "attention")


def _latent(rows: Rows, name: str, spec: LatentAttentionSpec) -> Iterator[Parameter]:
    d, n, z = rows.embed_dim, spec.num_heads, spec.latent_dim
    h, o, v = spec.head_dim, spec.rope_head_dim, spec.value_head_dim
    if spec.query_latent_dim is not None:
        q = spec.query_latent_dim
        yield rows.matrix(f"{name}.w_query_down", (d, q), ("embed", "latent"), "attention")
        if spec.bias:
            yield rows.vector(f"{name}.b_query_down", (q,), ("latent",), "attention")
        yield from rows.norm(f"{name}.query_norm", spec.norm, (q,), ("latent",))
    source, axis = (d, "embed") if spec.query_source_dim is None else (spec.query_source_dim, "latent")
    yield rows.matrix(f"{name}.w_query", (source, n, h + o), (axis, "head", "head_dim"), "attention")
    if spec.query_gate:
        yield rows.matrix(f"{name}.w_query_gate", (source, n, v), (axis, "head", "head_dim"), "attention")
    yield rows.matrix(f"{name}.w_latent", (d, z), ("embed", "latent"), "attention")
    if o:
        yield rows.matrix(f"{name}.w_rope_key", (d, o), ("embed", "head_dim"), "attention")
    if spec.bias:
        yield rows.vector(f"{name}.b_latent", (z,), ("latent",), "attention")
        if o:
            yield rows.vector(f"{name}.b_rope_key", (o,), ("head_dim",), "attention")
    yield from rows.norm(f"{name}.latent_norm", spec.norm, (z,), ("latent",))
    if spec.rope_key_norm:
        yield from rows.norm(f"{name}.rope_key_norm", spec.norm, (o,), ("head_dim",))
    yield rows.matrix(f"{name}.w_key", (z, n, h), ("latent", "head", "head_dim"), "attention")
    yield rows.matrix(f"{name}.w_value", (z, n, v), ("latent", "head", "head_dim"), "attention")
    if spec.gate == "headwise":
        yield rows.matrix(f"{name}.w_gate", (d, n), ("embed", "head"), "attention")
    if spec.gate == "elementwise":
        yield rows.matrix(f"{name}.w_gate", (d, n, v), ("embed", "head", "head_dim"), "attention")
    if spec.sinks:
        yield rows.vector(f"{name}.sink", (n,), ("head",), "attention")
    yield rows.output(f"{name}.w_output", (n, v, d), ("head", "head_dim", "embed"), "attention", fan_in=2)
    if spec.bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "attention")
    if spec.indexer is not None:
        i, k = spec.indexer.num_heads, spec.indexer.head_dim
        source, axis = (d, "embed") if spec.query_latent_dim is None else (spec.query_latent_dim, "latent")
        yield rows.matrix(f"{name}.indexer.w_query", (source, i, k), (axis, "head", "head_dim"), "attention")
        yield rows.matrix(f"{name}.indexer.w_key", (d, k), ("embed", "head_dim"), "attention")
        yield from rows.norm(f"{name}.indexer.key_norm", spec.indexer.key_norm, (k,), ("head_dim",))
        yield rows.matrix(f"{name}.indexer.w_weight", (d, i), ("embed", "head"), "attention")
        if (size := spec.indexer.pool_size) is not None:
            yield rows.matrix(f"{name}.indexer.w_gate", (d, k), ("embed", "head_dim"), "attention")
            yield rows.vector(f"{name}.indexer.position_bias", (size, k), ("source", "head_dim"), "attention")


def _compressed(rows: Rows, name: str, spec: CompressedAttentionSpec) -> Iterator[Parameter]:
    d, n, h, q = rows.embed_dim, spec.num_heads, spec.head_dim, spec.query_latent_dim
    m, z = spec.output_groups, spec.output_latent_dim
    yield rows.matrix(f"{name}.w_query_down", (d, q), ("embed", "latent"), "attention")
    yield from rows.norm(f"{name}.query_norm", spec.norm, (q,), ("latent",))
    yield rows.matrix(f"{name}.w_query", (q, n, h), ("latent", "head", "head_dim"), "attention")
    yield rows.matrix(f"{name}.w_key", (d, h), ("embed", "head_dim"), "attention")
    yield from rows.norm(f"{name}.key_norm", spec.norm, (h,), ("head_dim",))
    yield rows.vector(f"{name}.sink", (n,), ("head",), "attention")
    axes = ("group_head", "head_dim", "group", "latent")
    yield rows.matrix(f"{name}.w_output_down", (n // m, h, m, z), axes, "attention", fan_in=2)
    yield rows.output(f"{name}.w_output", (m, z, d), ("group", "latent", "embed"), "attention", fan_in=2)
    if spec.compression is None:
        return
    yield from _compressor(rows, f"{name}.compressor", spec.compression, h, spec.norm)
    if spec.compression.indexer is not None:
        i, k = spec.compression.indexer.num_heads, spec.compression.indexer.head_dim
        yield rows.matrix(f"{name}.indexer.w_query", (q, i, k), ("latent", "head", "head_dim"), "attention")
        yield rows.matrix(f"{name}.indexer.w_weight", (d, i), ("embed", "head"), "attention")
        norm = spec.compression.indexer.key_norm
        yield from _compressor(rows, f"{name}.indexer.compressor", spec.compression, k, norm)


def _compressor(rows: Rows, name: str, spec: CompressionSpec, width: int, norm: NormSpec) -> Iterator[Parameter]:
    d, features = rows.embed_dim, (2 if spec.overlap else 1) * width
    for which in ("key", "gate"):
        yield rows.matrix(f"{name}.w_{which}", (d, features), ("embed", "head_dim"), "attention")
    yield rows.vector(f"{name}.position_bias", (spec.ratio, features), ("source", "head_dim"), "attention")
    yield from rows.norm(f"{name}.key_norm", norm, (width,), ("head_dim",))


def _gated_delta(rows: Rows, name: str, spec: GatedDeltaAttentionSpec) -> Iterator[Parameter]:
    d, m, n, w = rows.embed_dim, spec.num_key_heads, spec.num_value_heads, spec.conv_width
    h, z = spec.key_head_dim, spec.value_head_dim
    convolution = filters(w)
    # Initial decays as in the authors' code: steps from 0.001 to 0.1.
    rate, step = Initializer("log_rate", value=16.0), Initializer("step_bias", value=0.1)
    for which, heads, width, axis in (("query", m, h, "kv_head"), ("key", m, h, "kv_head"), ("value", n, z, "head")):
        yield rows.matrix(f"{name}.w_{which}", (d, heads, width), ("embed", axis, "head_dim"), "attention")
        shape, axes = (w, heads, width), ("source", axis, "head_dim")
        yield Parameter(f"{name}.conv_{which}", shape, axes, convolution, True, "attention")
    per_channel = spec.decay == "channel"
    decays, decay_axes = ((n, h) if per_channel else (n,)), (("head", "head_dim") if per_channel else ("head",))
    yield from _low_rank(rows, name, "gate", spec.gate_rank, (n, z), ("head", "head_dim"))
    yield rows.matrix(f"{name}.w_beta", (d, n), ("embed", "head"), "attention")
    yield from _low_rank(rows, name, "decay", spec.decay_rank, decays, decay_axes)
    yield rows.vector(f"{name}.decay_bias", decays, decay_axes, "attention", step)
    yield rows.vector(f"{name}.log_decay_rate", (n,), ("head",), "attention", rate)
    yield from rows.norm(f"{name}.output_norm", spec.norm, (z,), ("head_dim",))
    yield rows.output(f"{name}.w_output", (n, z, d), ("head", "head_dim", "embed"), "attention", fan_in=2)


def _low_rank(
    rows: Rows, name: str, which: str, rank: int | None, shape: tuple[int, ...], axes: tuple[str, ...]
) -> Iterator[Parameter]:
    """Yield the matrix from the model width to `shape`, or the two matrices with `rank` features between them."""
    source, axis = (rows.embed_dim, "embed") if rank is None else (rank, "latent")
    if rank is not None:
        yield rows.matrix(f"{name}.w_{which}_down", (rows.embed_dim, rank), ("embed", "latent"), "attention")
    yield rows.matrix(f"{name}.w_{which}", (source, *shape), (axis, *axes), "attention")


def _short_convolution(rows: Rows, name: str, spec: ShortConvolutionSpec) -> Iterator[Parameter]:
    d, w = rows.embed_dim, spec.conv_width
    for which in ("input_gate", "output_gate", "value"):
        yield rows.matrix(f"{name}.w_{which}", (d, d), ("embed", "latent"), "attention")
        if spec.bias:
            yield rows.vector(f"{name}.b_{which}", (d,), ("latent",), "attention")
    yield Parameter(f"{name}.conv", (w, d), ("source", "latent"), filters(w), True, "attention")
    if spec.bias:
        yield rows.vector(f"{name}.b_conv", (d,), ("latent",), "attention")
    yield rows.output(f"{name}.w_output", (d, d), ("latent", "embed"), "attention")
    if spec.bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "attention")
