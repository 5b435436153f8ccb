"""Routing of many tokens among many experts, in blocks of rows."""

from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.cores import blocks, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def softmax(logits_PE: mx.array) -> mx.array:
    """Return the softmax over the last axis, float32."""

    @custom_function
    def forward(logits_PE: mx.array) -> mx.array:
        (logits,) = values(logits_PE)
        out_PE, out = zeros(*logits.shape)

        def forward_of(rows: slice) -> None:
            of_rows = out[rows]
            np.subtract(logits[rows], np.max(logits[rows], axis=-1, keepdims=True), out=of_rows)
            np.exp(of_rows, out=of_rows)
            of_rows /= np.sum(of_rows, axis=-1, keepdims=True)

        on_all_cores(partial(forward_of, rows) for rows in blocks(*logits.shape))
        return out_PE

    @forward.vjp
    def _(logits_PE: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        weighted_PE = gradient * out
        return weighted_PE - out * mx.sum(weighted_PE, axis=-1, keepdims=True)

    return forward(logits_PE)


def highest(value_PE: mx.array, count: int) -> mx.array:
    """Return the ids of the highest values of each row in falling order, ties by lower id; int32 [P, count]."""
    (value,) = values(value_PE)
    expert, found = np.empty((len(value), count), np.int32), np.empty((len(value), count), np.float32)

    def choose(rows: slice) -> None:
        left = value[rows].copy()
        row = np.arange(len(left))
        for slot in range(count):
            best = np.argmax(left, axis=-1)
            expert[rows, slot], found[rows, slot] = best, left[row, best]
            left[row, best] = -np.inf

    on_all_cores(partial(choose, rows) for rows in blocks(*value.shape))
    if not np.all(np.isfinite(found)):  # a row with too few choices would repeat one
        expert = np.argsort(-value, axis=-1, kind="stable")[:, :count].astype(np.int32)
    return mx.array(expert)


def counts(expert_PK: mx.array, counted_PK: mx.array, num_experts: int) -> mx.array:
    """Return the number of counted slots of each expert; int32 [E]."""
    mx.eval(expert_PK, counted_PK)
    counted = np.asarray(expert_PK)[np.asarray(counted_PK)]
    return mx.array(np.bincount(counted, minlength=num_experts)[:num_experts].astype(np.int32))
