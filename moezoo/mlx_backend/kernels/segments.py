"""A recurrence over segments of tokens, of which the backward pass keeps only the states between them."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.typed import custom_function

TOKENS = 256
"""Tokens whose intermediates exist at a time, over all sequences."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Rule = Callable[..., tuple[mx.array, mx.array]]
"""A recurrence: of a state, arrays [B, T, ...] and constants, the outputs [B, T, ...] and the last state."""


def by_segments(
    rule: Rule, chunk: int, state: mx.array, arrays: Sequence[mx.array], constants: Sequence[mx.array] = ()
) -> tuple[mx.array, mx.array]:
    """Return `rule(state, *arrays, *constants)`, computed in segments of whole chunks; all arrays float32.

    The backward pass computes a segment again, and so never holds the intermediates of more than one.
    """
    batch, length = arrays[0].shape[:2]
    segment = chunk * max(1, TOKENS // (chunk * batch))
    if length <= segment:
        return rule(state, *arrays, *constants)
    number = len(arrays)
    kept: list[list[mx.array]] = []

    @custom_function
    def forward(state: mx.array, *inputs: mx.array) -> list[mx.array]:
        states, outputs = [], []
        for own in segments(inputs[:number], segment):
            states.append(state)
            output, state = copied(rule(state, *own, *inputs[number:]))
            outputs.append(output)
        kept.append(states)
        return [mx.concatenate(outputs, axis=1), state]

    @forward.vjp
    def _(inputs: list[mx.array], gradients: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        of_output, of_state = gradients
        parts = segments([*inputs[1 : number + 1], of_output], segment)
        of_arrays, of_constants = [], [mx.zeros_like(constant) for constant in inputs[number + 1 :]]
        for before, (*own, of_own) in zip(reversed(kept[-1]), reversed(parts), strict=True):
            primals = [before, *own, *inputs[number + 1 :]]
            found = copied(mx.vjp(lambda *given: list(rule(*given)), primals, [of_own, of_state])[1])
            of_state = found[0]
            of_arrays.append(found[1 : number + 1])
            of_constants = [total + more for total, more in zip(of_constants, found[number + 1 :], strict=True)]
        joined = [mx.concatenate(list(each)[::-1], axis=1) for each in zip(*of_arrays, strict=True)]
        return [of_state, *joined, *of_constants]

    output, last = forward(state, *arrays, *constants)
    return output, last


def in_segments(rule: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a recurrence of arrays [B, T, ...], a state and a chunk length, in this order, to run `by_segments`."""
    signature = inspect.signature(rule)

    @wraps(rule)
    def whole(*given: Arguments.args, **named: Arguments.kwargs) -> Result:
        arguments = signature.bind(*given, **named)
        arguments.apply_defaults()
        *arrays, state, chunk = arguments.arguments.values()

        def own(state: mx.array, *arrays: mx.array) -> Any:
            return cast(Rule, rule)(*arrays, state, chunk)

        return cast(Result, by_segments(own, chunk, state, arrays))

    return whole


def copied(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Evaluate arrays, and return copies that do not hold what they were computed from.

    Trap: while MLX traces, an array that was computed holds all that it was computed from.
    """
    mx.eval(*arrays)
    return [
        mx.array(np.asarray(value.view(mx.uint16))).view(mx.bfloat16)
        if value.dtype == mx.bfloat16
        else mx.array(np.asarray(value))
        for value in arrays
    ]


def segments(arrays: Sequence[mx.array], size: int) -> list[tuple[mx.array, ...]]:
    """Return the arrays' parts of `size` tokens each, the last one of what is left."""
    ends = list(range(size, arrays[0].shape[1], size))
    return list(zip(*(mx.split(each, ends, axis=1) for each in arrays), strict=True))
