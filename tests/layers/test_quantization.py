import ml_dtypes
import numpy as np
import pytest

from moezoo.core.huggingface.nonfinite import is_finite_weight
from moezoo.core.quantization.formats import BITS, GROUP_SIZES, MODES, QuantizationFormat
from moezoo.core.reference.quantization import dequantize
from tests.support.quantized import FORMATS, random_weight


def in_gate(format: QuantizationFormat) -> bool:
    """Each mode and width with its smallest groups; core decodes the others too."""
    return format.group_size == GROUP_SIZES[format.mode][0]


@pytest.mark.parametrize(
    "format",
    [pytest.param(each, id=str(each), marks=() if in_gate(each) else pytest.mark.release) for each in FORMATS],
)
def test_numbers_are_those_of_the_reference(twin, format):
    weight = random_weight(format, (2, 128, 3), (0, 2), (1,), ml_dtypes.bfloat16)
    module = twin.module("quantization")
    values = twin.numpy(twin.compiled_function(module.dequantize)(module.quantized_array(weight)))
    expected = dequantize(weight)
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_affine_numbers_are_rounded_as_product_and_as_sum_to_the_dtype_of_the_scales(twin, dtype):
    weight = random_weight(QuantizationFormat("affine", 6, 32), (64, 96), (0,), (1,), dtype)
    module = twin.module("quantization")
    values = twin.numpy(twin.compiled_function(module.dequantize)(module.quantized_array(weight)))
    np.testing.assert_array_equal(values, weight.values())
    np.testing.assert_array_equal(values, values.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(values, dequantize(weight).astype(np.float32))


FOUND_IN_CODES = ("as it is", "nan scale", "nan code")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*FOUND_IN_CODES, "large scale, code 0", "large scale, largest code"])
def test_numbers_that_are_not_finite_are_found_in_codes(twin, mode, case):
    """As in the decoded numbers, which are needed only for a scale with which some code would be infinite."""
    format = QuantizationFormat(mode, BITS[mode][0], GROUP_SIZES[mode][0])
    dtype = np.float16 if mode == "affine" else np.float32
    weight = random_weight(format, (128, 3), (1,), (0,), dtype)
    row = weight.codes.view(np.uint8)[1]
    if "large" in case:
        largest = {"affine": 60000, "nvfp4": 0x7E}.get(mode, 1e38 if format.is_only_read else 254)
        weight.scales[1] = largest
        row[:] = 0 if "0" in case else 0x7E if format.has_nan_codes else 0xFF if mode == "affine" else 0x77
    elif case == "nan scale":
        weight.scales[1, 0] = np.nan if weight.scales.dtype.kind == "f" else {"nvfp4": 0x7F}.get(mode, 255)
    elif case == "nan code" and format.has_nan_codes:
        row[5] = 0xFF
    finite = bool(np.isfinite(weight.values()).all())
    module = twin.module("quantization")
    on_device = module.quantized_array(weight)
    found = bool(twin.compiled_function(module.is_surely_finite)(on_device))
    assert not found or finite
    assert found or finite == bool(np.isfinite(twin.numpy(twin.compiled_function(module.dequantize)(on_device))).all())
    assert is_finite_weight(weight) == finite
    if case in FOUND_IN_CODES:
        assert found == finite


@pytest.mark.parametrize("format", [QuantizationFormat("affine", 3, 32), QuantizationFormat("mxfp4", 4, 32)], ids=str)
def test_codes_come_back_from_the_device(twin, format):
    weight = random_weight(format, (2, 32, 3), (2,), (0, 1), ml_dtypes.bfloat16)
    module = twin.module("quantization")
    back = module.quantized_weight(module.quantized_array(weight))
    assert (back.format, back.shape, back.lead, back.packed) == (format, weight.shape, weight.lead, weight.packed)
    assert back.scales.dtype == weight.scales.dtype
    for name in ("codes", "scales", "biases"):
        np.testing.assert_array_equal(getattr(back, name), getattr(weight, name))


def test_rows_of_two_axes_in_bfloat16(twin):
    weight = random_weight(QuantizationFormat("affine", 5, 32), (2, 32, 3), (2,), (0, 1))
    module = twin.module("quantization")
    given = module.quantized_array(weight).astype(twin.module("arrays").DTYPES["bfloat16"])
    narrow = twin.compiled_function(module.dequantize)(given)
    assert narrow.shape == weight.shape
    assert str(narrow.dtype).endswith("bfloat16")
    np.testing.assert_allclose(twin.numpy(narrow), dequantize(weight), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("format", [QuantizationFormat(), QuantizationFormat("fp8", 8, 128)], ids=str)
@pytest.mark.parametrize(("shape", "lead", "packed"), [((5, 2, 64), (0,), (1, 2)), ((128, 4), (1,), (0,))])
def test_rows_are_taken_in_codes_and_then_decoded(twin, format, shape, lead, packed):
    weight, index = random_weight(format, shape, lead, packed), np.array([[3, 0], [1, 3]])
    module, expected = twin.module("quantization"), dequantize(weight)
    for given in (module.quantized_array(weight), twin.array(expected)):
        rows = twin.compiled_function(module.take)(given, twin.array(index))
        np.testing.assert_allclose(twin.numpy(rows), expected[index], rtol=1e-6, atol=1e-5)
