"""Grouped products: rows sorted by expert times their expert's matrix. Spec: moezoo.core.reference.experts."""

import importlib.util
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.jax_backend.runtime.platform import platform

Path = Literal["blocks", "ragged_dot", "tokamax"]


def grouped_path() -> Path:
    """How the experts are computed on this platform.

    `ragged_dot` is XLA's own grouped product, a kernel on TPU. On CPU and GPU XLA multiplies every row by every expert,
    so there `blocks` loops over blocks of rows that belong to one expert each, with the whole feed-forward at once. On
    GPU, `tokamax` has kernels, where that package is installed.
    """
    return _grouped_path(platform())


@cache
def _grouped_path(name: str) -> Path:
    if name == "gpu" and importlib.util.find_spec("tokamax") is not None:
        return "tokamax"
    return "ragged_dot" if name == "tpu" else "blocks"


def few_rows(num_rows: int, num_experts: int) -> bool:
    """Whether rows are so few that reading the matrices is all that matters, as when tokens are decoded.

    Then `blocks` have 1 or 4 rows, and the loop goes over them alone, so that no matrix of an idle expert is read.
    """
    return num_rows <= 4 * num_experts


class Groups(NamedTuple):
    """Consecutive groups of rows, one an expert."""

    size_E: jax.Array
    expert_R: jax.Array  # of an unused row the last expert


def group_rows(size_E: jax.Array, num_rows: int) -> Groups:
    """Groups of R rows that are sorted by expert. Rows beyond the sum of `size_E` are unused."""
    expert_R = jnp.searchsorted(jnp.cumsum(size_E), jnp.arange(num_rows), side="right")
    return Groups(size_E, jnp.minimum(expert_R, size_E.shape[0] - 1))


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block: about half the mean group, a power of two from 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= 0.75 * num_rows / num_experts:
        block *= 2
    return block


def grouped_product(x_RD: jax.Array, w_EDF: jax.Array, groups: Groups) -> jax.Array:
    """Spec: moezoo.core.reference.experts.grouped_product; casts w_EDF to the dtype of x_RD. By XLA or by tokamax."""
    # Trap: what a platform leaves in unused rows is its own affair, on the way back as well.
    used_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(groups.size_E))[:, None]
    x_RD, w_EDF = jnp.where(used_R1, x_RD, 0), w_EDF.astype(x_RD.dtype)
    if grouped_path() == "tokamax":
        import tokamax  # an extra: nothing else needs it

        # Named, or it would go on to XLA's ragged_dot where no kernel takes the shapes, and say nothing.
        kernels = ("mosaic", "triton")
        w_EDF = _trained_where_used(w_EDF, groups.size_E)
        product = tokamax.ragged_dot(x_RD, w_EDF, groups.size_E, implementation=kernels)
    else:
        product = lax.ragged_dot(x_RD, w_EDF, groups.size_E)
    return jnp.where(used_R1, product, 0)


@jax.custom_vjp
def _trained_where_used(w_EDF: jax.Array, size_E: jax.Array) -> jax.Array:
    """The matrices, with no gradient for those that no row met.

    Trap: for an empty group, tokamax 0.0.12's Triton kernel adds up rows of the group before (read in its source).
    """
    return w_EDF


_trained_where_used.defvjp(
    lambda w_EDF, size_E: (w_EDF, size_E),
    lambda size_E, gradient_EDF: (jnp.where(size_E[:, None, None] > 0, gradient_EDF, 0), None),
)
