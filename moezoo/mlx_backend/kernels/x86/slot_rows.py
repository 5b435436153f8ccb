"""Rows of tokens, and their weighted sums, where each gradient is a gather."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.cores import Floats, blocks, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def rows_of_tokens(x_PD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return x_PD[token_R], float32, with `num_slots` rows per token: its gradient sums these rows."""
    token, row_PK = _rows(token_R, num_slots)

    @custom_function
    def forward(x_PD: mx.array) -> mx.array:
        (x,) = values(x_PD)
        return _by_blocks(lambda rows, out: _take(x, token[rows], out), len(token), x.shape[1])

    @forward.vjp
    def _(x_PD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        (of_x,) = values(gradient)

        def sum_slots(tokens: slice, out: Floats) -> None:
            _take(of_x, row_PK[tokens, 0], out)
            for slot in range(1, num_slots):
                out += of_x[row_PK[tokens, slot]]

        return _by_blocks(sum_slots, len(row_PK), of_x.shape[1])

    return forward(x_PD)


def sum_over_rows(y_RD: mx.array, weight_R: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return the weighted sum of each token's `num_slots` rows, float32."""
    token, row_PK = _rows(token_R, num_slots)

    @custom_function
    def forward(y_RD: mx.array, weight_R: mx.array) -> mx.array:
        y, weight = values(y_RD, weight_R)

        def sum_slots(tokens: slice, out: Floats) -> None:
            for slot in range(num_slots):
                row_P = row_PK[tokens, slot]
                part = y[row_P]
                part *= weight[row_P, None]
                out += part

        return _by_blocks(sum_slots, len(row_PK), y.shape[1])

    @forward.vjp
    def _(primals: tuple[mx.array, mx.array], gradient: mx.array, out: mx.array) -> tuple[mx.array, mx.array]:
        y, weight, of_out = values(*primals, gradient)
        of_weight_R, of_weight = zeros(len(weight))

        def backward(rows: slice, of_y: Floats) -> None:
            _take(of_out, token[rows], of_y)
            np.einsum("RD,RD->R", y[rows], of_y, out=of_weight[rows])
            of_y *= weight[rows, None]

        return _by_blocks(backward, len(y), y.shape[1]), of_weight_R

    return forward(y_RD, weight_R)


def _rows(token_R: mx.array, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token of each row, and the rows of each token [P, K]."""
    token = np.asarray(token_R)
    return token, np.argsort(token, kind="stable").reshape(-1, num_slots)


def _take(x: Floats, index: np.ndarray, out: Floats) -> None:
    np.take(x, index, axis=0, out=out, mode="clip")  # with the default mode, the result is copied to `out`


def _by_blocks(write: Callable[[slice, Floats], object], rows: int, width: int) -> mx.array:
    """Return an array [rows, width] of which each block is written by `write(rows, zeros to write to)`."""
    array, out = zeros(rows, width)
    on_all_cores(partial(write, block, out[block]) for block in blocks(rows, width))
    return array
