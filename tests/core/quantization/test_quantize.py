"""Quantization: equal to `mx.quantize` where MLX is installed, and to the formulas everywhere."""

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.errors import CheckpointError
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.quantize import pack, quantize, quantize_weight
from moezoo.core.quantization.weight import QuantizedWeight, decode_rows, unpack
from moezoo.core.reference.quantization import dequantize
from tests.support.backends_available import require_backend
from tests.support.quantized import FORMATS

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
QUANTIZABLE = [format for format in FORMATS if not format.is_only_read]
SIZE = 256


def rows(dtype, format):
    """Return rows [n, 256]: normal ones of every magnitude, and edge cases of groups."""
    random = np.random.default_rng(5)
    normal = random.normal(size=(40, SIZE))
    outlier = normal[0].copy()
    outlier[[5, 70, 140, 250]] = 1000, -1000, 60000, -60000
    borders = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    found = [
        *normal,
        *(normal[:20] * 2.0 ** np.linspace(-20, 12, 20)[:, None]),
        np.zeros(SIZE),
        np.full(SIZE, -0.0),
        np.full(SIZE, 0.3),
        np.full(SIZE, -0.7),
        np.abs(normal[1]),
        -np.abs(normal[2]),
        outlier,
        np.arange(SIZE) / 2 - 64,  # ties of codes
        random.integers(-8, 8, SIZE) / 8,
        *(np.tile(borders * 2.0**power, SIZE // 16) for power in (-6, -1, 0, 3)),
        np.where(np.arange(SIZE) < 128, normal[3] * 1e-7, normal[3]),  # subnormal in float16
    ]
    if format.mode == "affine":
        found.append(normal[4] * 1e-40)  # subnormal in float32
    return np.stack(found).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZABLE, ids=str)
def test_equal_to_mlx_bit_for_bit(format, dtype):
    require_backend("mlx")
    import mlx.core as mx

    values = rows(DTYPES[dtype], format)
    array = mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
    expected = mx.quantize(array, group_size=format.group_size, bits=format.bits, mode=format.mode)
    own = [array for array in quantize(values, format) if array is not None]
    for found, theirs in zip(own, expected, strict=True):
        stored = np.array(theirs.view(mx.uint16)) if theirs.dtype == mx.bfloat16 else np.array(theirs)
        assert found.tobytes() == stored.tobytes()


@pytest.mark.parametrize("format", QUANTIZABLE, ids=str)
def test_error_is_at_most_a_step(format):
    values = np.random.default_rng(0).normal(size=(8, SIZE)).astype(np.float32)
    codes, scales, biases = quantize(values, format)
    error = np.abs(decode_rows(format, codes, scales, biases, SIZE) - values).reshape(8, -1, format.group_size)
    largest = np.abs(values).reshape(error.shape).max(-1, keepdims=True)
    # Affine: the range is at most twice the largest magnitude. E2M1's widest step is 2 of 6, E4M3's 32 of 448; a scale
    # that is a power of two can be twice the one needed, and one in E4M3 a sixteenth off, which may clamp.
    bound = {"affine": 2.01 / (2**format.bits - 1), "mxfp4": 1 / 3, "mxfp8": 1 / 14, "nvfp4": 1 / 6 * 17 / 16}
    assert (error <= bound[format.mode] * largest).all()


def test_zero_is_exact_in_affine_mode():
    values = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32) + 0.5
    values[:, 7] = 0
    for bits in (2, 3, 4, 5, 6, 8):
        format = QuantizationFormat("affine", bits, 64)
        decoded = decode_rows(format, *quantize(values, format), 64)
        assert np.abs(decoded[:, 7]).max() <= 1e-6


def test_pieces_and_threads_do_not_matter(monkeypatch):
    values = np.random.default_rng(2).normal(size=(3, 50, 128)).astype(np.float32)
    whole = quantize(values, QuantizationFormat())
    monkeypatch.setattr("moezoo.core.quantization.quantize._PIECE", 7 * 128)
    for found, expected in zip(quantize(values, QuantizationFormat()), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_undoes_unpacking(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64), np.uint8)
    words = pack(codes, bits)
    assert (words.dtype, words.shape) == (np.uint32, (3, 2 * bits))
    np.testing.assert_array_equal(unpack(words, bits, 64), codes)


@pytest.mark.parametrize(
    ("shape", "lead", "packed"), [((64, 3, 5), (1, 2), (0,)), ((2, 32, 5), (2,), (0, 1)), ((3, 64, 5), (0, 2), (1,))]
)
def test_a_parameter_is_quantized_along_its_packed_axes(monkeypatch, shape, lead, packed):
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    format = QuantizationFormat("affine", 8, 32)
    weight = quantize_weight(values, format, lead, packed)
    assert isinstance(weight, QuantizedWeight)
    np.testing.assert_allclose(dequantize(weight), values, atol=0.02)
    monkeypatch.setattr("moezoo.core.quantization.quantize._PIECE", 64)
    np.testing.assert_array_equal(quantize_weight(values, format, lead, packed).codes, weight.codes)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", [QuantizationFormat(), QuantizationFormat("mxfp4", 4, 32)], ids=str)
def test_numbers_that_are_not_finite_are_refused(format, number):
    values = np.ones((2, 64), np.float32)
    values[1, 3] = number
    with pytest.raises(CheckpointError, match="NaN or infinite numbers"):
        quantize(values, format)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(CheckpointError, match="rows of 96 numbers cannot be stored as 4-bit affine, groups of 64"):
        quantize(np.zeros((2, 96), np.float32), QuantizationFormat())


def test_a_tiny_group_gets_the_smallest_power_of_two():
    values = np.full((1, 32), 2.0**-140, np.float32)
    codes, scales, _ = quantize(values, QuantizationFormat("mxfp4", 4, 32))
    assert scales.tolist() == [[0]]
    assert not codes.any()
