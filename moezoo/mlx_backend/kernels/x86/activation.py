"""Sigmoid as a power of 2, and SwiGLU in blocks of rows."""

import math
from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.runtime.cores import Floats, blocks, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), computed in float32."""

    @custom_function
    def forward(x: mx.array) -> mx.array:
        return 1 / (1 + mx.power(2.0, x * (-1 / math.log(2))))

    @forward.vjp
    def _(x: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient * (out * (1 - out))

    return forward(x.astype(mx.float32)).astype(x.dtype)


def gated_silu(gate: mx.array, up: mx.array, *, few: bool = False) -> mx.array:
    """Return silu(gate) * up, computed in float32. `few`: by NumPy even if there are few elements."""
    if not few and not pays(up.size):
        return (gate * sigmoid(gate)) * up
    shape, width = up.shape, up.shape[-1]

    @custom_function
    def forward(gate: mx.array, up: mx.array) -> mx.array:
        of_gate, of_up = values(gate, up)
        out_RF, out = zeros(*of_up.shape)

        def forward_of(rows: slice) -> None:
            np.multiply(silu(of_gate[rows]), of_up[rows], out=out[rows])

        on_all_cores(partial(forward_of, rows) for rows in blocks(*out.shape))
        return out_RF

    @forward.vjp
    def _(primals: tuple[mx.array, ...], gradient: mx.array, out: mx.array) -> tuple[mx.array, mx.array]:
        gate, up, of_out = values(*primals, gradient)
        (of_gate_RF, of_gate), (of_up_RF, of_up) = zeros(*up.shape), zeros(*up.shape)

        def backward_of(rows: slice) -> None:
            np.copyto(of_up[rows], of_out[rows])
            swiglu_backward(gate[rows], up[rows], of_up[rows], of_gate[rows])

        on_all_cores(partial(backward_of, rows) for rows in blocks(*up.shape))
        return of_gate_RF, of_up_RF

    out_RF = forward(*(x.reshape(-1, width).astype(mx.float32) for x in (gate, up)))
    return out_RF.reshape(shape).astype(up.dtype)


def silu(x: Floats) -> Floats:
    """Return x * sigmoid(x)."""
    out = np.exp(-x)
    out += 1
    return np.divide(x, out, out=out)


def swiglu_backward(gate: Floats, up: Floats, of_hidden: Floats, of_gate: Floats) -> Floats:
    """Return silu(gate) * up; write the gradient of gate, and in place of the gradient of that product the up one."""
    share = np.exp(-gate)
    share += 1
    np.reciprocal(share, out=share)
    silu = gate * share
    # The derivative of silu is share + silu (1 - share).
    np.multiply(silu, share, out=of_gate)
    np.subtract(silu, of_gate, out=of_gate)
    of_gate += share
    of_gate *= up
    of_gate *= of_hidden
    of_hidden *= silu
    silu *= up
    return silu
