"""Grouped products: rows sorted by expert times their expert's matrix. Spec: moezoo.core.reference.experts."""

from typing import Literal, NamedTuple

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import ExpertsSpec, GatedFeedForwardSpec
from moezoo.mlx_backend.adapter import AdaptedArray
from moezoo.mlx_backend.arrays import named
from moezoo.mlx_backend.kernels import codes
from moezoo.mlx_backend.kernels.activation import swiglu
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.kernels.x86.experts import sliced_product, swiglu_experts
from moezoo.mlx_backend.quantization import QuantizedArray
from moezoo.mlx_backend.runtime.typed import custom_function, to_ints

Path = Literal["slices", "gather_mm of rows"]

FEW_ROWS = 16
"""Rows per expert up to which the CPU uses blocks: for so few rows, slices do not pay for waiting for their sizes."""


def grouped_path() -> Path:
    """Return the implementation of grouped products on this platform.

    On the GPU, `gather_mm` takes sorted single rows. On the CPU it would compute one product per row, so each expert's
    rows are sliced and multiplied by a plain product; this needs the sizes in Python, so a step waits for the router
    once per layer. Few rows are gathered into padded blocks of one expert each, without waiting.
    """
    return "gather_mm of rows" if mx.default_device() == mx.Device(mx.gpu) else "slices"


def few_rows(num_rows: int, num_experts: int) -> bool:
    """Return True for so few rows that reading the matrices dominates the time, for example in decoding.

    Each row is then multiplied by its own expert's matrix instead of in blocks, so idle experts are never read.
    """
    return num_rows <= 2 * num_experts


class _Blocks(NamedTuple):
    """Padded blocks of rows of one expert each, with the position of each row in them.

    Row `slot_R[r]` of the padded rows holds row r; padded row i holds row `source_I[i]`, or padding where that is R.
    Unused rows, those beyond the sum of `size_E`, all map to the last padded row, which is then padding.
    """

    slot_R: mx.array
    source_I: mx.array
    expert_block: mx.array
    segment_E2: mx.array  # first padded row of each expert, and its end
    size: int


class Groups(NamedTuple):
    """Consecutive groups of rows, one per expert, to multiply as slices, in blocks, or row by row."""

    expert_R: mx.array  # the last expert for an unused row
    ends: list[int] | None = None  # end row of each group, if multiplied as slices
    blocks: _Blocks | None = None
    frozen: bool = False  # the matrices need no gradient


def group_rows(size_E: mx.array, num_rows: int, *, sliced: bool = False) -> Groups:
    """Plan the product of R rows that are sorted by expert. `sliced`: by slices in any case."""
    num_experts, end_E = size_E.shape[0], mx.cumsum(size_E)
    expert_R = mx.sum((mx.arange(num_rows)[:, None] >= end_E[None]).astype(mx.int32), axis=1)
    own_R = mx.minimum(expert_R, num_experts - 1).astype(mx.uint32)
    if sliced:
        return Groups(own_R, ends=to_ints(end_E))
    if grouped_path() == "gather_mm of rows" or few_rows(num_rows, num_experts):
        return Groups(own_R)
    if num_rows > FEW_ROWS * num_experts:
        return Groups(own_R, ends=to_ints(mx.stop_gradient(end_E)))
    return Groups(own_R, blocks=_plan_blocks(size_E, end_E, own_R, expert_R < num_experts))


def are_frozen(experts: nn.Module) -> bool:
    """Return True if no matrix of the experts trains; factors of adapters may."""
    trained = named(experts.trainable_parameters())
    return not any(name.startswith("w_") and "." not in name for name in trained)


def _plan_blocks(size_E: mx.array, end_E: mx.array, expert_R: mx.array, used_R: mx.array) -> _Blocks:
    """Assign rows to blocks. The number of blocks is an upper bound, hence static."""
    num_rows, num_experts = expert_R.size, size_E.shape[0]
    block = block_rows(num_rows, num_experts)
    num_blocks = num_rows // block + num_experts
    blocks_E = (size_E + block - 1) // block
    last_block_E = mx.cumsum(blocks_E)
    first_block_E, start_E = last_block_E - blocks_E, end_E - size_E
    row_R, index = mx.arange(num_rows), mx.arange(num_blocks)
    expert_block = mx.sum((index[:, None] >= last_block_E[None]).astype(mx.int32), axis=1)
    place_R = row_R - start_E[expert_R] + first_block_E[expert_R] * block
    slot_R = mx.where(used_R, place_R, num_blocks * block - 1)
    source_I = mx.full((num_blocks * block,), num_rows, mx.int32)
    return _Blocks(
        slot_R,
        source_I.at[slot_R].add(mx.where(used_R, row_R - num_rows, 0)),
        mx.minimum(expert_block, num_experts - 1).astype(mx.uint32),
        mx.stack([first_block_E * block, last_block_E * block], axis=1).astype(mx.uint32),
        block,
    )


def block_rows(num_rows: int, num_experts: int) -> int:
    """Return the rows per block: about half the mean group size, a power of two from 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= 0.75 * num_rows / num_experts:
        block *= 2
    return block


Matrices = mx.array | QuantizedArray | AdaptedArray
"""One matrix per expert [E, D, F]."""


def grouped_product(x_RD: mx.array, w_EDF: Matrices, groups: Groups) -> mx.array:
    """Spec: moezoo.core.reference.experts.grouped_product; casts w_EDF to the dtype of x_RD. Adapters add their own."""
    if isinstance(w_EDF, AdaptedArray):
        of_factors = groups._replace(frozen=False)
        low_RK = grouped_product(x_RD, w_EDF.lora_a, of_factors)
        return grouped_product(x_RD, w_EDF.base, groups) + grouped_product(low_RK, w_EDF.scaled_b, of_factors)
    if isinstance(w_EDF, QuantizedArray) and groups.ends is not None:
        return codes.sliced_product(x_RD, w_EDF, groups.ends)
    if grouped_path() == "gather_mm of rows" or (groups.ends is None and groups.blocks is None):
        return product_of_rows(x_RD[:, None, :], w_EDF, groups.expert_R, in_order=True)[:, 0, :]
    assert not isinstance(w_EDF, QuantizedArray)  # has no blocks
    if groups.ends is not None:
        return _sliced_product(x_RD, w_EDF, groups.ends, frozen=groups.frozen)
    assert groups.blocks is not None
    padded = _blocked_product(_spread(x_RD, groups.blocks), w_EDF.astype(x_RD.dtype), groups.blocks)
    return _collect(padded, groups.blocks)


def is_plain_swiglu(spec: ExpertsSpec) -> bool:
    """Return True for the experts that `grouped_swiglu` computes: the common ones."""
    return isinstance(spec, GatedFeedForwardSpec) and spec.kind == "swiglu" and spec.limit is None and not spec.bias


def grouped_swiglu(
    x_RD: mx.array,
    gate_EDF: Matrices,
    up_EDF: Matrices,
    down_EFD: Matrices,
    groups: Groups,
) -> mx.array:
    """Return the feed-forward of SwiGLU experts without biases; in one kernel on x86, if the rows are many."""
    matrices = (gate_EDF, up_EDF, down_EFD)
    quantized = [w_EDF for w_EDF in matrices if isinstance(w_EDF, QuantizedArray)]
    if groups.ends is not None and len(quantized) == len(matrices):
        return codes.grouped_swiglu(x_RD, quantized, groups.ends)
    plain = [w_EDF for w_EDF in matrices if isinstance(w_EDF, mx.array)]
    if is_x86_cpu() and groups.ends is not None and len(plain) == len(matrices):
        x, gate, up, down = (array.astype(mx.float32) for array in (x_RD, *plain))
        return swiglu_experts(x, gate, up, down, groups.ends, frozen=groups.frozen).astype(x_RD.dtype)
    gate, up = (grouped_product(x_RD, w_EDF, groups) for w_EDF in (gate_EDF, up_EDF))
    return grouped_product(swiglu(gate, up, in_blocks=groups.ends is not None), down_EFD, groups)


def product_of_rows(
    x_R1D: mx.array,
    w_EDF: Matrices,
    expert_R: mx.array,
    row_R: mx.array | None = None,
    *,
    in_order: bool = False,
) -> mx.array:
    """Multiply each row by its own expert's matrix: blocks would read every expert, too slow to decode a token.

    R stands for any number of axes. `row_R`: the number of the row that each expert takes, uint32; None: its own.
    `in_order`: the experts ascend.
    """
    if isinstance(w_EDF, AdaptedArray):
        low_R1K = product_of_rows(x_R1D, w_EDF.lora_a, expert_R, row_R, in_order=in_order)
        more = product_of_rows(low_R1K, w_EDF.scaled_b, expert_R, in_order=in_order)
        return product_of_rows(x_R1D, w_EDF.base, expert_R, row_R, in_order=in_order) + more
    if isinstance(w_EDF, QuantizedArray):
        return codes.product_of_rows(x_R1D, w_EDF, expert_R, row_R, in_order=in_order)
    dtype = x_R1D.dtype
    if grouped_path() == "gather_mm of rows" or dtype == w_EDF.dtype == mx.float32:
        return mx.gather_mm(x_R1D, w_EDF.astype(dtype), row_R, expert_R, sorted_indices=in_order)
    # On the CPU, gather_mm supports only float32.
    rows_R1D = x_R1D if row_R is None else x_R1D.reshape(-1, 1, x_R1D.shape[-1])[row_R]
    matrices_RDF = w_EDF[expert_R].astype(dtype).astype(mx.float32)
    return (rows_R1D.astype(mx.float32) @ matrices_RDF).astype(dtype)


def _sliced_product(x_RD: mx.array, w_EDF: mx.array, ends: list[int], *, frozen: bool) -> mx.array:
    """Multiply each expert's slice of rows by its matrix, in float32 like all CPU products; unused rows return 0."""
    dtype = x_RD.dtype
    if is_x86_cpu():
        return sliced_product(x_RD.astype(mx.float32), w_EDF.astype(mx.float32), ends, frozen=frozen).astype(dtype)

    def product(rows_RD: mx.array, matrices: mx.array) -> mx.array:
        *slices, unused = mx.split(rows_RD[None], ends, axis=1)
        # Trap: one Slice per expert costs as much as a small product; a single Split does not.
        parts = [
            rows @ matrix for rows, matrix in zip(slices, mx.split(matrices, len(ends)), strict=True) if rows.shape[1]
        ]
        if unused.shape[1]:
            parts.append(mx.zeros((1, unused.shape[1], matrices.shape[-1])))
        return mx.concatenate(parts, axis=1)[0]

    @custom_function
    def multiply(rows_RD: mx.array, matrices: mx.array) -> mx.array:
        return product(rows_RD, matrices)

    @multiply.vjp
    def _(primals: tuple[mx.array, mx.array], gradient: mx.array, out: mx.array) -> tuple[mx.array, mx.array]:
        rows_RD, matrices = primals
        segment_E2 = mx.array(list(zip([0, *ends[:-1]], ends, strict=True)), mx.uint32)
        return product(gradient, matrices.swapaxes(1, 2)), mx.segmented_mm(rows_RD.T, gradient, segment_E2)

    return multiply(x_RD.astype(mx.float32), w_EDF.astype(mx.float32)).astype(dtype)


def _spread(x_RD: mx.array, blocks: _Blocks) -> mx.array:
    """Scatter rows [R, D] to padded rows [I, D], zero-padded. Its gradient is `_collect`: each row is used once."""

    @custom_function
    def spread(rows: mx.array) -> mx.array:
        padded = mx.concatenate([rows, mx.zeros((1, rows.shape[1]), rows.dtype)])
        return padded[blocks.source_I]

    @spread.vjp
    def _(rows: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient[blocks.slot_R]

    return spread(x_RD)


def _collect(x_ID: mx.array, blocks: _Blocks) -> mx.array:
    """Gather rows [R, D] from padded rows [I, D]. Its gradient is `_spread`."""

    @custom_function
    def collect(padded: mx.array) -> mx.array:
        return padded[blocks.slot_R]

    @collect.vjp
    def _(padded: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        rows = mx.concatenate([gradient, mx.zeros((1, gradient.shape[1]), gradient.dtype)])
        return rows[blocks.source_I]

    return collect(x_ID)


def _blocked_product(x_ID: mx.array, w_EDF: mx.array, blocks: _Blocks) -> mx.array:
    """Multiply padded rows by their block's expert. On the CPU, gather_mm and segmented_mm support only float32."""
    dtype = x_ID.dtype

    def product(rows_ID: mx.array, matrices: mx.array) -> mx.array:
        rows = rows_ID.reshape(-1, blocks.size, rows_ID.shape[-1])
        out = mx.gather_mm(rows, matrices, rhs_indices=blocks.expert_block, sorted_indices=True)
        return out.reshape(-1, matrices.shape[-1])

    @custom_function
    def multiply(rows_ID: mx.array, matrices: mx.array) -> mx.array:
        return product(rows_ID, matrices)

    @multiply.vjp
    def _(primals: tuple[mx.array, mx.array], gradient: mx.array, out: mx.array) -> tuple[mx.array, mx.array]:
        rows_ID, matrices = primals
        return product(gradient, matrices.swapaxes(1, 2)), mx.segmented_mm(rows_ID.T, gradient, blocks.segment_E2)

    return multiply(x_ID.astype(mx.float32), w_EDF.astype(mx.float32)).astype(dtype)
