"""Grouped products: rows sorted by expert times their expert's matrix. Spec: moezoo.core.reference.experts."""

import importlib.util
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.jax_backend.kernels import openblas
from moezoo.jax_backend.runtime.platform import platform

Path = Literal["openblas", "blocks", "ragged_dot", "tokamax"]

SMALLEST_PRODUCT = 1 << 22
"""Multiply-adds from which OpenBLAS is faster than blocks: handing it one product costs 0.1 ms (writings/log.md)."""


def grouped_path() -> Path:
    """Return the implementation of the experts on this platform.

    `ragged_dot` is XLA's own grouped product, a kernel on TPU. On CPU and GPU, XLA multiplies every row by every
    expert; there, `blocks` loops over blocks of rows of one expert each and computes the whole feed-forward of a block.
    On the CPU, `openblas` multiplies float32 rows where SciPy brings that library, and blocks are for other types. On
    GPU, `tokamax` provides kernels where that package is installed.
    """
    return _grouped_path(platform())


@cache
def _grouped_path(name: str) -> Path:
    if name == "gpu" and importlib.util.find_spec("tokamax") is not None:
        return "tokamax"
    if name == "cpu" and openblas.load() is not None:
        return "openblas"
    return "ragged_dot" if name == "tpu" else "blocks"


def path_in_words() -> str:
    """Return the implementation of the experts for the run's header."""
    match grouped_path():
        case "openblas":
            return f"{openblas.load()} of SciPy; small ones and other types: blocks; few rows: the chosen ones alone"
        case "blocks":
            return "blocks; few rows: the chosen ones alone"
        case path:
            return path


def few_rows(num_rows: int, num_experts: int) -> bool:
    """Return True for so few rows that reading the matrices dominates the time, for example in decoding.

    Blocks then have 1 or 4 rows, and a single loop runs over them, so matrices of idle experts are never read.
    """
    return num_rows <= 4 * num_experts


class Groups(NamedTuple):
    """Consecutive groups of rows, one per expert."""

    size_E: jax.Array
    expert_R: jax.Array  # the last expert for an unused row


def group_rows(size_E: jax.Array, num_rows: int) -> Groups:
    """Return the groups of R rows that are sorted by expert. Rows beyond the sum of `size_E` are unused."""
    expert_R = jnp.searchsorted(jnp.cumsum(size_E), jnp.arange(num_rows), side="right")
    return Groups(size_E, jnp.minimum(expert_R, size_E.shape[0] - 1))


def block_rows(num_rows: int, num_experts: int) -> int:
    """Return the rows per block: about half the mean group size, a power of two from 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= 0.75 * num_rows / num_experts:
        block *= 2
    return block


def grouped_product(x_RD: jax.Array, w_EDF: jax.Array, groups: Groups) -> jax.Array:
    """Spec: moezoo.core.reference.experts.grouped_product; casts w_EDF to the dtype of x_RD. Runs XLA or tokamax."""
    # Trap: the values of unused rows are undefined, in the backward pass too.
    used_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(groups.size_E))[:, None]
    x_RD, w_EDF = jnp.where(used_R1, x_RD, 0), w_EDF.astype(x_RD.dtype)
    if grouped_path() == "tokamax":
        import tokamax  # optional dependency, needed only here

        # Explicit, because tokamax silently falls back to XLA's ragged_dot where no kernel supports the shapes.
        kernels = ("mosaic", "triton")
        w_EDF = _trained_where_used(w_EDF, groups.size_E)
        product = tokamax.ragged_dot(x_RD, w_EDF, groups.size_E, implementation=kernels)
    else:
        product = lax.ragged_dot(x_RD, w_EDF, groups.size_E)
    return jnp.where(used_R1, product, 0)


@jax.custom_vjp
def _trained_where_used(w_EDF: jax.Array, size_E: jax.Array) -> jax.Array:
    """Return the matrices unchanged; their gradient is zero for experts without rows.

    Trap: for an empty group, tokamax 0.0.12's Triton kernel sums rows of the previous group (read in its source).
    """
    return w_EDF


_trained_where_used.defvjp(
    lambda w_EDF, size_E: (w_EDF, size_E),
    lambda size_E, gradient_EDF: (jnp.where(size_E[:, None, None] > 0, gradient_EDF, 0), None),
)
