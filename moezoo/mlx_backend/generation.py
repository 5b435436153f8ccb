"""Autoregressive generation on the device: the graph of a token is built while the previous token is computed."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from moezoo.core.generation.prefill import INITIAL_CAPACITY, padded, seen_tokens, widths, widths_after
from moezoo.core.reference.sampling import SamplingOptions, raise_unsampled
from moezoo.core.reuse import Reuse
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats, Integers
from moezoo.mlx_backend.kv_cache import STATES, Cache, Caches, States, cut_back, empty_cache, states_of
from moezoo.mlx_backend.sampling import Rule, draws, penalized, rule_of, sample

SMALLEST = 1
"""Minimum width of a piece of a prompt: MLX compiles nothing here, so no piece is padded."""

_DRAWN = 64  # number of positions drawn at once: threefry takes about a hundred small operations

Extend = Callable[[Any, Caches], tuple[mx.array, Caches]]
Step = Callable[..., tuple[mx.array, mx.array, mx.array | None, Caches]]


class PendingTokens:
    """Sampled tokens, which MLX may still be computing, and their logits."""

    def __init__(self, tokens_B: mx.array, logits_BV: mx.array):
        self._tokens_B, self._logits_BV = tokens_B, logits_BV

    def fetch(self) -> Integers:
        """Wait for the tokens. Raises DataError as `moezoo.core.reference.sampling.sample` does."""
        tokens = np.array(self._tokens_B)
        if tokens.min() < 0:
            raise_unsampled(np.array(self._logits_BV))
        return tokens

    def logits(self) -> Floats:
        """Spec: PendingTokens.logits."""
        return np.array(self._logits_BV)


class Generation:
    """Prompts and their generated tokens. `extend` and `step` build graphs, which are evaluated here."""

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
        self._tokens_B: mx.array | None = None
        self._position_B = mx.array([len(prompt) for prompt in prompts])
        self._draws: list[mx.array] = []
        penalizes = self._rule.penalty is not None
        self._seen_BV = mx.array(seen_tokens(prompts, spec.num_logits)) if penalizes else None

    def _continue(self, before: "Generation", shared: int, longest: int, new_tokens: int) -> None:
        """Take over the caches of another generation, cut back to the first `shared` tokens, and large enough."""
        self._first, self._length = before._first, before._first + shared
        self._size = self._first + longest + new_tokens
        self._capacity = max(before._capacity, _capacity(self._first + longest, self._size))
        caches, before._caches = before._caches, Caches([], None)
        self._kept = {}
        if self._length < before._length:
            caches = cut_back(caches, self._length, before._kept.get(shared, {}))
        self._caches = _grown(self._spec, caches, 1, self._capacity)

    def _read(self, extend: Extend, tokens: Integers) -> None:
        """Read more tokens of the only prompt."""
        for width in widths_after(len(tokens), SMALLEST):
            self._logits_BV, self._caches = extend(mx.array(tokens[None, :width]), self._caches)
            mx.eval(self._caches)
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
            self._tokens_B, logits_BV, self._seen_BV = choose(
                self._logits_BV, self._rule, self._seen_BV, self._next_draw()
            )
            del self._logits_BV
        else:
            capacity = _capacity(self._length + 1, self._size)
            if capacity > self._capacity:
                self._capacity = capacity
                self._caches = _grown(self._spec, self._caches, len(self._position_B), capacity)
            caches, self._caches = self._caches._replace(spent=True), Caches([], None)
            self._tokens_B, logits_BV, self._seen_BV, self._caches = self._step(
                self._tokens_B, caches, self._rule, self._seen_BV, self._next_draw()
            )
            del caches
            self._length += 1
        mx.async_eval(self._tokens_B, self._seen_BV, self._caches)
        return PendingTokens(self._tokens_B, logits_BV)

    def _next_draw(self) -> mx.array | None:
        if self._rule.temperature is None:
            return None
        if not self._draws:
            drawn_NB = drawn(self._rule, self._position_B)
            assert drawn_NB is not None
            mx.eval(drawn_NB)
            self._draws, self._position_B = list(drawn_NB)[::-1], self._position_B + _DRAWN
        return self._draws.pop()


def prefilled(spec: ModelSpec, extend: Extend, prompts: Sequence[Integers], size: int) -> tuple[mx.array, Caches]:
    """Prefill: return logits [B, V] after the last token of each prompt, and caches of `size` slots that hold them."""
    pieces = widths(max(len(prompt) for prompt in prompts), SMALLEST)
    tokens, first = padded(prompts, sum(pieces))
    caches = Caches(empty_cache(spec, len(prompts), size), mx.array(first) if first.any() else None)
    end = 0
    for width in pieces:
        end += width
        logits_BV, caches = extend(mx.array(tokens[:, end - width : end]), caches)
        mx.eval(caches)
    return logits_BV, caches


def choose(
    logits_BV: mx.array, rule: Rule, seen_BV: mx.array | None, draw_B: mx.array | None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Sample tokens with these draws; return them, the logits, and the updated mask of tokens seen in each row."""
    allowed_BV = logits_BV
    if seen_BV is not None:
        assert rule.penalty is not None
        allowed_BV = penalized(logits_BV, seen_BV, rule.penalty)
    tokens_B = sample(allowed_BV, rule, draw_B)
    if seen_BV is not None:
        seen_BV = seen_BV | (mx.arange(seen_BV.shape[1]) == tokens_B[:, None])
    return tokens_B, logits_BV, seen_BV


def _grown(spec: ModelSpec, caches: Caches, batch: int, size: int) -> Caches:
    """Enlarge the caches to `size` slots; filled slots stay where they are."""

    def enlarged(kept: Any, empty: Any) -> Any:
        if isinstance(kept, tuple):
            return type(kept)(*(enlarged(*pair) for pair in zip(kept, empty, strict=True)))
        if not isinstance(kept, mx.array) or kept.shape == empty.shape:
            return kept
        return mx.concatenate([kept, empty[:, kept.shape[1] :]], axis=1)

    layers: list[Cache] = [
        enlarged(cache, wanted) for cache, wanted in zip(caches.layers, empty_cache(spec, batch, size), strict=True)
    ]
    return Caches(layers, caches.first_B)


def drawn(rule: Rule, position_B: mx.array) -> mx.array | None:
    """Draw the random numbers of these positions and the next _DRAWN - 1: [positions, B]; None for greedy decoding."""
    if rule.temperature is None:
        return None
    batch = len(position_B)
    position = (position_B + mx.arange(_DRAWN)[:, None]).flatten()
    return draws(rule.key, position, mx.tile(mx.arange(batch), _DRAWN)).reshape(_DRAWN, batch)


def _capacity(length: int, size: int) -> int:
    """Return the capacity of caches that hold `length` tokens now and `size` in the end: n * INITIAL_CAPACITY."""
    return max(length, min(-(-length // INITIAL_CAPACITY) * INITIAL_CAPACITY, size))
