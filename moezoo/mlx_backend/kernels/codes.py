"""Products with weights in codes: by MLX's kernels, on x86 by NumPy, else with decoded numbers.

On the GPU, arithmetic is in the dtype of the inputs. On a CPU it is float32, which is faster there than bfloat16.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from moezoo.mlx_backend.adapter import Adapted
from moezoo.mlx_backend.arrays import canonical_name
from moezoo.mlx_backend.kernels.activation import swiglu
from moezoo.mlx_backend.kernels.x86 import codes as x86
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.quantization import QuantizedArray, dequantize
from moezoo.mlx_backend.runtime.typed import custom_function

contract = mx.einsum
"""Any einsum, under a name of its own: the strings are those of the callers."""

FEW_NUMBERS = 2**14
"""Numbers of a matrix up to which MLX decodes them in less time than waiting for the inputs takes, on x86."""


def in_codes(module: nn.Module) -> str:
    """Return how many parameters stay in codes, and what multiplies them, for the header of a run; empty if none."""
    codes = named_codes(module)
    formats = "; ".join(sorted({str(weight.format) for weight in codes.values()}))
    if is_x86_cpu():
        products = "decoded by NumPy in pieces, on all cores"
    elif all(has_kernel(weight, mx.float32) for weight in codes.values()):
        products = "multiplied by MLX's kernels"
    else:
        products = "decoded matrix by matrix in float32, or multiplied by MLX's kernels in the dtype of the scales"
    return f"{len(codes)} parameters ({formats}), {products}" if codes else ""


def named_codes(module: nn.Module) -> dict[str, QuantizedArray]:
    """Return the parameters that stay in codes, by path."""
    return {
        canonical_name(f"{path}.{name}"): value
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, QuantizedArray)
    }


def has_kernel(w: QuantizedArray, dtype: mx.Dtype) -> bool:
    """Return True if MLX multiplies inputs of this dtype by codes, with the numbers that `dequantize` returns.

    Trap: MLX's kernels do not round a number to the dtype of its scales, as `dequantize` does. In float32, logits would
    differ by 0.2; in bfloat16 that is lost among the other roundings.
    """
    if w.format.is_only_read:
        return False
    return w.biases is None or w.scales.dtype == (dtype if _on_gpu() else mx.float32)


def product(subscripts: str, x: mx.array, w: QuantizedArray) -> mx.array:
    """Return the einsum of x and decoded codes, in the dtype of x.

    Nothing is decoded beforehand where rows of codes run over the axes that are summed over, or over the last axes of
    the output. Axes may be shared: they are then the first of the codes.
    """
    form = _form(subscripts, x.ndim, w.lead, w.packed)
    if form is None:
        return contract(subscripts, x, dequantize(w).astype(x.dtype))
    size = dict(zip(form.x, x.shape, strict=True)) | dict(zip(form.w, w.shape, strict=True))

    def shape(letters: str) -> list[int]:
        return [size[letter] for letter in letters]

    inner, outer = (form.packed, form.lead) if form.transposed else (form.lead, form.packed)
    shared = shape(form.shared)
    own = [1 if letter not in form.x else size[letter] for letter in form.shared]
    ordered = _transposed(x, form.x, "".join(letter for letter in form.shared if letter in form.x) + form.rows + inner)
    rows = ordered.reshape(*own, -1, math.prod(shape(inner)))
    out = _product(rows, w, shared, transposed=form.transposed).astype(x.dtype)
    order = form.shared + form.rows + outer
    return _transposed(out.reshape(shape(order)), order, form.out)


class _Form(NamedTuple):
    """Letters of x, w and the output, and of the codes: shared axes, then `lead` and `packed`; `rows`: those of x."""

    x: str
    w: str
    out: str
    shared: str
    lead: str
    packed: str
    rows: str
    transposed: bool  # codes run over the axes that are summed over


@functools.cache
def _form(subscripts: str, ndim: int, lead: tuple[int, ...], packed: tuple[int, ...]) -> _Form | None:
    """Return the form of a product without decoding, or None."""
    x, w, out = subscripts.replace("->", ",").split(",")
    more = "abcdefgh"[: ndim - len(x.replace("...", ""))]
    x, out = x.replace("...", more), out.replace("...", more)
    inner = "".join(letter for letter in x if letter in w and letter not in out)
    led, row = ("".join(w[axis] for axis in axes) for axes in (lead, packed))
    both = "".join(letter for letter in led if letter in x and letter in out)
    rows = "".join(letter for letter in x if letter not in w)
    if row == inner:
        shared, transposed = both, True
    elif not set(row) & set(x) and set(inner) <= set(led):
        shared, transposed = "".join(letter for letter in led if letter in out), False
    else:
        return None
    return _Form(x, w, out, shared, led[len(shared) :], row, rows, transposed) if led.startswith(shared) else None


def _transposed(x: mx.array, axes: str, order: str) -> mx.array:
    return x if axes == order else x.transpose([axes.index(letter) for letter in order])


def _product(x: mx.array, w: QuantizedArray, shared: list[int], *, transposed: bool) -> mx.array:
    """Multiply rows [*shared, R, I] by codes [*shared, O, words of I], or [*shared, I, words of O]."""
    x = _input(x)
    if is_x86_cpu() and transposed and len(shared) < 2 and math.prod(w.shape) > FEW_NUMBERS:
        return x86.dense_product(x, w)
    signed = w.format.mode == "signed" and w.row_size % w.format.group_size == 0
    if signed or has_kernel(w, x.dtype):
        codes, scales = (array.reshape(*shared, -1, array.shape[-1]) for array in (w.codes, w.scales))
        biases, form = None if w.biases is None else w.biases.reshape(scales.shape), w.format
        if signed:  # MLX's kernels do not round numbers, which makes an affine one with this bias the same
            scales = scales if scales.dtype == x.dtype else scales.astype(mx.float32)
            biases = scales * -(2.0 ** (form.bits - 1))
        mode = "affine" if signed else form.mode
        return mx.quantized_matmul(x, codes, scales, biases, transposed, form.group_size, form.bits, mode)

    def decoded() -> mx.array:
        matrix = _rows(w, slice(None)).astype(x.dtype).reshape(*shared, -1, w.row_size)
        return matrix.swapaxes(-1, -2) if transposed else matrix

    @custom_function
    def multiply(x: mx.array) -> mx.array:
        return x @ decoded()

    @multiply.vjp
    def _(x: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return gradient @ decoded().swapaxes(-1, -2)  # decoded again, so that no matrix is kept until then

    return multiply(x)


def decodes_by_expert(experts: nn.Module, dtype: mx.Dtype) -> bool:
    """Return True if there are matrices that are decoded for all of an expert's rows: on the CPU, or without kernel."""
    return not all(_on_gpu() and has_kernel(w, dtype) for w in _codes_of(experts))


def indexes_experts(experts: nn.Module, dtype: mx.Dtype) -> bool:
    """Return True if `product_of_rows` takes all matrices that are codes."""
    return is_x86_cpu() or all(has_kernel(w, dtype) for w in _codes_of(experts))


def _codes_of(module: nn.Module) -> list[QuantizedArray]:
    parts = (vars(inner) for inner in (module, *(inner for inner in module.values() if isinstance(inner, Adapted))))
    return [value for own in parts for value in own.values() if isinstance(value, QuantizedArray)]


def product_of_rows(
    x_R1D: mx.array, w: QuantizedArray, expert_R: mx.array, row_R: mx.array | None, *, in_order: bool
) -> mx.array:
    """See moezoo.mlx_backend.kernels.grouped_product.product_of_rows."""
    dtype, x_R1D = x_R1D.dtype, _input(x_R1D)
    assert (w.lead, w.packed) == ((0, 2), (1,)), "rows of codes run over the inputs of an expert"
    if is_x86_cpu():
        return x86.product_of_rows(x_R1D, w, expert_R, row_R).astype(dtype)
    return mx.gather_qmm(
        x_R1D,
        w.codes,
        w.scales,
        w.biases,
        lhs_indices=row_R,
        rhs_indices=expert_R,
        group_size=w.format.group_size,
        bits=w.format.bits,
        mode=w.format.mode,
        sorted_indices=in_order,
    ).astype(dtype)


def sliced_product(x_RD: mx.array, w: QuantizedArray, ends: list[int]) -> mx.array:
    """Multiply each expert's slice of rows by its matrix, decoded for it; unused rows return 0."""
    dtype, x_RD = x_RD.dtype, _input(x_RD)
    assert (w.lead, w.packed) == ((0, 2), (1,)), "rows of codes run over the inputs of an expert"
    if is_x86_cpu():
        return x86.sliced_product(x_RD, w, ends).astype(dtype)

    def product(rows: mx.array, width: int, *, transposed: bool) -> mx.array:
        parts = []
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                matrix = _rows(w, expert).astype(rows.dtype)
                parts.append(rows[start:end] @ (matrix.T if transposed else matrix))
                mx.eval(parts[-1])  # so that no two experts' matrices are there at a time
        parts.append(mx.zeros((len(rows) - ends[-1], width), rows.dtype))
        return mx.concatenate(parts)

    @custom_function
    def multiply(x_RD: mx.array) -> mx.array:
        return product(x_RD, w.codes.shape[1], transposed=True)

    @multiply.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return product(gradient, x_RD.shape[1], transposed=False)

    return multiply(x_RD).astype(dtype)


def grouped_swiglu(x_RD: mx.array, matrices: Sequence[QuantizedArray], ends: list[int]) -> mx.array:
    """Return the feed-forward of SwiGLU experts without biases, by matrices for gate, up and down."""
    gate, up, down = matrices
    dtype, x_RD = x_RD.dtype, _input(x_RD)
    if is_x86_cpu():
        return x86.swiglu_experts(x_RD, gate, up, down, ends).astype(dtype)
    hidden = swiglu(sliced_product(x_RD, gate, ends), sliced_product(x_RD, up, ends))
    return sliced_product(hidden, down, ends).astype(dtype)


def _rows(w: QuantizedArray, part: int | slice) -> mx.array:
    """Decode a part of the first axis of codes: numbers [..., size of a row], with the axes of the codes."""
    codes, biases = w.codes[part], None if w.biases is None else w.biases[part]
    axes, shape = tuple(range(codes.ndim)), (*codes.shape[:-1], w.row_size)
    rows = replace(w, codes=codes, scales=w.scales[part], biases=biases, shape=shape, lead=axes[:-1], packed=axes[-1:])
    return dequantize(rows)


def _input(x: mx.array) -> mx.array:
    return x if _on_gpu() else x.astype(mx.float32)


def _on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)
