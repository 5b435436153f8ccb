"""`moezoo convert --quantize`, `--layout` and `--dequantize`: names, codes, config.json, and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile, write_tensors
from moezoo.core.errors import RunError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.recipe import FormatRule, Recipe, recipe_of_options
from moezoo.core.quantization.quantize import quantize
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.runs.convert_layout import convert_layout
from tests.support.fixtures import write_checkpoint

FOUR_BITS = recipe_of_options("4bit", None, 32, None, None)
MLX_FOLDERS = Path(__file__).parents[1] / "data" / "mlx_folders"


def values(folder):
    weights = open_checkpoint(folder).weights
    return {name: weights[name] for name in weights}


@pytest.mark.parametrize(
    "case", ["qwen3_moe", "deepseek_v3", "dbrx", "qwen3_next", "llama4", "lfm2_moe", "longcat_flash"]
)
def test_floats_go_to_the_layout_of_mlx_and_back(tmp_path, case):
    source = write_checkpoint(case, tmp_path / "source")
    result = convert_layout(source, tmp_path / "mlx", layout="mlx")
    assert result.format == "mlx"
    convert_layout(tmp_path / "mlx", tmp_path / "back", layout="transformers")
    before, after = values(source), values(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        if "norm" in name:  # plus and minus one, each rounded once
            np.testing.assert_allclose(after[name], value, atol=2e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert open_checkpoint(tmp_path / "back").spec == open_checkpoint(source).spec
    header = json.loads(SafetensorsFile(tmp_path / "mlx/model.safetensors").header)
    assert header["__metadata__"] == {"format": "mlx"}


def test_codes_are_those_of_each_matrix(tmp_path):
    source = write_checkpoint("qwen3_moe", tmp_path / "source")
    result = convert_layout(source, tmp_path / "out", recipe=FOUR_BITS)
    floats = open_checkpoint(source).weights
    weights = open_checkpoint(tmp_path / "out").weights
    coded = {name: weight for name in weights if isinstance(weight := stored(weights, name), QuantizedWeight)}
    assert "layers.1.moe.experts.w_up" in coded
    for name, weight in coded.items():
        rows = floats[name].transpose(*weight.lead, *weight.packed).reshape(*weight.codes.shape[:-1], -1)
        codes, scales, biases = quantize(rows, weight.format)
        np.testing.assert_array_equal(weight.codes, codes)
        np.testing.assert_array_equal(weight.scales, scales)
        np.testing.assert_array_equal(weight.biases, biases)
    for name in weights:
        if name not in coded:
            np.testing.assert_array_equal(weights[name], floats[name])
    notes = "\n".join(result.notes)
    assert "bits per weight" in notes
    assert "modules stay in floats, because groups do not divide their rows: " in notes
    assert "model.layers.1.mlp.switch_mlp.down_proj" in notes  # rows of 20


def test_config_has_the_spellings_of_mlx_lm(tmp_path):
    source = write_checkpoint("qwen3_moe", tmp_path / "source")
    recipe = Recipe(bits=4, group_size=32, rules=(FormatRule(role=("head",), bits=8, group_size=32),))
    convert_layout(source, tmp_path / "out", recipe=recipe)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_experts"], config["rope_theta"], config["rope_scaling"]) == (7, 1e6, None)
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    file = SafetensorsFile(tmp_path / "out/model.safetensors")
    assert index["weight_map"] == dict.fromkeys(sorted(file.entries), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(entry.size_bytes for entry in file.entries.values())
    assert index["metadata"]["total_parameters"] == sum(value.size for value in values(source).values())


def test_a_text_model_gets_the_wrapper_that_mlx_lm_needs(tmp_path):
    source = write_checkpoint("qwen3_5_moe_text", tmp_path / "source")
    convert_layout(source, tmp_path / "out", recipe=FOUR_BITS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe"
    assert config["text_config"]["model_type"] == "qwen3_5_moe_text"
    names = SafetensorsFile(tmp_path / "out/model.safetensors").entries
    assert all(name.startswith("language_model.") for name in names)


def test_a_text_model_leaves_the_wrapper_that_mlx_lm_lacks(tmp_path):
    source = write_checkpoint("step3p7", tmp_path / "source")
    convert_layout(source, tmp_path / "out", recipe=FOUR_BITS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "step3p5"
    assert not {"text_config", "vision_config"} & set(config)
    assert config["moe_layers_enum"] == "1,2,3"
    names = SafetensorsFile(tmp_path / "out/model.safetensors").entries
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    assert open_checkpoint(tmp_path / "out").ledger.counts().keys() <= {"mapped", "codes", "scales", "biases"}


def test_routers_that_mlx_lm_cannot_quantize_stay_in_floats(tmp_path):
    source = write_checkpoint("deepseek_v3", tmp_path / "source")
    recipe = Recipe(bits=4, group_size=32, rules=(FormatRule(role=("router",), bits=4, group_size=32),))
    convert_layout(source, tmp_path / "out", recipe=recipe)
    names = SafetensorsFile(tmp_path / "out/model.safetensors").entries
    assert "model.layers.1.mlp.gate.weight" in names
    assert "model.layers.1.mlp.gate.scales" not in names


def test_low_bits_of_a_router_are_said(tmp_path):
    source = write_checkpoint("qwen3_moe", tmp_path / "source")
    recipe = Recipe(bits=4, group_size=32, rules=(FormatRule(role=("router",), bits=3, group_size=32),))
    result = convert_layout(source, tmp_path / "out", recipe=recipe)
    assert any(note.startswith("the router has 3 bits") for note in result.notes)


def test_a_quantized_folder_goes_back_to_floats(tmp_path):
    source = MLX_FOLDERS / "qwen3_moe_4bit_router8"
    expected = values(source)
    for layout in ("mlx", "transformers"):
        convert_layout(source, tmp_path / layout, layout=layout, dequantize=True)
        found = values(tmp_path / layout)
        assert "quantization" not in json.loads((tmp_path / layout / "config.json").read_text())
        assert {str(value.dtype) for value in found.values()} == {"bfloat16"}
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].astype(np.float32), value.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("qwen3_moe", {"dequantize": True}, "which has floats. Leave out --dequantize"),
        ("qwen3_moe", {"recipe": FOUR_BITS, "layout": "transformers"}, "--quantize writes mlx-lm's layout"),
        ("gpt_oss_mxfp4", {"layout": "mlx"}, "is quantized. Add --dequantize"),
        ("gpt_oss_mxfp4", {"recipe": FOUR_BITS, "dequantize": True}, "with --quantize. Leave out --dequantize"),
        ("flex_olmo", {"layout": "mlx"}, "mlx-lm 0.32 does not have model_type flex_olmo"),
        ("glm_moe_dsa", {"layout": "mlx"}, "mlx-lm 0.32 cannot compute this model: layer 1 has no indexer of its own"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, case, options, message):
    source = write_checkpoint(case, tmp_path / "source")
    with pytest.raises(SpecError, match=message):
        convert_layout(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_what_mlx_lm_drops_is_not_converted(tmp_path):
    """config.json describes a selection bias, and mlx-lm writes no tensor for it."""
    source = write_checkpoint("ernie4_5_moe", tmp_path / "source")
    convert_layout(source, tmp_path / "mlx", layout="mlx")
    weights = tmp_path / "mlx/model.safetensors"
    file = SafetensorsFile(weights)
    kept = {name: file.read(name) for name in file.entries if not name.endswith("e_score_correction_bias")}
    write_tensors(weights, kept, {"format": "mlx"})
    (tmp_path / "mlx/model.safetensors.index.json").unlink()
    for options in ({"layout": "transformers"}, {"recipe": FOUR_BITS}):
        with pytest.raises(SpecError, match="lack selection_bias, which mlx-lm drops") as e:
            convert_layout(tmp_path / "mlx", tmp_path / "out", **options)
        assert "\n" not in str(e.value)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    source = write_checkpoint("qwen3_moe", tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    with pytest.raises(RunError, match="is not an empty folder"):
        convert_layout(source, tmp_path / "out", recipe=FOUR_BITS)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]
