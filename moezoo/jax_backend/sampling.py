"""Choosing the next token on the device. Spec: moezoo.core.sampling, in float32 where that has float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.core.random import key as key_of
from moezoo.core.sampling import SamplingOptions
from moezoo.jax_backend.random import fold_in, uniform

REFUSED = -1
"""In place of a token, where `moezoo.core.sampling.checked_logits` raises."""


class Rule(NamedTuple):
    """SamplingOptions as values, so that one compiled program serves all that have the same of them on; None is off.

    A `temperature` of None is greedy.
    """

    key: jax.Array
    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    penalty: jax.Array | None


def rule_of(options: SamplingOptions) -> Rule:
    """The rule that these options say."""

    def number(value: float | None, off: float | None = None) -> jax.Array | None:
        return None if value is None or value == off else jnp.asarray(np.float32(value))

    key, penalty = jnp.asarray(key_of(options.seed)), number(options.repetition_penalty, 1)
    if options.temperature == 0:
        return Rule(key, None, None, None, None, penalty)
    # Trap: a temperature below float32's smallest would divide by zero; at that one all but the best have underflowed.
    temperature = number(max(options.temperature, float(np.finfo(np.float32).tiny)))
    # More than any vocabulary is all of it, and must fit a word.
    top_k = None if options.top_k is None else jnp.asarray(np.int32(min(options.top_k, 2**31 - 1)))
    return Rule(key, temperature, top_k, number(options.top_p, 1), number(options.min_p), penalty)


def sample(logits_BV: jax.Array, rule: Rule, draw_B: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.sampling.sample, by these draws; REFUSED in a row of logits from which nothing can be drawn.

    Differs: probabilities and their sums are float32, and a token may be another where u falls within the rounding of a
    border, some 1e-7 times the tokens that matter: as rarely as logits of two backends differ enough to do the same.
    """
    best_B = jnp.max(logits_BV, axis=-1)
    usable_B = jnp.abs(best_B) < jnp.inf  # the best of numbers with a NaN is NaN, and of forbidden ones -inf
    if rule.temperature is None:
        chosen_B = jnp.argmax(logits_BV, axis=-1)
    else:
        assert draw_B is not None
        p_BV = probabilities(logits_BV, rule)
        cumulative_BV = jnp.cumsum(p_BV, axis=-1)
        target_B1 = (draw_B * jnp.max(cumulative_BV, axis=-1))[:, None]
        # Trap: a sum in parts may fall by a rounding, and what has no probability must not be where it rises again.
        chosen_B = jnp.argmax((cumulative_BV > target_B1) & (p_BV > 0), axis=-1)
    return jnp.where(usable_B, chosen_B.astype(jnp.int32), REFUSED)


def probabilities(logits_BV: jax.Array, rule: Rule) -> jax.Array:
    """Spec: moezoo.core.sampling.probabilities; of a temperature, and not renormalized, which `sample` needs not."""
    assert rule.temperature is not None
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    p_BV = jnp.exp(logits_BV / rule.temperature)
    if rule.top_k is not None or rule.top_p is not None:
        ranked_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        rank_V = jnp.arange(logits_BV.shape[-1])
        most_B1 = jnp.full((logits_BV.shape[0], 1), logits_BV.shape[-1], jnp.int32)
        most_B1 = most_B1 if rule.top_k is None else jnp.minimum(most_B1, rule.top_k)
        if rule.top_p is not None:
            q_BV = jnp.where(rank_V < most_B1, jnp.exp(ranked_BV / rule.temperature), 0.0)
            sum_BV = jnp.cumsum(q_BV, axis=-1)
            # The token that reaches top_p stays: those stay before which the sum has not reached it.
            short_BV = sum_BV < rule.top_p * sum_BV[:, -1:]
            most_B1 = jnp.minimum(most_B1, 1 + jnp.sum(short_BV, axis=-1, keepdims=True))
        p_BV = jnp.where(_first(logits_BV, ranked_BV, most_B1), p_BV, 0.0)
    if rule.min_p is not None:
        p_BV = jnp.where(p_BV < rule.min_p * jnp.max(p_BV, axis=-1, keepdims=True), 0.0, p_BV)
    return p_BV


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Spec: moezoo.core.sampling.penalized; `seen_BV` is True for tokens that the sequence has."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def draws(key: jax.Array, position: jax.Array, row: jax.Array) -> jax.Array:
    """What `moezoo.core.sampling.sample` draws for each pair of a position and a sequence [n]: float32 [n]."""
    keys = jax.vmap(lambda position, row: fold_in(key, position, row))(position, row)
    return jax.vmap(lambda one: uniform(one, ()))(keys)


def _first(logits_BV: jax.Array, ranked_BV: jax.Array, most_B1: jax.Array) -> jax.Array:
    """Which are the `most` highest, ties to the lower id; `ranked_BV` are the same logits, falling."""
    last_B1 = jnp.take_along_axis(ranked_BV, most_B1 - 1, axis=-1)
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    left_B1 = most_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV.astype(jnp.int32), axis=-1) <= left_B1))
