"""Rows of tokens, and their sums, where each gradient is a gather."""

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86.parts import SMALL
from moezoo.mlx_backend.runtime.typed import custom_function


def rows_of_tokens(x_PD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return x_PD[token_R], with `num_slots` rows per token: its gradient gathers these rows instead of scattering."""

    @custom_function
    def forward(x_PD: mx.array) -> mx.array:
        return x_PD[token_R]

    @forward.vjp
    def _(x_PD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return _sum_of_slots(gradient, token_R, num_slots)

    return forward(x_PD)


def sum_over_rows(x_RD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return the sum of each token's `num_slots` rows: the transpose of `rows_of_tokens`."""

    @custom_function
    def forward(x_RD: mx.array) -> mx.array:
        return _sum_of_slots(x_RD, token_R, num_slots)

    @forward.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient[token_R]

    return forward(x_RD)


def _sum_of_slots(x_RD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    row_PK = mx.argsort(token_R).reshape(-1, num_slots)
    if x_RD.size < SMALL:
        return mx.sum(x_RD[row_PK], axis=1)
    total = x_RD[row_PK[:, 0]]
    for slot in range(1, num_slots):
        total = total + x_RD[row_PK[:, slot]]
    return total
