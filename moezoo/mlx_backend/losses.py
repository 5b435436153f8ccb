"""Cross-entropy and auxiliary losses. Spec: moezoo.core.reference.losses."""

import math
from collections.abc import Sequence
from typing import assert_never

import mlx.core as mx

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
from moezoo.mlx_backend.dispatch import expert_counts
from moezoo.mlx_backend.distributed.data_parallel import average, total
from moezoo.mlx_backend.kernels.cross_entropy import softmax_losses
from moezoo.mlx_backend.positions import Documents, token_mean
from moezoo.mlx_backend.routing import Routing


def token_losses(logits_BTV: mx.array, target_BT: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.losses.token_losses."""
    counted_BT = mx.maximum(target_BT, 0)
    losses_P = softmax_losses(logits_BTV.reshape(-1, logits_BTV.shape[-1]), counted_BT.reshape(-1))
    return mx.where(target_BT == IGNORED, 0.0, losses_P.reshape(target_BT.shape))


def cross_entropy(logits_BTV: mx.array, target_BT: mx.array, num_targets: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.losses.cross_entropy."""
    count = average(mx.sum(target_BT != IGNORED)) if num_targets is None else num_targets
    return mx.sum(mx.sum(token_losses(logits_BTV, target_BT), axis=-1)) / count


# --- parts of balance losses -----------------------------------------------------------------------------------------


def probabilities(spec: RouterSpec, routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.probabilities."""
    match spec.score:
        case "softmax":
            return routing.score_PE
        case "none":
            return mx.softmax(routing.logits_PE, axis=-1, precise=True)
        case "sigmoid" | "sqrt_softplus":
            return routing.score_PE / (mx.sum(routing.score_PE, axis=-1, keepdims=True) + 1e-20)
        case _:
            assert_never(spec.score)


def highest_logits(logits_PE: mx.array, top_k: int) -> mx.array:
    """Spec: moezoo.core.reference.losses.highest_logits."""
    expert_PK = mx.argsort(-mx.stop_gradient(logits_PE), axis=-1)[:, :top_k]
    return mx.any(expert_PK[..., None] == mx.arange(logits_PE.shape[-1]), axis=1)


def by_device(x: mx.array, num_devices: int) -> mx.array:
    """Spec: moezoo.core.reference.losses.by_device."""
    return mx.sum(x.reshape(*x.shape[:-1], num_devices, -1), axis=-1)


def squared_variation(x_E: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.losses.squared_variation."""
    mean = mx.mean(x_E)
    return mx.mean(mx.square(x_E - mean)) / mx.square(mean)


def normal_cdf(x: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.losses.normal_cdf."""
    return 0.5 * (1 + mx.erf(x / math.sqrt(2)))


# --- the auxiliary losses --------------------------------------------------------------------------------------------


def switch_balance(load_E: mx.array, probability_PE: mx.array, real_P: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.losses.switch_balance."""
    share_E = load_E / mx.sum(load_E)
    return load_E.shape[-1] * mx.sum(share_E * token_mean(probability_PE, real_P))


def device_balance(
    load_E: mx.array, probability_PE: mx.array, num_devices: int, real_P: mx.array | None = None
) -> mx.array:
    """Spec: moezoo.core.reference.losses.device_balance."""
    return switch_balance(by_device(load_E, num_devices), by_device(probability_PE, num_devices), real_P)


def communication_balance(
    routing: Routing, probability_PE: mx.array, num_devices: int, max_devices: int, real_P: mx.array | None = None
) -> mx.array:
    """Spec: moezoo.core.reference.losses.communication_balance."""
    hot_PKE = routing.expert_PK[..., None] == mx.arange(routing.score_PE.shape[-1])
    chosen_PE = mx.any(hot_PKE & routing.valid_PK[..., None], axis=1)
    sent = average(token_mean((by_device(chosen_PE, num_devices) > 0).astype(mx.float32), real_P))
    return num_devices / max_devices * mx.sum(sent * token_mean(by_device(probability_PE, num_devices), real_P))


def sequence_balance(
    logits_PE: mx.array,
    probability_PE: mx.array,
    top_k: int,
    shape: tuple[int, int],
    documents: Documents | None = None,
) -> mx.array:
    """Spec: moezoo.core.reference.losses.sequence_balance."""
    batch, length = shape
    num_experts = logits_PE.shape[-1]
    if documents is not None:
        return num_experts * _document_balance(highest_logits(logits_PE, top_k), probability_PE, documents) / top_k
    hot_BTE = highest_logits(logits_PE, top_k).reshape(batch, length, num_experts)
    share_BE = mx.sum(hot_BTE, axis=1) / (length * top_k)
    mean_BE = mx.mean(probability_PE.reshape(batch, length, num_experts), axis=1)
    return num_experts * mx.mean(mx.sum(share_BE * mean_BE, axis=-1))


def _document_balance(hot_PE: mx.array, probability_PE: mx.array, documents: Documents) -> mx.array:
    """Return the mean over documents of `sum_e mean(hot_e) * mean(probability_e)`.

    There are at most as many as tokens; padding is added to one more.
    """
    number_P, tokens = documents.number_P, len(hot_PE)
    zeros_PE = mx.zeros((tokens + 1, hot_PE.shape[-1]))
    place_P = mx.where(number_P < 0, tokens, number_P)
    size_P1 = mx.maximum(zeros_PE[:, :1].at[place_P].add(mx.ones((tokens, 1))), 1)
    hot_PE = zeros_PE.at[place_P].add(hot_PE.astype(mx.float32)) / size_P1
    value_P = mx.sum(hot_PE * (zeros_PE.at[place_P].add(probability_PE) / size_P1), axis=-1)[:-1]
    return mx.sum(value_P) / average(mx.max(number_P) + 1)


def importance(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.importance."""
    importance_E = mx.zeros(routing.score_PE.shape[-1]).at[routing.expert_PK].add(routing.weight_PK)
    return squared_variation(total(importance_E))


def load(routing: Routing, top_k: int, real_P: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.losses.load."""
    if routing.clean_logits_PE is None or routing.noise_scale_PE is None:
        return squared_variation(total(expert_counts(routing)))
    order_PE = mx.argsort(-mx.stop_gradient(routing.logits_PE), axis=-1)
    falling_PE = mx.take_along_axis(routing.logits_PE, order_PE, axis=-1)
    last_P, next_P = falling_PE[:, top_k - 1], falling_PE[:, top_k]
    threshold_PE = mx.where(routing.logits_PE > next_P[:, None], next_P[:, None], last_P[:, None])
    chance_PE = normal_cdf((routing.clean_logits_PE - threshold_PE) / routing.noise_scale_PE)
    chance_PE = chance_PE if real_P is None else mx.where(real_P[:, None], chance_PE, 0.0)
    return squared_variation(total(mx.sum(chance_PE, axis=0)))


def heterogeneous_balance(
    load_E: mx.array, probability_PE: mx.array, num_experts: int, ffn_share: float, real_P: mx.array | None = None
) -> mx.array:
    """Spec: moezoo.core.reference.losses.heterogeneous_balance."""
    is_zero_E = mx.arange(load_E.shape[-1]) >= num_experts
    eta_E = mx.where(is_zero_E, ffn_share, 1.0)
    share_E = load_E / mx.sum(load_E)
    return mx.sum(1 / eta_E) * mx.sum(eta_E * share_E * token_mean(probability_PE, real_P))


def router_z(routing: Routing, real_P: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.losses.router_z."""
    return token_mean(mx.square(mx.logsumexp(routing.logits_PE, axis=-1)), real_P)


def pooled_balance(layer_logits: Sequence[mx.array], top_k: int, real_P: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.losses.pooled_balance."""
    logits_PE = mx.concatenate(list(layer_logits))
    real_P = None if real_P is None else mx.tile(real_P, len(layer_logits))
    frequency_E = average(token_mean(highest_logits(logits_PE, top_k).astype(mx.float32), real_P))
    probability_PE = mx.softmax(logits_PE, axis=-1, precise=True)
    return logits_PE.shape[-1] * mx.sum(frequency_E * token_mean(probability_PE, real_P))


def auxiliary_loss(
    spec: AuxiliaryLossSpec,
    moe: MoESpec,
    routing: Routing,
    shape: tuple[int, int],
    *,
    load_E: mx.array | None = None,
    documents: Documents | None = None,
) -> mx.array:
    """Spec: moezoo.core.reference.losses.auxiliary_loss."""
    real_P = None if documents is None else documents.real_P
    probability_PE = probabilities(moe.router, routing)
    match spec:
        case SwitchBalanceLossSpec() | ExpertBalanceLossSpec():
            return switch_balance(total(expert_counts(routing)), probability_PE, real_P)
        case GlobalBalanceLossSpec():
            own_E = total(expert_counts(routing)) if load_E is None else load_E
            return switch_balance(own_E, probability_PE, real_P)
        case DeviceBalanceLossSpec():
            return device_balance(total(expert_counts(routing)), probability_PE, spec.num_devices, real_P)
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
            return heterogeneous_balance(
                total(expert_counts(routing)), probability_PE, moe.num_experts, ffn_share, real_P
            )
        case RouterZLossSpec():
            return router_z(routing, real_P)
        case PooledBalanceLossSpec():
            return pooled_balance([routing.logits_PE], moe.router.top_k, real_P)
        case _:
            assert_never(spec)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: mx.array,
    target_BT: mx.array,
    routings: Sequence[Routing],
    *,
    index_losses: Sequence[tuple[int, float, mx.array]] = (),
    global_load: Sequence[mx.array] | None = None,
    num_targets: mx.array | None = None,
    documents: Documents | None = None,
) -> dict[str, mx.array]:
    """Spec: moezoo.core.reference.losses.loss_terms."""
    terms = {"cross_entropy": cross_entropy(logits_BTV, target_BT, num_targets)}
    found: dict[str, list[tuple[int, float, mx.array]]] = {}
    pooled: list[mx.array] = []
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
    total, zero = terms["cross_entropy"], mx.array(0.0)
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
