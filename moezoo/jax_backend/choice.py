"""The choice. Spec: moezoo.core.reference.choice."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import lax

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
from moezoo.jax_backend.random import bernoulli, fold_in, gumbel, normal
from moezoo.jax_backend.runtime.placement import row_by_row


class Choice(NamedTuple):
    """Spec: moezoo.core.reference.choice.Choice."""

    expert_PK: jax.Array
    valid_PK: jax.Array
    weight_PK: jax.Array | None
    cutoff_E: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingContext:
    """Spec: moezoo.core.reference.choice.RoutingContext."""

    token_P: jax.Array | None = None
    previous_PE: jax.Array | None = None
    previous_PZ: jax.Array | None = None
    forced_PK: jax.Array | None = None
    key: jax.Array | None = None
    inference: bool = field(default=False, metadata={"static": True})
    real_P: jax.Array | None = None
    silenced_PE: jax.Array | None = None
    excluded_PE: jax.Array | None = None


NO_CONTEXT = RoutingContext()


def given_routing(
    layers: Sequence[int], forced: Sequence[jax.Array] | None, masks: Sequence[ExpertMasks] | None, length: int
) -> dict[int, RoutingContext]:
    """Spec: moezoo.core.reference.choice.given_routing."""

    def of_tokens(mask_BE: Any) -> jax.Array | None:
        return None if mask_BE is None else jnp.repeat(jnp.asarray(mask_BE), length, axis=0)

    if forced is None and masks is None:
        return {}
    experts: Sequence[jax.Array | None] = [None] * len(layers) if forced is None else forced
    of_layers = zip(layers, experts, [NO_MASKS] * len(layers) if masks is None else masks, strict=True)
    return {
        layer: RoutingContext(
            forced_PK=forced_PK, silenced_PE=of_tokens(mask.silenced), excluded_PE=of_tokens(mask.excluded)
        )
        for layer, forced_PK, mask in of_layers
    }


def noisy(logits_PE: jax.Array, noise_scale_PE: jax.Array, key: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.choice.noisy."""
    return logits_PE + normal(fold_in(key, ROUTER_NOISE), logits_PE.shape) * noise_scale_PE


def choose(
    spec: RouterSpec,
    logits_PE: jax.Array,
    score_PE: jax.Array,
    selection_PE: jax.Array,
    context: RoutingContext = NO_CONTEXT,
    *,
    table_PK: jax.Array | None = None,
    cutoff_E: jax.Array | None = None,
) -> Choice:
    """Spec: moezoo.core.reference.choice.choose."""
    selection_PE = lax.stop_gradient(selection_PE)
    weight_PK, cutoffs_E = None, None
    match spec.choice:
        case TopKChoiceSpec() | NoisyTopKChoiceSpec():
            expert_PK, valid_PK = _highest(selection_PE, spec.top_k)
        case GroupedTopKChoiceSpec() as groups:
            expert_PK, valid_PK = _highest(_in_kept_groups(groups, selection_PE), spec.top_k)
        case TopPChoiceSpec() as nucleus:
            expert_PK, _ = _highest(selection_PE, spec.top_k)
            chosen_PK = jnp.take_along_axis(lax.stop_gradient(score_PE), expert_PK, axis=-1)
            valid_PK = jnp.cumsum(chosen_PK, axis=-1) - chosen_PK < nucleus.p
        case HashChoiceSpec():
            assert table_PK is not None
            expert_PK, valid_PK = table_PK, jnp.ones(table_PK.shape, jnp.bool_)
        case SparseMixerChoiceSpec() as mixer:
            key = None if context.inference else context.key
            expert_PK, weight_PK = _sparsemixer(mixer, spec.top_k, logits_PE, context, key)
            valid_PK = jnp.ones(expert_PK.shape, jnp.bool_)
        case ExpertChoiceSpec():
            if context.inference:
                assert cutoff_E is not None
                taken_PE = selection_PE >= cutoff_E
            else:
                taken_PE, cutoffs_E = _highest_tokens(spec, selection_PE, context.real_P)
            expert_PK, valid_PK = _highest(jnp.where(taken_PE, selection_PE, -jnp.inf), selection_PE.shape[1])
        case _:
            assert_never(spec.choice)
    if context.forced_PK is not None:
        expert_PK, valid_PK = _replayed(context.forced_PK, context.real_P, expert_PK, valid_PK)
        weight_PK = None if weight_PK is None else jnp.where(valid_PK, weight_PK, 0.0)
    return Choice(expert_PK, valid_PK, weight_PK, cutoffs_E)


def _replayed(
    forced_PK: jax.Array, real_P: jax.Array | None, expert_PK: jax.Array, valid_PK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.choice._replayed."""
    free_P1, used_PK = forced_PK[:, :1] == NOT_REPLAYED, forced_PK >= 0
    if real_P is not None:
        used_PK = used_PK | ~real_P[:, None]  # weights of no expert could be 0 / 0
    return jnp.where(free_P1, expert_PK, jnp.maximum(forced_PK, 0)), jnp.where(free_P1, valid_PK, used_PK)


# --- the kinds -------------------------------------------------------------------------------------------------------


def _highest(value_PE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # lax.top_k sorts descending and breaks ties by the lower id.
    value_PK, expert_PK = row_by_row(partial(lax.top_k, k=count))(value_PE)
    return expert_PK, value_PK > -jnp.inf


def _in_kept_groups(groups: GroupedTopKChoiceSpec, value_PE: jax.Array) -> jax.Array:
    tokens, num_experts = value_PE.shape
    in_groups = value_PE.reshape(tokens, groups.num_groups, -1)
    match groups.group_value:
        case "max":
            of_group = jnp.max(in_groups, axis=-1)
        case "top2":
            two = row_by_row(partial(lax.top_k, k=2))(in_groups)[0]
            of_group = two[..., 0] + jnp.where(two[..., 1] > -jnp.inf, two[..., 1], 0.0)
        case _:
            assert_never(groups.group_value)
    best, _ = _highest(of_group, groups.keep)
    group_E = jnp.arange(num_experts) // (num_experts // groups.num_groups)
    kept_PE = jnp.any(group_E[None, :, None] == best[:, None, :], axis=-1)
    if groups.others == "never":
        return jnp.where(kept_PE, value_PE, -jnp.inf)
    return jnp.where(kept_PE, value_PE, jnp.where(value_PE > -jnp.inf, 0.0, -jnp.inf))


def _sparsemixer(
    mixer: SparseMixerChoiceSpec, count: int, logits_PE: jax.Array, context: RoutingContext, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.choice._sparsemixer."""
    logits, id_E = lax.stop_gradient(logits_PE), jnp.arange(logits_PE.shape[1])
    free_PE = jnp.ones(logits.shape, jnp.bool_) if context.excluded_PE is None else ~context.excluded_PE
    experts, weights = [], []
    for slot in range(count):
        left_PE = jnp.where(free_PE, logits, -jnp.inf)
        best_P = jnp.argmax(left_PE, axis=-1)
        best_P1 = jnp.max(left_PE, axis=-1, keepdims=True)
        reach_PE = 2 * mixer.jitter * jnp.maximum(jnp.abs(logits), best_P1)
        near_PE = free_PE & (best_P1 - logits <= reach_PE)
        gate_PE = jax.nn.softmax(jnp.where(near_PE, logits_PE, -jnp.inf), axis=-1)
        drawn_PE, kept_P = logits, jnp.ones(best_P.shape, jnp.bool_)
        if key is not None:
            drawn_PE = logits + gumbel(fold_in(key, ROUTER_SAMPLE, 2 * slot), logits.shape)
            kept_P = bernoulli(fold_in(key, ROUTER_SAMPLE, 2 * slot + 1), 0.25, best_P.shape)
        expert_P = jnp.argmax(jnp.where(near_PE, drawn_PE, -jnp.inf), axis=-1)
        if context.forced_PK is not None:
            forced_P = context.forced_PK[:, slot]
            expert_P = jnp.where(forced_P == NOT_REPLAYED, expert_P, jnp.maximum(forced_P, 0))
        gate_P = jnp.take_along_axis(gate_PE, expert_P[:, None], axis=-1)[:, 0]
        scale_P = jnp.where((expert_P == best_P) | kept_P, 1.0, 1 / 3)
        experts.append(expert_P)
        weights.append(gate_P + lax.stop_gradient(gate_P) * (scale_P - 1))
        free_PE = free_PE & (id_E != expert_P[:, None])
    return jnp.stack(experts, axis=-1), jnp.stack(weights, axis=-1)


def _highest_tokens(spec: RouterSpec, value_PE: jax.Array, real_P: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    num_tokens, num_experts = value_PE.shape
    tokens: int | jax.Array = num_tokens
    if real_P is not None:
        value_PE, tokens = jnp.where(real_P[:, None], value_PE, -jnp.inf), jnp.sum(real_P)
    most = -(-tokens * spec.top_k // num_experts)
    order_PE = jnp.argsort(-value_PE, axis=0, stable=True)
    taken_PE = jnp.argsort(order_PE, axis=0) < most
    last_1E = lax.dynamic_slice_in_dim(order_PE, most - 1, 1)
    return taken_PE, jnp.take_along_axis(value_PE, last_1E, axis=0)[0]
