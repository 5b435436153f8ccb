"""Folders of mlx-lm in its own layout, quantized in every mode: names, codes, and its answers on both backends.

`tests/data/mlx_folders`: made by mlx-lm 0.32.2; `oracle.npz` has the last logits of each sequence and greedy text, of
the model whose weights are the codes decoded by `mx.dequantize`, in float32 arithmetic.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moezoo
from moezoo.backends import load_backend
from moezoo.core.checkpoint.coded_tensors import CodedTensors
from moezoo.core.huggingface.checkpoint import LazyWeights, open_checkpoint
from moezoo.core.huggingface.export import export_checkpoint
from moezoo.core.huggingface.tensors import Placed
from moezoo.core.parity.check import parity_of
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.core.reference.quantization import dequantize
from moezoo.core.runs.convert import convert
from tests.support.fixtures import write_checkpoint

ROOT = Path(__file__).parents[1] / "data" / "mlx_folders"
FOLDERS = sorted(path.name for path in ROOT.iterdir())
LOGITS = 5e-4
# Compiling takes JAX long; what differs between the others are names and formats, which MLX shows too.
DIFFERENT = ("deepseek_v3_4bit", "mellum_nvfp4", "qwen3_next_4bit")


@pytest.mark.parametrize(
    ("folder", "backend"),
    [
        *(pytest.param(name, "mlx", id=f"{name}-mlx") for name in FOLDERS),
        *(pytest.param(name, "jax", id=f"{name}-jax", marks=pytest.mark.release) for name in FOLDERS),
    ],
)
def test_logits_and_greedy_text(folder: str, backend: str) -> None:
    with np.load(ROOT / folder / "oracle.npz") as expected:
        ids, logits, greedy = (expected[name] for name in ("input_ids", "logits", "greedy"))
    model = moezoo.load(ROOT / folder, backend=backend)
    assert_near(model.forward(ids).logits, logits)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=greedy.shape[1], temperature=0.0), greedy)


def assert_near(found: np.ndarray, logits: np.ndarray) -> None:
    assert np.abs(found[:, -logits.shape[1] :] - logits).max() < LOGITS


def test_logits_of_jax() -> None:
    """In codes of two formats; what it generates with codes is in tests/layers/test_quantized_model.py."""
    folder = ROOT / "qwen3_moe_4bit_router8"
    with np.load(folder / "oracle.npz") as expected:
        assert_near(moezoo.load(folder, backend="jax").forward(expected["input_ids"]).logits, expected["logits"])


@pytest.mark.parametrize(
    ("folder", "backends"),
    [
        pytest.param("minimax_m2_mxfp4", ("mlx",), id="minimax_m2_mxfp4-mlx"),
        *(pytest.param(name, ("jax", "mlx"), id=f"{name}-both", marks=pytest.mark.release) for name in FOLDERS),
    ],
)
def test_parity_of_forward_passes_in_codes(folder: str, backends: tuple[str, ...]) -> None:
    loaded = {name: load_backend(name) for name in backends}
    report = parity_of(ROOT / folder, loaded, sequence_length=12)
    assert report.passed, report.failures
    assert any("parameters in codes" in note for note in report.notes)


def test_parity_finds_a_code_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend computes with the codes themselves, not with the floats that the reference has."""
    read = LazyWeights.stored

    def changed(weights: LazyWeights, name: str) -> Any:
        value = read(weights, name)
        if name.endswith("1.moe.experts.w_down") and isinstance(value, QuantizedWeight):
            codes = value.codes.copy()
            codes[:, :8] ^= 0x44444444
            return replace(value, codes=codes)
        return value

    monkeypatch.setattr(LazyWeights, "stored", changed)
    report = parity_of(ROOT / "minimax_m2_mxfp4", {"mlx": load_backend("mlx")}, sequence_length=12)
    assert not report.passed
    assert any("layers.1" in failure for failure in report.failures)


@pytest.mark.parametrize("folder", FOLDERS)
def test_parameters_in_codes_are_those_that_are_decoded(folder: str) -> None:
    checkpoint = open_checkpoint(ROOT / folder)
    entries = checkpoint.ledger.entries
    assert all(entry.ours for entry in entries)
    coded = {name for entry in entries if entry.status == "codes" for name in entry.ours}
    for name in checkpoint.weights:
        weight = checkpoint.weights.stored(name)
        assert isinstance(weight, QuantizedWeight) == (name in coded)
        if isinstance(weight, QuantizedWeight):
            assert weight.nbytes == checkpoint.weights.stored_bytes(name)
            assert weight.codes.flags.c_contiguous
            np.testing.assert_array_equal(weight.values(), checkpoint.weights[name])


def test_codes_decode_to_the_numbers_of_the_reference() -> None:
    weights = open_checkpoint(ROOT / "deepseek_v3_4bit").weights
    for name in ("layers.1.attention.w_key", "layers.1.attention.w_latent"):
        np.testing.assert_array_equal(dequantize(weights.stored(name)), weights[name])


@pytest.mark.parametrize(
    ("case", "mode"), [("gpt_oss_mxfp4", "mxfp4"), ("deepseek_v3_fp8", "fp8"), ("qwen3_moe_fp8_channels", "fp8")]
)
def test_codes_of_the_layout_of_transformers(case: str, mode: str, tmp_path: Path) -> None:
    """Interleaved gate and up, one tensor per expert, and scales of blocks and of rows, repeated for their groups."""
    weights = open_checkpoint(write_checkpoint(case, tmp_path)).weights
    found = {name: weights.stored(name) for name in weights}
    coded = {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}
    assert any(name.endswith("moe.experts.w_up") for name in coded)
    for name, weight in coded.items():
        assert weight.format.mode == mode
        assert weight.nbytes == weights.stored_bytes(name)
        np.testing.assert_array_equal(weight.values(), weights[name].astype(np.float32))


@pytest.mark.parametrize(
    "folder",
    [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.release) for name in FOLDERS],
)
def test_round_trip(folder: str, tmp_path: Path) -> None:
    """Every tensor with its bits, and config.json, directly and through a run folder."""
    checkpoint = open_checkpoint(ROOT / folder)
    export_checkpoint(checkpoint.weights, checkpoint.layout, tmp_path / "straight")
    convert(ROOT / folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    for out in ("straight", "back"):
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / out / name).read_bytes() == (ROOT / folder / name).read_bytes()


@pytest.mark.parametrize("source", ["lfm2_moe_5bit", "gpt_oss_mxfp4", "deepseek_v3_fp8", "qwen3_moe_fp8_channels"])
def test_a_model_in_codes_is_saved_without_decoding_them(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_fixture = not (ROOT / source).is_dir()
    folder = write_checkpoint(source, tmp_path / "source") if is_fixture else ROOT / source
    model = moezoo.load(folder, backend="mlx")
    monkeypatch.setattr(QuantizedWeight, "values", None)
    model.save(tmp_path / "back", format="huggingface")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_model_in_codes_is_exported_one_parameter_at_a_time(backend: str) -> None:
    weights = open_checkpoint(ROOT / "qwen3_moe_4bit_router8").weights
    exported = moezoo.load(ROOT / "qwen3_moe_4bit_router8", backend=backend).model.export_parameters()
    assert isinstance(exported, CodedTensors)
    assert {name: exported.stored_bytes(name) for name in exported} == {
        name: weights.stored_bytes(name) for name in weights
    }
    for name in ("embedding.weight", "final_norm.scale"):
        assert exported[name].dtype == exported.dtypes[name]
        np.testing.assert_array_equal(exported[name], weights[name])


def test_parameters_that_are_decoded_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = open_checkpoint(ROOT / "mixtral_8bit").weights
    assert weights.decoded_notes() == []
    monkeypatch.setattr(Placed, "packed", lambda _, place: None)
    (note,) = weights.decoded_notes()
    assert re.fullmatch(
        r"\d+ quantized parameters are decoded when the model is loaded, since they have only parts of rows of codes: "
        r"embedding.weight, .*, \.\.\.",
        note,
    )


@pytest.mark.parametrize("folder", ["qwen3_next_4bit", "lfm2_moe_5bit"])
def test_changed_weights_are_written_as_floats_in_the_same_layout(folder: str, tmp_path: Path) -> None:
    """Names, transforms and norms stay those of mlx-lm; config.json no longer declares a quantization."""
    checkpoint = open_checkpoint(ROOT / folder)
    weights = {name: checkpoint.weights[name] for name in checkpoint.weights}
    weights["layers.2.moe.experts.w_up"] = weights["layers.2.moe.experts.w_up"] * 2
    notes = export_checkpoint(weights, checkpoint.layout, tmp_path / "out")
    assert "without quantization" in notes[0]
    back = open_checkpoint(tmp_path / "out")
    assert back.spec == checkpoint.spec
    assert "model.layers.2" in "".join(name for name in back.folder.tensors if "switch_mlp" in name)
    assert not {"quantization", "quantization_config"} & back.description.fields.raw.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back.weights[name], value.astype(back.weights[name].dtype))
