"""Experts of few tokens: matrices are indexed by the chosen experts, without sorting, counting or dispatch."""

import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx import nn

from moezoo.core.spec import MoESpec, PlainFeedForwardSpec
from moezoo.mlx_backend.adapter import held
from moezoo.mlx_backend.feed_forward import activate
from moezoo.mlx_backend.kernels.grouped_product import product_of_rows
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.runtime.streams import streams

FEW_TOKENS = "gather_mm by index; with top_p, cutoffs or zero-computation experts by dispatch"
"""For the header of a run."""

ROWS_OF_TWO_STREAMS = 16
"""Number of rows from which a second stream saves more than waiting for it costs, 0.1 ms."""

ONE_THREAD = 2**18
"""Elements of a matrix up to which OpenBLAS multiplies one row by it on one thread; its threads exclude each other."""


def chosen_experts(
    spec: MoESpec,
    module: nn.Module,
    x_PD: mx.array,
    expert_PK: mx.array,
    valid_PK: mx.array,
    weight_PK: mx.array,
) -> mx.array:
    """Return the weighted sum of each token's experts, as dispatch, experts and combine do, within rounding.

    On an x86 CPU, halves of the tokens go to two streams if there are enough of them.
    """
    num_tokens, num_slots = expert_PK.shape
    turns = streams()
    in_turns = (
        is_x86_cpu()
        and isinstance(module.w_up, mx.array)
        and num_tokens * num_slots >= ROWS_OF_TWO_STREAMS
        and num_tokens >= len(turns)
    )
    if not in_turns or x_PD.shape[1] * spec.experts.hidden_dim >= ONE_THREAD:
        return _of_tokens(spec, module, x_PD, expert_PK, valid_PK, weight_PK)
    cuts = [num_tokens * turn // len(turns) for turn in range(1, len(turns))]
    parts = zip(turns, *(mx.split(array, cuts) for array in (x_PD, expert_PK, valid_PK, weight_PK)), strict=True)
    out = []
    for stream, *own in parts:
        with mx.stream(stream):
            out.append(_of_tokens(spec, module, *own))
    return mx.concatenate(out)


def _of_tokens(spec: MoESpec, module: nn.Module, *arrays: mx.array) -> mx.array:
    x_PD, expert_PK, valid_PK, weight_PK = arrays
    experts, dtype = spec.experts, x_PD.dtype
    own_PK, token_PK = _rows(*expert_PK.shape)
    x_R1D, row_PK = x_PD[:, None], token_PK
    if spec.router.apply_to == "input":
        x_R1D = (x_R1D.astype(mx.float32) * weight_PK[..., None]).astype(dtype)[:, :, None]
        weight_PK, row_PK = valid_PK.astype(mx.float32), own_PK
    linear = _linear(module, expert_PK.astype(mx.uint32), bias=experts.bias)
    gate = None if isinstance(experts, PlainFeedForwardSpec) else linear("gate", x_R1D, row_PK)
    out_PK1D = linear("down", activate(experts, gate, linear("up", x_R1D, row_PK)), own_PK)
    summed_P1D = weight_PK[:, None] @ out_PK1D.reshape(*expert_PK.shape, -1).astype(mx.float32)
    return summed_P1D.reshape(len(x_PD), -1).astype(dtype)


@functools.cache
def _rows(num_tokens: int, num_slots: int) -> tuple[mx.array, mx.array]:
    """Return the number of each slot and that of its token, uint32 [P, K]."""
    own_PK = np.arange(num_tokens * num_slots, dtype=np.uint32).reshape(num_tokens, num_slots)
    return mx.array(own_PK), mx.array(own_PK // num_slots)


def _linear(module: nn.Module, expert_PK: mx.array, *, bias: bool) -> Callable[[str, mx.array, mx.array], mx.array]:
    """Return `linear(name, x, row)`, the projection by the chosen experts of the rows of x with these numbers."""

    def linear(name: str, x_R1D: mx.array, row_PK: mx.array) -> mx.array:
        product, dtype = product_of_rows(x_R1D, held(getattr(module, f"w_{name}")), expert_PK, row_PK), x_R1D.dtype
        if not bias:
            return product
        # In float32, so that the sum over an expert's rows which is the bias's gradient keeps its digits.
        bias_EF: mx.array = module[f"b_{name}"]
        return product + bias_EF.astype(mx.float32)[expert_PK][..., None, :].astype(dtype)

    return linear
