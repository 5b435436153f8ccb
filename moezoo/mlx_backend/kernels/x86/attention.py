"""Attention in chunks of queries, with the elementwise work between products split over streams."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from moezoo.mlx_backend.kernels.x86.parts import LOG2_E, num_parts, split_parts, without_graph
from moezoo.mlx_backend.runtime.streams import streams
from moezoo.mlx_backend.runtime.typed import custom_function

# Score of masked keys. 2^-1e30 is exactly 0; a moderate number could give a denormal, and products of those are slow.
_MASKED = -1e30


class Chunk(NamedTuple):
    """Queries start:end, their keys first:last, and the mask of keys that each query attends to (None: all)."""

    start: int
    end: int
    first: int
    last: int
    mask_TS: mx.array | None


def attend_in_chunks(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    chunks: list[Chunk],
    scale: float,
    sink_N: mx.array | None = None,
    *,
    forget: bool = False,
) -> mx.array:
    """Compute attention in float32, one chunk of queries at a time.

    Each product uses all cores; the elementwise work between products is split over streams. The backward pass reuses
    values of the forward pass: 2^(score - largest), their sum, and the probability of sinks. Below, X = B M.
    """
    batch, length, kv_heads, group, head_dim = query_BTMGH.shape
    arrays = [
        (query_BTMGH * (scale * LOG2_E)).transpose(0, 2, 3, 1, 4).reshape(-1, group, length, head_dim),
        *(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in (key_BSMH, value_BSMH)),
    ]
    if sink_N is not None:
        per_batch = mx.broadcast_to(sink_N * LOG2_E, (batch, kv_heads * group))
        arrays.append(per_batch.reshape(-1, group, 1, 1))

    @custom_function
    def forward(*arrays: mx.array) -> list[list[mx.array]]:
        out, *rest = zip(*(_attend(chunk, *arrays) for chunk in chunks), strict=True)
        found = [[mx.concatenate(list(out), axis=2)], *map(list, rest)]
        if not forget:
            return found
        paths, values = zip(*tree_flatten(found), strict=True)
        copies: list[list[mx.array]] = tree_unflatten(list(zip(paths, without_graph(list(values)), strict=True)))
        return copies

    @forward.vjp
    def _(arrays: tuple[mx.array, ...], gradients: list[Any], outputs: list[Any]) -> list[mx.array]:
        (gradient,), ((out,), numerators, sums, *shares) = gradients[0], outputs
        inner = mx.sum(gradient * out, axis=-1, keepdims=True)
        found = [
            _attend_backward(chunk, arrays[:3], gradient, inner, parts, total)
            for chunk, parts, total in zip(chunks, numerators, sums, strict=True)
        ]
        query_gradients, key_gradients, value_gradients = zip(*found, strict=True)
        query_gradient = mx.concatenate(list(query_gradients), axis=2)
        input_gradients = [query_gradient, _summed(key_gradients, chunks), _summed(value_gradients, chunks)]
        if sink_N is not None:
            share = mx.concatenate(shares[0], axis=2)
            input_gradients.append(mx.sum(share * inner, axis=2, keepdims=True) / -LOG2_E)
        return input_gradients

    out_BMGTH = forward(*arrays)[0][0].reshape(batch, kv_heads, group, length, -1)
    return out_BMGTH.transpose(0, 3, 1, 2, 4)


def _attend(chunk: Chunk, query: mx.array, key: mx.array, value: mx.array, *sink: mx.array) -> list[Any]:
    """Return the output [X, G, t, H] of t queries, numerators [X, G, t, s] in parts, sums, and sink probabilities."""
    query = query[:, :, chunk.start : chunk.end]
    key, value = (x[:, chunk.first : chunk.last] for x in (key, value))
    score = (_folded(query) @ key.swapaxes(1, 2)).reshape(*query.shape[:3], -1)
    mask = None if chunk.mask_TS is None else mx.where(chunk.mask_TS, 0.0, _MASKED)
    count = num_parts(score)
    sinks = split_parts(sink[0], count) if sink else [None] * count
    numerators, sums, shares = [], [], []
    for stream, part, sink_part in zip(streams(), split_parts(score, count), sinks, strict=False):
        with mx.stream(stream):
            part = part if mask is None else part + mask
            largest = mx.max(part, axis=-1, keepdims=True)
            largest = largest if sink_part is None else mx.maximum(largest, sink_part)
            numerators.append(mx.power(2.0, part - largest))
            sums.append(mx.sum(numerators[-1], axis=-1, keepdims=True))
            if sink_part is not None:
                shares.append(mx.power(2.0, sink_part - largest))
                sums[-1] = sums[-1] + shares[-1]
    total = mx.concatenate(sums)
    out = mx.concatenate(
        [_folded(part) @ values for part, values in zip(numerators, split_parts(value, count), strict=True)]
    )
    share = [mx.concatenate(shares) / total] if sink else []
    return [out.reshape(*query.shape[:3], -1) / total, numerators, total, *share]


def _attend_backward(
    chunk: Chunk,
    arrays: tuple[mx.array, ...],
    gradient: mx.array,
    inner: mx.array,
    numerators: list[mx.array],
    total: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of a chunk's queries, keys and values."""
    rows = slice(chunk.start, chunk.end)
    query, key, value = arrays[0][:, :, rows], *(x[:, chunk.first : chunk.last] for x in arrays[1:])
    gradient, inner = _folded(gradient[:, :, rows] / total), _folded(inner[:, :, rows] / total)
    weight_gradient = gradient @ value.swapaxes(1, 2)
    found = []
    split = (split_parts(array, len(numerators)) for array in (weight_gradient, inner, _folded(query), key, gradient))
    for stream, *parts in zip(
        streams(),
        *split,
        map(_folded, numerators),
        strict=False,  # fewer parts than streams is possible
    ):
        weight_gradient, inner, query_part, key_part, gradient_part, numerator = parts
        with mx.stream(stream):
            score_gradient = (weight_gradient - inner) * numerator
        transposed = score_gradient.swapaxes(1, 2)
        found.append((score_gradient @ key_part, transposed @ query_part, numerator.swapaxes(1, 2) @ gradient_part))
    query_gradient, key_gradient, value_gradient = (mx.concatenate(list(parts)) for parts in zip(*found, strict=True))
    return query_gradient.reshape(query.shape) / LOG2_E, key_gradient / LOG2_E, value_gradient


def _folded(x_XGTH: mx.array) -> mx.array:
    """Reshape [X, G, t, H] to [X, G t, H]: queries that share keys become rows of one product."""
    return x_XGTH.reshape(x_XGTH.shape[0], -1, x_XGTH.shape[-1])


def _summed(parts: Sequence[mx.array], chunks: Sequence[Chunk]) -> mx.array:
    """Sum the gradients of all chunks, each for its own range of keys, into one array for all keys."""
    cuts = sorted({0, *(chunk.first for chunk in chunks), *(chunk.last for chunk in chunks)})
    sums: dict[int, mx.array] = {}
    for chunk, part in zip(chunks, parts, strict=True):
        own = [place for place, cut in enumerate(cuts[:-1]) if chunk.first <= cut < chunk.last]
        for place, piece in zip(own, mx.split(part, [cuts[i] - chunk.first for i in own[1:]], axis=1), strict=True):
            sums[place] = sums[place] + piece if place in sums else piece
    return mx.concatenate([sums[place] for place in range(len(cuts) - 1)], axis=1)
