"""Dispatch sorts routed copies of tokens by expert; combine adds the experts' answers up again."""

import math
from fractions import Fraction
from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, MoESpec, TopPChoiceSpec


class Dispatch(NamedTuple):
    """R rows for the E experts with feed-forwards: served copies, sorted by expert, then by token; then unused rows.

    R does not depend on the routing (`num_rows`). Only the first `sum(size_E)` rows need to be computed.

    Fields:
        token_R: int, which token a row is a copy of; always a real token.
        expert_R: int, ascending, below E.
        weight_R: combine weight; an unused row has weight 0.
        size_E: int, rows of each expert.
        kept_PK: bool, slots of the routing that are served, by experts that compute nothing too.
    """

    token_R: Array
    expert_R: Array
    weight_R: Array
    size_E: Array
    kept_PK: Array


def num_groups(spec: MoESpec, num_sequences: int) -> int:
    """In how many groups of tokens, each with capacities of its own, so many sequences of equal length fall.

    Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 2.2. Differs: there a group is what a device has.
    """
    by_sequence = isinstance(spec.dispatch, CapacitySpec) and spec.dispatch.group == "sequence"
    return num_sequences if by_sequence else 1


def capacities(spec: MoESpec, num_tokens: int, *, inference: bool = False) -> list[int]:
    """How many of a group's P tokens each expert serves at most: one number for each of the router's E + Z choices.

    - `capacity`: `ceil(factor * K * P / E)`. With Z experts that compute nothing, each of which may take 1 token where
      one with a feed-forward may take tau (`ffn_share`): `ceil(u)` for the former and `ceil(tau * u)` for the latter,
      `u = factor * K * P / (tau * E + Z)`, so that they add up to `factor * K * P` but for the rounding.
    - expert choice in training: `ceil(K * P / E)`, which is what each expert takes; K is the mean over tokens.
    - P otherwise, and at inference.

    Source: Fedus et al. 2021, arXiv 2101.03961, section 2.2; Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 8.
    Differs: eq. 8 has T in place of K * P, so that with K = 2 and its gamma of 1.1 nearly half of the copies would
    be dropped.
    """
    num_zero = spec.num_choices - spec.num_experts
    copies = num_tokens * spec.router.top_k
    most_ffn = most_zero = num_tokens
    if not inference and isinstance(spec.router.choice, ExpertChoiceSpec):
        most_ffn = math.ceil(Fraction(copies, spec.num_experts))
    elif not inference and isinstance(spec.dispatch, CapacitySpec):
        # 1.1 is eleven tenths, so that 1.1 * 100 / 5 is 22 and not a little more.
        factor = Fraction(str(spec.dispatch.factor))
        share = Fraction(1) if spec.zero_computation is None else Fraction(str(spec.zero_computation.ffn_share))
        unit = factor * copies / (share * spec.num_experts + num_zero)
        most_ffn, most_zero = math.ceil(share * unit), math.ceil(unit)
    return [min(most_ffn, num_tokens)] * spec.num_experts + [min(most_zero, num_tokens)] * num_zero


def num_rows(spec: MoESpec, num_tokens: int, *, num_sequences: int = 1, inference: bool = False) -> int:
    """R: as many rows as P tokens can fill, by the slots that they have and by what the experts serve."""
    slots = spec.num_experts if isinstance(spec.router.choice, ExpertChoiceSpec) else spec.router.top_k
    groups = num_groups(spec, num_sequences)
    served = groups * sum(capacities(spec, num_tokens // groups, inference=inference)[: spec.num_experts])
    return min(num_tokens * slots, served)


def mostly_unused(spec: MoESpec, *, inference: bool = False) -> bool:
    """Whether many of the R rows may be unused: where slots are, or go to experts that compute nothing, uncapped."""
    limited = not inference and isinstance(spec.dispatch, CapacitySpec)
    variable = isinstance(spec.router.choice, TopPChoiceSpec) or (
        isinstance(spec.router.choice, ExpertChoiceSpec) and inference
    )
    return not limited and (variable or spec.zero_computation is not None)


def num_dropped(routing: Routing, dispatched: Dispatch) -> Array:
    """How many routed copies the capacities drop."""
    return np.sum(routing.valid_PK & ~dispatched.kept_PK)


def kept_slots(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Array:
    """Who is served: bool [P, K]. Of each group an expert serves its first tokens, as many as `capacities` allows.

    First are the earliest tokens, or with `priority: score` those of the highest weight, ties to the earlier token.

    Args:
        spec: the mixture.
        routing: of P tokens, numbered sequence by sequence.
        num_sequences: how many there are, all of one length.
        inference: then all are served.

    Source: Riquelme et al. 2021 (V-MoE), arXiv 2106.05974, section 3.4 (batch prioritized routing).
    Differs: there tokens are ordered by their highest weight, and all first choices come before any second one. Here
    each expert orders its own tokens by the weight that they give to it.
    """
    groups = num_groups(spec, num_sequences)
    group_size = routing.expert_PK.shape[0] // groups
    most = capacities(spec, group_size, inference=inference)
    order = np.arange(routing.expert_PK.size)
    if isinstance(spec.dispatch, CapacitySpec) and spec.dispatch.priority == "score":
        order = np.argsort(-getval(routing.weight_PK).reshape(-1), kind="stable")
    kept_PK, served = np.zeros(routing.expert_PK.shape, bool), np.zeros((groups, len(most)), int)
    for token, choice in zip(*np.unravel_index(order, kept_PK.shape), strict=True):
        queue = token // group_size, routing.expert_PK[token, choice]
        if routing.valid_PK[token, choice] and served[queue] < most[queue[1]]:
            kept_PK[token, choice] = True
            served[queue] += 1
    return kept_PK


def dispatch(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Dispatch:
    """Sort the copies that are served by expert; those of experts that compute nothing get no row.

    Args: as `kept_slots`.

    Source: Gale et al. 2022, arXiv 2211.15841 (sorted, dropless); Fedus et al. 2021, arXiv 2101.03961 (capacity).
    """
    num_tokens = routing.expert_PK.shape[0]
    kept_PK = kept_slots(spec, routing, num_sequences=num_sequences, inference=inference)
    token_R, choice_R = np.nonzero(kept_PK & (routing.expert_PK < spec.num_experts))
    order_R = np.argsort(routing.expert_PK[token_R, choice_R], kind="stable")
    token_R, choice_R = token_R[order_R], choice_R[order_R]
    expert_R, weight_R = routing.expert_PK[token_R, choice_R], routing.weight_PK[token_R, choice_R]
    size_E = np.array([np.sum(expert_R == expert) for expert in range(spec.num_experts)])
    unused = num_rows(spec, num_tokens, num_sequences=num_sequences, inference=inference) - len(expert_R)
    return Dispatch(
        np.concatenate([token_R, np.zeros(unused, int)]),
        np.concatenate([expert_R, np.full(unused, spec.num_experts - 1)]),
        np.concatenate([weight_R, np.zeros(unused)]),
        size_E,
        kept_PK,
    )


def used_rows(dispatched: Dispatch) -> Array:
    """1 for a row that is a served copy, 0 for an unused one: [R]."""
    return (np.arange(len(dispatched.token_R)) < np.sum(dispatched.size_E)).astype(float)


def combine(dispatched: Dispatch, y_RD: Array, num_tokens: int) -> Array:
    """`out[p] = sum over used rows r of token p of weight_R[r] * y_RD[r]`, in float32: [P, D]."""
    used = np.sum(dispatched.size_E)
    belongs_PR = (np.arange(num_tokens)[:, None] == dispatched.token_R[None, :used]).astype(float)
    return np.einsum("PR,R,RD->PD", belongs_PR, dispatched.weight_R[:used], y_RD[:used])
