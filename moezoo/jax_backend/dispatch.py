"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from moezoo.core.parameters.capacity import capacities, num_groups, num_rows
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.placement import row_by_row


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


def num_dropped(routing: Routing, dispatched: Dispatch | None) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32. Without a dispatch none is dropped."""
    if dispatched is None:
        return jnp.zeros((), jnp.int32)
    return jnp.sum(routing.valid_PK & ~dispatched.kept_PK)


def kept_slots(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> jax.Array:
    """Spec: moezoo.core.reference.dispatch.kept_slots."""
    groups = num_groups(spec, num_sequences)
    group_size = routing.expert_PK.shape[0] // groups
    limits = capacities(spec, group_size, inference=inference)
    if min(limits) == group_size:
        return routing.valid_PK

    def kept(expert_PK: jax.Array, valid_PK: jax.Array, weight_PK: jax.Array) -> jax.Array:
        """Return the kept slots of B consecutive groups of tokens, with R assignments each."""
        expert_BR, valid_BR, weight_BR = (
            values.reshape(-1, group_size * values.shape[1]) for values in (expert_PK, valid_PK, weight_PK)
        )
        # Unused slots queue after those of the last expert.
        queue_BR = jnp.where(valid_BR, expert_BR, len(limits))
        order_BR = jnp.argsort(queue_BR, stable=True)
        match spec.dispatch:
            case CapacitySpec(priority="score"):
                order_BR = jnp.argsort(-weight_BR, stable=True)
                again_BR = jnp.argsort(jnp.take_along_axis(queue_BR, order_BR, axis=1), stable=True)
                order_BR = jnp.take_along_axis(order_BR, again_BR, axis=1)
            case CapacitySpec() | DroplessSpec():
                pass
            case _:
                assert_never(spec.dispatch)
        count_BE = jnp.sum(queue_BR[..., None] == jnp.arange(len(limits) + 1), axis=1, dtype=jnp.int32)
        start_BE = jnp.cumsum(count_BE, axis=1) - count_BE
        start_BR = jnp.take_along_axis(start_BE, jnp.take_along_axis(queue_BR, order_BR, axis=1), axis=1)
        rank_BR = jnp.arange(order_BR.shape[1]) - start_BR
        rank_BR = jnp.put_along_axis(jnp.zeros_like(rank_BR), order_BR, rank_BR, axis=1, inplace=False)
        return (valid_BR & (rank_BR < jnp.asarray(limits)[expert_BR])).reshape(expert_PK.shape)

    # On a mesh, a sequence is never split between devices.
    where = kept if groups == 1 else row_by_row(kept)
    return where(routing.expert_PK, routing.valid_PK, jax.lax.stop_gradient(routing.weight_PK))


def dispatch(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, num_slots = routing.expert_PK.shape
    num_experts = spec.num_experts
    max_rows = num_rows(spec, num_tokens, num_sequences=num_sequences, inference=inference)
    kept_PK = kept_slots(spec, routing, num_sequences=num_sequences, inference=inference)
    computed_PK = kept_PK & (routing.expert_PK < num_experts)
    size_E = _counts(routing.expert_PK, computed_PK, num_experts)
    order_R = jnp.argsort(jnp.where(computed_PK, routing.expert_PK, num_experts).reshape(-1), stable=True)[:max_rows]
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
    """Count the slots of each expert, of those to count; int32."""
    chosen = (expert_PK[..., None] == jnp.arange(num_experts)) & counted_PK[..., None]
    return jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
