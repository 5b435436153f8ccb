"""Codes of compressed-tensors, ModelOpt and transformers: kept, decoded as these decode them, written back, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.backends import load_backend
from moezoo.core.errors import MoezooError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.export import export_checkpoint
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.ledger import first_rules
from moezoo.core.parity.check import parity_of
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.core.reference.quantization import dequantize
from moezoo.core.runs.convert import convert
from tests.support.backends_available import require_backend
from tests.support.fixtures import drawn, e4m3_values, read_fixture, write_safetensors

PIECES = Path(__file__).parents[1] / "data/huggingface/quantized_pieces.npz"
ROWS, SIZE, HIDDEN = 12, 64, 64
QUERY = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, tuple[str, np.ndarray]]

GROUP = {"strategy": "group", "group_size": 32, "symmetric": True}
CHANNEL = {"strategy": "channel", "symmetric": True}


def compressed(format: str, type: str, bits: int, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": type, **weights}}
    own = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return own | {"ignore": ["lm_head", "re:.*mlp.gate$"], "quantization_status": "compressed"}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "lm_head": False}

# kind: quantization_config, and the mode of its codes
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "int4_group": (compressed("pack-quantized", "int", 4, **GROUP), "signed"),
    "int8_group": (compressed("pack-quantized", "int", 8, **GROUP), "signed"),
    "int4_row": (compressed("pack-quantized", "int", 4, **CHANNEL), "signed"),
    "int4_zero": (compressed("pack-quantized", "int", 4, **GROUP | {"symmetric": False}), "affine"),
    "int8": (compressed("int-quantized", "int", 8, **CHANNEL), "signed"),
    "int8_zero": (compressed("int-quantized", "int", 8, **CHANNEL | {"symmetric": False}), "affine"),
    "nvfp4": (compressed("nvfp4-pack-quantized", "float", 4, strategy="tensor_group", group_size=16), "fp4"),
    "mxfp4": (compressed("mxfp4-pack-quantized", "float", 4, **GROUP), "mxfp4"),
    "mxfp8": (compressed("mxfp8-quantized", "float", 8, **GROUP), "mxfp8"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "fp4"),
    "fp4": ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "mxfp4"),
    "fp8_bytes": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "mxfp8"),
    "gptq": (GPTQ | {"sym": False}, "affine"),
    "gptq8": (GPTQ | {"sym": False, "bits": 8, "dynamic": {"-:.*mlp.gate.*": {}}}, "affine"),
    "gptq_symmetric": (GPTQ | {"sym": True}, "signed"),
    "gptq_v2": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, "affine"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "affine"),
}
# Groups are of inputs in any order: these are decoded.
REORDERED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq_reordered": (GPTQ | {"sym": False, "desc_act": True}, "affine"),
    "gptq8_reordered": (GPTQ | {"bits": 8, "desc_act": True}, "signed"),
}
FLOAT8 = {"nvfp4 weight_scale", "modelopt weight_scale", "mxfp8 weight", "fp8_bytes weight"}
COLUMNS = ("gptq", "gptq8", "gptq_symmetric", "gptq_v2", "awq", *REORDERED)
DTYPES = {
    "float16": "F16",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "uint16": "BF16",
    "float32": "F32",
}


def piece(kind: str, rows: int) -> Tensors:
    """Return the stored arrays of a kind by their endings, with the rows of its piece repeated or cut."""
    found: Tensors = {}
    with np.load(PIECES) as arrays:
        for name in arrays:
            own, _, ending = name.partition(" ")
            if own != kind or ending == "values":
                continue
            array = arrays[name]
            dtype = "F8_E4M3" if name in FLOAT8 else DTYPES[array.dtype.name]
            if kind in COLUMNS:
                if array.ndim == 2:
                    per_column = array.shape[1] / 32  # the piece has 32
                    array = array.take(range(round(rows * per_column)), axis=1, mode="wrap")
            elif ending == "weight_shape":
                array = np.array([rows, SIZE])
            elif array.ndim == 2:
                of_words = ending == "weight_zero_point" and array.dtype == np.int32
                array = np.resize(array, (-(-rows // 8) if of_words else rows, array.shape[1]))
            found[ending] = (dtype, array)
    return found


def rows_of(kind: str) -> int:
    """Return the rows of a kind's piece."""
    return 32 if kind in COLUMNS else ROWS


def numbers(kind: str) -> np.ndarray:
    """Return the piece's numbers, rounded to bfloat16, as float32."""
    with np.load(PIECES) as arrays:
        bits = arrays[f"{kind} values"]
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers rounded to bfloat16, as float32."""
    bits = values.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def write(
    kind: str,
    folder: Path,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    config: Callable[[dict[str, Any]], Any] = lambda own: None,
) -> Path:
    """Write a model of one layer: matrices of 64 inputs in this format, others in float32."""
    values = read_fixture("qwen3_moe").description["config"] | {
        "quantization_config": json.loads(json.dumps((KINDS | REORDERED)[kind][0]))
    }
    rows = rows_of(kind)
    values |= {"hidden_size": HIDDEN, "num_attention_heads": rows // 4, "num_key_value_heads": rows // 4, "head_dim": 4}
    values |= {"num_hidden_layers": 1, "moe_intermediate_size": SIZE, "num_local_experts": 3, "mlp_only_layers": []}
    attention, experts = "model.layers.0.self_attn.", "model.layers.0.mlp.experts."
    coded = {f"{attention}{name}_proj": rows for name in "qkv"}
    coded |= {f"{experts}{e}.{name}_proj": SIZE for e in range(3) for name in ("gate", "up", "down")}
    floats = {
        **{f"model.{name}.weight": (values["vocab_size"], HIDDEN) for name in ("embed_tokens",)},
        **{"lm_head.weight": (values["vocab_size"], HIDDEN), "model.norm.weight": (HIDDEN,)},
        **{f"model.layers.0.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")},
        **{f"{attention}{name}_norm.weight": (4,) for name in "qk"},
        **{f"{attention}o_proj.weight": (HIDDEN, rows), "model.layers.0.mlp.gate.weight": (3, HIDDEN)},
    }
    law = {"mean": 0.0, "std": 0.3}
    tensors: Tensors = {name: ("F32", drawn(7, name, shape, "F32", law)) for name, shape in floats.items()}
    for name, rows in coded.items():
        tensors |= {f"{name}.{ending}": form for ending, form in piece(kind, rows).items()}
    change(tensors)
    config(values["quantization_config"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_kept_and_decode_as_elsewhere(kind: str, tmp_path: Path) -> None:
    opened = open_checkpoint(write(kind, tmp_path / "in"))
    weights = {name: opened.weights.stored(name) for name in opened.weights}
    assert opened.weights.decoded_notes() == []
    coded = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    assert {name.rpartition(".")[2] for name in coded} == {"w_query", "w_key", "w_value", "w_gate", "w_up", "w_down"}
    for name, weight in coded.items():
        assert weight.format.mode == KINDS[kind][1]
        assert weight.nbytes == opened.weights.stored_bytes(name)
        np.testing.assert_array_equal(weight.values(), opened.weights[name])
    query = coded["layers.0.attention.w_query"]
    np.testing.assert_array_equal(rounded(query.values().reshape(SIZE, -1).T), numbers(kind))
    np.testing.assert_allclose(dequantize(query), query.values(), rtol=1e-7)
    assert opened.damaged_scales() == []
    export_checkpoint(weights, opened.layout, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["int4_zero", "nvfp4", "awq", "gptq_symmetric"])
def test_a_run_folder_has_the_codes_for_the_way_back(kind: str, tmp_path: Path) -> None:
    convert(write(kind, tmp_path / "in"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


@pytest.mark.parametrize("kind", ["int4_group", "int4_row", "modelopt"])
def test_a_model_computes_with_the_codes(kind: str, tmp_path: Path) -> None:
    require_backend("mlx")
    report = parity_of(write(kind, tmp_path / "in"), {"mlx": load_backend("mlx")}, sequence_length=12)
    assert report.passed, report.failures
    assert any("6 parameters in codes" in note for note in report.notes)


def test_changed_numbers_are_written_without_codes(tmp_path: Path) -> None:
    opened = open_checkpoint(write("int4_group", tmp_path / "in"))
    changed = {name: np.asarray(value, np.float32) * np.float32(1.5) for name, value in opened.weights.items()}
    assert "without quantization" in export_checkpoint(changed, opened.layout, tmp_path / "out")[0]
    again = open_checkpoint(tmp_path / "out")
    assert all(name.endswith(".weight") for name in again.layout.tensors)
    for name, value in again.weights.items():
        np.testing.assert_allclose(np.asarray(value, np.float32), changed[name], rtol=2**-8)


def without(ending: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{QUERY}.{ending}")


def instead(ending: str, dtype: str, array: np.ndarray) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{QUERY}.{ending}": (dtype, array)})


HOSTILE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no scales": ("int4_group", without("weight_scale"), "q_proj.weight_packed, but no .*q_proj.weight_scale"),
    "no codes": ("int4_group", without("weight_packed"), "unknown for qwen3_moe|is missing 1 parameter of"),
    "codes and numbers": (
        "int4_group",
        instead("weight", "F32", np.zeros((ROWS, SIZE), np.float32)),
        "weight_packed is beside .*q_proj.weight: codes and numbers of one tensor",
    ),
    "other words": (
        "int4_group",
        instead("weight_packed", "I32", np.zeros((ROWS, 7), np.int32)),
        r"is I32 \[12, 7\], its scales \[12, 2\], without zero points; none of the integers",
    ),
    "other rows": (
        "int4_row",
        instead("weight_scale", "BF16", np.zeros((ROWS - 1, 1), np.uint16)),
        r"its scales \[11, 1\], without zero points; none of the integers .* fit \(4 bits, groups of rows\)",
    ),
    "integer scales": (
        "int4_group",
        instead("weight_scale", "I32", np.zeros((ROWS, 2), np.int32)),
        "is I32; expected F32 or",
    ),
    "surplus zero points": (
        "int4_group",
        instead("weight_zero_point", "I32", np.zeros((2, 2), np.int32)),
        "with zero points; none of the integers",
    ),
    "no zero points": ("int4_zero", without("weight_zero_point"), "without zero points; none of the integers"),
    "other zero points": (
        "int4_zero",
        instead("weight_zero_point", "I32", np.zeros((3, 2), np.int32)),
        r"weight_zero_point is I32 \[3, 2\]; expected I32 \[2, 2\]",
    ),
    "wide scales beside zero points": (
        "int4_zero",
        instead("weight_scale", "F32", np.zeros((ROWS, 2), np.float32)),
        "is F32; expected F16 or BF16 for scales",
    ),
    "codes of one axis": (
        "int4_group",
        instead("weight_packed", "I32", np.zeros(96, np.int32)),
        r"is I32 \[96\], its scales",
    ),
    "a scalar": ("nvfp4", instead("weight_packed", "U8", np.zeros((), np.uint8)), r"has shape \[\] and its scales"),
    "other groups": (
        "nvfp4",
        instead("weight_scale", "F8_E4M3", np.zeros((ROWS, 2), np.uint8)),
        r"has shape \[12, 32\] and its scales F8_E4M3 \[12, 2\]; expected \[..., out, in / 2\] and",
    ),
    "no scale of the tensor": ("nvfp4", without("weight_global_scale"), "global_scale is missing; expected one F32"),
    "several scales of the tensor": (
        "nvfp4",
        instead("weight_global_scale", "F32", np.ones(2, np.float32)),
        r"is F32 \[2\]; expected one F32 number",
    ),
    "second scale in bfloat16": (
        "modelopt",
        instead("weight_scale_2", "BF16", np.zeros((), np.uint16)),
        r"weight_scale_2 is BF16 \[\]; expected one F32 number",
    ),
    "scales of 64 numbers": (
        "fp8_bytes",
        instead("weight_scale_inv", "U8", np.zeros((ROWS, 1), np.uint8)),
        r"its scales U8 \[12, 1\]; expected \[..., out, in\] and \[..., out, in / 32\]",
    ),
    "codes of other bytes": (
        "fp4",
        instead("weight", "I8", np.zeros((ROWS, 31), np.int8)),
        r"has shape \[12, 31\] and its scales U8 \[12, 2\]; expected \[..., out, in / 2\]",
    ),
    "an unknown tensor": (
        "int4_group",
        instead("weight_g_idx", "I32", np.zeros(SIZE, np.int32)),
        "1 tensor unknown for qwen3_moe: .*weight_g_idx",
    ),
    "gptq without zeros": ("gptq", without("qzeros"), "q_proj.qweight, but no .qzeros"),
    "gptq without scales": ("awq", without("scales"), "q_proj.qweight, but no .scales"),
    "gptq and numbers": (
        "gptq",
        instead("weight", "F32", np.zeros((32, SIZE), np.float32)),
        "q_proj.qweight, but also .weight",
    ),
    "gptq of other groups": (
        "gptq",
        instead("scales", "F16", np.zeros((4, 32), np.float16)),
        r"scales is F16 \[4, 32\]; expected F16 or BF16 \[2, 32\] beside .qweight \[8, 32\], 4 bits and groups of 32",
    ),
    "gptq of one axis": (
        "gptq",
        instead("qweight", "I32", np.zeros(256, np.int32)),
        r"qweight is I32 \[256\]; expected",
    ),
    "gptq with wide scales": ("awq", instead("scales", "F32", np.zeros((2, 32), np.float32)), "scales is F32"),
    "gptq by activations without groups": (
        "gptq_reordered",
        without("g_idx"),
        "q_proj.qweight, but no .g_idx: desc_act is true",
    ),
    "parts of words": ("awq", instead("qweight", "I32", np.zeros((SIZE, 3), np.int32)), r"scales is F16 \[2, 32\]"),
    "another model": (
        "int4_group",
        lambda tensors: tensors.update({f"{QUERY}.{end}": form for end, form in piece("int4_group", 16).items()}),
        r"q_proj.weight in model.safetensors has shape \[16, 64\]; expected \[12, 64\]",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_tensors_that_do_not_belong_together(
    kind: str, change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MoezooError, match=message) as refused:
        open_checkpoint(write(kind, tmp_path / "in", change))
    assert "\n" not in str(refused.value)


def weights_of(own: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = own["config_groups"]["group_0"]["weights"]
    return found


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "format": (
        "int4_group",
        lambda own: own.update(format="marlin-24"),
        'format is "marlin-24"; expected one of float-qu',
    ),
    "groups": ("int4_group", lambda own: own.pop("config_groups"), "expected one of .*, with config_groups"),
    "a group": (
        "int4_group",
        lambda own: own["config_groups"].update(group_0=3),
        "group_0 is 3; expected a JSON object",
    ),
    "bits": ("int4_group", lambda own: weights_of(own).update(num_bits=3), "num_bits is 3; expected 4 or 8"),
    "bits of files": ("int4_group", lambda own: weights_of(own).update(num_bits=8), "fit .8 bits, groups 32."),
    "size": (
        "int4_group",
        lambda own: weights_of(own).update(group_size=48),
        "group_size is 48; expected 32 or 64 or 128",
    ),
    "strategy": ("int4_group", lambda own: weights_of(own).update(strategy="block"), 'strategy is "block"; expected'),
    "order": ("int4_group", lambda own: weights_of(own).update(actorder="group"), 'actorder is "group"; expected'),
    "type": ("int4_group", lambda own: weights_of(own).update(type="float"), "none of the integers .* fit .none."),
    "floats": ("nvfp4", lambda own: weights_of(own).update(num_bits=8), "declares no float weights of 4 bits"),
    "rotations": (
        "int4_group",
        lambda own: own.update(transform_config={"config_groups": {}}),
        "transform_config is .*; expected none",
    ),
    "algorithm": (
        "modelopt",
        lambda own: own.update(quant_algo="W4A8_AWQ"),
        'quant_algo is "W4A8_AWQ"; expected "FP8" or',
    ),
    "blocks": (
        "fp8_bytes",
        lambda own: own.update(weight_block_size=[64, 64]),
        r"weight_block_size is \[64, 64\]; expected",
    ),
    "gptq of 3 bits": ("gptq", lambda own: own.update(bits=3), "bits is 3; expected 4 or 8"),
    "gptq of other groups": ("gptq", lambda own: own.update(group_size=48), "group_size is 48; expected 32 or 64"),
    "gptq of another version": (
        "gptq",
        lambda own: own.update(checkpoint_format="marlin"),
        "expected one of gptq, gptq_v2",
    ),
    "gptq of several widths": (
        "gptq",
        lambda own: own.update(dynamic={"+:.*q_proj": {"bits": 8}}),
        "dynamic is .*; expected only modules that are not quantized",
    ),
    "awq for a vector": ("awq", lambda own: own.update(version="gemv"), 'version is "gemv"; expected "gemm"'),
    "awq without zeros": ("awq", lambda own: own.update(zero_point=False), "zero_point is false; expected true"),
    "method": (
        "fp4",
        lambda own: own.update(quant_method="quark"),
        "quant_method is 'quark'; expected one of mxfp4, fp8, mxfp8",
    ),
    "several fit": (
        "int4_row",
        lambda own: own["config_groups"].update(
            group_1={"weights": {"num_bits": 8, "type": "int", "strategy": "tensor"}}
        ),
        "several of the integers that config.json declares fit",
    ),
}


@pytest.mark.parametrize(("kind", "config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_declares_and_is_not_supported(
    kind: str, config: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MoezooError, match=message) as refused:
        open_checkpoint(write(kind, tmp_path / "in", config=config))
    assert "\n" not in str(refused.value)


def write_family(case: str, folder: Path, config: dict[str, Any], form: Callable[[str, Any], Tensors]) -> Path:
    """Write a model of a fixture's family, with `form(name, shape)`: the stored tensors of one, or none: float32."""
    values = read_fixture(case).description["config"] | config
    fields = Fields(values, "config.json")
    family = family_of(fields)
    law, tensors = {"mean": 0.0, "std": 0.3}, Tensors()
    for name, placed in first_rules(family.tensors, family.spec_of(fields)).items():
        ids = np.zeros(placed.shape, np.int64) + np.arange(placed.shape[-1])  # of experts, for tables
        table = {name: ("I64", ids)} if name.endswith("tid2eid") else None
        tensors |= table or form(name, placed.shape) or {name: ("F32", drawn(7, name, placed.shape, "F32", law))}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def check_codes(folder: Path, modes: dict[str, str], numbers: dict[str, np.ndarray]) -> None:
    """Compare the modes of parameters by their names' ends, the numbers of some, and the files that are written."""
    opened = open_checkpoint(folder)
    weights = {name: opened.weights.stored(name) for name in opened.weights}
    assert opened.weights.decoded_notes() == []
    found = {name: weight.format.mode for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    assert found == {name: mode for name in weights for end, mode in modes.items() if name.endswith(end)}
    for name, expected in numbers.items():
        np.testing.assert_array_equal(opened.weights[name], expected)
    export_checkpoint(weights, opened.layout, folder / "out")
    assert (folder / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_deepseek_v4_has_experts_in_e2m1_and_attention_in_e4m3(tmp_path: Path) -> None:
    """As released: `w1.weight` I8 [out, in / 2] with `w1.scale` E8M0 [out, in / 32], and blocks of 128 x 128."""
    kept: Tensors = {}

    def form(name: str, shape: tuple[int, ...]) -> Tensors:
        own, scale = name.removesuffix(".weight"), name.removesuffix(".weight") + ".scale"
        if ".ffn.experts." in name:
            codes = drawn(7, name, (shape[0], shape[1] // 2), "U8", {"low": 0, "high": 255}).view(np.int8)
            exponents = drawn(7, scale, (shape[0], shape[1] // 32), "U8", {"low": 120, "high": 126})
            found: Tensors = {name: ("I8", codes), scale: ("F8_E8M0", exponents)}
        elif own.endswith((".wq_a", ".wkv", ".wo_a")) and ".compressor" not in name:
            blocks = np.full([-(-size // 128) for size in shape], 122, np.uint8)
            found = {
                name: ("F8_E4M3", drawn(7, name, shape, "U8", {"low": 0, "high": 126})),
                scale: ("F8_E8M0", blocks),
            }
        else:
            return {}
        kept.update(found)
        return found

    config = {"expert_dtype": "fp4", "moe_intermediate_size": 32, "quantization_config": KINDS["fp4"][0]}
    folder = write_family("deepseek_v4", tmp_path / "in", config, form)
    attention = dict.fromkeys(("attention.w_query_down", "attention.w_key", "attention.w_output_down"), "fp8")
    experts = []
    for e in range(8):
        codes, exponents = (kept[f"layers.0.ffn.experts.{e}.w1.{end}"][1] for end in ("weight", "scale"))
        pairs = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(len(codes), -1)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        experts.append((np.concatenate([values, -values])[pairs] * np.exp2(exponents.astype(np.float32) - 127)).T)
    of_experts = dict.fromkeys(("moe.experts.w_gate", "moe.experts.w_up", "moe.experts.w_down"), "mxfp4")
    check_codes(folder, attention | of_experts, {"layers.0.moe.experts.w_gate": np.stack(experts)})


def test_inkling_2_has_experts_in_mxfp8_that_no_config_declares(tmp_path: Path) -> None:
    """As released: `w13_weight`, gate and up in turns, with `w13_weight_scale` in bytes."""
    kept: Tensors = {}

    def form(name: str, shape: tuple[int, ...]) -> Tensors:
        if not name.endswith(("w13_weight", "w2_weight")):
            return {}
        scales = drawn(7, f"{name}_scale", (*shape[:-1], shape[-1] // 32), "U8", {"low": 118, "high": 124})
        codes = drawn(7, name, shape, "U8", {"low": 0, "high": 126})
        kept.update({name: ("F8_E4M3", codes), f"{name}_scale": ("U8", scales)})
        return {each: kept[each] for each in (name, f"{name}_scale")}

    config = {"hidden_size": 32, "moe_intermediate_size": 32}
    folder = write_family("inkling2_text", tmp_path / "in", config, form)
    name = "model.llm.layers.1.mlp.experts.w13_weight"
    scales = np.exp2(kept[f"{name}_scale"][1].astype(np.float32) - 127)
    up = (e4m3_values()[kept[name][1]] * np.repeat(scales, 32, axis=-1))[:, 1::2].transpose(0, 2, 1)
    modes = dict.fromkeys(("moe.experts.w_gate", "moe.experts.w_up", "moe.experts.w_down"), "mxfp8")
    check_codes(folder, modes, {"layers.1.moe.experts.w_up": up})


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    """As in NVFP4 releases with FP8 attention; a parameter of two formats is decoded."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(QUERY)]:
            del tensors[name]
        tensors |= {f"{QUERY}.{ending}": form for ending, form in piece("mxfp8", ROWS).items()}
        up = "model.layers.0.mlp.experts.1.up_proj"
        for name in [name for name in tensors if name.startswith(up)]:
            del tensors[name]
        tensors |= {f"{up}.{ending}": form for ending, form in piece("mxfp8", SIZE).items()}

    def config(own: dict[str, Any]) -> None:
        own["format"] = "mixed-precision"
        own["config_groups"]["group_1"] = {"targets": ["x"], "weights": {"num_bits": 8, "type": "float", **GROUP}}

    opened = open_checkpoint(write("nvfp4", tmp_path / "in", change, config))
    modes = {name: getattr(opened.weights.stored(name), "format", None) for name in opened.weights}
    assert str(modes["layers.0.attention.w_query"]) == "8-bit mxfp8, groups of 32"
    assert str(modes["layers.0.attention.w_key"]) == "4-bit fp4, groups of 16"
    (note,) = opened.weights.decoded_notes()
    assert "since their tensors have several formats: layers.0.moe.experts.w_up" in note


@pytest.mark.parametrize("kind", REORDERED)
def test_groups_of_inputs_in_any_order_are_decoded_and_written_back(kind: str, tmp_path: Path) -> None:
    opened = open_checkpoint(write(kind, tmp_path / "in"))
    query = opened.weights["layers.0.attention.w_query"]
    np.testing.assert_array_equal(rounded(np.ascontiguousarray(query.reshape(SIZE, -1).T)), numbers(kind))
    (note,) = opened.weights.decoded_notes()
    assert note.startswith("6 quantized parameters are decoded")
    assert "their groups are of inputs in any order (desc_act)" in note
    export_checkpoint(dict(opened.weights), opened.layout, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    other = instead("g_idx", "I32", np.full(SIZE, 2, np.int32))
    damaged = open_checkpoint(write(kind, tmp_path / "damaged", other))
    with pytest.raises(MoezooError, match=r"q_proj.g_idx has groups 2 to 2; expected 0 to 1, those of .*scales"):
        damaged.weights["layers.0.attention.w_query"]


def test_what_modelopt_declares_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As in releases whose config.json has no quantization_config."""
    folder = write("modelopt", tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoezooError, match=r"q_proj.weight in model.safetensors"):
        open_checkpoint(folder)
    beside = folder / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": own["quant_algo"]}}))
    opened = open_checkpoint(folder)
    query = opened.weights.stored("layers.0.attention.w_query")
    assert isinstance(query, QuantizedWeight)
    assert query.format.mode == "fp4"
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "same")
    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    changed = {name: np.asarray(value, np.float32) * np.float32(1.5) for name, value in opened.weights.items()}
    assert "without quantization" in export_checkpoint(changed, opened.layout, tmp_path / "floats")[0]
    assert not (tmp_path / "floats" / beside.name).exists()
    for content, message in (
        ({"quantization": {"quant_algo": "W4A8_AWQ"}}, 'quant_algo is "W4A8_AWQ"; expected "FP8" or .*hf_quant_config'),
        ({}, "quantization is null; expected an object with quant_algo .*hf_quant_config.json"),
    ):
        beside.write_text(json.dumps(content))
        with pytest.raises(MoezooError, match=message):
            open_checkpoint(folder)


def test_gptq_has_symmetric_zeros_and_groups_of_consecutive_inputs(tmp_path: Path) -> None:
    for kind, ending, array, message in (
        (
            "gptq_symmetric",
            "qzeros",
            np.full((2, 4), 0x77767777, np.int32),
            "codes of zero other than 8, but config.json",
        ),
        ("gptq", "g_idx", np.arange(SIZE, dtype=np.int32)[::-1] // 32, "other groups than those of consecutive inputs"),
    ):
        opened = open_checkpoint(write(kind, tmp_path / kind, instead(ending, "I32", array)))
        with pytest.raises(MoezooError, match=f"q_proj.{ending} has {message}"):
            opened.weights.stored("layers.0.attention.w_query")


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for kind, ending, dtype, array in (
        ("nvfp4", "weight_scale", "F8_E4M3", np.full((ROWS, 4), 0x7F, np.uint8)),
        ("nvfp4", "weight_global_scale", "F32", np.full(1, np.nan, np.float32)),
        ("int4_group", "weight_scale", "BF16", np.full((ROWS, 2), 0x7F80, np.uint16)),
    ):
        folder = tmp_path / f"{kind}_{ending}"
        opened = open_checkpoint(write(kind, folder, instead(ending, dtype, array)))
        assert opened.damaged_scales() == ["layers.0.attention.w_query"]
        assert isinstance(opened.weights.stored("layers.0.attention.w_query"), QuantizedWeight)
        assert list(opened.weights.nonfinite) == ["layers.0.attention.w_query"]
