"""Sampling the next token on the device. Spec: moezoo.core.reference.sampling, in float32 instead of float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.core.random import key as key_of
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.jax_backend.random import fold_in, uniform

REFUSED = -1
"""Returned in place of a token where `moezoo.core.reference.sampling.checked_logits` raises."""


class Rule(NamedTuple):
    """SamplingOptions as arrays, so that options with the same filters on share one compiled program; None is off.

    A `temperature` of None is greedy.
    """

    key: jax.Array
    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    penalty: jax.Array | None


def rule_of(options: SamplingOptions) -> Rule:
    """Return the rule for these options."""

    def number(value: float | None, off: float | None = None) -> jax.Array | None:
        return None if value is None or value == off else jnp.asarray(np.float32(value))

    key, penalty = jnp.asarray(key_of(options.seed)), number(options.repetition_penalty, 1)
    if options.temperature == 0:
        return Rule(key, None, None, None, None, penalty)
    # Trap: a temperature below the smallest float32 would divide by zero; at the smallest, only the best token is left.
    temperature = number(max(options.temperature, float(np.finfo(np.float32).tiny)))
    # A top_k beyond the vocabulary keeps all of it; it must fit an int32.
    top_k = None if options.top_k is None else jnp.asarray(np.int32(min(options.top_k, 2**31 - 1)))
    return Rule(key, temperature, top_k, number(options.top_p, 1), number(options.min_p), penalty)


def sample(logits_BV: jax.Array, rule: Rule, draw_B: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.reference.sampling.sample, with these draws; REFUSED for a row that cannot be sampled.

    Differs: probabilities and their sums are float32, so the token may differ where u is within rounding of a boundary,
    about 1e-7 times the number of probable tokens: as rarely as different logits of two backends have that effect.
    """
    best_B = jnp.max(logits_BV, axis=-1)
    usable_B = jnp.abs(best_B) < jnp.inf  # the maximum is NaN if one logit is, and -inf if all tokens are forbidden
    if rule.temperature is None:
        chosen_B = jnp.argmax(logits_BV, axis=-1)
    else:
        assert draw_B is not None
        p_BV = probabilities(logits_BV, rule)
        cumulative_BV = jnp.cumsum(p_BV, axis=-1)
        target_B1 = (draw_B * jnp.max(cumulative_BV, axis=-1))[:, None]
        # Trap: a cumulative sum in parts may decrease by rounding; tokens with probability 0 must not be chosen there.
        chosen_B = jnp.argmax((cumulative_BV > target_B1) & (p_BV > 0), axis=-1)
    return jnp.where(usable_B, chosen_B.astype(jnp.int32), REFUSED)


def probabilities(logits_BV: jax.Array, rule: Rule) -> jax.Array:
    """Spec: moezoo.core.reference.sampling.probabilities; temperature > 0; not renormalized."""
    assert rule.temperature is not None
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    p_BV = jnp.exp(logits_BV / rule.temperature)
    if rule.top_k is not None or rule.top_p is not None:
        ranked_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        rank_V = jnp.arange(logits_BV.shape[-1])
        keep_B1 = jnp.full((logits_BV.shape[0], 1), logits_BV.shape[-1], jnp.int32)
        keep_B1 = keep_B1 if rule.top_k is None else jnp.minimum(keep_B1, rule.top_k)
        if rule.top_p is not None:
            q_BV = jnp.where(rank_V < keep_B1, jnp.exp(ranked_BV / rule.temperature), 0.0)
            sum_BV = jnp.cumsum(q_BV, axis=-1)
            # The token that reaches top_p stays: tokens stay while the sum before them is below top_p.
            short_BV = sum_BV < rule.top_p * sum_BV[:, -1:]
            keep_B1 = jnp.minimum(keep_B1, 1 + jnp.sum(short_BV, axis=-1, keepdims=True))
        p_BV = jnp.where(_first(logits_BV, ranked_BV, keep_B1), p_BV, 0.0)
    if rule.min_p is not None:
        p_BV = jnp.where(p_BV < rule.min_p * jnp.max(p_BV, axis=-1, keepdims=True), 0.0, p_BV)
    return p_BV


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.sampling.penalized; `seen_BV` is True for tokens that are in the sequence."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def draws(key: jax.Array, position: jax.Array, row: jax.Array) -> jax.Array:
    """Return the uniform draws of `core.reference.sampling.sample`, one per position and sequence [n]: float32 [n]."""
    keys = jax.vmap(lambda position, row: fold_in(key, position, row))(position, row)
    return jax.vmap(lambda one: uniform(one, ()))(keys)


def _first(logits_BV: jax.Array, ranked_BV: jax.Array, keep_B1: jax.Array) -> jax.Array:
    """Return the mask of the `keep` highest logits, ties to the lower id; `ranked_BV` are the logits, descending."""
    last_B1 = jnp.take_along_axis(ranked_BV, keep_B1 - 1, axis=-1)
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    left_B1 = keep_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV.astype(jnp.int32), axis=-1) <= left_B1))
