"""Choosing the next token on the device. Spec: moezoo.core.sampling, in float32 where that has float64."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from moezoo.core.random import key as key_of
from moezoo.core.sampling import SamplingOptions
from moezoo.mlx_backend.random import fold_in, uniform

REFUSED = -1
"""In place of a token, where `moezoo.core.sampling.checked_logits` raises."""


class Rule(NamedTuple):
    """SamplingOptions as values, so that one compiled program serves all that have the same of them on; None is off.

    A `temperature` of None is greedy.
    """

    key: mx.array
    temperature: mx.array | None
    top_k: mx.array | None
    top_p: mx.array | None
    min_p: mx.array | None
    penalty: mx.array | None


def rule_of(options: SamplingOptions) -> Rule:
    """The rule that these options say."""

    def number(value: float | None, off: float | None = None) -> mx.array | None:
        return None if value is None or value == off else mx.array(float(value), mx.float32)

    key, penalty = mx.array(key_of(options.seed)), number(options.repetition_penalty, 1)
    if options.temperature == 0:
        return Rule(key, None, None, None, None, penalty)
    # Trap: a temperature below float32's smallest would divide by zero; at that one all but the best have underflowed.
    temperature = number(max(options.temperature, float(np.finfo(np.float32).tiny)))
    # More than any vocabulary is all of it, and must fit a word.
    top_k = None if options.top_k is None else mx.array(int(min(options.top_k, 2**31 - 1)), mx.int32)
    return Rule(key, temperature, top_k, number(options.top_p, 1), number(options.min_p), penalty)


def sample(logits_BV: mx.array, rule: Rule, draw_B: mx.array | None) -> mx.array:
    """Spec: moezoo.core.sampling.sample, by these draws; REFUSED in a row of logits from which nothing can be drawn.

    Differs: probabilities and their sums are float32, and a token may be another where u falls within the rounding of a
    border, some 1e-7 times the tokens that matter: as rarely as logits of two backends differ enough to do the same.
    """
    best_B = mx.max(logits_BV, axis=-1)
    usable_B = mx.abs(best_B) < mx.inf  # the best of numbers with a NaN is NaN, and of forbidden ones -inf
    if rule.temperature is None:
        chosen_B = mx.argmax(logits_BV, axis=-1)
    else:
        assert draw_B is not None
        p_BV = probabilities(logits_BV, rule)
        cumulative_BV = mx.cumsum(p_BV, axis=-1)
        target_B1 = (draw_B * mx.max(cumulative_BV, axis=-1))[:, None]
        # Trap: a sum in parts may fall by a rounding, and what has no probability must not be where it rises again.
        chosen_B = mx.argmax((cumulative_BV > target_B1) & (p_BV > 0), axis=-1)
    return mx.where(usable_B, chosen_B.astype(mx.int32), REFUSED)


def probabilities(logits_BV: mx.array, rule: Rule) -> mx.array:
    """Spec: moezoo.core.sampling.probabilities; of a temperature, and not renormalized, which `sample` needs not."""
    assert rule.temperature is not None
    logits_BV = logits_BV - mx.max(logits_BV, axis=-1, keepdims=True)
    p_BV = mx.exp(logits_BV / rule.temperature)
    if rule.top_k is not None or rule.top_p is not None:
        ranked_BV = mx.sort(logits_BV, axis=-1)[:, ::-1]
        rank_V = mx.arange(logits_BV.shape[-1])
        most_B1 = mx.full((logits_BV.shape[0], 1), logits_BV.shape[-1], mx.int32)
        most_B1 = most_B1 if rule.top_k is None else mx.minimum(most_B1, rule.top_k)
        if rule.top_p is not None:
            q_BV = mx.where(rank_V < most_B1, mx.exp(ranked_BV / rule.temperature), 0.0)
            sum_BV = mx.cumsum(q_BV, axis=-1)
            # The token that reaches top_p stays: those stay before which the sum has not reached it.
            short_BV = sum_BV < rule.top_p * sum_BV[:, -1:]
            most_B1 = mx.minimum(most_B1, 1 + mx.sum(short_BV, axis=-1, keepdims=True))
        p_BV = mx.where(_first(logits_BV, ranked_BV, most_B1), p_BV, 0.0)
    if rule.min_p is not None:
        p_BV = mx.where(p_BV < rule.min_p * mx.max(p_BV, axis=-1, keepdims=True), 0.0, p_BV)
    return p_BV


def penalized(logits_BV: mx.array, seen_BV: mx.array, penalty: mx.array) -> mx.array:
    """Spec: moezoo.core.sampling.penalized; `seen_BV` is True for tokens that the sequence has."""
    return mx.where(seen_BV, mx.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def draws(key: mx.array, position: mx.array, row: mx.array) -> mx.array:
    """What `moezoo.core.sampling.sample` draws for each pair of a position and a sequence [n]: float32 [n]."""
    keys = fold_in(key, position, row)  # [2, n]: the words of keys broadcast with counters
    return uniform(keys, ())


def _first(logits_BV: mx.array, ranked_BV: mx.array, most_B1: mx.array) -> mx.array:
    """Which are the `most` highest, ties to the lower id; `ranked_BV` are the same logits, falling."""
    last_B1 = mx.take_along_axis(ranked_BV, most_B1 - 1, axis=-1)
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    left_B1 = most_B1 - mx.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (equal_BV & (mx.cumsum(equal_BV.astype(mx.int32), axis=-1) <= left_B1))
