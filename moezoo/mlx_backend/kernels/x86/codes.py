"""Products with codes: a core decodes a piece of a matrix that stays in its cache, and multiplies it.

MLX's own product with codes takes 0.9 ns per number and row on one core; decoding by NumPy 0.3, for all rows at once.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import ml_dtypes
import mlx.core as mx
import numpy as np

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import Array, decode_rows, scale_values
from moezoo.core.tokens import Integers
from moezoo.mlx_backend.kernels.x86.activation import silu, swiglu_backward
from moezoo.mlx_backend.quantization import QuantizedArray
from moezoo.mlx_backend.runtime.cores import Floats, blocks, cores, on_all_cores, one_by_one, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function

PIECE = 2**19
"""Numbers decoded at a time: fewer, and threads would wait for each other to hold Python's lock."""

FEW_PIECES = 2
"""Pieces up to which one core is faster than two, of which the second has to be woken up."""

FEW_ROWS = 16
"""Rows up to which sums of groups are scaled; above, numbers are."""


class Matrix(NamedTuple):
    """Rows of codes: bytes uint8 [O, bytes], scales and biases [O, groups], of rows of `size` numbers."""

    format: QuantizationFormat
    size: int
    codes: Array
    scales: Array
    biases: Array | None

    @property
    def numbers(self) -> int:
        """Count of numbers."""
        return self.size * math.prod(self.codes.shape[:-1])

    @property
    def rounds(self) -> bool:
        """True if numbers are rounded, as product and as sum with the bias, to a dtype narrower than float32."""
        return self.biases is not None and self.scales.dtype != np.float32

    def part(self, rows: slice | int | Integers) -> "Matrix":
        """Return some of the rows, or the matrix of one expert."""
        biases = None if self.biases is None else self.biases[rows]
        return self._replace(codes=self.codes[rows], scales=self.scales[rows], biases=biases)

    def flat(self) -> "Matrix":
        """Merge the leading axes."""
        biases = None if self.biases is None else self.biases.reshape(-1, self.biases.shape[-1])
        codes, scales = (array.reshape(-1, array.shape[-1]) for array in (self.codes, self.scales))
        return self._replace(codes=codes, scales=scales, biases=biases)

    def pieces(self) -> Iterator[slice]:
        """Yield consecutive slices of rows, to decode one at a time."""
        step = max(1, PIECE // self.size)
        return (slice(start, min(start + step, len(self.codes))) for start in range(0, len(self.codes), step))


Work = Callable[[Floats, Matrix, Floats], list[Callable[[], None]]]
"""A product of rows with a matrix, `work(rows, matrix, out)`, as pieces of work."""


def matrix(w: QuantizedArray) -> Matrix:
    """Return views of codes [*lead, words], with their leading axes."""
    biases = None if w.biases is None else _view(w.biases)
    return Matrix(w.format, w.row_size, _view(w.codes).view(np.uint8), _view(w.scales), biases)


def decoded(w: Matrix, index: Integers) -> Floats:
    """Return the rows of numbers with these indices."""
    rows = w.part(index)
    return decode_rows(w.format, rows.codes.view(np.uint32), rows.scales, rows.biases, w.size)


def product(x: Floats, w: Matrix, out: Floats) -> list[Callable[[], None]]:
    """Return pieces of work which together write `x @ w.T` to out [R, O], for rows x [R, I]."""
    rows = _arranged(x, w)
    return [partial(_piece, rows, w.part(piece), out[:, piece]) for piece in w.pieces()]


def product_with_rows(gradient: Floats, w: Matrix, out: Floats) -> list[Callable[[], None]]:
    """Return pieces of work which together write `gradient @ w` to out [R, I], for a gradient [R, O].

    Each core takes some of the rows and decodes the whole matrix: it adds to the same output for every piece of it.
    """
    step = max(1, -(-len(gradient) // cores()))
    starts = range(0, len(gradient), step)
    return [partial(_add_pieces, gradient[start : start + step], w, out[start : start + step]) for start in starts]


def _add_pieces(gradient: Floats, w: Matrix, out: Floats) -> None:
    planes = _cycle(w.format.bits)[0]
    total = np.zeros((planes, len(out), w.size // planes), np.float32)
    for piece in w.pieces():
        part = w.part(piece)
        number, spare = _scratch((planes, len(part.codes), w.size // planes))
        _read_scaled(part, number, spare)
        for sum_RI, plane in zip(total, number, strict=True):
            sum_RI += gradient[:, piece] @ plane
    out[...] = total.transpose(1, 2, 0).reshape(out.shape)
    if w.biases is not None and not w.rounds:
        out += np.repeat(gradient @ w.biases, w.format.group_size, axis=1)[:, : w.size]


def dense_product(x: mx.array, w: QuantizedArray) -> mx.array:
    """Multiply rows [*shared, R, I] by decoded codes [*shared, ..., words of I], where x has up to one shared axis."""
    codes = matrix(w)
    outputs = w.codes.size // w.codes.shape[-1] // (len(x) if x.ndim == 3 else 1)

    def multiply(work: Work, x: mx.array, width: int) -> mx.array:
        (rows,) = values(x)
        out_RO, out = zeros(*x.shape[:-1], width)
        parts = [(rows, codes, out)]
        if x.ndim == 3:
            parts = [(rows[k], codes.part(k), out[k]) for k in range(len(rows))]
        _run(piece for each, part, to in parts for piece in work(each, part.flat(), to))
        return out_RO

    @custom_function
    def forward(x: mx.array) -> mx.array:
        return multiply(product, x, outputs)

    @forward.vjp
    def _(x: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        return multiply(product_with_rows, gradient, w.row_size)

    return forward(x.astype(mx.float32))


def product_of_rows(x_R1D: mx.array, w: QuantizedArray, expert_R: mx.array, row_R: mx.array | None = None) -> mx.array:
    """Multiply rows, R being any number of axes, by their experts' matrices [E, F, words of D]; each once decoded."""
    (expert,) = values(expert_R.reshape(-1))
    row = np.arange(expert.size) if row_R is None else np.asarray(row_R).reshape(-1)
    order = np.argsort(expert, kind="stable")
    ends = np.cumsum(np.bincount(expert, minlength=len(w.codes))).tolist()

    @custom_function
    def forward(x_RD: mx.array) -> mx.array:
        (x,) = values(x_RD)
        sorted_RF = np.empty((expert.size, w.codes.shape[1]), np.float32)
        _run(_of_experts(product, x[row[order]], matrix(w), ends, sorted_RF))
        out_RF, out = zeros(*sorted_RF.shape)
        out[order] = sorted_RF
        return out_RF

    @forward.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        (of_out,) = values(gradient)
        sorted_RD = np.zeros((expert.size, x_RD.shape[1]), np.float32)
        _run(_of_experts(product_with_rows, of_out[order], matrix(w), ends, sorted_RD))
        of_x_RD, of_x = zeros(*x_RD.shape)
        np.add.at(of_x, row[order], sorted_RD)
        return of_x_RD

    return forward(x_R1D.astype(mx.float32).reshape(-1, x_R1D.shape[-1])).reshape(*expert_R.shape, 1, -1)


def sliced_product(x_RD: mx.array, w: QuantizedArray, ends: list[int]) -> mx.array:
    """See moezoo.mlx_backend.kernels.x86.experts.sliced_product, for codes [E, F, words of D], without gradient."""

    @custom_function
    def forward(x_RD: mx.array) -> mx.array:
        (x,) = values(x_RD)
        out_RF, out = zeros(len(x), w.codes.shape[1])
        _run(_of_experts(product, x, matrix(w), ends, out))
        return out_RF

    @forward.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        (of_out,) = values(gradient)
        of_x_RD, of_x = zeros(*x_RD.shape)
        _run(_of_experts(product_with_rows, of_out, matrix(w), ends, of_x))
        return of_x_RD

    return forward(x_RD)


def swiglu_experts(
    x_RD: mx.array, gate: QuantizedArray, up: QuantizedArray, down: QuantizedArray, ends: list[int]
) -> mx.array:
    """See moezoo.mlx_backend.kernels.x86.experts.swiglu_experts, for codes, which have no gradient."""
    used, kept = ends[-1], list[Floats]()

    @custom_function
    def forward(x_RD: mx.array) -> mx.array:
        (x,) = values(x_RD)
        out_RD, out = zeros(*x.shape)
        hidden, raised, kept_gate = (np.empty((used, gate.codes.shape[1]), np.float32) for _ in range(3))
        gates = _of_experts(product, x, matrix(gate), ends, kept_gate)
        _run([*gates, *_of_experts(product, x, matrix(up), ends, raised)])
        kept[:] = kept_gate, raised

        def activate(rows: slice) -> None:
            np.multiply(silu(kept_gate[rows]), raised[rows], out=hidden[rows])

        _run(partial(activate, rows) for rows in blocks(*hidden.shape))
        _run(_of_experts(product, hidden, matrix(down), ends, out))
        return out_RD

    @forward.vjp
    def _(x_RD: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        (of_out,), (kept_gate, raised) = values(gradient), kept
        of_up, of_gate, spare = (
            np.zeros_like(raised),
            np.empty_like(raised),
            np.zeros((used, x_RD.shape[1]), np.float32),
        )
        _run(_of_experts(product_with_rows, of_out, matrix(down), ends, of_up))
        for rows in blocks(*raised.shape):
            swiglu_backward(kept_gate[rows], raised[rows], of_up[rows], of_gate[rows])
        kept.clear()
        of_x_RD, of_x = zeros(*x_RD.shape)
        _run(_of_experts(product_with_rows, of_gate, matrix(gate), ends, of_x))
        _run(_of_experts(product_with_rows, of_up, matrix(up), ends, spare))
        of_x[:used] += spare
        return of_x_RD

    return forward(x_RD)


def _of_experts(work: Work, x: Floats, w: Matrix, ends: list[int], out: Floats) -> list[Callable[[], None]]:
    """Return pieces of work which write the products of each expert's rows, `product` or `product_with_rows`."""
    pieces = []
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            pieces += work(x[start:end], w.part(expert), out[start:end])
    return pieces


def _run(pieces: Iterable[Callable[[], object]]) -> None:
    """Run pieces of work, on all cores unless there are few."""
    every = list(pieces)
    (on_all_cores if len(every) > FEW_PIECES else one_by_one)(every)


class _Rows(NamedTuple):
    """Rows [R, I] in the order of decoded numbers, and their sums over groups [R, groups], which biases multiply.

    Few rows are [n, groups, group / n, R], others [n, R, I / n].
    """

    x: Floats
    sum_RG: Floats | None
    few: bool


def _arranged(x: Floats, w: Matrix) -> _Rows:
    size, group, planes = w.size, w.format.group_size, _cycle(w.format.bits)[0]
    sums = None if w.biases is None else x.reshape(len(x), -1, group).sum(-1)
    ordered = x.reshape(len(x), -1, planes).transpose(2, 0, 1)
    few = len(x) <= FEW_ROWS and size % group == 0 and not w.rounds
    if few:
        grouped = ordered.reshape(planes, len(x), -1, group // planes).transpose(0, 2, 3, 1)
        return _Rows(np.ascontiguousarray(grouped), sums, few)
    return _Rows(np.ascontiguousarray(ordered), sums, few)


def _piece(rows: _Rows, w: Matrix, out: Floats) -> None:
    """Write the product with a piece of a matrix to out [R, O]."""
    shape = (_cycle(w.format.bits)[0], len(w.codes), w.size // _cycle(w.format.bits)[0])
    number, spare = _scratch(shape)
    if rows.few:
        _read_numbers(w, spare, number)
        scale = scale_values(w.format, w.scales)
        grouped = number.reshape(*shape[:2], -1, w.format.group_size // shape[0]).swapaxes(1, 2)
        sum_GOR = (grouped @ rows.x).sum(0)
        sum_GOR *= scale.T[..., None]
        out[...] = sum_GOR.sum(0).T
    else:
        _read_scaled(w, number, spare)
        np.matmul(rows.x[0], number[0].T, out=out)
        for x, plane in zip(rows.x[1:], number[1:], strict=True):
            out += x @ plane.T
    if w.biases is not None and not w.rounds:
        out += rows.sum_RG @ w.biases.T


def _read_scaled(w: Matrix, number: Floats, spare: Floats) -> None:
    """Write numbers times their scales [n, O, I / n], with their biases where both are rounded. `spare`: scratch."""
    _read_numbers(w, spare, number)
    per_group, repeated = w.format.group_size // len(number), spare[0]
    _repeat(scale_values(w.format, w.scales), per_group, repeated)
    number *= repeated
    if w.rounds:
        assert w.biases is not None
        _round(number, spare, w.scales.dtype)
        _repeat(w.biases.astype(np.float32), per_group, repeated)
        number += repeated
        _round(number, spare, w.scales.dtype)


def _repeat(groups: Array, times: int, out: Floats) -> None:
    """Write each value of [O, groups] as often as a plane has numbers of its group to out [O, I / n]."""
    if out.shape[1] == groups.shape[1] * times:
        out.reshape(*groups.shape, times)[...] = groups[..., None]
    else:
        out[...] = np.repeat(groups, times, axis=1)[:, : out.shape[1]]


def _round(number: Floats, spare: Floats, dtype: np.dtype[Any]) -> None:
    """Round to the nearest number of another dtype, ties to even."""
    if dtype != ml_dtypes.bfloat16:
        number[...] = number.astype(dtype)
        return
    # Eight significant bits by Veltkamp's splitting: c = x (2^16 + 1), and c - (c - x) in float32.
    np.multiply(number, np.float32(2**16 + 1), out=spare)
    np.subtract(spare, number, out=number)
    np.subtract(spare, number, out=number)


def _read_numbers(w: Matrix, spare: Floats, number: Floats) -> None:
    """Write numbers of codes without scale [n, O, I / n]: plane k has each n-th one, from k on. `spare`: scratch."""
    code = spare.view(np.uint8).reshape(-1)[: number.size].reshape(number.shape)
    _unpack(w.codes, w.format.bits, _cycle(w.format.bits)[1], code)
    match w.format.mode:
        case "affine":
            number[...] = code
        case "signed":
            np.subtract(code, np.float32(2 ** (w.format.bits - 1)), out=number)
        case "mxfp4" | "nvfp4" | "fp4":
            np.take(_E2M1, code, out=number, mode="clip")
        case _:
            np.take(_E4M3, code, out=number, mode="clip")


def _unpack(codes: Array, bits: int, per_cycle: int, out: Array) -> None:
    """Write codes of bytes [O, bytes] to out [n, O, I / n]; n codes take `per_cycle` bytes."""
    parts = [np.ascontiguousarray(codes[:, k::per_cycle]) for k in range(per_cycle)] if per_cycle > 1 else [codes]
    for k, plane in enumerate(out):
        byte, shift = divmod(k * bits, 8)
        np.right_shift(parts[byte], shift, out=plane)
        if shift + bits > 8:
            plane |= parts[byte + 1] << (8 - shift)
        if shift + bits != 8:
            plane &= 2**bits - 1


@cache
def _cycle(bits: int) -> tuple[int, int]:
    """Return the number of codes after which borders of bytes repeat, and their bytes."""
    codes = next(number for number in (1, 2, 4, 8) if number * bits % 8 == 0)
    return codes, codes * bits // 8


_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_local = threading.local()


def _scratch(shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return two arrays of this thread."""
    size = math.prod(shape)
    if size > getattr(_local, "size", 0):
        _local.size, _local.arrays = size, np.empty((2, size), np.float32)
    first, second = (array[:size].reshape(shape) for array in _local.arrays)
    return first, second


def _view(array: mx.array) -> Array:
    """Return a view of an evaluated array."""
    if array.dtype == mx.bfloat16:
        return np.asarray(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.asarray(array)
