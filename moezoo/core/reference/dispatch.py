"""Dispatch sorts token-expert assignments by expert; combine sums the expert outputs of each token."""

from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.parameters.capacity import capacities, num_groups, num_rows
from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, MoESpec


class Dispatch(NamedTuple):
    """Dispatched tokens, R rows for the E feed-forward experts: sorted by expert, then by token; unused rows are last.

    R does not depend on the routing (`num_rows`). Only the first `sum(size_E)` rows need to be computed.

    Fields:
        token_R: int, the token of each row; a valid token in unused rows too.
        expert_R: int, ascending, below E.
        weight_R: combine weight; 0 for an unused row.
        size_E: int, rows of each expert.
        kept_PK: bool, slots of the routing that are not dropped, including those of zero-computation experts.
    """

    token_R: Array
    expert_R: Array
    weight_R: Array
    size_E: Array
    kept_PK: Array


def num_dropped(routing: Routing, dispatched: Dispatch) -> Array:
    """Return the number of token-expert assignments dropped by the capacities."""
    return np.sum(routing.valid_PK & ~dispatched.kept_PK)


def kept_slots(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Array:
    """Return the assignments that are not dropped: bool [P, K]. An expert keeps the first of its tokens in each group.

    It keeps as many as `capacities` allows. First are the earliest tokens, or with `priority: score` those with the
    highest weight, ties to the earlier token.

    Args:
        spec: the MoE layer.
        routing: the routing of P tokens, sequence by sequence.
        num_sequences: number of sequences, all of the same length.
        inference: nothing is dropped in inference.

    Source: Riquelme et al. 2021 (V-MoE), arXiv 2106.05974, section 3.4 (batch prioritized routing).
    Differs: in the paper, tokens are ordered by their highest weight, and all first choices precede any second choice.
    Here each expert orders its own tokens by their weight for it.
    """
    groups = num_groups(spec, num_sequences)
    group_size = routing.expert_PK.shape[0] // groups
    limits = capacities(spec, group_size, inference=inference)
    order = np.arange(routing.expert_PK.size)
    if isinstance(spec.dispatch, CapacitySpec) and spec.dispatch.priority == "score":
        order = np.argsort(-getval(routing.weight_PK).reshape(-1), kind="stable")
    kept_PK, served = np.zeros(routing.expert_PK.shape, bool), np.zeros((groups, len(limits)), int)
    for token, choice in zip(*np.unravel_index(order, kept_PK.shape), strict=True):
        queue = token // group_size, routing.expert_PK[token, choice]
        if routing.valid_PK[token, choice] and served[queue] < limits[queue[1]]:
            kept_PK[token, choice] = True
            served[queue] += 1
    return kept_PK


def dispatch(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Dispatch:
    """Sort the kept token-expert assignments by expert; those of zero-computation experts get no row.

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
    """Return 1 for each used row and 0 for each unused row: [R]."""
    return (np.arange(len(dispatched.token_R)) < np.sum(dispatched.size_E)).astype(float)


def combine(dispatched: Dispatch, y_RD: Array, num_tokens: int) -> Array:
    """Combine: `out[p] = sum over used rows r of token p of weight_R[r] * y_RD[r]`, in float32: [P, D]."""
    used = np.sum(dispatched.size_E)
    belongs_PR = (np.arange(num_tokens)[:, None] == dispatched.token_R[None, :used]).astype(float)
    return np.einsum("PR,R,RD->PD", belongs_PR, dispatched.weight_R[:used], y_RD[:used])
