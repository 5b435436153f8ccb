"""Attention in chunks of queries whose scores stay in the cache of a core; each key/value head is a piece of work."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moezoo.mlx_backend.runtime.cores import BLOCK, Floats, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function

Bools = npt.NDArray[np.bool_]

# Score of masked keys. Its exponential is exactly 0; a moderate number could give a denormal, and products of those are
# slow.
_MASKED = -1e30


class Chunk(NamedTuple):
    """Queries start:end, their keys first:last, and the mask of keys that each query attends to (None: all).

    The mask is [T, S], or one per sequence, [B, T, S], where sequences are packed with documents, or one per head too,
    [B, M, T, S], where each chooses what it attends to.
    """

    start: int
    end: int
    first: int
    last: int
    mask_TS: mx.array | None

    @property
    def rows(self) -> slice:
        """Its queries."""
        return slice(self.start, self.end)

    @property
    def seen(self) -> slice:
        """Its keys."""
        return slice(self.first, self.last)


class _Part(NamedTuple):
    """Queries and keys of one product, and what to add to the scores of the keys from `hidden` on."""

    queries: slice
    keys: slice
    hidden: int
    mask_T1S: Floats | None


def attend_in_chunks(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    chunks: Sequence[Chunk],
    scale: float,
    sink_N: mx.array | None = None,
) -> mx.array:
    """Attend in float32. The backward pass computes the scores again; only the largest and the sum are kept.

    Pieces of work are the key/value heads of each sequence: no two of them write to the same place.
    """
    batch, length, kv_heads, group = query_BTMGH.shape[:4]
    parts_of = _parts_of_heads(chunks, group)
    pieces = list(product(range(batch), range(kv_heads)))
    kept: list[Floats] = []
    sinks = [] if sink_N is None else [sink_N]

    @custom_function
    def forward(*arrays: mx.array) -> mx.array:
        query, key, value, *sink = values(*arrays)
        out_BTMGH, out = zeros(batch, length, kv_heads, group, value.shape[-1])
        largest, total = (np.empty((batch, kv_heads, length, group, 1), np.float32) for _ in range(2))
        kept[:] = largest, total

        def forward_of(row: int, head: int) -> None:
            own = _Head(query[row, :, head] * np.float32(scale), key[row, :, head], value[row, :, head])
            of_head = sink[0].reshape(kv_heads, group, 1)[head] if sink else None
            _attend(parts_of(row, head), own, largest[row, head], total[row, head], out[row, :, head], of_head)

        on_all_cores(partial(forward_of, *piece) for piece in pieces)
        return out_BTMGH

    @forward.vjp
    def _(primals: tuple[mx.array, ...], gradient: mx.array, output: mx.array) -> list[mx.array]:
        query, key, value, *sink = values(*primals)
        of_out, out = values(gradient, output)
        largest, total = kept
        gradients = [zeros(*primal.shape) for primal in primals[:3]]
        of_query, of_key, of_value = (view for _, view in gradients)
        inner = np.empty_like(total)

        def backward_of(row: int, head: int) -> None:
            own = _Head(query[row, :, head] * np.float32(scale), key[row, :, head], value[row, :, head])
            scaled = of_out[row, :, head] / total[row, head]
            np.sum(scaled * out[row, :, head], axis=-1, keepdims=True, out=inner[row, head])
            of_own = _Head(of_query[row, :, head], of_key[row, :, head], of_value[row, :, head])
            _attend_backward(parts_of(row, head), own, largest[row, head], scaled, inner[row, head], of_own)
            np.multiply(of_own.query, np.float32(scale), out=of_own.query)

        on_all_cores(partial(backward_of, *piece) for piece in pieces)
        found = [array for array, _ in gradients]
        if sink:
            share = np.exp(sink[0].reshape(kv_heads, 1, group, 1) - largest)
            found.append(mx.array(-np.sum(share * inner, axis=(0, 2)).reshape(-1)))
        return found

    return forward(query_BTMGH, key_BSMH, value_BSMH, *sinks)


class _Head(NamedTuple):
    """Queries [T, G, H], already multiplied by the scale, keys [S, H] and values [S, H] of one head of a sequence."""

    query: Floats
    key: Floats
    value: Floats


def _attend(
    parts: Sequence[_Part], own: _Head, largest: Floats, total: Floats, out: Floats, sink_G1: Floats | None
) -> None:
    """Write the output of a head [T, G, H], and the largest score and the sum of each query [T, G, 1]."""
    for part in parts:
        score = _scores(part, own.query, own.key)
        most, sums = largest[part.queries], total[part.queries]
        np.max(score, axis=-1, keepdims=True, out=most)
        if sink_G1 is not None:
            np.maximum(most, sink_G1, out=most)
        score -= most
        np.exp(score, out=score)
        np.sum(score, axis=-1, keepdims=True, out=sums)
        if sink_G1 is not None:
            sums += np.exp(sink_G1 - most)
        np.divide(_product(score, own.value[part.keys]), sums, out=out[part.queries])


def _attend_backward(
    parts: Sequence[_Part], own: _Head, largest: Floats, scaled: Floats, inner: Floats, of_own: _Head
) -> None:
    """Write the gradients of a head; that of the queries before the scale.

    `scaled` [T, G, H]: the gradient of the output by the sums; `inner` [T, G, 1]: its product with the output.
    """
    to_keys, to_values = np.zeros(own.key.shape, np.float32), np.zeros(own.value.shape, np.float32)
    for part in parts:
        score = _scores(part, own.query, own.key)
        score -= largest[part.queries]
        np.exp(score, out=score)
        numerator = score.reshape(-1, score.shape[-1])
        to_values[part.keys] += numerator.T @ scaled[part.queries].reshape(-1, scaled.shape[-1])
        of_score = _product(scaled[part.queries], own.value[part.keys].T)
        of_score -= inner[part.queries]
        of_score *= score
        of_own.query[part.queries] = _product(of_score, own.key[part.keys])
        rows = own.query[part.queries].reshape(-1, own.query.shape[-1])
        to_keys[part.keys] += of_score.reshape(numerator.shape).T @ rows
    of_own.key[:], of_own.value[:] = to_keys, to_values


def _parts_of_heads(chunks: Sequence[Chunk], group: int) -> Callable[[int, int], Sequence[_Part]]:
    """Return what gives the parts of a sequence and head; they are kept, unless each head has its own masks."""
    masks = [None if chunk.mask_TS is None else np.asarray(chunk.mask_TS) for chunk in chunks]
    most = max((mask.ndim for mask in masks if mask is not None), default=2)

    def parts_of(*place: int) -> list[_Part]:
        own = [mask if mask is None else mask[place[: mask.ndim - 2]] for mask in masks]
        return list(_parts(chunks, own, group))

    if most == 4:
        return parts_of
    kept = functools.cache(parts_of)
    return lambda row, _: kept(row) if most == 3 else kept()


def _parts(chunks: Sequence[Chunk], masks: Sequence[Bools | None], group: int) -> Iterator[_Part]:
    """Split chunks further, so that the scores of a part fit into the cache of a core. `masks` are [T, S]."""
    for chunk, mask in zip(chunks, masks, strict=True):
        num_keys = chunk.last - chunk.first
        size = max(1, 2 * BLOCK // (group * num_keys))
        for start in range(chunk.start, chunk.end, size):
            queries = slice(start, min(start + size, chunk.end))
            first, hidden, added = 0, num_keys, None
            if mask is not None:
                seen_TS = mask[start - chunk.start : queries.stop - chunk.start]
                first = int(np.argmax(seen_TS.any(axis=0)))  # keys below are seen by none
                seen_TS = seen_TS[:, first:]
                hidden = int(np.argmin(np.append(seen_TS.all(axis=0), False)))  # keys below are seen by all
                added = np.where(seen_TS[:, None, hidden:], np.float32(0), np.float32(_MASKED))
            yield _Part(queries, slice(chunk.first + first, chunk.last), hidden, added)


def _scores(part: _Part, query_TGH: Floats, key_SH: Floats) -> Floats:
    score = _product(query_TGH[part.queries], key_SH[part.keys].T)
    if part.mask_T1S is not None:
        score[..., part.hidden :] += part.mask_T1S
    return score


def _product(x_TGH: Floats, matrix: Floats) -> Floats:
    """Return the product of all queries of a group, as rows of one matrix, with a matrix."""
    out: Floats = np.matmul(x_TGH.reshape(-1, x_TGH.shape[-1]), matrix)
    return out.reshape(*x_TGH.shape[:-1], matrix.shape[-1])
