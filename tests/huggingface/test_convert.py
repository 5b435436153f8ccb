"""`moezoo convert`: round trips, and a ledger that lists every tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

import moezoo
from moezoo.cli.main import main
from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from tests.huggingface.test_round_trip import digests
from tests.support.fixtures import read_fixture, write_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_round_trip_through_a_run(tmp_path: Path) -> None:
    source = write_checkpoint("deepseek_v3", tmp_path / "source", shards=2)
    there = run("convert", source, tmp_path / "run")
    assert there.exit_code == 0
    assert "none dropped. Written as moezoo" in there.output
    assert "model.layers.*.self_attn.kv_b_proj.weight -> layers.*.attention.w_key, layers.*.attention.w_value" in (
        there.output
    )
    back = run("convert", tmp_path / "run", tmp_path / "back", "--json")
    ledger = json.loads(back.output)
    assert ledger["format"] == "huggingface"
    assert {row["name"] for row in ledger["tensors"]} == set(open_checkpoint(source).folder.tensors)
    assert digests(tmp_path / "back") == digests(source)


def test_kept_tensors_survive_the_round_trip(tmp_path: Path) -> None:
    source = write_checkpoint("deepseek_v3", tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    later = f"model.layers.{json.loads((source / 'config.json').read_text())['num_hidden_layers']}.eh_proj.weight"
    tensors[later] = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ledger = open_checkpoint(source).ledger
    assert ledger.counts()["kept"] == 1
    run("convert", source, tmp_path / "run")
    run("convert", tmp_path / "run", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.layers.0.surprise.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.surprise\.weight F32 \[3\] in model\.safetensors"):
        open_checkpoint(source)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    named = r"layers\.1\.moe\.experts\.w_gate of experts 2 \(in .*layers\.1\.block_sparse_moe\.experts\.2\.w1\.weight\)"
    with pytest.raises(CheckpointError, match=f"is missing 1 parameter of the model in config.json: {named}"):
        open_checkpoint(source)


def test_two_layouts_in_one_checkpoint_are_read(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    expected = {name: np.array(value) for name, value in open_checkpoint(source).weights.items()}
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts."
    parts = {which: [] for which in ("w1", "w2", "w3")}
    for name in sorted(tensors):
        if name.startswith(prefix):
            parts[name.split(".")[-2]].append(tensors.pop(name))
    gate, down, up = (np.stack(parts[which]) for which in ("w1", "w2", "w3"))
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
    tensors["model.layers.0.mlp.experts.down_proj"] = down
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    mixed = open_checkpoint(source)
    assert all(np.array_equal(mixed.weights[name], value) for name, value in expected.items())


def test_a_duplicate_parameter_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has layers\.0\.moe\.router\.w_router more than once"):
        open_checkpoint(source)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_nan_is_a_warning_with_names(backend: str, tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    (warning,) = moezoo.load(source, backend=backend).problems
    assert "NaN or infinity in final_norm.scale" in warning


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_compute_chooses_the_dtype_of_activations(backend: str, tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    ids = read_fixture("mixtral").expected["input_ids"].astype(np.int32)
    exact = moezoo.load(source, backend=backend).forward(ids).logits
    rounded = moezoo.load(source, backend=backend, compute="bfloat16").forward(ids).logits
    assert 1e-3 < np.abs(rounded - exact).max() < 0.5
    with pytest.raises(SpecError, match="compute is 'float8'"):
        moezoo.load(source, backend=backend, compute="float8")


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source")
    (tmp_path / "secret.json").write_text("{}")
    (source / "tokenizer_extra.json").symlink_to(tmp_path / "secret.json")
    result = run("convert", source, tmp_path / "run")
    assert result.exit_code == 1
    assert "is a link to" in result.output
