"""The choice. Spec: moezoo.core.reference.choice."""

from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

import mlx.core as mx

from moezoo.core.random import ROUTER_NOISE, ROUTER_SAMPLE
from moezoo.core.spec import (
    ExpertChoiceSpec,
    GroupedTopKChoiceSpec,
    HashChoiceSpec,
    NoisyTopKChoiceSpec,
    RouterSpec,
    SparseMixerChoiceSpec,
    TopKChoiceSpec,
    TopPChoiceSpec,
)
from moezoo.core.tokens import NO_MASKS, NOT_REPLAYED, ExpertMasks
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.routing import highest
from moezoo.mlx_backend.random import bernoulli, fold_in, gumbel, normal


class Choice(NamedTuple):
    """Spec: moezoo.core.reference.choice.Choice."""

    expert_PK: mx.array
    valid_PK: mx.array
    weight_PK: mx.array | None
    cutoff_E: mx.array | None


class RoutingContext(NamedTuple):
    """Spec: moezoo.core.reference.choice.RoutingContext; a tuple, so that MLX's transforms find its arrays."""

    token_P: mx.array | None = None
    previous_PE: mx.array | None = None
    previous_PZ: mx.array | None = None
    forced_PK: mx.array | None = None
    key: mx.array | None = None
    inference: bool = False
    real_P: mx.array | None = None
    silenced_PE: mx.array | None = None
    excluded_PE: mx.array | None = None


NO_CONTEXT = RoutingContext()


def given_routing(
    layers: Sequence[int], forced: Sequence[mx.array] | None, masks: Sequence[ExpertMasks] | None, length: int
) -> dict[int, RoutingContext]:
    """Spec: moezoo.core.reference.choice.given_routing."""

    def of_tokens(mask_BE: Any) -> mx.array | None:
        return None if mask_BE is None else mx.repeat(mx.array(mask_BE), length, axis=0)

    if forced is None and masks is None:
        return {}
    experts: Sequence[mx.array | None] = [None] * len(layers) if forced is None else forced
    of_layers = zip(layers, experts, [NO_MASKS] * len(layers) if masks is None else masks, strict=True)
    return {
        layer: RoutingContext(
            forced_PK=forced_PK, silenced_PE=of_tokens(mask.silenced), excluded_PE=of_tokens(mask.excluded)
        )
        for layer, forced_PK, mask in of_layers
    }


def noisy(logits_PE: mx.array, noise_scale_PE: mx.array, key: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.choice.noisy."""
    return logits_PE + normal(fold_in(key, ROUTER_NOISE), logits_PE.shape) * noise_scale_PE


def choose(
    spec: RouterSpec,
    logits_PE: mx.array,
    score_PE: mx.array,
    selection_PE: mx.array,
    context: RoutingContext = NO_CONTEXT,
    *,
    table_PK: mx.array | None = None,
    cutoff_E: mx.array | None = None,
) -> Choice:
    """Spec: moezoo.core.reference.choice.choose."""
    selection_PE = mx.stop_gradient(selection_PE)
    weight_PK, cutoffs_E = None, None
    match spec.choice:
        case TopKChoiceSpec() | NoisyTopKChoiceSpec():
            expert_PK, valid_PK = _highest(selection_PE, spec.top_k)
        case GroupedTopKChoiceSpec() as groups:
            expert_PK, valid_PK = _highest(_in_kept_groups(groups, selection_PE), spec.top_k)
        case TopPChoiceSpec() as nucleus:
            expert_PK, _ = _highest(selection_PE, spec.top_k)
            chosen_PK = mx.take_along_axis(mx.stop_gradient(score_PE), expert_PK, axis=-1)
            valid_PK = mx.cumsum(chosen_PK, axis=-1) - chosen_PK < nucleus.p
        case HashChoiceSpec():
            assert table_PK is not None
            expert_PK, valid_PK = table_PK, mx.ones(table_PK.shape, mx.bool_)
        case SparseMixerChoiceSpec() as mixer:
            key = None if context.inference else context.key
            expert_PK, weight_PK = _sparsemixer(mixer, spec.top_k, logits_PE, context, key)
            valid_PK = mx.ones(expert_PK.shape, mx.bool_)
        case ExpertChoiceSpec():
            if context.inference:
                assert cutoff_E is not None
                taken_PE = selection_PE >= cutoff_E
            else:
                taken_PE, cutoffs_E = _highest_tokens(spec, selection_PE, context.real_P)
            expert_PK, valid_PK = _highest(mx.where(taken_PE, selection_PE, -mx.inf), selection_PE.shape[1])
        case _:
            assert_never(spec.choice)
    if context.forced_PK is not None:
        expert_PK, valid_PK = _replayed(context.forced_PK, context.real_P, expert_PK, valid_PK)
        weight_PK = None if weight_PK is None else mx.where(valid_PK, weight_PK, 0.0)
    return Choice(expert_PK, valid_PK, weight_PK, cutoffs_E)


def _replayed(
    forced_PK: mx.array, real_P: mx.array | None, expert_PK: mx.array, valid_PK: mx.array
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.choice._replayed."""
    free_P1, used_PK = forced_PK[:, :1] == NOT_REPLAYED, forced_PK >= 0
    if real_P is not None:
        used_PK = used_PK | ~real_P[:, None]  # weights of no expert could be 0 / 0
    return mx.where(free_P1, expert_PK, mx.maximum(forced_PK, 0)), mx.where(free_P1, valid_PK, used_PK)


# --- the kinds -------------------------------------------------------------------------------------------------------


def _highest(value_PE: mx.array, count: int) -> tuple[mx.array, mx.array]:
    # Trap: argsort is stable, so ties go to the lower id; argpartition has no tie rule.
    if pays(value_PE.size) and 2 * count < value_PE.shape[1]:
        expert_PK = highest(value_PE, count)
    else:
        expert_PK = mx.argsort(-value_PE, axis=-1)[:, :count]
    return expert_PK.astype(mx.int32), mx.take_along_axis(value_PE, expert_PK, axis=-1) > -mx.inf


def _in_kept_groups(groups: GroupedTopKChoiceSpec, value_PE: mx.array) -> mx.array:
    tokens, num_experts = value_PE.shape
    in_groups = value_PE.reshape(tokens, groups.num_groups, -1)
    match groups.group_value:
        case "max":
            of_group = mx.max(in_groups, axis=-1)
        case "top2":
            two = mx.sort(in_groups, axis=-1)[..., -2:]
            of_group = two[..., 1] + mx.where(two[..., 0] > -mx.inf, two[..., 0], 0.0)
        case _:
            assert_never(groups.group_value)
    best, _ = _highest(of_group, groups.keep)
    group_E = mx.arange(num_experts) // (num_experts // groups.num_groups)
    kept_PE = mx.any(group_E[None, :, None] == best[:, None, :], axis=-1)
    if groups.others == "never":
        return mx.where(kept_PE, value_PE, -mx.inf)
    return mx.where(kept_PE, value_PE, mx.where(value_PE > -mx.inf, 0.0, -mx.inf))


def _sparsemixer(
    mixer: SparseMixerChoiceSpec, count: int, logits_PE: mx.array, context: RoutingContext, key: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.choice._sparsemixer."""
    logits, id_E = mx.stop_gradient(logits_PE), mx.arange(logits_PE.shape[1])
    free_PE = mx.ones(logits.shape, mx.bool_) if context.excluded_PE is None else ~context.excluded_PE
    experts, weights = [], []
    for slot in range(count):
        left_PE = mx.where(free_PE, logits, -mx.inf)
        best_P = mx.argmax(left_PE, axis=-1)
        best_P1 = mx.max(left_PE, axis=-1, keepdims=True)
        reach_PE = 2 * mixer.jitter * mx.maximum(mx.abs(logits), best_P1)
        near_PE = free_PE & (best_P1 - logits <= reach_PE)
        gate_PE = mx.softmax(mx.where(near_PE, logits_PE, -mx.inf), axis=-1, precise=True)
        drawn_PE, kept_P = logits, mx.ones(best_P.shape, mx.bool_)
        if key is not None:
            drawn_PE = logits + gumbel(fold_in(key, ROUTER_SAMPLE, 2 * slot), logits.shape)
            kept_P = bernoulli(fold_in(key, ROUTER_SAMPLE, 2 * slot + 1), 0.25, best_P.shape)
        expert_P = mx.argmax(mx.where(near_PE, drawn_PE, -mx.inf), axis=-1)
        if context.forced_PK is not None:
            forced_P = context.forced_PK[:, slot]
            expert_P = mx.where(forced_P == NOT_REPLAYED, expert_P, mx.maximum(forced_P, 0))
        # Trap: without it, "Cannot calculate VJP with respect to indices".
        expert_P = mx.stop_gradient(expert_P.astype(mx.int32))
        gate_P = mx.take_along_axis(gate_PE, expert_P[:, None], axis=-1)[:, 0]
        scale_P = mx.where((expert_P == best_P) | kept_P, 1.0, 1 / 3)
        experts.append(expert_P)
        weights.append(gate_P + mx.stop_gradient(gate_P) * (scale_P - 1))
        free_PE = free_PE & (id_E != expert_P[:, None])
    return mx.stack(experts, axis=-1), mx.stack(weights, axis=-1)


def _highest_tokens(spec: RouterSpec, value_PE: mx.array, real_P: mx.array | None) -> tuple[mx.array, mx.array]:
    num_tokens, num_experts = value_PE.shape
    tokens: int | mx.array = num_tokens
    if real_P is not None:
        value_PE, tokens = mx.where(real_P[:, None], value_PE, -mx.inf), mx.sum(real_P)
    most = -(-tokens * spec.top_k // num_experts)
    order_PE = mx.argsort(-value_PE, axis=0)
    taken_PE = mx.argsort(order_PE, axis=0) < most
    last_1E = mx.take(order_PE, mx.array([most - 1]) if isinstance(most, int) else most[None] - 1, axis=0)
    return taken_PE, mx.take_along_axis(value_PE, last_1E, axis=0)[0]
