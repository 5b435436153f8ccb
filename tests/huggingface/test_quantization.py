import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.errors import CheckpointError, MoezooError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.codecs import fp8_decode, fp8_encode, fp8_shape, mxfp4_decode, mxfp4_encode, mxfp4_shape
from moezoo.core.huggingface.export import export_checkpoint
from tests.support.fixtures import drawn_tensors, read_fixture, write_checkpoint, write_safetensors

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


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1), (1, 2)])
def test_fp8_scales_may_be_of_a_tensor_or_of_channels(shape):
    """By hand: 0x38 is 1, 0x40 is 2, 0xB8 is -1, 0x30 is 0.5, 0x7E is 448, 0x01 is 2^-9."""
    codes = np.array([[0x38, 0x40], [0xB8, 0x30], [0x7E, 0x01]], np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = (np.arange(np.prod(shape, dtype=int)) + 3).astype(np.float32).reshape(shape)
    expected = np.float32([[1, 2], [-1, 0.5], [448, 2**-9]]) * scales
    np.testing.assert_array_equal(fp8_decode(codes, scales), expected)
    np.testing.assert_array_equal(bits(fp8_encode(expected, scales)), bits(codes))


@pytest.mark.parametrize("matrices", [(2, 200, 1), (2, 1, 5), (2, 1, 1)])
def test_fp8_scales_of_channels_of_several_matrices_broadcast(matrices):
    codes, _ = random_fp8(2, 200, 5)
    scales = np.exp(np.random.default_rng(1).uniform(-3, 3, matrices)).astype(np.float32)
    np.testing.assert_array_equal(fp8_decode(codes, scales), codes.astype(np.float32) * scales)


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
    ("codes", "scales"), [((200, 300), (1, 2)), ((200, 300), (2, 3, 1)), ((200,), (2,)), ((3, 9, 9), (9, 1))]
)
def test_fp8_scales_of_another_shape_are_refused(codes, scales):
    with pytest.raises(CheckpointError, match="w: FP8 codes have shape"):
        fp8_shape("w", codes, scales)


@pytest.mark.parametrize(
    ("config", "ending", "per_row"),
    [
        ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, "_scale_inv", False),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "_scale", True),
    ],
)
def test_a_folder_with_scales_of_tensors_or_channels_is_opened(config, ending, per_row, tmp_path):
    """Each number is its code times 0.01, and in rows 0, 1, ... 0.01, 0.02, ...; scales of activations are kept."""
    case = "qwen3_moe_fp8_channels"
    folder, description = write_checkpoint(case, tmp_path / case), read_fixture(case).description
    tensors = {}
    for name, (dtype, array) in drawn_tensors(description).items():
        if not name.endswith("_scale"):
            tensors[name] = (dtype, array)
            continue
        scale = 0.01 * np.arange(1, len(array) + 1).reshape(-1, 1) if per_row else np.asarray(0.01)
        tensors[name.removesuffix("_scale") + ending] = ("F32", scale.astype(np.float32))
        tensors[name.removesuffix("weight_scale") + "input_scale"] = ("F32", np.asarray(0.5, np.float32))
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(description["config"] | {"quantization_config": config}))
    opened = open_checkpoint(folder)
    codes = tensors["model.layers.0.self_attn.q_proj.weight"][1].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = codes * tensors["model.layers.0.self_attn.q_proj.weight" + ending][1]
    found = np.asarray(opened.weights["layers.0.attention.w_query"])
    np.testing.assert_array_equal(found.reshape(len(found), -1).T, expected)
    coded = opened.weights.stored("layers.0.attention.w_query")
    np.testing.assert_array_equal(coded.values(), found)
    assert opened.weights.decoded_notes() == []
    export_checkpoint({name: opened.weights.stored(name) for name in opened.weights}, opened.layout, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert opened.layout.ledger.counts()["kept"] == opened.layout.ledger.counts()["scales"]


def test_scales_of_columns_are_decoded_when_a_model_is_loaded(tmp_path):
    case = "qwen3_moe_fp8_channels"
    folder, tensors = write_checkpoint(case, tmp_path / case), drawn_tensors(read_fixture(case).description)
    name = "model.layers.0.self_attn.q_proj.weight"
    columns = tensors[name][1].shape[1]
    tensors[f"{name}_scale"] = ("F32", 0.01 * np.arange(1, columns + 1, dtype=np.float32)[None])
    write_safetensors(folder / "model.safetensors", tensors)
    opened = open_checkpoint(folder)
    assert isinstance(opened.weights.stored("layers.0.attention.w_query"), np.ndarray)
    (note,) = opened.weights.decoded_notes()
    assert "decoded when the model is loaded, since their scales are of columns: layers.0.attention.w_query" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format is .marlin-24.; expected one of float-quantized, .*, with config_groups"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "group_0 is .*; expected an object with weights"),
        ({"config_groups": {"group_0": {"weights": {"type": "int"}}}}, "declares no float weights of 8 bits"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 3}}}}, "num_bits is 3; expected 4 or 8"),
    ],
)
def test_other_formats_of_compressed_tensors_are_refused_by_name(change, message, tmp_path):
    case = "qwen3_moe_fp8_channels"
    folder, config = write_checkpoint(case, tmp_path / case), read_fixture(case).description["config"]
    config = config | {"quantization_config": config["quantization_config"] | change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoezooError, match=message):
        open_checkpoint(folder)
