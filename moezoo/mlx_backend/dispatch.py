"""Dispatch and combine. Spec: moezoo.core.reference.dispatch."""

from typing import NamedTuple, assert_never

import mlx.core as mx

from moezoo.core.reference.dispatch import capacities, mostly_unused, num_rows
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from moezoo.mlx_backend.cpu_kernels import is_x86_cpu, rows_of_tokens, sum_over_rows
from moezoo.mlx_backend.routing import Routing


class Dispatch(NamedTuple):
    """Spec: moezoo.core.reference.dispatch.Dispatch; where most rows may be unused, R is as many as are used."""

    token_R: mx.array
    expert_R: mx.array
    weight_R: mx.array
    size_E: mx.array
    kept_PK: mx.array


def expert_counts(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.expert_counts; int32."""
    return _counts(routing.expert_PK, routing.valid_PK, routing.score_PE.shape[-1])


def num_dropped(routing: Routing, dispatched: Dispatch) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.num_dropped; int32."""
    return mx.sum((routing.valid_PK & ~dispatched.kept_PK).astype(mx.int32))


def kept_slots(spec: MoESpec, routing: Routing, *, inference: bool = False) -> mx.array:
    """Spec: moezoo.core.reference.dispatch.kept_slots."""
    num_tokens = routing.expert_PK.shape[0]
    most = capacities(spec, num_tokens, inference=inference)
    if min(most) == num_tokens:
        return routing.valid_PK
    # Unused slots queue behind those of the last expert.
    queue_R = mx.where(routing.valid_PK, routing.expert_PK, len(most)).reshape(-1)
    order_R = mx.argsort(queue_R)
    match spec.dispatch:
        case CapacitySpec(priority="score"):
            weight_R = mx.stop_gradient(routing.weight_PK).reshape(-1)
            order_R = mx.argsort(-weight_R)
            order_R = order_R[mx.argsort(queue_R[order_R])]
        case CapacitySpec() | DroplessSpec():
            pass
        case _:
            assert_never(spec.dispatch)
    end_E = mx.cumsum(_counts(routing.expert_PK, routing.valid_PK, len(most)))
    start_E = mx.concatenate([mx.zeros(1, end_E.dtype), end_E])
    order_R = mx.stop_gradient(order_R.astype(mx.int32))
    place_R = mx.arange(order_R.size) - start_E[queue_R[order_R]]
    place_PK = mx.zeros_like(place_R).at[order_R].add(place_R).reshape(routing.expert_PK.shape)
    return routing.valid_PK & (place_PK < mx.array(most)[routing.expert_PK])


def dispatch(spec: MoESpec, routing: Routing, *, inference: bool = False) -> Dispatch:
    """Spec: moezoo.core.reference.dispatch.dispatch."""
    num_tokens, num_slots = routing.expert_PK.shape
    num_experts, most = spec.num_experts, num_rows(spec, num_tokens, inference=inference)
    kept_PK = kept_slots(spec, routing, inference=inference)
    computed_PK = kept_PK
    if spec.num_choices > num_experts:
        computed_PK = kept_PK & (routing.expert_PK < num_experts)
    size_E = _counts(routing.expert_PK, computed_PK, num_experts)
    if mostly_unused(spec, inference=inference):
        # gather_mm would multiply unused rows too. Shapes may depend on values here: nothing is compiled.
        most = max(1, int(mx.sum(size_E).item()))
    order_R = mx.argsort(mx.where(computed_PK, routing.expert_PK, num_experts).reshape(-1))[:most]
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


def _token_rows(dispatched: Dispatch, x_PD: mx.array) -> mx.array:
    """Each row's token, x_PD[token_R], of rows as `dispatch` gives them."""
    if is_x86_cpu() and _has_every_slot(dispatched):
        return rows_of_tokens(x_PD, dispatched.token_R, dispatched.kept_PK.shape[1])
    return x_PD[dispatched.token_R]


def _combined(dispatched: Dispatch, y_RD: mx.array, num_tokens: int) -> mx.array:
    """`combine` of rows as `dispatch` gives them."""
    if is_x86_cpu() and _has_every_slot(dispatched):
        weighted_RD = dispatched.weight_R[:, None] * y_RD.astype(mx.float32)
        return sum_over_rows(weighted_RD, dispatched.token_R, dispatched.kept_PK.shape[1]).astype(y_RD.dtype)
    return combine(dispatched, y_RD, num_tokens)


def _has_every_slot(dispatched: Dispatch) -> bool:
    """Whether the rows of `dispatch` are all slots of all tokens, in another order: unused ones stand last."""
    return dispatched.token_R.size == dispatched.kept_PK.size


def _counts(expert_PK: mx.array, counted_PK: mx.array, num_experts: int) -> mx.array:
    """How many of the counted slots name each expert; int32."""
    chosen = (expert_PK[..., None] == mx.arange(num_experts)) & counted_PK[..., None]
    return mx.sum(chosen.reshape(-1, num_experts).astype(mx.int32), axis=0)
