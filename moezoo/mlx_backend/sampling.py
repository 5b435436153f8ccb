"""Sampling the next token on the device. Spec: moezoo.core.reference.sampling, in float32 instead of float64."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from moezoo.core.random import key as key_of
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.mlx_backend.random import fold_in, uniform

REFUSED = -1
"""Returned in place of a token where `moezoo.core.reference.sampling.checked_logits` raises."""


class Rule(NamedTuple):
    """SamplingOptions as arrays, so that options with the same filters on share one compiled program; None is off.

    A `temperature` of None is greedy.
    """

    key: mx.array
    temperature: mx.array | None
    top_k: mx.array | None
    top_p: mx.array | None
    min_p: mx.array | None
    penalty: mx.array | None


def rule_of(options: SamplingOptions) -> Rule:
    """Return the rule for these options."""

    def number(value: float | None, off: float | None = None) -> mx.array | None:
        return None if value is None or value == off else mx.array(float(value), mx.float32)

    key, penalty = mx.array(key_of(options.seed)), number(options.repetition_penalty, 1)
    if options.temperature == 0:
        return Rule(key, None, None, None, None, penalty)
    # Trap: a temperature below the smallest float32 would divide by zero; at the smallest, only the best token is left.
    temperature = number(max(options.temperature, float(np.finfo(np.float32).tiny)))
    # A top_k beyond the vocabulary keeps all of it; it must fit an int32.
    top_k = None if options.top_k is None else mx.array(int(min(options.top_k, 2**31 - 1)), mx.int32)
    return Rule(key, temperature, top_k, number(options.top_p, 1), number(options.min_p), penalty)


def sample(logits_BV: mx.array, rule: Rule, draw_B: mx.array | None) -> mx.array:
    """Spec: moezoo.core.reference.sampling.sample, with these draws; REFUSED for a row that cannot be sampled.

    Differs: probabilities and their sums are float32, so the token may differ where u is within rounding of a boundary,
    about 1e-7 times the number of probable tokens: as rarely as different logits of two backends have that effect.
    """
    best_B = mx.max(logits_BV, axis=-1)
    usable_B = mx.abs(best_B) < mx.inf  # the maximum is NaN if one logit is, and -inf if all tokens are forbidden
    if rule.temperature is None:
        chosen_B = mx.argmax(logits_BV, axis=-1)
    else:
        assert draw_B is not None
        p_BV = probabilities(logits_BV, rule)
        cumulative_BV = mx.cumsum(p_BV, axis=-1)
        target_B1 = (draw_B * mx.max(cumulative_BV, axis=-1))[:, None]
        # Trap: a cumulative sum in parts may decrease by rounding; tokens with probability 0 must not be chosen there.
        chosen_B = mx.argmax((cumulative_BV > target_B1) & (p_BV > 0), axis=-1)
    return mx.where(usable_B, chosen_B.astype(mx.int32), REFUSED)


def probabilities(logits_BV: mx.array, rule: Rule) -> mx.array:
    """Spec: moezoo.core.reference.sampling.probabilities; temperature > 0; not renormalized."""
    assert rule.temperature is not None
    logits_BV = logits_BV - mx.max(logits_BV, axis=-1, keepdims=True)
    p_BV = mx.exp(logits_BV / rule.temperature)
    if rule.top_k is not None or rule.top_p is not None:
        ranked_BV = mx.sort(logits_BV, axis=-1)[:, ::-1]
        rank_V = mx.arange(logits_BV.shape[-1])
        keep_B1 = mx.full((logits_BV.shape[0], 1), logits_BV.shape[-1], mx.int32)
        keep_B1 = keep_B1 if rule.top_k is None else mx.minimum(keep_B1, rule.top_k)
        if rule.top_p is not None:
            q_BV = mx.where(rank_V < keep_B1, mx.exp(ranked_BV / rule.temperature), 0.0)
            sum_BV = mx.cumsum(q_BV, axis=-1)
            # The token that reaches top_p stays: tokens stay while the sum before them is below top_p.
            short_BV = sum_BV < rule.top_p * sum_BV[:, -1:]
            keep_B1 = mx.minimum(keep_B1, 1 + mx.sum(short_BV, axis=-1, keepdims=True))
        p_BV = mx.where(_first(logits_BV, ranked_BV, keep_B1), p_BV, 0.0)
    if rule.min_p is not None:
        p_BV = mx.where(p_BV < rule.min_p * mx.max(p_BV, axis=-1, keepdims=True), 0.0, p_BV)
    return p_BV


def penalized(logits_BV: mx.array, seen_BV: mx.array, penalty: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.sampling.penalized; `seen_BV` is True for tokens that are in the sequence."""
    return mx.where(seen_BV, mx.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def draws(key: mx.array, position: mx.array, row: mx.array) -> mx.array:
    """Return the uniform draws of `core.reference.sampling.sample`, one per position and sequence [n]: float32 [n]."""
    keys = fold_in(key, position, row)  # [2, n]: the words of keys broadcast with counters
    return uniform(keys, ())


def _first(logits_BV: mx.array, ranked_BV: mx.array, keep_B1: mx.array) -> mx.array:
    """Return the mask of the `keep` highest logits, ties to the lower id; `ranked_BV` are the logits, descending."""
    last_B1 = mx.take_along_axis(ranked_BV, keep_B1 - 1, axis=-1)
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    left_B1 = keep_B1 - mx.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (equal_BV & (mx.cumsum(equal_BV.astype(mx.int32), axis=-1) <= left_B1))
