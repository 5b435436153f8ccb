"""Products with a weight matrix, each as one product of matrices: `mx.einsum` takes up to six more operations."""

import functools
import math

import mlx.core as mx

from moezoo.core.reference.adapter import steps_of
from moezoo.mlx_backend.adapter import AdaptedArray
from moezoo.mlx_backend.kernels import codes
from moezoo.mlx_backend.quantization import QuantizedArray


def einsum(subscripts: str, x: mx.array, w: mx.array | QuantizedArray | AdaptedArray) -> mx.array:
    """Return `mx.einsum(subscripts, x, w)` where the last axes of x meet the first of w, or the last; or of codes.

    That is `...I,IO->...O`, or `...I,OI->...O`, where I and O stand for any number of axes. Or x and w share axes. An
    adapter adds its own product.
    """
    if isinstance(w, AdaptedArray):
        a, b = w.lora_a, w.scaled_b
        steps = steps_of(subscripts, a.ndim + b.ndim - 2 - len(w.base.shape), b.ndim)
        first, second = (a, b) if steps.inputs_first else (b, a)
        low = _product(steps.first, w.dropped(x), first)
        return _product(subscripts, x, w.base) + _product(steps.second, low, second)
    return _product(subscripts, x, w)


def _product(subscripts: str, x: mx.array, w: mx.array | QuantizedArray) -> mx.array:
    if isinstance(w, QuantizedArray):
        return codes.product(subscripts, x, w)
    inner, transposed = _meeting(subscripts)
    if not inner:
        return codes.contract(subscripts, x, w)
    outer = w.shape[: w.ndim - inner] if transposed else w.shape[inner:]
    lead, size = x.shape[: x.ndim - inner], math.prod(outer)
    # One sequence is a batch of one product, with fewer views; of more, it would be as many products.
    batch = lead[:1] if lead[:-1] == (1,) else ()
    matrix = w.reshape(*batch, size, -1).swapaxes(-1, -2) if transposed else w.reshape(*batch, -1, size)
    return (x.reshape(*batch, -1, matrix.shape[-2]) @ matrix).reshape(*lead, *outer)


@functools.cache
def _meeting(subscripts: str) -> tuple[int, bool]:
    """Return the number of axes summed over, and True if they are the last of w; 0 if x and w share other axes."""
    x, w, out = subscripts.replace("->", ",").split(",")
    if set(x) & set(w) & set(out) - {"."}:
        return 0, False
    inner = "".join(letter for letter in x if letter in w)
    if not inner or not x.endswith(inner) or not (w.startswith(inner) or w.endswith(inner)):
        raise ValueError(f"not a product with a matrix: {subscripts}")
    return len(inner), not w.startswith(inner)
