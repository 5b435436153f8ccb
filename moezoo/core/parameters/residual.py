"""Rows of the parameter table for the residual stream or streams."""

import math
from collections.abc import Iterator

from moezoo.core.parameters.row import ONES, ZEROS, Initializer, Parameter, Rows
from moezoo.core.spec import BlockAttentionResidualSpec, GatedStreamsSpec, HyperConnectionsSpec, ScaledResidualSpec

_SCALE = Initializer("constant", value=0.01)
"""Of what depends on the token (alpha). Source: Xie et al. 2025, arXiv 2512.24880; hy_v4 in transformers."""


def residual_rows(rows: Rows, name: str) -> Iterator[Parameter]:
    """Yield the rows of one block's connection to the residual streams."""
    spec = rows.spec.residual
    if isinstance(spec, HyperConnectionsSpec):
        yield from _weights(rows, name, "read", spec.num_streams)
        yield from _weights(rows, name, "write", spec.num_streams)
        if spec.sinkhorn_iterations is not None:
            yield from _weights(rows, name, "mix", spec.num_streams)
    if isinstance(spec, ScaledResidualSpec):
        if spec.terms == "both":
            yield from _scale_and_bias(rows, name, "stream")
            yield from _scale_and_bias(rows, name, "block")
        else:
            yield rows.vector(f"{name}.stream_scale", (rows.embed_dim,), ("embed",), "norms", ONES)
    if isinstance(spec, BlockAttentionResidualSpec) and not name.startswith("layers.0.attention"):
        yield rows.vector(f"{name}.query", (rows.embed_dim,), ("embed",), "norms")
    if isinstance(spec, GatedStreamsSpec):
        yield from _gated(rows, name, spec)
        shape = (spec.num_streams, rows.embed_dim, spec.num_streams)
        yield rows.matrix(f"{name}.w_write", shape, ("stream", "embed", "stream"), "norms", fan_in=2)


def first_residual_rows(rows: Rows, name: str) -> Iterator[Parameter]:
    """Yield the rows of the first step, from the embeddings to the residual streams."""
    if isinstance(rows.spec.residual, ScaledResidualSpec) and rows.spec.residual.terms == "both":
        yield from _scale_and_bias(rows, name, "stream")


def final_residual_rows(rows: Rows, name: str) -> Iterator[Parameter]:
    """Yield the rows of the last step, from the residual streams to the final norm."""
    if isinstance(rows.spec.residual, HyperConnectionsSpec) and rows.spec.residual.final_read == "weighted":
        yield from _weights(rows, name, "read", rows.spec.residual.num_streams)
    if isinstance(rows.spec.residual, GatedStreamsSpec):
        yield from _gated(rows, name, rows.spec.residual)
    if isinstance(rows.spec.residual, BlockAttentionResidualSpec):
        yield rows.vector(f"{name}.query", (rows.embed_dim,), ("embed",), "norms")


def _gated(rows: Rows, name: str, spec: GatedStreamsSpec) -> Iterator[Parameter]:
    """Yield the rows of the gated mean of the streams."""
    j, d, z = spec.num_streams, rows.embed_dim, spec.rank
    yield from rows.norm(f"{name}.norm", rows.spec.norm, (j, d), ("stream", "embed"))
    yield rows.matrix(f"{name}.w_down", (j, d, z), ("stream", "embed", "latent"), "norms", fan_in=2)
    yield rows.matrix(f"{name}.w_up", (z, j, d), ("latent", "stream", "embed"), "norms")


def _scale_and_bias(rows: Rows, name: str, which: str) -> Iterator[Parameter]:
    for part, initializer in (("scale", ONES), ("bias", ZEROS)):
        yield rows.vector(f"{name}.{which}_{part}", (rows.embed_dim,), ("embed",), "norms", initializer)


def _weights(rows: Rows, name: str, which: str, streams: int) -> Iterator[Parameter]:
    """Yield the rows of a map from all streams of a token to weights: at first, reading takes their mean."""
    outputs, axes = ((streams, streams), ("stream", "stream")) if which == "mix" else ((streams,), ("stream",))
    matrix = (streams, rows.embed_dim, *outputs)
    yield rows.matrix(f"{name}.w_{which}", matrix, ("stream", "embed", *axes), "norms", fan_in=2)
    bias = -math.log(max(streams - 1, 1)) if which == "read" else 0.0
    yield rows.vector(f"{name}.b_{which}", outputs, axes, "norms", Initializer("constant", value=bias))
    yield rows.vector(f"{name}.{which}_scale", (1,), ("one",), "norms", _SCALE)
