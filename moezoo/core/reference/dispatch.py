"""Dispatch sorts routed copies of tokens by expert; combine adds the experts' answers up again."""

from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.parameters.capacity import capacities, num_groups, num_rows
from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, MoESpec


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
