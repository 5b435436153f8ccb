"""The residual stream or streams: what a block reads, and where its output goes.

The layer stack calls `enter` once, `read` and `write` around each block, and `leave` once. Streams are an array with
axes B, T first; their other axes, and the connection that `read` hands to `write`, depend on the variant.
"""

from typing import Any, assert_never

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.gated_streams import read_gated, write_weights
from moezoo.core.reference.hyper_connections import enter_streams, merge_streams, read_streams, write_streams
from moezoo.core.reference.normalization import rms_norm
from moezoo.core.spec import (
    BlockAttentionResidualSpec,
    DepthScaledResidualSpec,
    GatedStreamsSpec,
    HyperConnectionsSpec,
    NormSpec,
    ResidualSpec,
    ScaledResidualSpec,
    SumResidualSpec,
)

Streams = Array
Connection = Any


def enter(spec: ResidualSpec, parameters: Parameters, x_BTD: Array) -> Streams:
    """Return the streams before the first block, of the embeddings; `parameters`: those of `first_residual`."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec(terms="stream"):
            return x_BTD
        case ScaledResidualSpec():
            return (x_BTD + parameters["stream_bias"]) * parameters["stream_scale"]
        case HyperConnectionsSpec() | GatedStreamsSpec():
            return enter_streams(spec, x_BTD)
        case BlockAttentionResidualSpec():
            return x_BTD[:, :, None]
        case _:
            assert_never(spec)


def read(
    spec: ResidualSpec, norm: NormSpec, parameters: Parameters, streams: Streams, block: int
) -> tuple[Array, Connection]:
    """Return the input of a block, before its norm, and what `write` needs beside its output.

    Args:
        norm: the model's, of gated streams.
        parameters: the block's own, `layers.N.attention_residual` or `layers.N.feed_forward_residual`.
        block: index of the block in the model, 2 l for the mixer of layer l and 2 l + 1 for its feed-forward.
    """
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec():
            return streams, None
        case HyperConnectionsSpec():
            return read_streams(spec, parameters, streams)
        case GatedStreamsSpec():
            return read_gated(norm, parameters, streams), write_weights(norm, parameters, streams)
        case BlockAttentionResidualSpec():
            return (streams[:, :, 0] if block == 0 else attend_blocks(spec, parameters["query"], streams)), None
        case _:
            assert_never(spec)


def write(
    spec: ResidualSpec, parameters: Parameters, streams: Streams, connection: Connection, out_BTD: Array, block: int
) -> Streams:
    """Return the streams after a block.

    With `depth_scaled`, they are the sum of the embedding and all blocks' outputs over the root of their number: terms
    of equal variance keep it.

    Args:
        parameters, block: as of `read`.
        streams: those that the block read.
        out_BTD: what the block adds.

    Source: SumResidualSpec and the others name theirs.
    """
    match spec:
        case SumResidualSpec():
            return streams + out_BTD
        case DepthScaledResidualSpec():
            share = 1 / (block + 2)
            return streams * np.sqrt(1 - share) + out_BTD * np.sqrt(share)
        case ScaledResidualSpec(terms="stream"):
            return streams * parameters["stream_scale"] + out_BTD
        case ScaledResidualSpec():
            stream_BTD = (streams + parameters["stream_bias"]) * parameters["stream_scale"]
            return stream_BTD + (out_BTD + parameters["block_bias"]) * parameters["block_scale"]
        case HyperConnectionsSpec():
            return write_streams(streams, connection, out_BTD)
        case GatedStreamsSpec():
            return streams + connection[..., None] * out_BTD[:, :, None]
        case BlockAttentionResidualSpec():
            kept = streams if spec.begins(block) else streams[:, :, :-1]
            running = out_BTD if spec.begins(block) else streams[:, :, -1] + out_BTD
            return np.concatenate([kept, running[:, :, None]], axis=2)
        case _:
            assert_never(spec)


def leave(spec: ResidualSpec, norm: NormSpec, parameters: Parameters, streams: Streams) -> Array:
    """Return the input of the final norm [B, T, D]; `parameters`: those of `final_residual`."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec():
            return streams
        case HyperConnectionsSpec():
            return merge_streams(spec, parameters, streams)
        case GatedStreamsSpec():
            return read_gated(norm, parameters, streams)
        case BlockAttentionResidualSpec():
            return attend_blocks(spec, parameters["query"], streams)
        case _:
            assert_never(spec)


def attend_blocks(spec: BlockAttentionResidualSpec, query_D: Array, streams_BTJD: Array) -> Array:
    """Attend over depth: `sum over j of softmax(query . n_j / sqrt(D)) n_j` of the normalized sums n: [B, T, D].

    Args:
        query_D: the reader's.
        streams_BTJD: the sums that are kept, oldest first, then the running one.

    Source: see BlockAttentionResidualSpec.
    """
    normed_BTJD = rms_norm(streams_BTJD, None, spec.norm_epsilon)
    score_BTJ = np.einsum("BTJD,D->BTJ", normed_BTJD, query_D) / np.sqrt(len(query_D))
    weight_BTJ = np.exp(score_BTJ - np.max(score_BTJ, axis=-1, keepdims=True))
    weight_BTJ = weight_BTJ / np.sum(weight_BTJ, axis=-1, keepdims=True)
    return np.einsum("BTJ,BTJD->BTD", weight_BTJ, normed_BTJD)
