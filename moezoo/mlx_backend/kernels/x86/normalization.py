"""RMS norm, in blocks of rows."""

from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.cores import Floats, blocks, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def rms_norm(x: mx.array, scale: mx.array | None, epsilon: float) -> mx.array:
    """Return `mx.fast.rms_norm`, float32. Only the root mean square of each row is kept for the backward pass."""
    width, kept = x.shape[-1], list[Floats]()
    scales = [] if scale is None else [scale]

    @custom_function
    def forward(*arrays: mx.array) -> mx.array:
        x, *scale = values(*arrays)
        out_PD, out = zeros(*x.shape)
        inverse = np.empty((len(x), 1), np.float32)
        kept[:] = [inverse]

        def forward_of(rows: slice) -> None:
            inverse[rows] = inverse_rms(x[rows], epsilon)
            np.multiply(x[rows], inverse[rows], out=out[rows])
            for scale_D in scale:
                out[rows] *= scale_D

        on_all_cores(partial(forward_of, rows) for rows in blocks(*x.shape))
        return out_PD

    @forward.vjp
    def _(primals: mx.array | tuple[mx.array, ...], gradient: mx.array, out: mx.array) -> list[mx.array]:
        x, *scale = values(*(primals if isinstance(primals, tuple) else [primals]))
        (of_out,), (inverse,) = values(gradient), kept
        of_x_PD, of_x = zeros(*x.shape)
        parts: list[Floats] = []

        def backward_of(rows: slice) -> None:
            of_rows = of_x[rows]
            normed = x[rows] * inverse[rows]
            np.copyto(of_rows, of_out[rows])
            for scale_D in scale:
                parts.append(np.einsum("PD,PD->D", of_rows, normed))
                of_rows *= scale_D
            mean = np.einsum("PD,PD->P", of_rows, normed)[:, None] / np.float32(width)
            normed *= mean
            of_rows -= normed
            of_rows *= inverse[rows]

        on_all_cores(partial(backward_of, rows) for rows in blocks(*x.shape))
        return [of_x_PD, *(mx.array(np.sum(parts, axis=0)) for _ in scale)]

    return forward(x.reshape(-1, width), *scales).reshape(x.shape)


def inverse_rms(x: Floats, epsilon: float) -> Floats:
    """Return 1 over the root mean square of the last axis, which is kept."""
    mean = np.einsum("...D,...D->...", x, x)[..., None] / np.float32(x.shape[-1])
    return np.asarray(1 / np.sqrt(mean + np.float32(epsilon)), np.float32)
