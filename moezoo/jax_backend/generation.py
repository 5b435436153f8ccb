"""Sequences that grow on the device: one compiled step a token, from its caches to the next token."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.core.backend import Integers
from moezoo.core.prompts import ROOM, padded, seen_tokens, widths
from moezoo.core.sampling import SamplingOptions, checked_logits
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.kv_cache import Cache, Caches, empty_cache
from moezoo.jax_backend.sampling import Rule, draws, penalized, rule_of, sample

SMALLEST = 16
"""The narrowest piece of a prompt: few widths compile."""

Extend = Callable[[Any, Caches], tuple[jax.Array, Caches]]
Step = Callable[..., tuple[jax.Array, jax.Array, jax.Array | None, Caches]]


class PendingTokens:
    """Tokens that XLA may still be computing, and the logits that they are from."""

    def __init__(self, tokens_B: jax.Array, logits_BV: jax.Array):
        self._tokens_B, self._logits_BV = tokens_B, logits_BV

    def fetch(self) -> Integers:
        """Wait for them. Raises DataError as `moezoo.core.sampling.sample` does."""
        tokens = np.asarray(self._tokens_B)
        if tokens.min() < 0:
            checked_logits(np.asarray(self._logits_BV))
        return tokens


class Generation:
    """Prompts, and what follows them. `extend` and `step` are compiled, and donate the caches that they are given."""

    def __init__(
        self,
        spec: ModelSpec,
        extend: Extend,
        step: Step,
        prompts: Sequence[Integers],
        new_tokens: int,
        options: SamplingOptions,
    ):
        self._spec, self._step, self._rule = spec, step, rule_of(options)
        pieces = widths(max(len(prompt) for prompt in prompts), SMALLEST)
        self._length, self._size = sum(pieces), sum(pieces) + new_tokens
        self._logits_BV, self._caches = prefilled(spec, extend, prompts, _room(self._length, self._size))
        self._tokens_B: jax.Array | None = None
        penalizes = self._rule.penalty is not None
        self._seen_BV = jnp.asarray(seen_tokens(prompts, spec.vocab)) if penalizes else None

    def next(self) -> PendingTokens:
        """Dispatch one more token of each sequence."""
        if self._tokens_B is None:
            assert self._caches.first_B is not None
            self._tokens_B, logits_BV, self._seen_BV = _choose(
                self._logits_BV,
                self._rule,
                self._seen_BV,
                _drawn(self._rule, self._length - self._caches.first_B),
            )
            del self._logits_BV
            return PendingTokens(self._tokens_B, logits_BV)
        room = _room(self._length + 1, self._size)
        if room > _room(self._length, self._size):
            self._caches = _grown(self._spec, self._caches, room)
        self._tokens_B, logits_BV, self._seen_BV, self._caches = self._step(
            self._tokens_B, self._caches, self._rule, self._seen_BV
        )
        self._length += 1
        return PendingTokens(self._tokens_B, logits_BV)


def prefilled(spec: ModelSpec, extend: Extend, prompts: Sequence[Integers], size: int) -> tuple[jax.Array, Caches]:
    """Logits [B, V] after the last token of each prompt, and caches of so many places that hold them."""
    pieces = widths(max(len(prompt) for prompt in prompts), SMALLEST)
    tokens, first = padded(prompts, sum(pieces))
    caches = Caches(empty_cache(spec, len(prompts), size), jnp.asarray(first))
    end = 0
    for width in pieces:
        end += width
        logits_BV, caches = extend(tokens[:, end - width : end], caches)
    return logits_BV, caches


def choose(
    logits_BV: jax.Array, rule: Rule, seen_BV: jax.Array | None, draw_B: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Tokens by these draws, the logits that they are from, and which tokens each row has now."""
    if seen_BV is not None:
        assert rule.penalty is not None
        logits_BV = penalized(logits_BV, seen_BV, rule.penalty)
    tokens_B = sample(logits_BV, rule, draw_B)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
    return tokens_B, logits_BV, seen_BV


def drawn(rule: Rule, position_B: jax.Array) -> jax.Array | None:
    """What is drawn for tokens at these positions; None if nothing is."""
    return None if rule.temperature is None else draws(rule.key, position_B, jnp.arange(len(position_B)))


_choose, _drawn = jax.jit(choose), jax.jit(drawn)


def _grown(spec: ModelSpec, caches: Caches, size: int) -> Caches:
    """The caches with room for so many places, those in them where they were."""
    assert caches.first_B is not None
    batch = len(caches.first_B)
    shapes = jax.eval_shape(lambda: empty_cache(spec, batch, size))

    def enlarged(kept: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        more = [(0, new - old) for new, old in zip(shape.shape, kept.shape, strict=True)]
        return jnp.pad(kept, more) if any(behind for _, behind in more) else kept

    layers: list[Cache] = jax.tree.map(enlarged, caches.layers, shapes)
    return Caches(layers, caches.first_B)


def _room(length: int, size: int) -> int:
    """Places of caches that hold `length` now and `size` in the end: ROOM, or twice, four times, ... as many.

    Few sizes compile, and what a token reads is at most twice what is there.
    """
    room = ROOM
    while room < length:
        room *= 2
    return max(length, min(room, -(-size // 64) * 64))
