"""Products with a weight matrix, which may be kept as codes."""

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.reference.adapter import steps_of
from moezoo.jax_backend.adapter import AdaptedArray
from moezoo.jax_backend.kernels.slices import rows
from moezoo.jax_backend.quantization import QuantizedArray, dequantize

PIECE = 1 << 20
"""Numbers of a matrix that are decoded at a time: enough to share among cores, and few enough to stay in the cache."""

_einsum = jnp.einsum  # its strings are checked where products are called


def einsum(subscripts: str, x: jax.Array, w: jax.Array | QuantizedArray | AdaptedArray) -> jax.Array:
    """Return `jnp.einsum(subscripts, x, w)`; codes are decoded just before the product, and adapters add their own."""
    if isinstance(w, AdaptedArray):
        a, b = w.lora_a, w.scaled_b
        steps = steps_of(subscripts, a.ndim + b.ndim - 2 - len(w.base.shape), b.ndim)
        first, second = (a, b) if steps.inputs_first else (b, a)
        low = _product(steps.first, w.dropped(x), first)
        return _product(subscripts, x, w.base) + _product(steps.second, low, second)
    return _product(subscripts, x, w)


def _product(subscripts: str, x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
    if isinstance(w, QuantizedArray):
        return _of_codes(subscripts, x, w)
    of_x, of_w = subscripts.partition("->")[0].split(",")
    inner = sum(letter in of_x for letter in of_w)
    if inner > 1 and of_x.endswith(of_w[:inner]):
        # An einsum sums over axes in the order of the alphabet: XLA would copy a matrix [N, H, D] to exchange N and H.
        product: jax.Array = jnp.tensordot(x, w, axes=inner)
        return product
    return _einsum(subscripts, x, w)


def in_codes(parameters: Mapping[str, jax.Array | QuantizedArray]) -> str:
    """Return how many parameters stay in codes, and how they are used, for the header of a run; empty if none."""
    codes = [value for value in parameters.values() if isinstance(value, QuantizedArray)]
    formats = "; ".join(sorted({str(value.format) for value in codes}))
    how = "decoded by XLA just before their products, in pieces, those of experts one at a time"
    return f"{len(codes)} parameters ({formats}), {how}" if codes else ""


def times_rows(x_RD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """Return `x_RD @ w_FD.T`, told so that XLA on the CPU reads the matrix in place."""
    return _einsum("RD,FD->RF", x_RD, w_FD)


def _of_codes(subscripts: str, x: jax.Array, w: QuantizedArray) -> jax.Array:
    # Without the barrier XLA decodes all matrices of a model before the first product, and keeps them.
    x, w = lax.optimization_barrier((x, w))
    operands, _, result = subscripts.partition("->")
    of_x, of_w = operands.split(",")
    lead, packed = ("".join(of_w[axis] for axis in axes) for axes in (w.lead, w.packed))
    count = len(packed)
    if of_x.endswith(packed) and result == of_x[:-count] + lead:
        product = times_codes(x.reshape(-1, w.row_size), _matrix(w))
        return product.reshape(*x.shape[:-count], *(w.shape[axis] for axis in w.lead))
    return _einsum(f"{of_x},{lead}{packed}->{result}", x, _rows(w))


@jax.custom_vjp
def times_codes(x_RD: jax.Array, w_FD: QuantizedArray) -> jax.Array:
    """Return `x_RD @ dequantize(w_FD).T`; no more than PIECE numbers are decoded at a time."""
    count, step = _pieces(w_FD)
    if count == 1:
        return times_rows(x_RD, dequantize(w_FD))

    def one_piece(index: jax.Array, out_RF: jax.Array) -> jax.Array:
        start = _start(index, step, w_FD)
        product = times_rows(x_RD, dequantize(_part(w_FD, start, step)))
        return lax.dynamic_update_slice_in_dim(out_RF, product, start, axis=1)

    product: jax.Array = lax.fori_loop(0, count, one_piece, jnp.zeros((len(x_RD), w_FD.shape[0]), x_RD.dtype))
    return product


def _times_codes_forward(x_RD: jax.Array, w_FD: QuantizedArray) -> tuple[jax.Array, QuantizedArray]:
    return times_codes(x_RD, w_FD), w_FD


def _times_codes_backward(w_FD: QuantizedArray, gradient_RF: jax.Array) -> tuple[jax.Array, None]:
    """Decode the pieces again: autodiff would keep those of the whole matrix. Codes have no gradient."""
    count, step = _pieces(w_FD)

    def one_piece(index: jax.Array, total_RD: jax.Array) -> jax.Array:
        start = _start(index, step, w_FD)
        part = lax.dynamic_slice_in_dim(gradient_RF, start, step, axis=1)
        part = jnp.where(jnp.arange(step) >= index * step - start, part, 0)  # the last piece may begin in another one
        return total_RD + part @ dequantize(_part(w_FD, start, step))

    zeros = jnp.zeros((len(gradient_RF), w_FD.row_size), gradient_RF.dtype)
    gradient_RD: jax.Array = lax.fori_loop(0, count, one_piece, zeros)
    return gradient_RD, None


times_codes.defvjp(_times_codes_forward, _times_codes_backward)


def _pieces(w_FD: QuantizedArray) -> tuple[int, int]:
    """Return the number of pieces of a matrix, and the rows of each."""
    num_rows, size = w_FD.shape
    count = min(num_rows, math.ceil(num_rows * size / PIECE))
    step = math.ceil(num_rows / count)
    return math.ceil(num_rows / step), step


def _start(index: jax.Array, step: int, w_FD: QuantizedArray) -> jax.Array:
    """Return the first row of a piece; the last one may begin in the one before it."""
    return jnp.minimum(index * step, w_FD.shape[0] - step)


def _matrix(w: QuantizedArray) -> QuantizedArray:
    """Return the same codes as a matrix whose rows are the rows of codes."""
    flat: QuantizedArray = jax.tree.map(lambda values: values.reshape(-1, values.shape[-1]), w)
    return replace(flat, shape=(flat.codes.shape[0], w.row_size), lead=(0,), packed=(1,))


def _part(w_FD: QuantizedArray, start: jax.Array, count: int) -> QuantizedArray:
    """Return `count` rows of a matrix in codes."""
    part: QuantizedArray = jax.tree.map(lambda values: rows(values, start, count), w_FD)
    return replace(part, shape=(count, w_FD.row_size))


def _rows(w: QuantizedArray) -> jax.Array:
    """Return the decoded numbers with axes in the order of the codes, `lead` and then `packed`."""
    order = (*w.lead, *w.packed)
    shape, axes = tuple(w.shape[axis] for axis in order), tuple(range(len(order)))
    return dequantize(replace(w, shape=shape, lead=axes[: len(w.lead)], packed=axes[len(w.lead) :]))
