"""Experts with many rows: each expert's products on one core, several experts at a time."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.kernels.x86.activation import silu, swiglu_backward
from moezoo.mlx_backend.runtime.cores import Floats, blocks, cores, on_all_cores, one_by_one, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def sliced_product(x_RD: mx.array, w_EDF: mx.array, ends: list[int], *, frozen: bool = False) -> mx.array:
    """Return each row times the matrix of its expert, float32; row r belongs to the first expert whose end is above r.

    Rows above the last end return 0. `frozen`: the gradient of the matrices is not needed, and zeros stand for it.
    """

    @custom_function
    def forward(x_RD: mx.array, w_EDF: mx.array) -> mx.array:
        x, w = values(x_RD, w_EDF)
        out_RF, out = zeros(len(x), w.shape[-1])
        _per_expert(ends, lambda expert, rows: np.matmul(x[rows], w[expert], out=out[rows]))
        return out_RF

    @forward.vjp
    def _(primals: tuple[mx.array, mx.array], gradient: mx.array, out: mx.array) -> tuple[mx.array, mx.array]:
        x, w, of_out = values(*primals, gradient)
        of_x_RD, of_x = zeros(*x.shape)
        of_w_EDF, of_w = _gradients(w.shape, frozen=frozen)

        def backward(expert: int, rows: slice) -> None:
            np.matmul(of_out[rows], w[expert].T, out=of_x[rows])
            if of_w is not None:
                np.matmul(x[rows].T, of_out[rows], out=of_w[expert])

        _per_expert(ends, backward)
        return of_x_RD, of_w_EDF

    return forward(x_RD, w_EDF)


def _gradients(shape: tuple[int, ...], *, frozen: bool) -> tuple[mx.array, Floats | None]:
    """Return zeros, and a view through which they are written; of frozen matrices, zeros that are not there yet."""
    return (mx.zeros(shape), None) if frozen else zeros(*shape)


def swiglu_experts(
    x_RD: mx.array, gate_EDF: mx.array, up_EDF: mx.array, down_EFD: mx.array, ends: list[int], *, frozen: bool = False
) -> mx.array:
    """Return the whole feed-forward of SwiGLU experts, float32; rows and `frozen` as in `sliced_product`.

    Only gate and up are kept for the backward pass, and only until then.
    """
    kept: list[Floats] = []

    @custom_function
    def forward(x_RD: mx.array, gate_EDF: mx.array, up_EDF: mx.array, down_EFD: mx.array) -> mx.array:
        x, w_gate, w_up, w_down = values(x_RD, gate_EDF, up_EDF, down_EFD)
        out_RD, out = zeros(*x.shape)
        gate, up = (np.empty((len(x), w_gate.shape[-1]), np.float32) for _ in range(2))
        kept[:] = gate, up

        def forward_of(expert: int, rows: slice) -> None:
            np.matmul(x[rows], w_gate[expert], out=gate[rows])
            np.matmul(x[rows], w_up[expert], out=up[rows])
            hidden = np.empty_like(gate[rows])
            for block in blocks(*hidden.shape):
                np.multiply(silu(gate[rows][block]), up[rows][block], out=hidden[block])
            np.matmul(hidden, w_down[expert], out=out[rows])

        _per_expert(ends, forward_of)
        return out_RD

    @forward.vjp
    def _(primals: tuple[mx.array, ...], gradient: mx.array, out: mx.array) -> list[mx.array]:
        x, w_gate, w_up, w_down, of_out = values(*primals, gradient)
        gate, up = kept
        of_x_RD, of_x = zeros(*x.shape)
        gradients = [_gradients(w.shape, frozen=frozen) for w in (w_gate, w_up, w_down)]
        of_gate, of_up, of_down = (view for _, view in gradients)

        def backward_of(expert: int, rows: slice) -> None:
            of_hidden = of_out[rows] @ w_down[expert].T
            of_gate_rows, hidden = np.empty_like(of_hidden), np.empty_like(of_hidden)
            for block in blocks(*hidden.shape):
                inputs = gate[rows][block], up[rows][block]
                hidden[block] = swiglu_backward(*inputs, of_hidden[block], of_gate_rows[block])
            if of_gate is not None and of_up is not None and of_down is not None:
                np.matmul(hidden.T, of_out[rows], out=of_down[expert])
                np.matmul(x[rows].T, of_gate_rows, out=of_gate[expert])
                np.matmul(x[rows].T, of_hidden, out=of_up[expert])
            np.matmul(of_gate_rows, w_gate[expert].T, out=of_x[rows])
            of_x[rows] += of_hidden @ w_up[expert].T

        _per_expert(ends, backward_of)
        kept.clear()
        return [of_x_RD, *(array for array, _ in gradients)]

    return forward(x_RD, gate_EDF, up_EDF, down_EFD)


_UNEVEN = 1.4
"""Rows of the largest expert, as a multiple of a core's share, from which its products are split over all cores."""


def _per_expert(ends: list[int], work: Callable[[int, slice], object]) -> None:
    """Call `work(expert, rows)` for all experts, those with the most rows first, so that all cores end together.

    If one has so many rows that the other cores would wait for it, each product uses all cores instead.
    """
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    order = sorted(range(len(ends)), key=lambda expert: -sizes[expert])
    pieces = [partial(work, expert, slice(starts[expert], ends[expert])) for expert in order]
    if sizes[order[0]] > _UNEVEN * ends[-1] / cores():
        one_by_one(pieces)
    else:
        on_all_cores(pieces)
