"""Products with a weight matrix, which may be kept as codes."""

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


def _of_codes(subscripts: str, x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Decode in the order of the codes' axes, so that nothing is transposed."""
    # Without the barrier XLA decodes all matrices of a model before the first product, and keeps them.
    x, w = lax.optimization_barrier((x, w))
    operands, _, result = subscripts.partition("->")
    of_x, of_w = operands.split(",")
    order = (*w.lead, *w.packed)
    of_codes = "".join(of_w[axis] for axis in order)
    shape, axes = tuple(w.shape[axis] for axis in order), tuple(range(len(order)))
    ordered = replace(w, shape=shape, lead=axes[: len(w.lead)], packed=axes[len(w.lead) :])
    return _einsum(f"{of_x},{of_codes}->{result}", x, dequantize(ordered))
