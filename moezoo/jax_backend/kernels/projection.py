"""Products with a weight matrix, which may be kept as codes."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.jax_backend.quantization import QuantizedArray, dequantize

_einsum = jnp.einsum  # its strings are checked where products are called


def einsum(subscripts: str, x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
    """Return `jnp.einsum(subscripts, x, w)`; codes are decoded just before the product."""
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
    how = "each matrix decoded by XLA just before its product, those of experts one at a time"
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
    rows, count = _rows(w), len(packed)
    if of_x.endswith(packed) and result == of_x[:-count] + lead:
        product = times_rows(x.reshape(-1, w.row_size), rows.reshape(-1, w.row_size))
        return product.reshape(*x.shape[:-count], *rows.shape[: len(lead)])
    return _einsum(f"{of_x},{lead}{packed}->{result}", x, rows)


def _rows(w: QuantizedArray) -> jax.Array:
    """Return the decoded numbers with axes in the order of the codes, `lead` and then `packed`."""
    order = (*w.lead, *w.packed)
    shape, axes = tuple(w.shape[axis] for axis in order), tuple(range(len(order)))
    return dequantize(replace(w, shape=shape, lead=axes[: len(w.lead)], packed=axes[len(w.lead) :]))
