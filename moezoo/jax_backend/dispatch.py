"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from moezoo.core.reference.dispatch import capacities, num_rows
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.jax_backend.routing import Routing


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch."""

    token_R: jax.Array
    expert_R: jax.Array
    weight_R: jax.Array
    size_E: jax.Array
    kept_PK: jax.Array


def expert_counts(routing: Routing) -> jax.Array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32."""
    return _counts(routing.expert_PK, routing.valid_PK, routing.score_PE.shape[-1])


def num_dropped(routing: Routing, dispatched: Dispatch) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32."""
    return jnp.sum(routing.valid_PK & ~dispatched.kept_PK)


def kept_slots(spec: MoESpec, routing: Routing, *, inference: bool = False) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.kept_slots."""
    num_tokens = routing.expert_PK.shape[0]
    most = capacities(spec, num_tokens, inference=inference)
    if min(most) == num_tokens:
        return routing.valid_PK
    # Unused slots queue behind those of the last expert.
    queue_R = jnp.where(routing.valid_PK, routing.expert_PK, len(most)).reshape(-1)
    order_R = jnp.argsort(queue_R, stable=True)
    match spec.dispatch:
        case CapacitySpec(priority="score"):
            weight_R = jax.lax.stop_gradient(routing.weight_PK).reshape(-1)
            order_R = jnp.argsort(-weight_R, stable=True)
            order_R = order_R[jnp.argsort(queue_R[order_R], stable=True)]
        case CapacitySpec() | DroplessSpec():
            pass
        case _:
            assert_never(spec.dispatch)
    end_E = jnp.cumsum(_counts(routing.expert_PK, routing.valid_PK, len(most)))
    start_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E])
    place_R = jnp.arange(order_R.size) - start_E[queue_R[order_R]]
    place_PK = jnp.zeros_like(place_R).at[order_R].set(place_R).reshape(routing.expert_PK.shape)
    return routing.valid_PK & (place_PK < jnp.asarray(most)[routing.expert_PK])


def dispatch(spec: MoESpec, routing: Routing, *, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, num_slots = routing.expert_PK.shape
    num_experts, most = spec.num_experts, num_rows(spec, num_tokens, inference=inference)
    kept_PK = kept_slots(spec, routing, inference=inference)
    computed_PK = kept_PK & (routing.expert_PK < num_experts)
    size_E = _counts(routing.expert_PK, computed_PK, num_experts)
    order_R = jnp.argsort(jnp.where(computed_PK, routing.expert_PK, num_experts).reshape(-1), stable=True)[:most]
    used_R = jnp.arange(order_R.size) < jnp.sum(size_E)
    expert_R = jnp.where(used_R, routing.expert_PK.reshape(-1)[order_R], num_experts - 1)
    weight_R = jnp.where(used_R, routing.weight_PK.reshape(-1)[order_R], 0.0)
    return Dispatch(order_R // num_slots, expert_R, weight_R, size_E, kept_PK)


def used_rows(dispatched: Dispatch) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.used_rows; float32."""
    return (jnp.arange(dispatched.token_R.size) < jnp.sum(dispatched.size_E)).astype(jnp.float32)


def combine(dispatched: Dispatch, y_RD: jax.Array, num_tokens: int) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.combine; in the dtype of y_RD."""
    weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(jnp.float32)
    return jax.ops.segment_sum(weighted_RD, dispatched.token_R, num_tokens).astype(y_RD.dtype)


def _counts(expert_PK: jax.Array, counted_PK: jax.Array, num_experts: int) -> jax.Array:
    """How many of the counted slots name each expert; int32."""
    chosen = (expert_PK[..., None] == jnp.arange(num_experts)) & counted_PK[..., None]
    return jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
