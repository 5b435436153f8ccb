"""Routed experts, and the grouped product that they are made of. Spec: moezoo.core.reference.experts."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.spec import ExpertsSpec, PlainFeedForwardSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.feed_forward import activate

Path = Literal["blocks", "ragged_dot"]


def grouped_path() -> Path:
    """How grouped products are computed on this platform.

    `ragged_dot` is XLA's own on GPU and TPU. On the CPU it multiplies every row by every expert, so there `blocks`
    loops over blocks of rows that belong to one expert each.
    """
    return "blocks" if jax.default_backend() == "cpu" else "ragged_dot"


class Groups(NamedTuple):
    """Consecutive groups of rows, one an expert, and their blocks of at most `block` rows.

    A block starts inside its group and may reach over its end: what it computes there is overwritten by the next block.
    """

    size_E: jax.Array
    expert_R: jax.Array  # of an unused row the last expert
    first_block_E: jax.Array
    start_block: jax.Array  # first row of each block
    expert_block: jax.Array
    end_block: jax.Array  # end of the block's group
    block: int


def group_rows(size_E: jax.Array, num_rows: int) -> Groups:
    """Plan the blocks of R rows that are sorted by expert. The number of blocks is bounded, so shapes are static.

    Rows beyond the sum of `size_E` are unused: no block starts there.
    """
    num_experts = size_E.shape[0]
    block = block_rows(num_rows, num_experts)
    blocks_E = (size_E + block - 1) // block
    last_block_E = jnp.cumsum(blocks_E)
    index = jnp.arange(num_rows // block + num_experts)
    expert = jnp.minimum(jnp.searchsorted(last_block_E, index, side="right"), num_experts - 1)
    end_E = jnp.cumsum(size_E)
    expert_R = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(num_rows), side="right"), num_experts - 1)
    first_block_E = last_block_E - blocks_E
    start = end_E[expert] - size_E[expert] + (index - first_block_E[expert]) * block
    first_block_E = jnp.append(first_block_E, last_block_E[-1])
    return Groups(size_E, expert_R, first_block_E, start, expert, end_E[expert], block)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block: about half the mean group, a power of two from 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= 0.75 * num_rows / num_experts:
        block *= 2
    return block


def grouped_product(x_RD: jax.Array, w_EDF: jax.Array, groups: Groups) -> jax.Array:
    """Spec: moezoo.core.reference.experts.grouped_product; casts w_EDF to the dtype of x_RD.

    In blocks the matrix of each is cast by itself: decoding a token must not touch the experts that it does not choose.
    """
    if grouped_path() == "ragged_dot":
        # Trap: what a platform's ragged_dot leaves in unused rows is its own affair, on the way back as well.
        used_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(groups.size_E))[:, None]
        product = lax.ragged_dot(jnp.where(used_R1, x_RD, 0), w_EDF.astype(x_RD.dtype), groups.size_E)
        return jnp.where(used_R1, product, 0)
    plan = (groups.first_block_E, groups.start_block, groups.expert_block, groups.end_block)
    return _blocked_product(groups.block, x_RD, w_EDF, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_product(block: int, x_RD: jax.Array, w_EDF: jax.Array, plan: tuple[jax.Array, ...]) -> jax.Array:
    first_block_E, start_block, expert_block, _ = plan
    num_rows = x_RD.shape[0]
    padded = jnp.pad(x_RD, ((0, block), (0, 0)))

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(padded, start_block[index], block)
        product = rows @ _matrix_of(w_EDF, expert_block[index], rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, product, start_block[index], axis=0)

    out = jnp.zeros((num_rows + block, w_EDF.shape[-1]), x_RD.dtype)
    return lax.fori_loop(0, first_block_E[-1], multiply, out)[:num_rows]


def _matrix_of(w_EDF: jax.Array, expert: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One expert's matrix, cast."""
    if w_EDF.dtype == dtype or w_EDF.dtype.itemsize != 2:
        return lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False).astype(dtype)
    # Trap: XLA on the CPU makes float32 of a whole bfloat16 array before it takes a part of it, but leaves integers as
    # they are; and it would move what is done to the whole array out of the loop, if that did not hang on the index.
    w_EDF, expert = lax.optimization_barrier((w_EDF, expert))
    bits = lax.dynamic_index_in_dim(lax.bitcast_convert_type(w_EDF, jnp.uint16), expert, keepdims=False)
    return lax.bitcast_convert_type(bits, w_EDF.dtype).astype(dtype)


def _blocked_forward(block: int, x_RD: jax.Array, w_EDF: jax.Array, plan: tuple[jax.Array, ...]):
    return _blocked_product(block, x_RD, w_EDF, plan), (x_RD, w_EDF, plan)


def _blocked_backward(block: int, saved, gradient_RF: jax.Array):
    x_RD, w_EDF, plan = saved
    first_block_E, start_block, _, end_block = plan
    x_gradient = _blocked_product(block, gradient_RF, w_EDF.swapaxes(1, 2), plan)
    x_padded = jnp.pad(x_RD, ((0, block), (0, 0)))
    gradient_padded = jnp.pad(gradient_RF, ((0, block), (0, 0)))

    def one_expert(expert: jax.Array, w_gradient: jax.Array) -> jax.Array:
        def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
            start = start_block[index]
            rows = lax.dynamic_slice_in_dim(x_padded, start, block)
            inside = (start + jnp.arange(block) < end_block[index])[:, None]
            gradient = jnp.where(inside, lax.dynamic_slice_in_dim(gradient_padded, start, block), 0)
            return total + jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)

        zero = jnp.zeros(w_EDF.shape[1:], jnp.float32)
        total = lax.fori_loop(first_block_E[expert], first_block_E[expert + 1], add_block, zero)
        total = total.astype(x_RD.dtype).astype(w_EDF.dtype)  # as the gradient of a cast is
        return lax.dynamic_update_index_in_dim(w_gradient, total, expert, axis=0)

    w_gradient = lax.fori_loop(0, w_EDF.shape[0], one_expert, jnp.zeros_like(w_EDF))
    return x_gradient, w_gradient, None


_blocked_product.defvjp(_blocked_forward, _blocked_backward)


class Experts(nnx.Module):
    """Spec: moezoo.core.reference.experts.experts."""

    def __init__(self, spec: ExpertsSpec, weights: Weights):
        self.spec = spec
        if not isinstance(spec, PlainFeedForwardSpec):
            self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")
        if spec.bias:
            if not isinstance(spec, PlainFeedForwardSpec):
                self.b_gate = weights.parameter("b_gate")
            self.b_up = weights.parameter("b_up")
            self.b_down = weights.parameter("b_down")

    def __call__(self, x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        spec, dtype = self.spec, x_RD.dtype
        groups = group_rows(size_E, x_RD.shape[0])
        gate = None
        if not isinstance(spec, PlainFeedForwardSpec):
            gate = grouped_product(x_RD, self.w_gate[...], groups)
            gate = gate + _rows_of(self.b_gate[...], groups).astype(dtype) if spec.bias else gate
        up = grouped_product(x_RD, self.w_up[...], groups)
        up = up + _rows_of(self.b_up[...], groups).astype(dtype) if spec.bias else up
        out = grouped_product(activate(spec, gate, up), self.w_down[...], groups)
        return out + _rows_of(self.b_down[...], groups).astype(dtype) if spec.bias else out


def _rows_of(bias_EF: jax.Array, groups: Groups) -> jax.Array:
    """Each row's own bias, float32, so that the sum over an expert's rows which is its gradient keeps its digits."""
    return bias_EF.astype(jnp.float32)[groups.expert_R]
