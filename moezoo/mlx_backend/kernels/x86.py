"""Replacements for operations that are slow in MLX's Linux wheel for x86, each with a custom gradient.

In that wheel, `exp` and all operations based on it (sigmoid, softmax, logsumexp, fused attention) take 14 to 20 ns per
element, `where` 6, and `power`, from the C library, 6; a sum or a product takes 0.3. So exponentials are computed as
powers of 2, masks are added, and gradients reuse the exponentials of the forward pass. On other platforms (Apple
silicon, for instance) this module is not used.
"""

import functools
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten, tree_unflatten

from moezoo.mlx_backend.runtime.streams import streams
from moezoo.mlx_backend.runtime.typed import custom_function

LOG2_E = 1 / math.log(2)
# Score of masked keys. 2^-1e30 is exactly 0; a moderate number could give a denormal, and products of those are slow.
_MASKED = -1e30

SMALL = 2**14
"""Number of elements up to which one thread is faster than two."""


@functools.cache
def is_x86_cpu() -> bool:
    """Return True on the platform that these kernels are for: an x86 CPU."""
    return mx.default_device() == mx.Device(mx.cpu) and platform.machine().lower() in ("x86_64", "amd64")


def without_graph(arrays: list[mx.array]) -> list[mx.array]:
    """Return copies that do not keep the arrays that they were computed from alive. Waits for the values.

    Trap: arrays evaluated while MLX traces a gradient keep all their inputs until the backward pass ends, and the
    experts' slices force such an evaluation. A custom function has its own gradient and needs only its outputs.
    """
    mx.eval(arrays)
    return [mx.array(np.asarray(array)) for array in arrays]


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), computed in float32."""

    @custom_function
    def forward(x: mx.array) -> mx.array:
        return _sigmoid(x)

    @forward.vjp
    def _(x: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient * (out * (1 - out))

    return forward(x.astype(mx.float32)).astype(x.dtype)


def gated_silu(gate: mx.array, up: mx.array, *, forget: bool = False) -> mx.array:
    """Return silu(gate) * up, computed in float32, split over the first axis by stream; `forget`: see without_graph."""

    @custom_function
    def forward(gate: mx.array, up: mx.array) -> list[mx.array]:
        outs, shares, count = [], [], _num_parts(gate)
        for stream, gate_part, up_part in zip(streams(), _parts(gate, count), _parts(up, count), strict=False):
            with mx.stream(stream):
                shares.append(_sigmoid(gate_part))
                outs.append(gate_part * shares[-1] * up_part)
        found = [mx.concatenate(outs), *shares]
        return without_graph(found) if forget else found

    @forward.vjp
    def _(
        primals: tuple[mx.array, ...], gradients: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        gate_gradients, up_gradients, shares = [], [], outputs[1:]
        arrays = (_parts(array, len(shares)) for array in (*primals, gradients[0]))
        for stream, share, *parts in zip(streams(), shares, *arrays, strict=False):
            gate, up, gradient = parts
            with mx.stream(stream):
                silu = gate * share
                gate_gradients.append(gradient * up * (share * (1 + gate - silu)))
                up_gradients.append(gradient * silu)
        return mx.concatenate(gate_gradients), mx.concatenate(up_gradients)

    return forward(gate.astype(mx.float32), up.astype(mx.float32))[0].astype(up.dtype)


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + mx.power(2.0, x * -LOG2_E))


def log_losses(logits_PV: mx.array, target_P: mx.array) -> mx.array:
    """Return -log softmax(logits) of each target, float32. [P, V] is large: MiB-sized parts alternate over streams."""
    num_rows, vocab = logits_PV.shape
    size = max(1, 2**21 // vocab)
    cuts = list(range(size, num_rows, size))

    def in_turns(compute: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
        parts = []
        for turn, part in enumerate(zip(*(mx.split(array, cuts) for array in arrays), strict=True)):
            with mx.stream(streams()[turn % len(streams())]):
                parts.append(compute(*part))
        return mx.concatenate(parts)

    def powers(logits: mx.array, largest: mx.array) -> mx.array:
        # Trap: subtracting the logarithm of the sum instead would lose the digits that large logits lose in it.
        return mx.power(2.0, (logits - largest[:, None]) * LOG2_E)

    def gradient_of_part(
        logits: mx.array, target: mx.array, largest: mx.array, total: mx.array, gradient: mx.array
    ) -> mx.array:
        share = powers(logits, largest) * (gradient / total)[:, None]
        return share.at[mx.arange(len(target)), target].add(-gradient)

    @custom_function
    def forward(logits: mx.array, target: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        largest = in_turns(lambda part: mx.max(part, axis=-1), logits)
        total = in_turns(lambda *part: mx.sum(powers(*part), axis=-1), logits, largest)
        chosen = mx.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return mx.log(total) + (largest - chosen), largest, total

    @forward.vjp
    def _(
        primals: tuple[mx.array, ...], gradients: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        found = in_turns(gradient_of_part, *primals, *outputs[1:], gradients[0])
        return found, mx.zeros_like(primals[1])

    return forward(logits_PV, target_P)[0]


def rows_of_tokens(x_PD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return x_PD[token_R], with `num_slots` rows per token: its gradient gathers these rows instead of scattering."""

    @custom_function
    def forward(x_PD: mx.array) -> mx.array:
        return x_PD[token_R]

    @forward.vjp
    def _(x_PD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return _sum_of_slots(gradient, token_R, num_slots)

    return forward(x_PD)


def sum_over_rows(x_RD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    """Return the sum of each token's `num_slots` rows: the transpose of `rows_of_tokens`."""

    @custom_function
    def forward(x_RD: mx.array) -> mx.array:
        return _sum_of_slots(x_RD, token_R, num_slots)

    @forward.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient[token_R]

    return forward(x_RD)


def _sum_of_slots(x_RD: mx.array, token_R: mx.array, num_slots: int) -> mx.array:
    row_PK = mx.argsort(token_R).reshape(-1, num_slots)
    if x_RD.size < SMALL:
        return mx.sum(x_RD[row_PK], axis=1)
    total = x_RD[row_PK[:, 0]]
    for slot in range(1, num_slots):
        total = total + x_RD[row_PK[:, slot]]
    return total


def can_fuse() -> bool:
    """Return True if `mx.compile` can fuse operations into one loop. Without a compiler it silently fuses none."""
    return is_x86_cpu() and shutil.which("g++") is not None


class FusedAdamW(optimizers.AdamW):
    """MLX's AdamW with bias correction; the update of an array is one fused loop, and arrays alternate over streams."""

    def init(self, parameters: Any) -> None:
        super().init(parameters)
        self._turn = 0

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        beta1, beta2 = self.betas
        step, rate = self.step.astype(mx.float32), self.learning_rate.astype(mx.float32)
        factors = mx.stack([1 - rate * self.weight_decay, rate / (1 - beta1**step), mx.rsqrt(1 - beta2**step)])
        self._turn = (getattr(self, "_turn", 0) + 1) % len(streams())
        update = _adamw_update(self._turn, beta1, beta2, self.eps)
        parameter, state["m"], state["v"] = update(gradient, parameter, state["m"], state["v"], *factors)
        return parameter


def adamw_kind() -> type[optimizers.AdamW]:
    """Return the AdamW of this platform: fused where `mx.compile` can fuse, else MLX's."""
    return FusedAdamW if can_fuse() else optimizers.AdamW


@functools.cache
def _adamw_update(turn: int, beta1: float, beta2: float, epsilon: float) -> Callable[..., list[mx.array]]:
    """Return the compiled update of a stream: a compiled function stays on the stream where it was traced."""

    def update(
        gradient: mx.array,
        parameter: mx.array,
        first: mx.array,
        second: mx.array,
        kept: mx.array,
        rate: mx.array,
        root: mx.array,
    ) -> list[mx.array]:
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * (gradient * gradient)
        return [parameter * kept - rate * first / (mx.sqrt(second) * root + epsilon), first, second]

    compiled = mx.compile(update, shapeless=True)

    def on_stream(*arrays: mx.array) -> list[mx.array]:
        with mx.stream(streams()[turn]):
            updated: list[mx.array] = compiled(*arrays)
            return updated

    return on_stream


class Chunk(NamedTuple):
    """Queries start:end, their keys first:last, and the mask of keys that each query attends to (None: all)."""

    start: int
    end: int
    first: int
    last: int
    mask_TS: mx.array | None


def attend_in_chunks(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    chunks: list[Chunk],
    scale: float,
    sink_N: mx.array | None = None,
    *,
    forget: bool = False,
) -> mx.array:
    """Compute attention in float32, one chunk of queries at a time.

    Each product uses all cores; the elementwise work between products is split over streams. The backward pass reuses
    values of the forward pass: 2^(score - largest), their sum, and the probability of sinks. Below, X = B M.
    """
    batch, length, kv_heads, group, head_dim = query_BTMGH.shape
    arrays = [
        (query_BTMGH * (scale * LOG2_E)).transpose(0, 2, 3, 1, 4).reshape(-1, group, length, head_dim),
        *(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in (key_BSMH, value_BSMH)),
    ]
    if sink_N is not None:
        per_batch = mx.broadcast_to(sink_N * LOG2_E, (batch, kv_heads * group))
        arrays.append(per_batch.reshape(-1, group, 1, 1))

    @custom_function
    def forward(*arrays: mx.array) -> list[list[mx.array]]:
        out, *rest = zip(*(_attend(chunk, *arrays) for chunk in chunks), strict=True)
        found = [[mx.concatenate(list(out), axis=2)], *map(list, rest)]
        if not forget:
            return found
        paths, values = zip(*tree_flatten(found), strict=True)
        copies: list[list[mx.array]] = tree_unflatten(list(zip(paths, without_graph(list(values)), strict=True)))
        return copies

    @forward.vjp
    def _(arrays: tuple[mx.array, ...], gradients: list[Any], outputs: list[Any]) -> list[mx.array]:
        (gradient,), ((out,), numerators, sums, *shares) = gradients[0], outputs
        inner = mx.sum(gradient * out, axis=-1, keepdims=True)
        found = [
            _attend_backward(chunk, arrays[:3], gradient, inner, parts, total)
            for chunk, parts, total in zip(chunks, numerators, sums, strict=True)
        ]
        query_gradients, key_gradients, value_gradients = zip(*found, strict=True)
        query_gradient = mx.concatenate(list(query_gradients), axis=2)
        input_gradients = [query_gradient, _summed(key_gradients, chunks), _summed(value_gradients, chunks)]
        if sink_N is not None:
            share = mx.concatenate(shares[0], axis=2)
            input_gradients.append(mx.sum(share * inner, axis=2, keepdims=True) / -LOG2_E)
        return input_gradients

    out_BMGTH = forward(*arrays)[0][0].reshape(batch, kv_heads, group, length, -1)
    return out_BMGTH.transpose(0, 3, 1, 2, 4)


def _attend(chunk: Chunk, query: mx.array, key: mx.array, value: mx.array, *sink: mx.array) -> list[Any]:
    """Return the output [X, G, t, H] of t queries, numerators [X, G, t, s] in parts, sums, and sink probabilities."""
    query = query[:, :, chunk.start : chunk.end]
    key, value = (x[:, chunk.first : chunk.last] for x in (key, value))
    score = (_folded(query) @ key.swapaxes(1, 2)).reshape(*query.shape[:3], -1)
    mask = None if chunk.mask_TS is None else mx.where(chunk.mask_TS, 0.0, _MASKED)
    count = _num_parts(score)
    sinks = _parts(sink[0], count) if sink else [None] * count
    numerators, sums, shares = [], [], []
    for stream, part, sink_part in zip(streams(), _parts(score, count), sinks, strict=False):
        with mx.stream(stream):
            part = part if mask is None else part + mask
            largest = mx.max(part, axis=-1, keepdims=True)
            largest = largest if sink_part is None else mx.maximum(largest, sink_part)
            numerators.append(mx.power(2.0, part - largest))
            sums.append(mx.sum(numerators[-1], axis=-1, keepdims=True))
            if sink_part is not None:
                shares.append(mx.power(2.0, sink_part - largest))
                sums[-1] = sums[-1] + shares[-1]
    total = mx.concatenate(sums)
    out = mx.concatenate(
        [_folded(part) @ values for part, values in zip(numerators, _parts(value, count), strict=True)]
    )
    share = [mx.concatenate(shares) / total] if sink else []
    return [out.reshape(*query.shape[:3], -1) / total, numerators, total, *share]


def _attend_backward(
    chunk: Chunk,
    arrays: tuple[mx.array, ...],
    gradient: mx.array,
    inner: mx.array,
    numerators: list[mx.array],
    total: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of a chunk's queries, keys and values."""
    rows = slice(chunk.start, chunk.end)
    query, key, value = arrays[0][:, :, rows], *(x[:, chunk.first : chunk.last] for x in arrays[1:])
    gradient, inner = _folded(gradient[:, :, rows] / total), _folded(inner[:, :, rows] / total)
    weight_gradient = gradient @ value.swapaxes(1, 2)
    found = []
    split = (_parts(array, len(numerators)) for array in (weight_gradient, inner, _folded(query), key, gradient))
    for stream, *parts in zip(
        streams(),
        *split,
        map(_folded, numerators),
        strict=False,  # fewer parts than streams is possible
    ):
        weight_gradient, inner, query_part, key_part, gradient_part, numerator = parts
        with mx.stream(stream):
            score_gradient = (weight_gradient - inner) * numerator
        transposed = score_gradient.swapaxes(1, 2)
        found.append((score_gradient @ key_part, transposed @ query_part, numerator.swapaxes(1, 2) @ gradient_part))
    query_gradient, key_gradient, value_gradient = (mx.concatenate(list(parts)) for parts in zip(*found, strict=True))
    return query_gradient.reshape(query.shape) / LOG2_E, key_gradient / LOG2_E, value_gradient


def _folded(x_XGTH: mx.array) -> mx.array:
    """Reshape [X, G, t, H] to [X, G t, H]: queries that share keys become rows of one product."""
    return x_XGTH.reshape(x_XGTH.shape[0], -1, x_XGTH.shape[-1])


def _num_parts(x: mx.array) -> int:
    """Return the number of streams to use: a single token is done before another thread wakes up."""
    return 1 if x.size < SMALL else min(len(streams()), len(x))


def _parts(x: mx.array, count: int) -> list[mx.array]:
    """Split the first axis into `count` parts."""
    return list(mx.split(x, [len(x) * part // count for part in range(1, count)]))


def _summed(parts: Sequence[mx.array], chunks: Sequence[Chunk]) -> mx.array:
    """Sum the gradients of all chunks, each for its own range of keys, into one array for all keys."""
    cuts = sorted({0, *(chunk.first for chunk in chunks), *(chunk.last for chunk in chunks)})
    sums: dict[int, mx.array] = {}
    for chunk, part in zip(chunks, parts, strict=True):
        own = [place for place, cut in enumerate(cuts[:-1]) if chunk.first <= cut < chunk.last]
        for place, piece in zip(own, mx.split(part, [cuts[i] - chunk.first for i in own[1:]], axis=1), strict=True):
            sums[place] = sums[place] + piece if place in sums else piece
    return mx.concatenate([sums[place] for place in range(len(cuts) - 1)], axis=1)
