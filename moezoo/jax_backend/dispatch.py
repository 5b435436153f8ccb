"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from moezoo.core.reference.dispatch import capacity
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.jax_backend.routing import Routing


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch."""

    token_R: jax.Array
    expert_R: jax.Array
    weight_R: jax.Array
    size_E: jax.Array
    kept_PK: jax.Array


def dispatch(spec: MoESpec, routing: Routing, *, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, top_k = routing.expert_PK.shape
    num_experts = spec.num_experts
    flat_R = routing.expert_PK.reshape(-1)
    order_R = jnp.argsort(flat_R, stable=True)
    expert_R, token_R, weight_R = flat_R[order_R], order_R // top_k, routing.weight_PK.reshape(-1)[order_R]
    size_E = expert_counts(routing)
    kept_R = jnp.ones(flat_R.shape, jnp.bool_)
    match DroplessSpec() if inference else spec.dispatch:
        case DroplessSpec():
            pass
        case CapacitySpec() as limited:
            start_E = jnp.cumsum(size_E) - size_E
            place_R = jnp.arange(expert_R.size) - start_E[expert_R]
            kept_R = place_R < capacity(limited, num_tokens, top_k, num_experts)
            weight_R = jnp.where(kept_R, weight_R, 0.0)
        case _:
            assert_never(spec.dispatch)
    kept_PK = kept_R[jnp.argsort(order_R)].reshape(num_tokens, top_k)
    return Dispatch(token_R, expert_R, weight_R, size_E, kept_PK)


def num_dropped(routing: Routing, dispatched: Dispatch) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32."""
    return jnp.sum(routing.valid_PK & ~dispatched.kept_PK)


def expert_counts(routing: Routing) -> jax.Array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32 [E]."""
    chosen = routing.expert_PK.reshape(-1, 1) == jnp.arange(routing.logits_PE.shape[-1])
    return jnp.sum((chosen & routing.valid_PK.reshape(-1, 1)).astype(jnp.int32), axis=0)


def combine(dispatched: Dispatch, y_RD: jax.Array, num_tokens: int) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.combine; in the dtype of y_RD."""
    weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(jnp.float32)
    return jax.ops.segment_sum(weighted_RD, dispatched.token_R, num_tokens).astype(y_RD.dtype)
