"""Attention kernels: MLX's fused kernel, or NumPy's products on all cores on x86 (`x86`)."""

from collections.abc import Callable

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu, pays
from moezoo.mlx_backend.kernels.x86.attention import Chunk as Chunk
from moezoo.mlx_backend.kernels.x86.attention import attend_in_chunks
from moezoo.mlx_backend.runtime.streams import streams


def chunk_length(length: int) -> int:
    """Return the number of queries per chunk: 64 on the CPU, whose scores stay in cache; on the GPU all of them."""
    return 64 if mx.default_device() == mx.Device(mx.cpu) else length


def attend_fused(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    mask_TS: mx.array | None,
    scale: float,
    sink_N: mx.array | None,
) -> mx.array:
    """Attend without a softcap; `mask_TS` [T, S], one mask per row [B, T, S] and group [B, M, T, S], or None.

    On x86, `x86` computes it, except with one mask per row (prompts of unequal length) and for few scores, where
    fewer operations are faster.
    """
    dtype = query_BTMGH.dtype
    batch, length, kv_heads, group, head_dim = query_BTMGH.shape
    if mx.default_device() == mx.Device(mx.cpu):
        # Trap: without a kernel the scores would be rounded to the dtype of the inputs.
        query_BTMGH, key_BSMH, value_BSMH = (x.astype(mx.float32) for x in (query_BTMGH, key_BSMH, value_BSMH))
    if mask_TS is not None and mask_TS.ndim > 2:
        mask_TS = mask_TS[:, None] if mask_TS.ndim == 3 else mx.repeat(mask_TS, group, axis=1)
    elif pays(batch * kv_heads * group * length * key_BSMH.shape[1]):
        whole = Chunk(0, length, 0, key_BSMH.shape[1], mask_TS)
        return attend_in_chunks(query_BTMGH, key_BSMH, value_BSMH, [whole], scale, sink_N).astype(dtype)
    elif is_x86_cpu() and length == 1 and mask_TS is None and sink_N is None:
        return _attend_once(query_BTMGH.squeeze(1) * scale, key_BSMH, value_BSMH)[:, None].astype(dtype)
    attended_BNTH = mx.fast.scaled_dot_product_attention(
        query_BTMGH.reshape(batch, length, kv_heads * group, head_dim).swapaxes(1, 2),
        key_BSMH.swapaxes(1, 2),
        value_BSMH.swapaxes(1, 2),
        scale=scale,
        mask=mask_TS,
        sinks=None if sink_N is None else sink_N.astype(query_BTMGH.dtype),
    )
    return attended_BNTH.swapaxes(1, 2).reshape(batch, length, kv_heads, group, -1).astype(dtype)


def _attend_once(query_BMGH: mx.array, key_BSMH: mx.array, value_BSMH: mx.array) -> mx.array:
    """Attend with one query to all keys: a third of the operations of MLX's kernel, which on a CPU is none."""
    weight_BMGS = mx.softmax(query_BMGH @ key_BSMH.transpose(0, 2, 3, 1), axis=-1)
    return weight_BMGS @ value_BSMH.swapaxes(1, 2)


def attend_chunks(
    attend_chunk: Callable[[Chunk], mx.array],
    query_BTMGH: mx.array,
    key_BTMH: mx.array,
    value_BTMH: mx.array,
    chunks: list[Chunk],
    scale: float,
    sink_N: mx.array | None,
    *,
    plain: bool,
) -> mx.array:
    """Attend chunk by chunk of queries: fused on x86 for plain scores, else by `attend_chunk` on streams."""
    if is_x86_cpu() and plain:
        dtype = query_BTMGH.dtype
        query_BTMGH, key_BTMH, value_BTMH = (x.astype(mx.float32) for x in (query_BTMGH, key_BTMH, value_BTMH))
        return attend_in_chunks(query_BTMGH, key_BTMH, value_BTMH, chunks, scale, sink_N).astype(dtype)
    turns, attended = streams(), []
    for index, chunk in enumerate(chunks):
        with mx.stream(turns[index % len(turns)]):
            attended.append(attend_chunk(chunk))
    return mx.concatenate(attended, axis=1)
