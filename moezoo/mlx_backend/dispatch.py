"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import mlx.core as mx

from moezoo.core.reference.dispatch import capacity
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.mlx_backend.routing import Routing


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch."""

    token_R: mx.array
    expert_R: mx.array
    weight_R: mx.array
    size_E: mx.array
    kept_PK: mx.array


def dispatch(spec: MoESpec, routing: Routing, *, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, top_k = routing.expert_PK.shape
    num_experts = spec.num_experts
    flat_R = routing.expert_PK.reshape(-1)
    order_R = mx.argsort(flat_R).astype(mx.int32)
    expert_R, token_R, weight_R = flat_R[order_R], order_R // top_k, routing.weight_PK.reshape(-1)[order_R]
    size_E = expert_counts(routing)
    kept_R = mx.ones(flat_R.shape, mx.bool_)
    match DroplessSpec() if inference else spec.dispatch:
        case DroplessSpec():
            pass
        case CapacitySpec() as limited:
            start_E = mx.cumsum(size_E) - size_E
            place_R = mx.arange(expert_R.size) - start_E[expert_R]
            kept_R = place_R < capacity(limited, num_tokens, top_k, num_experts)
            weight_R = mx.where(kept_R, weight_R, 0.0)
        case _:
            assert_never(spec.dispatch)
    kept_PK = kept_R[mx.argsort(order_R)].reshape(num_tokens, top_k)
    return Dispatch(token_R, expert_R, weight_R, size_E, kept_PK)


def num_dropped(routing: Routing, dispatched: Dispatch) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32."""
    return mx.sum((routing.valid_PK & ~dispatched.kept_PK).astype(mx.int32))


def expert_counts(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32 [E]."""
    chosen = routing.expert_PK.reshape(-1, 1) == mx.arange(routing.logits_PE.shape[-1])
    return mx.sum((chosen & routing.valid_PK.reshape(-1, 1)).astype(mx.int32), axis=0)


def combine(dispatched: Dispatch, y_RD: mx.array, num_tokens: int) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.combine; in the dtype of y_RD."""
    weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(mx.float32)
    out_PD = mx.zeros((num_tokens, y_RD.shape[-1]), mx.float32)
    return out_PD.at[dispatched.token_R].add(weighted_RD).astype(y_RD.dtype)
