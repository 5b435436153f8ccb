"""The choice of experts, from each token's selection values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.random import ROUTER_NOISE, ROUTER_SAMPLE, bernoulli, fold_in, gumbel, normal
from moezoo.core.reference import Array
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


class Choice(NamedTuple):
    """The chosen experts of each token: the part of `Routing` that a choice decides. Integers have no gradient.

    Fields:
        expert_PK: int, by descending selection value, ties to the lower id; of a hash in the order of its table. An
            unused slot has any expert's id. K is top_k, or E for expert choice.
        valid_PK: bool, False for an unused slot; these are last.
        weight_PK: combine weights, for a choice with its own (sparsemixer), else None.
        cutoff_E: the lowest value that each expert took (expert choice in training), else None. No gradient.
        margin_P: only in the reference: relative distance of a token's nearest decision from the opposite one, as a
            share of the value (of its exponential, if logits decide); inf where there is no other decision.
    """

    expert_PK: Array
    valid_PK: Array
    weight_PK: Array | None
    cutoff_E: Array | None
    margin_P: Array


@dataclass(frozen=True)
class RoutingContext:
    """Inputs of routing beside the tokens' activations. By default: training, without noise.

    Fields:
        token_P: int, the tokens' ids in the vocabulary; only `choice: hash` reads them.
        previous_PE: logits of the previous MoE layer; only a gating residual reads them.
        previous_PZ: state of the router's MLP of the previous MoE layer; only an MLP with a depth average reads it.
        forced_PK: int, experts to use in place of the router's own choice: UNUSED in an unused slot; NOT_REPLAYED in
            the slots of a token for which the router chooses freely. Weights and cutoffs are still the router's own.
            With it, two implementations can be compared where near ties would let them choose differently.
        key: uint32 [2], the key of the layer and step, for jitter, noise and sampling; None for none of them.
        inference: route as generation does: causal (expert choice by cutoffs), and no capacity drops a token.
        real_P: bool, False for padding, which is not routed: all its slots are unused. None: there is none.
        silenced_PE: bool, experts whose combine weight for this token becomes 0, after everything else: other weights,
            the choice and the load stay as they are.
        excluded_PE: bool, experts that cannot be chosen for this token: their selection value is minus infinity, while
            scores and logits stay as they are. At least K must remain. A hash and forced experts do not heed it.
    """

    token_P: Array | None = None
    previous_PE: Array | None = None
    previous_PZ: Array | None = None
    forced_PK: Array | None = None
    key: Array | None = None
    inference: bool = False
    real_P: Array | None = None
    silenced_PE: Array | None = None
    excluded_PE: Array | None = None


NO_CONTEXT = RoutingContext()


def given_routing(
    layers: Sequence[int], forced: Sequence[Array] | None, masks: Sequence[ExpertMasks] | None, length: int
) -> dict[int, RoutingContext]:
    """Return what a caller decides about routing, by index of the MoE layer; empty if that is nothing.

    Args:
        layers: indices of the MoE layers.
        forced: experts [P, K] of each of them, or None.
        masks: of each of them, experts [B, E] of whole sequences, or None.
        length: T, tokens of each sequence.
    """

    def of_tokens(mask_BE: Array | None) -> Array | None:
        return None if mask_BE is None else np.repeat(mask_BE, length, axis=0)

    if forced is None and masks is None:
        return {}
    experts: Sequence[Array | None] = [None] * len(layers) if forced is None else forced
    of_layers = zip(layers, experts, [NO_MASKS] * len(layers) if masks is None else masks, strict=True)
    return {
        layer: RoutingContext(
            forced_PK=forced_PK, silenced_PE=of_tokens(mask.silenced), excluded_PE=of_tokens(mask.excluded)
        )
        for layer, forced_PK, mask in of_layers
    }


def noisy(logits_PE: Array, noise_scale_PE: Array, key: Array) -> Array:
    """`logits + normal() * noise_scale`; `key` is that of the layer and step.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 4, where `noise_scale = softplus(x w_noise)`.
    """
    return logits_PE + normal(fold_in(key, ROUTER_NOISE), logits_PE.shape) * noise_scale_PE


def choose(
    spec: RouterSpec,
    logits_PE: Array,
    score_PE: Array,
    selection_PE: Array,
    context: RoutingContext = NO_CONTEXT,
    *,
    table_PK: Array | None = None,
    cutoff_E: Array | None = None,
) -> Choice:
    """Choose experts for tokens, or tokens for experts.

    | choice | experts of a token |
    |---|---|
    | `top_k`, `noisy_top_k` | the K of the highest selection value |
    | `grouped_top_k` | the same among the experts of the groups of the highest value; others are minus infinity or 0 |
    | `top_p` | the first n of the K highest, where n - 1 of them have scores that sum to less than p |
    | `hash` | those of the table |
    | `sparsemixer` | one or two draws from a softmax over the logits near the best; see `_sparsemixer` |
    | `expert_choice` | those with the token among their C highest; at inference those whose cutoff its value reaches |

    Args:
        spec: the router.
        logits_PE, score_PE: after temperature, softcap and noise; and their scores.
        selection_PE: values to compare: `spec.selection_basis` of the two, plus the selection bias; minus infinity for
            an excluded expert.
        context: forced and excluded experts, key, padding, and whether to choose as in generation.
        table_PK: int; rows of the hash table for these tokens.
        cutoff_E: for expert choice at inference: the least value with which each expert takes a token.

    Source: each spec's docstring (moezoo/core/spec/routing.py) names its own.
    """
    selection_PE, tokens = getval(selection_PE), selection_PE.shape[0]
    margin_P, weight_PK, cutoffs_E = np.full(tokens, np.inf), None, None
    match spec.choice:
        case TopKChoiceSpec() | NoisyTopKChoiceSpec():
            expert_PK, valid_PK = _highest(selection_PE, spec.top_k)
            margin_P = _boundary(spec, selection_PE, np.full(tokens, spec.top_k))
        case GroupedTopKChoiceSpec() as groups:
            kept_PE, margin_P = _in_kept_groups(spec, groups, selection_PE)
            expert_PK, valid_PK = _highest(kept_PE, spec.top_k)
            margin_P = np.minimum(margin_P, _boundary(spec, kept_PE, np.full(tokens, spec.top_k)))
        case TopPChoiceSpec() as nucleus:
            expert_PK, valid_PK, margin_P = _in_nucleus(spec, nucleus, getval(score_PE), selection_PE)
        case HashChoiceSpec():
            expert_PK, valid_PK = table_PK, np.ones((tokens, spec.top_k), bool)
        case SparseMixerChoiceSpec() as mixer:
            key = None if context.inference else context.key
            expert_PK, weight_PK, margin_P = _sparsemixer(mixer, spec.top_k, logits_PE, context, key)
            valid_PK = np.ones(expert_PK.shape, bool)
        case ExpertChoiceSpec():
            if context.inference:
                taken_PE, margin_P = _above_cutoff(spec, selection_PE, cutoff_E)
            else:
                taken_PE, cutoffs_E, margin_P = _highest_tokens(spec, selection_PE, context.real_P)
            expert_PK, valid_PK = _highest(np.where(taken_PE, selection_PE, -np.inf), selection_PE.shape[1])
    if context.forced_PK is not None:
        expert_PK, valid_PK = _replayed(context.forced_PK, context.real_P, expert_PK, valid_PK)
        weight_PK = None if weight_PK is None else np.where(valid_PK, weight_PK, 0.0)
    return Choice(expert_PK, valid_PK, weight_PK, cutoffs_E, margin_P)


def runner_up(spec: RouterSpec, selection_PE: Array, expert_PK: Array, valid_PK: Array) -> Array:
    """Return the expert of the highest selection value among those not chosen, ties to the lower id: int [P].

    -1 where there is none: all of the kept groups are chosen, or a table decides. `expert_PK`, `valid_PK`: the choice.
    """
    if isinstance(spec.choice, HashChoiceSpec):
        return np.full(len(selection_PE), -1)
    if isinstance(spec.choice, GroupedTopKChoiceSpec):
        selection_PE, _ = _in_kept_groups(spec, spec.choice, selection_PE)
    chosen_PKE = (expert_PK[..., None] == np.arange(selection_PE.shape[1])) & valid_PK[..., None]
    left_PE = np.where(np.any(chosen_PKE, axis=1), -np.inf, selection_PE)
    return np.where(np.max(left_PE, axis=-1) == -np.inf, -1, np.argmax(left_PE, axis=-1))


def _replayed(forced_PK: Array, real_P: Array | None, expert_PK: Array, valid_PK: Array) -> tuple[Array, Array]:
    """Return the experts and valid slots of forced tokens, and the router's own of those that are not replayed."""
    free_P1, used_PK = forced_PK[:, :1] == NOT_REPLAYED, forced_PK >= 0
    if real_P is not None:
        used_PK = used_PK | ~real_P[:, None]  # weights of no expert could be 0 / 0
    return np.where(free_P1, expert_PK, np.maximum(forced_PK, 0)), np.where(free_P1, valid_PK, used_PK)


# --- the kinds -------------------------------------------------------------------------------------------------------


def _highest(value_PE: Array, count: int) -> tuple[Array, Array]:
    """Return the experts of the `count` highest values, descending, and which of these values are finite.

    Trap: a stable sort of the negated values is the tie rule; argpartition has none.
    """
    expert_PK = np.argsort(-value_PE, axis=-1, kind="stable")[:, :count]
    return expert_PK, np.take_along_axis(value_PE, expert_PK, axis=-1) > -np.inf


def _in_kept_groups(spec: RouterSpec, groups: GroupedTopKChoiceSpec, value_PE: Array) -> tuple[Array, Array]:
    """Return the values, those outside the `keep` best groups (ties to the lower) replaced, and the groups' margin.

    Outside they are minus infinity, or with `others: zero` 0, unless the expert is excluded.
    The value of a group is its highest, or the sum of its two highest: of a group with one expert left, that one's.
    """
    tokens, num_experts = value_PE.shape
    ascending = np.sort(value_PE.reshape(tokens, groups.num_groups, -1), axis=-1)
    of_group = ascending[..., -1]
    if groups.group_value == "top2":
        second = ascending[..., -2]
        of_group = of_group + np.where(second > -np.inf, second, 0.0)
    best, _ = _highest(of_group, groups.keep)
    group_E = np.arange(num_experts) // (num_experts // groups.num_groups)
    kept_PE = np.any(group_E[None, :, None] == best[:, None, :], axis=-1)
    other_PE = np.where((value_PE > -np.inf) & (groups.others == "zero"), 0.0, -np.inf)
    return np.where(kept_PE, value_PE, other_PE), _boundary(spec, of_group, np.full(tokens, groups.keep))


def _in_nucleus(
    spec: RouterSpec, nucleus: TopPChoiceSpec, score_PE: Array, value_PE: Array
) -> tuple[Array, Array, Array]:
    """Return the K highest experts, which of them have scores before them that sum to less than p, and the margin."""
    expert_PK, _ = _highest(value_PE, spec.top_k)
    chosen_PK = np.take_along_axis(score_PE, expert_PK, axis=-1)
    before_PK = np.cumsum(chosen_PK, axis=-1) - chosen_PK
    valid_PK = before_PK < nucleus.p
    nearest_P = np.min(np.abs(before_PK[:, 1:] - nucleus.p), axis=-1, initial=np.inf) / nucleus.p
    return expert_PK, valid_PK, np.minimum(nearest_P, _boundary(spec, value_PE, np.sum(valid_PK, axis=-1)))


def _sparsemixer(
    mixer: SparseMixerChoiceSpec, count: int, logits_PE: Array, context: RoutingContext, key: Array | None
) -> tuple[Array, Array, Array]:
    """Choose `count` experts one after the other: ids, weights and margin. For each, among experts not yet chosen:

        best  = the highest logit;      near = experts with  best - logit <= 2 jitter max(|logit|, best)
        gate  = softmax(logits of the near ones)
        drawn = with a key: the highest of logit + gumbel() among the near ones; without: the best
        scale = 1 if drawn is the best, or with probability 1/4; else 1/3
        weight = scale * gate[drawn],  with the gradient of  gate[drawn]

    So the loss's gradient for an expert that is not the best is taken at a third of its weight three times out of
    four, and at all of it once: Heun's third-order rule, `f(w) - f(0) = w (f'(w) / 4 + 3 f'(w / 3) / 4)`.

    Differs from the released code: a third is 1/3 and not 0.3333.
    """
    logits, tokens = getval(logits_PE), logits_PE.shape[0]
    free_PE = np.ones(logits.shape, bool) if context.excluded_PE is None else ~context.excluded_PE
    experts, weights, margin_P = [], [], np.full(tokens, np.inf)
    for slot in range(count):
        left_PE = np.where(free_PE, logits, -np.inf)
        best_P = np.argmax(left_PE, axis=-1)  # the lowest of equals
        best_P1 = np.max(left_PE, axis=-1, keepdims=True)
        reach_PE = 2 * mixer.jitter * np.maximum(np.abs(logits), best_P1)
        near_PE = free_PE & (best_P1 - logits <= reach_PE)
        gate_PE = _softmax(np.where(near_PE, logits_PE, -np.inf))
        noise_PE, kept_P = np.zeros(logits.shape), np.ones(tokens, bool)
        if key is not None:
            noise_PE = gumbel(fold_in(key, ROUTER_SAMPLE, 2 * slot), logits.shape)
            kept_P = bernoulli(fold_in(key, ROUTER_SAMPLE, 2 * slot + 1), 0.25, (tokens,))
        drawn_PE = np.where(near_PE, logits + noise_PE, -np.inf)
        expert_P = np.argmax(drawn_PE, axis=-1)
        if context.forced_PK is not None:
            forced_P = context.forced_PK[:, slot]
            expert_P = np.where(forced_P == NOT_REPLAYED, expert_P, np.maximum(forced_P, 0))
        gate_P = gate_PE[np.arange(tokens), expert_P]
        scale_P = np.where((expert_P == best_P) | kept_P, 1.0, 1 / 3)
        experts.append(expert_P)
        weights.append(gate_P + getval(gate_P) * (scale_P - 1))
        others_PE = free_PE & (np.arange(logits.shape[1]) != best_P[:, None])
        from_edge_PE = np.where(others_PE, np.abs(best_P1 - logits - reach_PE), np.inf)
        for distance_P in (_distance(left_PE), _distance(drawn_PE), np.min(from_edge_PE, axis=-1)):
            margin_P = np.minimum(margin_P, np.where(np.isinf(distance_P), np.inf, 1 - np.exp(-distance_P)))
        free_PE = free_PE & (np.arange(logits.shape[1]) != expert_P[:, None])
    return np.stack(experts, axis=-1), np.stack(weights, axis=-1), margin_P


def _highest_tokens(spec: RouterSpec, value_PE: Array, real_P: Array | None) -> tuple[Array, Array, Array]:
    """Return the tokens that each expert takes, [P, E]: its `C = ceil(P * top_k / E)` highest, ties to the earlier one.

    Padding is neither taken nor counted as one of the P tokens.

    And the lowest value that it takes, and each token's margin: the distance of its nearest expert from its cutoff.
    """
    if real_P is not None and not np.all(real_P):
        taken_PE, margin_P = np.zeros(value_PE.shape, bool), np.full(len(value_PE), np.inf)
        taken_PE[real_P], last_E, margin_P[real_P] = _highest_tokens(spec, value_PE[real_P], None)
        return taken_PE, last_E, margin_P
    tokens, num_experts = value_PE.shape
    most = -(-tokens * spec.top_k // num_experts)
    order_PE = np.argsort(-value_PE, axis=0, kind="stable")
    taken_PE = np.argsort(order_PE, axis=0) < most
    falling_PE = np.take_along_axis(value_PE, order_PE, axis=0)
    last_E, next_E = falling_PE[most - 1], falling_PE[most] if most < tokens else np.full(num_experts, -np.inf)
    share_PE = _share(spec, np.where(taken_PE, value_PE, last_E), np.where(taken_PE, next_E, value_PE))
    return taken_PE, last_E, np.min(share_PE, axis=-1)


def _above_cutoff(spec: RouterSpec, value_PE: Array, cutoff_E: Array) -> tuple[Array, Array]:
    """Return the experts whose cutoff a token's value reaches, [P, E], and the margin of each token."""
    margin_PE = _share(spec, np.maximum(value_PE, cutoff_E), np.minimum(value_PE, cutoff_E))
    return value_PE >= cutoff_E, np.min(margin_PE, axis=-1)


def _softmax(logits_PE: Array) -> Array:
    unnormalized = np.exp(logits_PE - np.max(getval(logits_PE), axis=-1, keepdims=True))
    return unnormalized / np.sum(unnormalized, axis=-1, keepdims=True)


# --- margins ---------------------------------------------------------------------------------------------------------


def _share(spec: RouterSpec, kept: Array, rest: Array) -> Array:
    """Return the gap between two values as a share of the higher: `(kept - rest) / |kept|`.

    Of their exponentials if logits decide: `1 - exp(rest - kept)`. inf where there is no other (minus infinity).
    """
    alone = np.isinf(rest)
    kept, rest = np.where(alone, 0.0, kept), np.where(alone, 0.0, rest)  # minus infinity less itself is not a number
    if spec.selection_basis == "logits":
        return np.where(alone, np.inf, 1 - np.exp(rest - kept))
    return np.where(alone, np.inf, (kept - rest) / np.maximum(np.abs(kept), np.finfo(np.float32).tiny))


def _boundary(spec: RouterSpec, value_PE: Array, count_P: Array) -> Array:
    """Return the share by which the last of the `count` highest values exceeds the next."""
    falling_PE = np.concatenate([-np.sort(-value_PE, axis=-1), np.full((len(value_PE), 1), -np.inf)], axis=-1)
    token_P = np.arange(len(value_PE))
    return _share(spec, falling_PE[token_P, count_P - 1], falling_PE[token_P, count_P])


def _distance(value_PE: Array) -> Array:
    """Return the distance from the highest value to the next; inf where there is no other."""
    if value_PE.shape[1] == 1:
        return np.full(len(value_PE), np.inf)
    falling_PE = -np.sort(-value_PE, axis=-1)
    return falling_PE[:, 0] - falling_PE[:, 1]
