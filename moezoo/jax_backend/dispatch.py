"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from moezoo.core.reference.dispatch import capacity
from moezoo.core.spec import CapacitySpec, DispatchSpec, DroplessSpec
from moezoo.jax_backend.routing import Routing


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch."""

    token_R: jax.Array
    expert_R: jax.Array
    weight_R: jax.Array
    size_E: jax.Array


def dispatch(spec: DispatchSpec, routing: Routing, num_experts: int) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, top_k = routing.expert_PK.shape
    flat_R = routing.expert_PK.reshape(-1)
    order_R = jnp.argsort(flat_R, stable=True)
    expert_R, token_R, weight_R = flat_R[order_R], order_R // top_k, routing.weight_PK.reshape(-1)[order_R]
    size_E = expert_counts(routing.expert_PK, num_experts)
    match spec:
        case DroplessSpec():
            pass
        case CapacitySpec():
            start_E = jnp.cumsum(size_E) - size_E
            place_R = jnp.arange(expert_R.size) - start_E[expert_R]
            weight_R = jnp.where(place_R < capacity(spec, num_tokens, top_k, num_experts), weight_R, 0.0)
        case _:
            assert_never(spec)
    return Dispatch(token_R, expert_R, weight_R, size_E)


def num_dropped(spec: DispatchSpec, dispatched: Dispatch, num_tokens: int) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.num_dropped."""
    match spec:
        case DroplessSpec():
            return jnp.zeros((), jnp.int32)
        case CapacitySpec():
            top_k = dispatched.token_R.shape[0] // num_tokens
            most = capacity(spec, num_tokens, top_k, dispatched.size_E.shape[0])
            return jnp.sum(jnp.maximum(dispatched.size_E - most, 0))
        case _:
            assert_never(spec)


def expert_counts(expert_PK: jax.Array, num_experts: int) -> jax.Array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32 [E]."""
    chosen = expert_PK.reshape(-1, 1) == jnp.arange(num_experts)
    return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def combine(dispatched: Dispatch, y_RD: jax.Array, num_tokens: int) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.combine; in the dtype of y_RD."""
    weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(jnp.float32)
    return jax.ops.segment_sum(weighted_RD, dispatched.token_R, num_tokens).astype(y_RD.dtype)
