"""Dispatch sorts routed copies of tokens by expert; combine adds the experts' answers up again."""

import math
from fractions import Fraction
from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec


class Dispatch(NamedTuple):
    """R = P * K routed copies, sorted by expert, and within an expert by token.

    Fields:
        token_R: int, which token a row is a copy of; always a real token.
        expert_R: int, ascending.
        weight_R: combine weight; a dropped row has weight 0.
        size_E: int, rows of each expert; rows beyond their sum are unused.
        kept_PK: bool, slots of the routing that are served.
    """

    token_R: Array
    expert_R: Array
    weight_R: Array
    size_E: Array
    kept_PK: Array


def capacity(spec: CapacitySpec, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(factor * P * K / E), the rows that an expert serves."""
    factor = Fraction(str(spec.factor))  # 1.1 is eleven tenths, so that 1.1 * 100 / 5 is 22 and not a little more
    return math.ceil(factor * num_tokens * top_k / num_experts)


def num_dropped(routing: Routing, dispatched: Dispatch) -> Array:
    """How many routed copies the capacity drops."""
    return np.sum(routing.valid_PK & ~dispatched.kept_PK)


def dispatch(spec: MoESpec, routing: Routing, *, inference: bool = False) -> Dispatch:
    """Sort the routed copies by expert; with a capacity, give rows beyond an expert's first C the weight 0.

    Source: Gale et al. 2022, arXiv 2211.15841 (sorted, dropless); Fedus et al. 2021, arXiv 2101.03961 (capacity).
    Differs: a row beyond the capacity is kept and weighted 0, instead of left out; the result is the same.
    """
    num_tokens, top_k = routing.expert_PK.shape
    num_experts = spec.num_experts
    flat_R = routing.expert_PK.reshape(-1)
    order_R = np.argsort(flat_R, kind="stable")
    expert_R, token_R, weight_R = flat_R[order_R], order_R // top_k, routing.weight_PK.reshape(-1)[order_R]
    size_E = np.array([np.sum(flat_R == expert) for expert in range(num_experts)])
    kept_R = np.ones(len(flat_R), bool)
    match DroplessSpec() if inference else spec.dispatch:
        case DroplessSpec():
            pass
        case CapacitySpec() as limited:
            start_E = np.cumsum(size_E) - size_E
            place_R = np.arange(len(expert_R)) - start_E[expert_R]
            kept_R = place_R < capacity(limited, num_tokens, top_k, num_experts)
            weight_R = np.where(kept_R, weight_R, 0.0)
    kept_PK = kept_R[np.argsort(order_R)].reshape(num_tokens, top_k)
    return Dispatch(token_R, expert_R, weight_R, size_E, kept_PK)


def combine(dispatched: Dispatch, y_RD: Array, num_tokens: int) -> Array:
    """`out[p] = sum over rows r of token p of weight_R[r] * y_RD[r]`, in float32: [P, D]."""
    belongs_PR = (np.arange(num_tokens)[:, None] == dispatched.token_R[None, :]).astype(float)
    return np.einsum("PR,R,RD->PD", belongs_PR, dispatched.weight_R, y_RD)
