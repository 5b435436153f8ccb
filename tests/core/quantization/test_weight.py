"""Decoding of quantized weights: equal to the reference, and to a folder of codes written down by hand."""

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.errors import CheckpointError
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.reference.quantization import dequantize
from tests.support.quantized import FORMATS, random_weight


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_are_those_of_the_reference(format):
    weight = random_weight(format, (2, 128, 3), (0, 2), (1,), ml_dtypes.bfloat16)
    values, expected = weight.values(), dequantize(weight)
    assert values.dtype == np.float32
    assert values.shape == expected.shape == weight.shape
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)


def test_known_codes():
    """Eight 4-bit codes 0 to 7 and 24 zeros, low nibble first, with a negative scale."""
    codes = np.array([[0x76543210, 0, 0, 0]], np.uint32)
    scale, bias = np.array([[-0.5]], np.float32), np.array([[2.0]], np.float32)
    weight = QuantizedWeight(QuantizationFormat("affine", 4, 32), (32, 1), (1,), (0,), codes, scale, bias)
    expected = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, *[2.0] * 24]
    assert weight.values()[:, 0].tolist() == dequantize(weight)[:, 0].tolist() == expected


def test_three_bit_codes_cross_words():
    """Codes 0 to 7 again and again are the bytes 88 C6 FA, low bits first."""
    stream = bytes.fromhex("88c6fa") * 4
    codes = np.frombuffer(stream, np.uint32)[None]
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    weight = QuantizedWeight(QuantizationFormat("affine", 3, 32), (1, 32), (0,), (1,), codes, one, zero)
    assert weight.values()[0].tolist() == dequantize(weight)[0].tolist() == list(range(8)) * 4


def test_codes_and_scales_that_are_not_numbers():
    codes = np.frombuffer(bytes([0x7F, 0xFF, 0x38, *[0] * 29]), np.uint32)[None]
    for scale, expected in ((127, [np.nan, np.nan, 1.0, 0.0]), (255, [np.nan] * 4)):
        scales = np.array([[scale]], np.uint8)
        weight = QuantizedWeight(QuantizationFormat("mxfp8", 8, 32), (1, 32), (0,), (1,), codes, scales)
        np.testing.assert_array_equal(weight.values()[0, :4], expected)
        np.testing.assert_array_equal(dequantize(weight)[0, :4], expected)


def test_axes_of_a_composed_row():
    """A matrix stored as [D, N * H] is the parameter [N, H, D]."""
    weight = random_weight(QuantizationFormat("affine", 8, 32), (2, 32, 3), (2,), (0, 1))
    rows = dequantize(random_weight(QuantizationFormat("affine", 8, 32), (3, 64), (0,), (1,)))
    np.testing.assert_allclose(weight.values(), rows.reshape(3, 2, 32).transpose(1, 2, 0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "message"),
    [
        ("int4", 4, 64, "quantization mode is 'int4'; expected one of affine, mxfp4, mxfp8, nvfp4, fp8, fp4, signed"),
        ("affine", 7, 64, "bits of quantization mode affine is 7; expected 2 or 3 or 4 or 5 or 6 or 8"),
        ("affine", True, 64, "bits of quantization mode affine is True"),
        ("mxfp4", 4, 64, "group_size of quantization mode mxfp4 is 64; expected 32"),
    ],
)
def test_formats_that_do_not_exist(mode, bits, group_size, message):
    with pytest.raises(CheckpointError, match=message):
        QuantizationFormat(mode, bits, group_size)


def test_shapes_that_do_not_agree():
    format, codes = QuantizationFormat("affine", 4, 32), np.zeros((3, 8), np.uint32)
    scales = np.zeros((3, 2), np.float32)
    QuantizedWeight(format, (64, 3), (1,), (0,), codes, scales, scales)
    with pytest.raises(CheckpointError, match=r"biases of a weight .* have shape None; expected \[3, 2\]"):
        QuantizedWeight(format, (64, 3), (1,), (0,), codes, scales)
    with pytest.raises(CheckpointError, match=r"scales .* have shape \[3, 1\]; expected \[3, 2\]"):
        QuantizedWeight(format, (64, 3), (1,), (0,), codes, scales[:, :1], scales)
    with pytest.raises(CheckpointError, match="rows of 48 numbers cannot be stored as 4-bit affine, groups of 32"):
        QuantizedWeight(format, (48, 3), (1,), (0,), codes[:, :6], scales, scales)


def test_stored_of_a_plain_mapping_and_a_lazy_one():
    weight = random_weight(QuantizationFormat(), (64, 3), (1,), (0,))
    assert stored({"w": weight}, "w") is weight

    class Lazy(dict):
        def stored(self, name):
            return weight

    assert stored(Lazy(w=np.zeros((64, 3))), "w") is weight
