"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import mlx.core as mx

from moezoo.core.parameters.capacity import capacities, mostly_unused, num_groups, num_rows
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.routing import counts
from moezoo.mlx_backend.routing import Routing
from moezoo.mlx_backend.runtime.typed import to_int


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch; where limits rows may be unused, R is the number of used rows."""

    token_R: mx.array
    expert_R: mx.array
    weight_R: mx.array
    size_E: mx.array
    kept_PK: mx.array


def expert_counts(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32."""
    return _counts(routing.expert_PK, routing.valid_PK, routing.score_PE.shape[-1])


def num_dropped(routing: Routing, dispatched: Dispatch | None) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32. Without a dispatch none is dropped."""
    if dispatched is None:
        return mx.array(0)
    return mx.sum((routing.valid_PK & ~dispatched.kept_PK).astype(mx.int32))


def kept_slots(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.kept_slots."""
    groups = num_groups(spec, num_sequences)
    group_size = routing.expert_PK.shape[0] // groups
    limits = capacities(spec, group_size, inference=inference)
    if min(limits) == group_size:
        return routing.valid_PK
    # B consecutive groups of tokens, with R assignments each.
    expert_BR, valid_BR, weight_BR = (
        values.reshape(groups, -1) for values in (routing.expert_PK, routing.valid_PK, routing.weight_PK)
    )
    # Unused slots queue after those of the last expert.
    queue_BR = mx.where(valid_BR, expert_BR, len(limits))
    order_BR = mx.argsort(queue_BR)
    match spec.dispatch:
        case CapacitySpec(priority="score"):
            order_BR = mx.argsort(-mx.stop_gradient(weight_BR))
            again_BR = mx.argsort(mx.take_along_axis(queue_BR, order_BR, axis=1))
            order_BR = mx.take_along_axis(order_BR, again_BR, axis=1)
        case CapacitySpec() | DroplessSpec():
            pass
        case _:
            assert_never(spec.dispatch)
    order_BR = mx.stop_gradient(order_BR.astype(mx.int32))
    count_BE = mx.sum((queue_BR[..., None] == mx.arange(len(limits) + 1)).astype(mx.int32), axis=1)
    start_BE = mx.cumsum(count_BE, axis=1) - count_BE
    start_BR = mx.take_along_axis(start_BE, mx.take_along_axis(queue_BR, order_BR, axis=1), axis=1)
    rank_BR = mx.arange(order_BR.shape[1]) - start_BR
    rank_BR = mx.put_along_axis(mx.zeros_like(rank_BR), order_BR, rank_BR, axis=1)
    return (valid_BR & (rank_BR < mx.array(limits)[expert_BR])).reshape(routing.expert_PK.shape)


def dispatch(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, num_slots = routing.expert_PK.shape
    num_experts = spec.num_experts
    max_rows = num_rows(spec, num_tokens, num_sequences=num_sequences, inference=inference)
    kept_PK = kept_slots(spec, routing, num_sequences=num_sequences, inference=inference)
    computed_PK = kept_PK
    if spec.num_choices > num_experts:
        computed_PK = kept_PK & (routing.expert_PK < num_experts)
    size_E = _counts(routing.expert_PK, computed_PK, num_experts)
    if mostly_unused(spec, inference=inference):
        # gather_mm would multiply unused rows too. Shapes may depend on values here, since nothing is compiled.
        max_rows = max(1, to_int(mx.sum(size_E)))
    order_R = mx.argsort(mx.where(computed_PK, routing.expert_PK, num_experts).reshape(-1))[:max_rows]
    # Trap: without it, "Cannot calculate VJP with respect to indices".
    order_R = mx.stop_gradient(order_R.astype(mx.int32))
    used_R = mx.arange(order_R.size) < mx.sum(size_E)
    expert_R = mx.where(used_R, routing.expert_PK.reshape(-1)[order_R], num_experts - 1)
    weight_R = mx.where(used_R, routing.weight_PK.reshape(-1)[order_R], 0.0)
    return Dispatch(order_R // num_slots, expert_R, weight_R, size_E, kept_PK)


def used_rows(dispatched: Dispatch) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.used_rows; float32."""
    return (mx.arange(dispatched.token_R.size) < mx.sum(dispatched.size_E)).astype(mx.float32)


def combine(dispatched: Dispatch, y_RD: mx.array, num_tokens: int) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.combine; in the dtype of y_RD."""
    weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(mx.float32)
    out_PD = mx.zeros((num_tokens, y_RD.shape[-1]), mx.float32)
    return out_PD.at[dispatched.token_R].add(weighted_RD).astype(y_RD.dtype)


def _counts(expert_PK: mx.array, counted_PK: mx.array, num_experts: int) -> mx.array:
    """Count the slots of each expert, of those to count; int32."""
    if pays(expert_PK.size * num_experts):
        return counts(expert_PK, counted_PK, num_experts)
    chosen = (expert_PK[..., None] == mx.arange(num_experts)) & counted_PK[..., None]
    return mx.sum(chosen.reshape(-1, num_experts).astype(mx.int32), axis=0)
