"""Attention kernels on the CPU, and chunk sizes by platform."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moezoo.jax_backend.runtime.platform import platform


def chunk_length(length: int) -> int:
    """Return the number of queries per chunk: on the CPU 64, or more so that there are at most 16; else all of them.

    On the CPU the scores of a chunk stay in cache, which is four times faster at T = 384. Every chunk is a part of the
    program: at T = 4,096, 64 of them save a tenth of a gradient's time, but take three to four times as long to compile
    as 16 (writings/performance.md).
    """
    return 64 * -(-length // 1024) if platform() == "cpu" else length


class Chunk(NamedTuple):
    """Queries start:end, and their keys first:end."""

    start: int
    end: int
    first: int

    @property
    def rows(self) -> slice:
        """Its queries."""
        return slice(self.start, self.end)

    @property
    def seen(self) -> slice:
        """Its keys."""
        return slice(self.first, self.end)


def uses_chunk_kernel(dtype: jnp.dtype) -> bool:
    """Return True where `attend_in_chunks` computes causal attention of plain scores: float32 on the CPU."""
    return platform() == "cpu" and dtype == jnp.float32


def attention_path() -> str:
    """Return what computes causal attention of whole sequences, for the run's header."""
    if platform() != "cpu":
        return "all queries at once"
    return "chunks of queries, custom gradient; with a softcap, a bias or in bfloat16: XLA's gradient"


Mask = Callable[[Chunk, Any], jax.Array]
"""Function that returns the mask of a chunk, from what it is given: [T, S], [B, T, S], or by head [B, M, T, S]."""


class _Saved(NamedTuple):
    """Inputs with heads before positions, the queries of a group as rows [B, M, T G, H], and what became of them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    sink_M1G: jax.Array | None
    weights: list[jax.Array]  # of each chunk, before the division by `total`
    largest: jax.Array
    total: jax.Array
    out: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_in_chunks(
    chunks: Sequence[Chunk],
    mask_of: Mask,
    scale: float,
    query_BTMGH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMH: jax.Array,
    sink_N: jax.Array | None,
    given: Any,
) -> jax.Array:
    """Attend in float32, with a custom gradient; chunks are in order, and every query belongs to one.

    All queries that share a key head are rows of one matrix, so that products are larger and fewer than those of
    `attend`; and the gradient needs no derivative of the softmax's denominator.
    """
    return _forward(chunks, mask_of, scale, query_BTMGH, key_BTMH, value_BTMH, sink_N, given)[0]


def _forward(
    chunks: Sequence[Chunk],
    mask_of: Mask,
    scale: float,
    query_BTMGH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMH: jax.Array,
    sink_N: jax.Array | None,
    given: Any,
) -> tuple[jax.Array, _Saved]:
    kv_heads, group = query_BTMGH.shape[2:4]
    query, key, value = (_heads_first(x) for x in (query_BTMGH, key_BTMH, value_BTMH))
    sink_M1G = None if sink_N is None else sink_N.reshape(kv_heads, 1, group)
    weights, largest, total, out = [], [], [], []
    for chunk in chunks:
        score = jnp.einsum("BMRH,BMSH->BMRS", query[:, :, _rows(chunk, group)], key[:, :, chunk.seen]) * scale
        mask_RS = jnp.repeat(mask_of(chunk, given), group, axis=-2)
        score = jnp.where(mask_RS[:, None] if mask_RS.ndim == 3 else mask_RS, score, -jnp.inf)
        most = jnp.max(score, axis=-1, keepdims=True)
        if sink_M1G is not None:
            most = jnp.maximum(most, _of_rows(sink_M1G, chunk.end - chunk.start))
        weights.append(jnp.exp(score - most))
        largest.append(most)
        total.append(jnp.sum(weights[-1], axis=-1, keepdims=True))
        if sink_M1G is not None:
            total[-1] += jnp.exp(_of_rows(sink_M1G, chunk.end - chunk.start) - most)
        out.append(jnp.einsum("BMRS,BMSH->BMRH", weights[-1], value[:, :, chunk.seen]) / total[-1])
    joined = [jnp.concatenate(parts, axis=2) for parts in (largest, total, out)]
    return _heads_last(joined[-1], group), _Saved(query, key, value, sink_M1G, weights, *joined)


def _backward(
    chunks: Sequence[Chunk], mask_of: Mask, scale: float, saved: _Saved, gradient_BTMGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, None]:
    group = gradient_BTMGH.shape[3]
    scaled = _heads_first(gradient_BTMGH) / saved.total
    inner = jnp.sum(scaled * saved.out, axis=-1, keepdims=True)
    of_query, of_key, of_value = [], jnp.zeros_like(saved.key), jnp.zeros_like(saved.value)
    for chunk, weight in zip(chunks, saved.weights, strict=True):
        rows, seen = _rows(chunk, group), chunk.seen
        of_out, query, key = scaled[:, :, rows], saved.query[:, :, rows], saved.key[:, :, seen]
        of_value = of_value.at[:, :, seen].add(jnp.einsum("BMRS,BMRH->BMSH", weight, of_out))
        of_score = jnp.einsum("BMRH,BMSH->BMRS", of_out, saved.value[:, :, seen]) - inner[:, :, rows]
        of_score = of_score * weight
        of_query.append(jnp.einsum("BMRS,BMSH->BMRH", of_score, key))
        of_key = of_key.at[:, :, seen].add(jnp.einsum("BMRS,BMRH->BMSH", of_score, query))
    of_sink_N = None
    if saved.sink_M1G is not None:
        share = inner * jnp.exp(_of_rows(saved.sink_M1G, gradient_BTMGH.shape[1]) - saved.largest)
        of_sink_N = -jnp.sum(_heads_last(share, group), axis=(0, 1)).reshape(-1)
    of_query_BTMGH = _heads_last(jnp.concatenate(of_query, axis=2) * scale, group)
    return of_query_BTMGH, jnp.moveaxis(of_key * scale, 1, 2), jnp.moveaxis(of_value, 1, 2), of_sink_N, None


attend_in_chunks.defvjp(_forward, _backward)


def _heads_first(x: jax.Array) -> jax.Array:
    """Return [B, M, T, H] of [B, T, M, H], or [B, M, T G, H] of [B, T, M, G, H]."""
    return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, x.shape[-1])


def _heads_last(x: jax.Array, group: int) -> jax.Array:
    """Return [B, T, M, G, H] of rows [B, M, T G, H]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, group, x.shape[-1]), 1, 2)


def _rows(chunk: Chunk, group: int) -> slice:
    return slice(chunk.start * group, chunk.end * group)


def _of_rows(sink_M1G: jax.Array, length: int) -> jax.Array:
    """Return the sink of each row of so many queries, [M, R, 1]."""
    return jnp.repeat(sink_M1G, length, axis=1).reshape(sink_M1G.shape[0], -1, 1)
