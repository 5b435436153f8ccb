"""Dispatch sorts routed copies of tokens by expert; combine adds the experts' answers up again."""

import math
from fractions import Fraction
from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, DispatchSpec, DroplessSpec


class Dispatch(NamedTuple):
    """R = P * K routed copies, sorted by expert, and within an expert by token.

    Fields:
        token_R: int, which token a row is a copy of; always a real token.
        expert_R: int, ascending.
        weight_R: combine weight; a dropped row has weight 0.
        size_E: int, rows of each expert; sums to R.
    """

    token_R: Array
    expert_R: Array
    weight_R: Array
    size_E: Array


def capacity(spec: CapacitySpec, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(factor * P * K / E), the rows that an expert serves."""
    factor = Fraction(str(spec.factor))  # 1.1 is eleven tenths, so that 1.1 * 100 / 5 is 22 and not a little more
    return math.ceil(factor * num_tokens * top_k / num_experts)


def num_dropped(spec: DispatchSpec, dispatched: Dispatch, num_tokens: int) -> Array:
    """How many routed copies the capacity drops: the sum over experts of `max(size_E - C, 0)`."""
    match spec:
        case DroplessSpec():
            return 0
        case CapacitySpec():
            top_k = len(dispatched.token_R) // num_tokens
            most = capacity(spec, num_tokens, top_k, len(dispatched.size_E))
            return np.sum(np.maximum(dispatched.size_E - most, 0))


def dispatch(spec: DispatchSpec, routing: Routing, num_experts: int) -> Dispatch:
    """Sort the routed copies by expert; with a capacity, give rows beyond an expert's first C the weight 0.

    Source: Gale et al. 2022, arXiv 2211.15841 (sorted, dropless); Fedus et al. 2021, arXiv 2101.03961 (capacity).
    Differs: a row beyond the capacity is kept and weighted 0, instead of left out; the result is the same.
    """
    num_tokens, top_k = routing.expert_PK.shape
    flat_R = routing.expert_PK.reshape(-1)
    order_R = np.argsort(flat_R, kind="stable")
    expert_R, token_R, weight_R = flat_R[order_R], order_R // top_k, routing.weight_PK.reshape(-1)[order_R]
    size_E = np.array([np.sum(flat_R == expert) for expert in range(num_experts)])
    match spec:
        case DroplessSpec():
            pass
        case CapacitySpec():
            start_E = np.cumsum(size_E) - size_E
            place_R = np.arange(len(expert_R)) - start_E[expert_R]
            weight_R = np.where(place_R < capacity(spec, num_tokens, top_k, num_experts), weight_R, 0.0)
    return Dispatch(token_R, expert_R, weight_R, size_E)


def combine(dispatched: Dispatch, y_RD: Array, num_tokens: int) -> Array:
    """`out[p] = sum over rows r of token p of weight_R[r] * y_RD[r]`, in float32: [P, D]."""
    belongs_PR = (np.arange(num_tokens)[:, None] == dispatched.token_R[None, :]).astype(float)
    return np.einsum("PR,R,RD->PD", belongs_PR, dispatched.weight_R, y_RD)
