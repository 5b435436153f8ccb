from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.codecs import fp8_decode, fp8_encode, fp8_shape, mxfp4_decode, mxfp4_encode, mxfp4_shape

PIECE = Path(__file__).parents[1] / "data/huggingface/mxfp4_piece.npz"

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EVERY_CODE = np.arange(256, dtype=np.uint8)


def bits(array):
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def e2m1(nibble):
    return -E2M1[nibble - 8] if nibble >= 8 else E2M1[nibble]


def e4m3(code):
    """Decode E4M3 by definition: sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, one NaN per sign."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# --- MXFP4 --------------------------------------------------------------------------------------------------


def every_block_and_scale():
    """Return blocks [scale, code group, byte]: each of the 256 bytes with each of the 256 scales."""
    blocks = np.broadcast_to(EVERY_CODE.reshape(1, 16, 16), (256, 16, 16)).copy()
    return blocks, np.broadcast_to(EVERY_CODE[:, None], (256, 16)).copy()


def test_mxfp4_values_are_code_times_power_of_two_for_every_byte_and_scale():
    values = mxfp4_decode(*every_block_and_scale())
    assert (values.dtype, values.shape) == (ml_dtypes.bfloat16, (256, 512))
    nibbles = [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    code = np.array([e2m1(nibble) for nibble in nibbles])
    with np.errstate(over="ignore"):
        expected = (code * 2.0 ** (np.arange(255)[:, None] - 127)).astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(values[:255]), bits(expected))
    assert np.isnan(values[255].astype(np.float32)).all()
    exact = np.abs(code * 2.0 ** (np.arange(255)[:, None] - 127)) < 2.0**128
    np.testing.assert_array_equal(
        values[:255].astype(np.float64)[exact], (code * 2.0 ** (np.arange(255)[:, None] - 127))[exact]
    )


def test_mxfp4_codes_round_trip_with_every_injective_scale():
    blocks, scales = every_block_and_scale()
    finite = slice(0, 253)
    found = mxfp4_encode(mxfp4_decode(blocks[finite], scales[finite]), scales[finite])
    np.testing.assert_array_equal(found, blocks[finite])


def test_mxfp4_ambiguous_codes_round_trip_from_the_kept_ones():
    blocks, scales = every_block_and_scale()
    np.testing.assert_array_equal(mxfp4_encode(mxfp4_decode(blocks, scales), scales, blocks), blocks)


def test_mxfp4_keeps_only_codes_that_still_decode_to_the_value():
    blocks, scales = every_block_and_scale()
    blocks, scales = blocks[120:130], scales[120:130]
    others = mxfp4_encode(-mxfp4_decode(blocks, scales), scales, blocks)
    np.testing.assert_array_equal(others, blocks ^ 0x88)


def test_mxfp4_changed_values_are_refused_unless_rounded():
    scales = np.full((1, 1), 127, np.uint8)
    values = np.zeros((1, 32), np.float32)
    values[0, :8] = [0.1, 0.26, 5.1, 100, -100, -0.1, 2.5, 3.5]
    with pytest.raises(CheckpointError, match="8 values have no exact MXFP4 code with the original scales"):
        mxfp4_encode(values, scales)
    found = mxfp4_decode(mxfp4_encode(values, scales, rounded=True), scales).astype(np.float32)
    np.testing.assert_array_equal(bits(found[0, :8]), bits(np.float32([0, 0.5, 6, 6, -6, -0.0, 2, 4])))


@pytest.mark.parametrize(
    ("blocks", "scales"), [((3, 4, 16), (3, 5)), ((3, 4, 15), (3, 4)), ((16,), ()), ((3, 4, 16), (3, 4, 1))]
)
def test_mxfp4_scales_of_another_shape_are_refused(blocks, scales):
    with pytest.raises(CheckpointError, match="x_blocks: MXFP4 blocks have shape"):
        mxfp4_shape("x_blocks", blocks, scales)


def test_mxfp4_piece_of_the_oracle_decodes_by_definition():
    piece = np.load(PIECE)  # values: decoded code by code in float64
    values = mxfp4_decode(piece["blocks"], piece["scales"])
    np.testing.assert_array_equal(bits(values), piece["bfloat16_bits"])
    np.testing.assert_array_equal(mxfp4_encode(values, piece["scales"]), piece["blocks"])


# --- FP8 ----------------------------------------------------------------------------------------------------


def random_fp8(*shape, seed=0):
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] ^= 1  # no NaN
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    scales = np.exp(draw.uniform(-12, 2, blocks)).astype(np.float32)
    return codes.view(ml_dtypes.float8_e4m3fn), scales


def test_fp8_values_are_code_times_scale_for_every_code():
    scale = np.float32([[1e-3 / 3]])
    values = fp8_decode(EVERY_CODE.reshape(2, 128).view(ml_dtypes.float8_e4m3fn), scale[:, :1]).reshape(-1)
    assert values.dtype == np.float32
    expected = np.float32([e4m3(code) for code in range(256)]) * scale[0]
    np.testing.assert_array_equal(values, expected)  # NaN where NaN is expected, and nowhere else
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(values)), [0x7F, 0xFF])
    assert np.signbit(values[0x80])


def test_fp8_blocks_have_separate_scales_and_the_last_ones_are_partial():
    codes, scales = random_fp8(200, 300)
    assert scales.shape == (2, 3)
    values = fp8_decode(codes, scales)
    for row, column in ((0, 0), (127, 127), (128, 127), (127, 128), (199, 299), (128, 256)):
        expected = np.float32(codes[row, column]) * scales[row // 128, column // 128]
        assert values[row, column] == expected


@pytest.mark.parametrize("shape", [(200, 300), (3, 130, 5), (1, 1), (128, 256)])
def test_fp8_codes_round_trip_bit_for_bit(shape):
    codes, scales = random_fp8(*shape)
    np.testing.assert_array_equal(bits(fp8_encode(fp8_decode(codes, scales), scales)), bits(codes))


def test_fp8_codes_with_extreme_scales_round_trip_from_the_kept_ones():
    codes = np.broadcast_to(EVERY_CODE, (5 * 128, 256)).copy().view(ml_dtypes.float8_e4m3fn)
    scales = np.float32([[1e-45, 1], [0, -0.0], [3e38, -2], [np.inf, np.nan], [1e-38, -1e-38]])
    with np.errstate(all="ignore"):
        found = fp8_encode(fp8_decode(codes, scales), scales, codes)
    np.testing.assert_array_equal(bits(found), bits(codes))


def test_fp8_changed_values_are_refused_unless_rounded():
    scales = np.float32([[0.5]])
    values = np.float32([[0.5, 0.51, 1e6, -1e6]])
    with pytest.raises(CheckpointError, match="3 values have no exact FP8 code with the original scales"):
        fp8_encode(values, scales)
    np.testing.assert_array_equal(
        fp8_decode(fp8_encode(values, scales, rounded=True), scales), np.float32([[0.5, 0.5, 224, -224]])
    )


@pytest.mark.parametrize(
    ("codes", "scales"), [((200, 300), (1, 2)), ((200, 300), (2, 3, 1)), ((200,), (2,)), ((3, 9, 9), (1, 1))]
)
def test_fp8_scales_of_another_shape_are_refused(codes, scales):
    with pytest.raises(CheckpointError, match="w: FP8 codes have shape"):
        fp8_shape("w", codes, scales)
