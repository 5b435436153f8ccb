"""Sigmoid and SwiGLU as powers of 2."""

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86.parts import LOG2_E, num_parts, split_parts, without_graph
from moezoo.mlx_backend.runtime.streams import streams
from moezoo.mlx_backend.runtime.typed import custom_function


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), computed in float32."""

    @custom_function
    def forward(x: mx.array) -> mx.array:
        return _sigmoid(x)

    @forward.vjp
    def _(x: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient * (out * (1 - out))

    return forward(x.astype(mx.float32)).astype(x.dtype)


def gated_silu(gate: mx.array, up: mx.array, *, forget: bool = False) -> mx.array:
    """Return silu(gate) * up, computed in float32, split over the first axis by stream; `forget`: see without_graph."""

    @custom_function
    def forward(gate: mx.array, up: mx.array) -> list[mx.array]:
        outs, shares, count = [], [], num_parts(gate)
        for stream, gate_part, up_part in zip(
            streams(), split_parts(gate, count), split_parts(up, count), strict=False
        ):
            with mx.stream(stream):
                shares.append(_sigmoid(gate_part))
                outs.append(gate_part * shares[-1] * up_part)
        found = [mx.concatenate(outs), *shares]
        return without_graph(found) if forget else found

    @forward.vjp
    def _(
        primals: tuple[mx.array, ...], gradients: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        gate_gradients, up_gradients, shares = [], [], outputs[1:]
        arrays = (split_parts(array, len(shares)) for array in (*primals, gradients[0]))
        for stream, share, *parts in zip(streams(), shares, *arrays, strict=False):
            gate, up, gradient = parts
            with mx.stream(stream):
                silu = gate * share
                gate_gradients.append(gradient * up * (share * (1 + gate - silu)))
                up_gradients.append(gradient * silu)
        return mx.concatenate(gate_gradients), mx.concatenate(up_gradients)

    return forward(gate.astype(mx.float32), up.astype(mx.float32))[0].astype(up.dtype)


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + mx.power(2.0, x * -LOG2_E))
