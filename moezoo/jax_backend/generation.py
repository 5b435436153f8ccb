"""Autoregressive generation on the device: one compiled step per token, from the caches to the next token."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.core.generation.prefill import INITIAL_CAPACITY, padded, seen_tokens, widths, widths_after
from moezoo.core.reference.sampling import SamplingOptions, raise_unsampled
from moezoo.core.reuse import Reuse
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats, Integers
from moezoo.jax_backend.kv_cache import STATES, Cache, Caches, States, cut_back, empty_cache, states_of
from moezoo.jax_backend.sampling import Rule, draws, penalized, rule_of, sample

SMALLEST = 16
"""Minimum width of a piece of a prompt, so that few widths are compiled."""

Extend = Callable[[Any, Caches], tuple[jax.Array, Caches]]
Step = Callable[..., tuple[jax.Array, jax.Array, jax.Array | None, Caches]]


class PendingTokens:
    """Sampled tokens, which XLA may still be computing, and their logits."""

    def __init__(self, tokens_B: jax.Array, logits_BV: jax.Array):
        self._tokens_B, self._logits_BV = tokens_B, logits_BV

    def fetch(self) -> Integers:
        """Wait for the tokens. Raises DataError as `moezoo.core.reference.sampling.sample` does."""
        tokens = np.asarray(self._tokens_B)
        if tokens.min() < 0:
            raise_unsampled(np.asarray(self._logits_BV))
        return tokens

    def logits(self) -> Floats:
        """Spec: PendingTokens.logits."""
        return np.asarray(self._logits_BV)


class Generation:
    """Prompts and their generated tokens. `extend` and `step` are compiled, and donate their input caches."""

    def __init__(
        self,
        spec: ModelSpec,
        extend: Extend,
        step: Step,
        prompts: Sequence[Integers],
        new_tokens: int,
        options: SamplingOptions,
        reuse: Reuse,
    ):
        self._spec, self._step, self._rule = spec, step, rule_of(options)
        longest = max(len(prompt) for prompt in prompts)
        stops = sorted({*(place for place in reuse.keep if reuse.shared < place < longest), longest})
        if reuse.before is None:
            self._kept: dict[int, States] = {}
            self._length = sum(widths(stops[0], SMALLEST))
            self._first = self._length - stops[0]  # slots before a prompt of this length
            self._size = self._first + longest + new_tokens
            self._capacity = _capacity(self._first + longest, self._size)
            begun = [prompt[: stops[0]] for prompt in prompts] if reuse.keep else prompts
            self._logits_BV, self._caches = prefilled(spec, extend, begun, self._capacity)
        else:
            self._continue(reuse.before, reuse.shared, longest, new_tokens)
            stops = [reuse.shared, *stops]
        for start, end in pairwise(stops):
            self._kept[start] = states_of(self._caches)
            self._read(extend, prompts[0][start:end])
        self._tokens_B: jax.Array | None = None
        penalizes = self._rule.penalty is not None
        self._seen_BV = jnp.asarray(seen_tokens(prompts, spec.num_logits)) if penalizes else None

    def _continue(self, before: "Generation", shared: int, longest: int, new_tokens: int) -> None:
        """Take over the caches of another generation, cut back to the first `shared` tokens, and large enough."""
        self._first, self._length = before._first, before._first + shared
        self._size = self._first + longest + new_tokens
        self._capacity = max(before._capacity, _capacity(self._first + longest, self._size))
        caches, before._caches = before._caches, Caches([], None)
        self._kept = {}
        if self._length < before._length:
            caches = cut_back(caches, self._length, before._kept.get(shared, {}))
        self._caches = _grown(self._spec, caches, self._capacity)

    def _read(self, extend: Extend, tokens: Integers) -> None:
        """Read more tokens of the only prompt."""
        for width in widths_after(len(tokens), SMALLEST):
            self._logits_BV, self._caches = extend(tokens[None, :width], self._caches)
            tokens, self._length = tokens[width:], self._length + width

    def reusable(self, length: int) -> int:
        """Spec: Generation.reusable."""
        held = self._length - self._first
        if any(isinstance(cache, STATES) for cache in self._caches.layers):
            return max((place for place in (*self._kept, held) if place <= length), default=0)
        return min(length, held) if self._caches.layers else 0

    def next(self) -> PendingTokens:
        """Dispatch the next token of each sequence."""
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
        capacity = _capacity(self._length + 1, self._size)
        if capacity > self._capacity:
            self._capacity = capacity
            self._caches = _grown(self._spec, self._caches, capacity)
        self._tokens_B, logits_BV, self._seen_BV, self._caches = self._step(
            self._tokens_B, self._caches, self._rule, self._seen_BV
        )
        self._length += 1
        return PendingTokens(self._tokens_B, logits_BV)


def prefilled(spec: ModelSpec, extend: Extend, prompts: Sequence[Integers], size: int) -> tuple[jax.Array, Caches]:
    """Prefill: return logits [B, V] after the last token of each prompt, and caches of `size` slots that hold them."""
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
    """Sample tokens with these draws; return them, the logits, and the updated mask of tokens seen in each row."""
    allowed_BV = logits_BV
    if seen_BV is not None:
        assert rule.penalty is not None
        allowed_BV = penalized(logits_BV, seen_BV, rule.penalty)
    tokens_B = sample(allowed_BV, rule, draw_B)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
    return tokens_B, logits_BV, seen_BV


def drawn(rule: Rule, position_B: jax.Array) -> jax.Array | None:
    """Draw the random numbers of tokens at these positions; None for greedy decoding."""
    return None if rule.temperature is None else draws(rule.key, position_B, jnp.arange(len(position_B)))


_choose, _drawn = jax.jit(choose), jax.jit(drawn)


def _grown(spec: ModelSpec, caches: Caches, size: int) -> Caches:
    """Enlarge the caches to `size` slots; filled slots stay where they are."""
    assert caches.first_B is not None
    batch = len(caches.first_B)
    shapes = jax.eval_shape(lambda: empty_cache(spec, batch, size))

    def enlarged(kept: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        more = [(0, new - old) for new, old in zip(shape.shape, kept.shape, strict=True)]
        return jnp.pad(kept, more) if any(behind for _, behind in more) else kept

    layers: list[Cache] = jax.tree.map(enlarged, caches.layers, shapes)
    return Caches(layers, caches.first_B)


def _capacity(length: int, size: int) -> int:
    """Return the capacity of caches that hold `length` tokens now and `size` in the end: INITIAL_CAPACITY * 2**n.

    So few capacities are compiled, and a token reads at most twice the filled slots.
    """
    capacity = INITIAL_CAPACITY
    while capacity < length:
        capacity *= 2
    return max(length, min(capacity, -(-size // 64) * 64))
