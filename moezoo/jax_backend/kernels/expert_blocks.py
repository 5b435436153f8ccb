"""Blocked expert feed-forward, for platforms where XLA's grouped product multiplies every row by every expert.

Rows are sorted by expert. The outer loop slices each expert's matrices once; the inner loop runs over blocks of its
rows. The last block of an expert may extend past its last row: the extra results are overwritten by the next expert in
the forward pass and in the gradient of the rows, and masked in the gradients of the matrices.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import ExpertsSpec
from moezoo.jax_backend.adapter import AdaptedArray
from moezoo.jax_backend.feed_forward import activate
from moezoo.jax_backend.kernels import grouped_product as products
from moezoo.jax_backend.kernels.expert_groups import grouped_experts
from moezoo.jax_backend.kernels.projection import times_rows
from moezoo.jax_backend.kernels.slices import at
from moezoo.jax_backend.quantization import QuantizedArray, dequantize

Arrays = dict[str, jax.Array]
Outputs = tuple[jax.Array, Arrays]

Kernel = Callable[[ExpertsSpec, jax.Array, Arrays, jax.Array], jax.Array]
"""Function of a spec, rows [R, D] sorted by expert, parameters by name, and size_E; returns the output [R, D]."""


def with_factors(parameters: Mapping[str, Any]) -> Arrays:
    """Return arrays or codes by name; the factors of an adapter beside its matrix, the second times the scale."""
    arrays: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, AdaptedArray):
            arrays |= {name: value.base, f"{name}.lora_a": value.lora_a, f"{name}.lora_b": value.scaled_b}
        else:
            arrays[name] = value
    return arrays


def expert_kernel(x_RD: jax.Array, parameters: Arrays) -> Kernel | None:
    """Return the kernel for these rows, or None where the platform computes experts by grouped products."""
    path, in_codes = products.grouped_path(), any(isinstance(value, QuantizedArray) for value in parameters.values())
    if path not in ("openblas", "blocks") and not in_codes:
        return None
    num_rows, (num_experts, *matrix) = x_RD.shape[0], parameters["w_up"].shape
    few = products.few_rows(num_rows, num_experts)
    are_float32 = not in_codes and all(array.dtype == jnp.float32 for array in (x_RD, *parameters.values()))
    is_large = num_rows * math.prod(matrix) >= products.SMALLEST_PRODUCT
    if path == "openblas" and are_float32 and is_large and not few:
        return grouped_experts
    kernel = _experts_of_few_rows if few else _blocked_experts
    block = products.block_rows(num_rows, num_experts)
    return lambda spec, x_RD, parameters, size_E: kernel(spec, block, x_RD, parameters, size_E)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked_experts(
    spec: ExpertsSpec, block: int, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array
) -> jax.Array:
    return _experts_forward(spec, block, x_RD, parameters, size_E)[0]


def _experts_forward(
    spec: ExpertsSpec, block: int, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Arrays, jax.Array, Arrays]]:
    """Return the output [R, D] and the residuals for the backward pass: inputs, and pre-activations by matrix name."""
    num_rows, dtype = x_RD.shape[0], x_RD.dtype
    names = [name for name in ("w_gate", "w_up") if name in parameters]
    start_E = jnp.cumsum(size_E) - size_E
    padded = jnp.pad(x_RD, ((0, block), (0, 0)))

    def one_expert(expert: jax.Array, results: Outputs) -> Outputs:
        own = {name: _matrix_of(value, expert, dtype) for name, value in parameters.items()}

        def one_block(index: jax.Array, results: Outputs) -> Outputs:
            start = start_E[expert] + index * block
            rows = lax.dynamic_slice_in_dim(padded, start, block)
            pre_activations = {name: _linear(rows, own, name) for name in names}
            out = _linear(activate(spec, pre_activations.get("w_gate"), pre_activations["w_up"]), own, "w_down")
            written: Outputs = jax.tree.map(
                lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
                results,
                (out, pre_activations),
            )
            return written

        outputs: Outputs = lax.fori_loop(0, _num_blocks(size_E[expert], block), one_block, results)
        return outputs

    def empty(width: int) -> jax.Array:
        return jnp.zeros((num_rows + block, width), dtype)

    results = (empty(x_RD.shape[1]), {name: empty(parameters[name].shape[2]) for name in names})
    out, pre_activations = lax.fori_loop(0, size_E.shape[0], one_expert, results)
    return out[:num_rows], (x_RD, parameters, size_E, pre_activations)


def _experts_backward(
    spec: ExpertsSpec, block: int, saved: tuple[jax.Array, Arrays, jax.Array, Arrays], gradient_RD: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array | None], None]:
    x_RD, parameters, size_E, pre_activations = saved
    dtype = x_RD.dtype
    floats = {name: value for name, value in parameters.items() if not isinstance(value, QuantizedArray)}
    start_E = jnp.cumsum(size_E) - size_E
    x_padded, gradient_padded = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_RD, gradient_RD))

    def one_expert(expert: jax.Array, results: Outputs) -> Outputs:
        own = {name: _matrix_of(value, expert, dtype) for name, value in parameters.items()}

        def one_block(index: jax.Array, results: Outputs) -> Outputs:
            x_gradient, totals = results
            start = start_E[expert] + index * block
            inside = (jnp.arange(block) < size_E[expert] - index * block)[:, None]
            # Trap: pre-activations of another expert's large rows may be infinite, and infinity times 0 is NaN.
            rows, gradient, *pre_activation_rows = (
                jnp.where(inside, lax.dynamic_slice_in_dim(whole, start, block), 0)
                for whole in (x_padded, gradient_padded, *pre_activations.values())
            )
            hidden, pull = jax.vjp(
                lambda *values: activate(spec, values[0] if len(values) > 1 else None, values[-1]), *pre_activation_rows
            )
            of_hidden, added = _gradients_of_linear(hidden, gradient, own, "w_down")
            back: jax.Array | float = 0.0
            for name, part in zip(pre_activations, pull(of_hidden), strict=True):
                of_rows, of_arrays = _gradients_of_linear(rows, part, own, name)
                back, added = back + of_rows, added | of_arrays
            x_gradient = lax.dynamic_update_slice_in_dim(x_gradient, back, start, axis=0)
            return x_gradient, jax.tree.map(jnp.add, totals, added)

        x_gradient, gradients = results
        zeros = {name: jnp.zeros(value.shape[1:], jnp.float32) for name, value in floats.items()}
        x_gradient, totals = lax.fori_loop(0, _num_blocks(size_E[expert], block), one_block, (x_gradient, zeros))
        # The gradient of a matrix is rounded to the dtype of the product, like the gradient of a cast.
        totals = {name: total.astype(dtype) if name.startswith("w_") else total for name, total in totals.items()}
        return x_gradient, {
            name: lax.dynamic_update_index_in_dim(whole, totals[name].astype(whole.dtype), expert, axis=0)
            for name, whole in gradients.items()
        }

    results = (jnp.zeros_like(x_padded), jax.tree.map(jnp.zeros_like, floats))
    x_gradient, gradients = lax.fori_loop(0, size_E.shape[0], one_expert, results)
    return x_gradient[: x_RD.shape[0]], {name: gradients.get(name) for name in parameters}, None


_blocked_experts.defvjp(_experts_forward, _experts_backward)


def _linear(rows: jax.Array, own: dict[str, Any], name: str) -> jax.Array:
    """Return rows times the expert's matrix `name`, plus its adapter's output and its bias if it has them."""
    matrix = own[name]
    product = times_rows(rows, matrix.rows_FD) if isinstance(matrix, _Decoded) else rows @ matrix
    if f"{name}.lora_a" in own:
        product = product + rows @ own[f"{name}.lora_a"] @ own[f"{name}.lora_b"]
    return product + own[_bias_of(name)] if _bias_of(name) in own else product


def _gradients_of_linear(
    rows: jax.Array, gradient: jax.Array, own: dict[str, Any], name: str
) -> tuple[jax.Array, Arrays]:
    """Return the gradients of `_linear`: that of the rows, and those of arrays by name. Codes have none."""
    matrix, of_arrays = own[name], dict[str, jax.Array]()
    if isinstance(matrix, _Decoded):
        of_rows = gradient @ matrix.rows_FD
    else:
        of_rows = gradient @ matrix.T
        of_arrays[name] = _of_matrix(rows, gradient)
    if f"{name}.lora_a" in own:
        lora_a, lora_b = own[f"{name}.lora_a"], own[f"{name}.lora_b"]
        of_low = gradient @ lora_b.T
        of_rows = of_rows + of_low @ lora_a.T
        of_arrays[f"{name}.lora_a"] = _of_matrix(rows, of_low)
        of_arrays[f"{name}.lora_b"] = _of_matrix(rows @ lora_a, gradient)
    if _bias_of(name) in own:
        of_arrays[_bias_of(name)] = jnp.sum(gradient.astype(jnp.float32), axis=0)
    return of_rows, of_arrays


def _of_matrix(rows: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)


def _bias_of(name: str) -> str:
    return name.replace("w_", "b_")


def _num_blocks(size: jax.Array, block: int) -> jax.Array:
    blocks: jax.Array = (size + block - 1) // block
    return blocks


class _Decoded(NamedTuple):
    """One expert's matrix, decoded from codes: transposed, since a row of codes has the numbers of one output."""

    rows_FD: jax.Array


def _matrix_of(w_EDF: jax.Array | QuantizedArray, expert: jax.Array, dtype: jnp.dtype) -> Any:
    """Return one expert's matrix, cast to `dtype`; of codes, only its own are decoded."""
    if isinstance(w_EDF, QuantizedArray):
        return _Decoded(lax.optimization_barrier(dequantize(w_EDF[expert].astype(dtype)).T))
    if w_EDF.dtype == dtype:  # nothing is cast, so nothing can be cast too early
        return lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
    return at(w_EDF, expert).astype(dtype)


# --- few rows --------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts_of_few_rows(
    spec: ExpertsSpec, block: int, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array
) -> jax.Array:
    """Run one loop over blocks of 1 or 4 rows; `block` is used by the backward pass, the same as for many rows.

    XLA on the CPU copies a matrix that is sliced at a computed index. In a loop, all copies share one buffer, which
    stays in cache, so memory is read once; unrolled, each copy gets a new buffer, which is ten times as slow.
    """
    (num_rows, width), num_experts, dtype = x_RD.shape, size_E.shape[0], x_RD.dtype
    few = 1 if 2 * num_rows <= num_experts else 4
    blocks_E = _num_blocks(size_E, few)
    last_block_E, start_E = jnp.cumsum(blocks_E), jnp.cumsum(size_E) - size_E
    index = jnp.arange(min(num_rows, num_rows // few + num_experts))
    expert_block = jnp.minimum(jnp.sum(index[:, None] >= last_block_E, axis=1), num_experts - 1)
    start_block = start_E[expert_block] + (index - (last_block_E - blocks_E)[expert_block]) * few
    padded = jnp.pad(x_RD, ((0, few), (0, 0)))

    def one_block(index: jax.Array, out: jax.Array) -> jax.Array:
        own = {name: _matrix_of(value, expert_block[index], dtype) for name, value in parameters.items()}
        rows = lax.dynamic_slice_in_dim(padded, start_block[index], few)
        gate = _linear(rows, own, "w_gate") if "w_gate" in own else None
        done = _linear(activate(spec, gate, _linear(rows, own, "w_up")), own, "w_down")
        return lax.dynamic_update_slice_in_dim(out, done, start_block[index], axis=0)

    padded_out: jax.Array = lax.fori_loop(0, last_block_E[-1], one_block, jnp.zeros((num_rows + few, width), dtype))
    return padded_out[:num_rows]


def _few_rows_forward(
    spec: ExpertsSpec, block: int, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Arrays, jax.Array]]:
    return _experts_of_few_rows(spec, block, x_RD, parameters, size_E), (x_RD, parameters, size_E)


def _few_rows_backward(
    spec: ExpertsSpec, block: int, saved: tuple[jax.Array, Arrays, jax.Array], gradient_RD: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array | None], None]:
    return _experts_backward(spec, block, _experts_forward(spec, block, *saved)[1], gradient_RD)


_experts_of_few_rows.defvjp(_few_rows_forward, _few_rows_backward)
