"""Gather token rows and combine outputs when every slot of every token has a row (no capacity limit)."""

import mlx.core as mx

from moezoo.mlx_backend.dispatch import Dispatch, combine
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.slot_rows import rows_of_tokens, sum_over_rows


def token_rows(dispatched: Dispatch, x_PD: mx.array) -> mx.array:
    """Return the token of each dispatched row: x_PD[token_R]."""
    if pays(x_PD.size) and _has_every_slot(dispatched):
        x_RD = rows_of_tokens(x_PD.astype(mx.float32), dispatched.token_R, dispatched.kept_PK.shape[1])
        return x_RD.astype(x_PD.dtype)
    return x_PD[dispatched.token_R]


def combine_rows(dispatched: Dispatch, y_RD: mx.array, num_tokens: int) -> mx.array:
    """Return the weighted sum of each token's expert outputs, like `combine`."""
    if pays(y_RD.size) and _has_every_slot(dispatched):
        num_slots = dispatched.kept_PK.shape[1]
        out_PD = sum_over_rows(y_RD.astype(mx.float32), dispatched.weight_R, dispatched.token_R, num_slots)
        return out_PD.astype(y_RD.dtype)
    return combine(dispatched, y_RD, num_tokens)


def _has_every_slot(dispatched: Dispatch) -> bool:
    """Return True if the rows are all slots of all tokens, reordered; unused slots are last."""
    return dispatched.token_R.size == dispatched.kept_PK.size
