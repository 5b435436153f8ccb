"""Activation kernels: fused on the GPU, split over two streams on the CPU, and on all cores on x86."""

from collections.abc import Callable

import mlx.core as mx
from mlx import nn

from moezoo.mlx_backend.kernels.x86 import activation as x86
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.runtime.streams import streams

FEW = 2**12
"""Number of elements up to which MLX's sigmoid costs less than the operations of a power of 2."""

Activation = Callable[[mx.array | None, mx.array], mx.array]


def swiglu(gate: mx.array, up: mx.array, *, in_blocks: bool = False) -> mx.array:
    """Return silu(gate) * up. `in_blocks`: with the bits that a kernel of whole experts gives, on x86."""
    if is_x86_cpu() and in_blocks:
        return x86.gated_silu(gate, up, few=True)
    if is_x86_cpu() and up.size <= FEW and up.dtype == mx.float32:
        return _swiglu(gate, up)
    if is_x86_cpu():
        return x86.gated_silu(gate, up)
    return rows_in_turns(_swiglu, gate, up)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x))."""
    return x86.sigmoid(x) if is_x86_cpu() else mx.sigmoid(x)


def rows_in_turns(activation: Activation, gate: mx.array | None, up: mx.array) -> mx.array:
    """Apply an elementwise activation to parts of the rows, one per stream."""
    turns = streams()
    if len(turns) == 1:
        return activation(gate, up)
    up_rows = up.reshape(-1, up.shape[-1])
    cuts = [len(up_rows) * turn // len(turns) for turn in range(1, len(turns))]
    gate_parts = [None] * len(turns) if gate is None else mx.split(gate.reshape(up_rows.shape), cuts)
    parts = []
    for stream, gate_part, up_part in zip(turns, gate_parts, mx.split(up_rows, cuts), strict=True):
        with mx.stream(stream):
            parts.append(activation(gate_part, up_part))
    return mx.concatenate(parts).reshape(up.shape)


def _swiglu(gate: mx.array | None, up: mx.array) -> mx.array:
    """SwiGLU, fused on the GPU; on the CPU, fusing would need a C++ compiler."""
    assert gate is not None
    silu = nn.silu(gate) if len(streams()) == 1 else gate * mx.sigmoid(gate)
    return silu * up
