"""Products with a weight matrix, which may be kept as codes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.jax_backend.quantization import QuantizedArray, dequantize

_einsum = jnp.einsum  # its strings are checked where products are called


def einsum(subscripts: str, x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
    """Return `jnp.einsum(subscripts, x, w)`; codes are decoded just before the product."""
    return _of_codes(subscripts, x, w) if isinstance(w, QuantizedArray) else _einsum(subscripts, x, w)


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
