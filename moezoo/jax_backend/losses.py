"""Cross-entropy and auxiliary losses. Spec: moezoo.core.reference.losses."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import (
    AuxiliaryLossSpec,
    CommunicationBalanceLossSpec,
    DeviceBalanceLossSpec,
    ExpertBalanceLossSpec,
    GlobalBalanceLossSpec,
    HeterogeneousBalanceLossSpec,
    ImportanceLossSpec,
    LoadLossSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    RouterSpec,
    RouterZLossSpec,
    SequenceBalanceLossSpec,
    SwitchBalanceLossSpec,
)
from moezoo.core.tokens import IGNORED
from moezoo.jax_backend.dispatch import expert_counts
from moezoo.jax_backend.positions import Documents, token_mean
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.placement import row_by_row

Carried = TypeVar("Carried")

PART = 2**20
"""Number of logits whose exponentials cross-entropy computes at once: 4 MiB."""


def token_losses(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.losses.token_losses."""
    return jnp.where(target_BT == IGNORED, 0.0, _log_losses(logits_BTV, jnp.maximum(target_BT, 0)))


@jax.custom_vjp
def _log_losses(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """Return -log softmax(logits) of each target.

    Computed for a few positions at a time, so that memory holds [B, T, V] once: exponentials are those of a few
    positions, and in the backward pass the gradient overwrites the logits.
    """
    return _log_losses_forward(logits_BTV, target_BT)[0]


def _log_losses_forward(
    logits_BTV: jax.Array, target_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    def of_positions(start: jax.Array, length: int, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        logits_BTV, *columns = found
        logits, target = (lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in (logits_BTV, target_BT))
        largest = jnp.max(logits, axis=-1)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        columns = [
            lax.dynamic_update_slice_in_dim(*pair, start, axis=1)
            for pair in zip(columns, (largest, total, chosen), strict=True)
        ]
        return logits_BTV, *columns

    # Trap: the backward pass overwrites the logits, and XLA would copy them first unless this loop returned them.
    empty = jnp.zeros(target_BT.shape, logits_BTV.dtype)
    carried: tuple[jax.Array, ...] = (logits_BTV, empty, empty, empty)
    logits_BTV, largest_BT, total_BT, chosen_BT = _over_positions(logits_BTV.shape, of_positions, carried)
    return jnp.log(total_BT) + (largest_BT - chosen_BT), (logits_BTV, target_BT, largest_BT, total_BT)


def _log_losses_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], gradient_BT: jax.Array
) -> tuple[jax.Array, None]:
    logits_BTV, *columns = saved
    token_V = jnp.arange(logits_BTV.shape[-1])

    def of_positions(start: jax.Array, length: int, logits_BTV: jax.Array) -> jax.Array:
        logits, target, largest, total, gradient = (
            lax.dynamic_slice_in_dim(whole, start, length, axis=1) for whole in (logits_BTV, *columns, gradient_BT)
        )
        # Trap: exp(logits - log_sum_exp) instead would lose the digits that large logits lose in that sum.
        share = jnp.exp(logits - largest[..., None]) / total[..., None]
        gradient_BTV = (share - (token_V == target[..., None])) * gradient[..., None]
        return lax.dynamic_update_slice_in_dim(logits_BTV, gradient_BTV, start, axis=1)

    return _over_positions(logits_BTV.shape, of_positions, logits_BTV), None


_log_losses.defvjp(_log_losses_forward, _log_losses_backward)


def _over_positions(shape: tuple[int, ...], of_positions: Callable[..., Carried], carried: Carried) -> Carried:
    """Apply `of_positions(start, length, carried)` to chunks of positions with at most PART logits, in turn."""
    batch, length, vocab = shape
    part = max(1, min(length, PART // (batch * vocab)))
    whole = length // part
    carried = lax.fori_loop(0, whole, lambda index, carried: of_positions(index * part, part, carried), carried)
    return of_positions(whole * part, length % part, carried) if length % part else carried


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array, num_targets: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.losses.cross_entropy."""
    count = jnp.sum(target_BT != IGNORED) if num_targets is None else num_targets
    return jnp.sum(token_losses(logits_BTV, target_BT)) / count


# --- parts of balance losses -----------------------------------------------------------------------------------------


def probabilities(spec: RouterSpec, routing: Routing) -> jax.Array:
    """Spec: moezoo.core.reference.losses.probabilities."""
    match spec.score:
        case "softmax":
            return routing.score_PE
        case "none":
            return jax.nn.softmax(routing.logits_PE, axis=-1)
        case "sigmoid" | "sqrt_softplus":
            return routing.score_PE / (jnp.sum(routing.score_PE, axis=-1, keepdims=True) + 1e-20)
        case _:
            assert_never(spec.score)


def highest_logits(logits_PE: jax.Array, top_k: int) -> jax.Array:
    """Spec: moezoo.core.reference.losses.highest_logits."""
    expert_PK = row_by_row(partial(lax.top_k, k=top_k))(lax.stop_gradient(logits_PE))[1]
    return jnp.any(expert_PK[..., None] == jnp.arange(logits_PE.shape[-1]), axis=1)


def by_device(x: jax.Array, num_devices: int) -> jax.Array:
    """Spec: moezoo.core.reference.losses.by_device."""
    return jnp.sum(x.reshape(*x.shape[:-1], num_devices, -1), axis=-1)


def squared_variation(x_E: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.losses.squared_variation."""
    mean = jnp.mean(x_E)
    return jnp.mean(jnp.square(x_E - mean)) / jnp.square(mean)


def normal_cdf(x: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.losses.normal_cdf."""
    return 0.5 * (1 + lax.erf(x / math.sqrt(2)))


# --- the auxiliary losses --------------------------------------------------------------------------------------------


def switch_balance(load_E: jax.Array, probability_PE: jax.Array, real_P: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.losses.switch_balance."""
    share_E = load_E / jnp.sum(load_E)
    return load_E.shape[-1] * jnp.sum(share_E * token_mean(probability_PE, real_P))


def device_balance(
    load_E: jax.Array, probability_PE: jax.Array, num_devices: int, real_P: jax.Array | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.losses.device_balance."""
    return switch_balance(by_device(load_E, num_devices), by_device(probability_PE, num_devices), real_P)


def communication_balance(
    routing: Routing, probability_PE: jax.Array, num_devices: int, max_devices: int, real_P: jax.Array | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.losses.communication_balance."""
    hot_PKE = routing.expert_PK[..., None] == jnp.arange(routing.score_PE.shape[-1])
    chosen_PE = jnp.any(hot_PKE & routing.valid_PK[..., None], axis=1)
    sent = token_mean((by_device(chosen_PE, num_devices) > 0).astype(jnp.float32), real_P)
    return num_devices / max_devices * jnp.sum(sent * token_mean(by_device(probability_PE, num_devices), real_P))


def sequence_balance(
    logits_PE: jax.Array,
    probability_PE: jax.Array,
    top_k: int,
    shape: tuple[int, int],
    documents: Documents | None = None,
) -> jax.Array:
    """Spec: moezoo.core.reference.losses.sequence_balance."""
    batch, length = shape
    num_experts = logits_PE.shape[-1]
    if documents is not None:
        return num_experts * _document_balance(highest_logits(logits_PE, top_k), probability_PE, documents) / top_k
    hot_BTE = highest_logits(logits_PE, top_k).reshape(batch, length, num_experts)
    share_BE = jnp.sum(hot_BTE, axis=1) / (length * top_k)
    mean_BE = jnp.mean(probability_PE.reshape(batch, length, num_experts), axis=1)
    return num_experts * jnp.mean(jnp.sum(share_BE * mean_BE, axis=-1))


def _document_balance(hot_PE: jax.Array, probability_PE: jax.Array, documents: Documents) -> jax.Array:
    """Return the mean over documents of `sum_e mean(hot_e) * mean(probability_e)`.

    There are at most as many as tokens; padding is added to one more.
    """
    number_P, tokens = documents.number_P, len(hot_PE)
    zeros_PE = jnp.zeros((tokens + 1, hot_PE.shape[-1]))
    place_P = jnp.where(number_P < 0, tokens, number_P)
    size_P1 = jnp.maximum(zeros_PE[:, :1].at[place_P].add(jnp.ones((tokens, 1))), 1)
    hot_PE = zeros_PE.at[place_P].add(hot_PE.astype(jnp.float32)) / size_P1
    value_P = jnp.sum(hot_PE * (zeros_PE.at[place_P].add(probability_PE) / size_P1), axis=-1)[:-1]
    return jnp.sum(value_P) / (jnp.max(number_P) + 1)


def importance(routing: Routing) -> jax.Array:
    """Spec: moezoo.core.reference.losses.importance."""
    importance_E = jnp.zeros(routing.score_PE.shape[-1]).at[routing.expert_PK].add(routing.weight_PK)
    return squared_variation(importance_E)


def load(routing: Routing, top_k: int, real_P: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.losses.load."""
    if routing.clean_logits_PE is None or routing.noise_scale_PE is None:
        return squared_variation(expert_counts(routing))
    falling_PK = row_by_row(partial(lax.top_k, k=top_k + 1))(routing.logits_PE)[0]
    last_P, next_P = falling_PK[:, top_k - 1], falling_PK[:, top_k]
    threshold_PE = jnp.where(routing.logits_PE > next_P[:, None], next_P[:, None], last_P[:, None])
    chance_PE = normal_cdf((routing.clean_logits_PE - threshold_PE) / routing.noise_scale_PE)
    chance_PE = chance_PE if real_P is None else jnp.where(real_P[:, None], chance_PE, 0.0)
    return squared_variation(jnp.sum(chance_PE, axis=0))


def heterogeneous_balance(
    load_E: jax.Array, probability_PE: jax.Array, num_experts: int, ffn_share: float, real_P: jax.Array | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.losses.heterogeneous_balance."""
    is_zero_E = jnp.arange(load_E.shape[-1]) >= num_experts
    eta_E = jnp.where(is_zero_E, ffn_share, 1.0)
    share_E = load_E / jnp.sum(load_E)
    return jnp.sum(1 / eta_E) * jnp.sum(eta_E * share_E * token_mean(probability_PE, real_P))


def router_z(routing: Routing, real_P: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.losses.router_z."""
    return token_mean(jnp.square(jax.nn.logsumexp(routing.logits_PE, axis=-1)), real_P)


def pooled_balance(layer_logits: Sequence[jax.Array], top_k: int, real_P: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.losses.pooled_balance.

    Layers are averaged, and not concatenated: on a mesh that would send tokens to other devices.
    """
    chosen = [highest_logits(own_PE, top_k).astype(jnp.float32) for own_PE in layer_logits]
    frequency_E = sum(token_mean(own_PE, real_P) for own_PE in chosen) / len(layer_logits)
    probability_E = sum(token_mean(jax.nn.softmax(own_PE, axis=-1), real_P) for own_PE in layer_logits)
    return layer_logits[0].shape[-1] * jnp.sum(frequency_E * probability_E / len(layer_logits))


def auxiliary_loss(
    spec: AuxiliaryLossSpec,
    moe: MoESpec,
    routing: Routing,
    shape: tuple[int, int],
    *,
    load_E: jax.Array | None = None,
    documents: Documents | None = None,
) -> jax.Array:
    """Spec: moezoo.core.reference.losses.auxiliary_loss."""
    real_P = None if documents is None else documents.real_P
    probability_PE = probabilities(moe.router, routing)
    match spec:
        case SwitchBalanceLossSpec() | ExpertBalanceLossSpec():
            return switch_balance(expert_counts(routing), probability_PE, real_P)
        case GlobalBalanceLossSpec():
            own_E = expert_counts(routing) if load_E is None else load_E
            return switch_balance(own_E, probability_PE, real_P)
        case DeviceBalanceLossSpec():
            return device_balance(expert_counts(routing), probability_PE, spec.num_devices, real_P)
        case CommunicationBalanceLossSpec():
            return communication_balance(routing, probability_PE, spec.num_devices, spec.max_devices, real_P)
        case SequenceBalanceLossSpec():
            return sequence_balance(routing.logits_PE, probability_PE, moe.router.top_k, shape, documents)
        case ImportanceLossSpec():
            return importance(routing)
        case LoadLossSpec():
            return load(routing, moe.router.top_k, real_P)
        case HeterogeneousBalanceLossSpec():
            ffn_share = 1.0 if moe.zero_computation is None else moe.zero_computation.ffn_share
            return heterogeneous_balance(expert_counts(routing), probability_PE, moe.num_experts, ffn_share, real_P)
        case RouterZLossSpec():
            return router_z(routing, real_P)
        case PooledBalanceLossSpec():
            return pooled_balance([routing.logits_PE], moe.router.top_k, real_P)
        case _:
            assert_never(spec)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: jax.Array,
    target_BT: jax.Array,
    routings: Sequence[Routing],
    *,
    index_losses: Sequence[tuple[int, float, jax.Array]] = (),
    global_load: Sequence[jax.Array] | None = None,
    num_targets: jax.Array | None = None,
    documents: Documents | None = None,
) -> dict[str, jax.Array]:
    """Spec: moezoo.core.reference.losses.loss_terms."""
    terms = {"cross_entropy": cross_entropy(logits_BTV, target_BT, num_targets)}
    found: dict[str, list[tuple[int, float, jax.Array]]] = {}
    pooled: list[jax.Array] = []
    batch, length = target_BT.shape
    for order, ((index, moe), routing) in enumerate(zip(spec.moes, routings, strict=True)):
        load_E = None if global_load is None else global_load[order]
        for loss in moe.losses:
            value = auxiliary_loss(loss, moe, routing, (batch, length), load_E=load_E, documents=documents)
            found.setdefault(loss.kind, []).append((index, loss.coefficient, value))
            if isinstance(loss, PooledBalanceLossSpec):
                pooled += [routing.logits_PE] * loss.times
                pooled_top_k = moe.router.top_k
    if index_losses:
        found["index"] = list(index_losses)
    total, zero = terms["cross_entropy"], jnp.float32(0)
    for name, rows in found.items():
        value = sum((value for _, _, value in rows), zero) / len(rows)
        weighted = sum((coefficient * value for _, coefficient, value in rows), zero)
        if name == "pooled_balance":
            value = pooled_balance(pooled, pooled_top_k, None if documents is None else documents.real_P)
            weighted = rows[0][1] * value
        terms |= {name: value, f"{name}_weighted": weighted}
        terms |= {f"layers.{index}.{name}": value for index, _, value in rows}
        total = total + weighted
    return {"loss": total, **terms}
