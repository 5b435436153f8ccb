"""A checkpoint of one mesh restores on others, on one device and in MLX: verified, as of the step it was saved at."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.checkpoint.store import load_checkpoint, load_latest_checkpoint
from moezoo.core.errors import CheckpointError
from tests.mesh.simulated import run_simulated
from tests.support.tolerances import FLOAT32_TRAINING

SCRIPT = "checkpoints.py"
CONFIG = "configs/tiny/softmax_with_bias.yaml"  # a selection bias is state, which no mesh cuts


def on_devices(devices: int, what: str, mesh: dict, run: Path, backend: str, config: str = CONFIG) -> str:
    return run_simulated(SCRIPT, what, backend, json.dumps(mesh), str(run), config, devices=devices, backend=backend)


WRITTEN_ON = {
    "eight": (8, {"fsdp": 2, "expert": 2, "tensor": 2}, "jax"),
    "two_by_two": (4, {"fsdp": 2, "expert": 2}, "jax"),
    "one": (1, {}, "jax"),
    "mlx": (1, {}, "mlx"),
}
READ_ON = {
    "one": (1, {}, "jax"),
    "two_by_two": (4, {"data": 2, "expert": 2}, "jax"),
    "eight": (8, {"fsdp": 4, "tensor": 2}, "jax"),
    "mlx": (1, {}, "mlx"),
}


# To another mesh, and to no mesh.
IN_THE_GATE = [("eight", "two_by_two"), ("eight", "mlx")]
EVERY_PAIR = [
    pytest.param(written, where, marks=() if (written, where) in IN_THE_GATE else pytest.mark.release)
    for written in WRITTEN_ON
    for where in READ_ON
]


@cache
def written_on(name: str, folder: Path, config: str = CONFIG) -> Path:
    run = folder / f"{Path(config).stem}_written_on_{name}"
    run.mkdir()
    devices, mesh, backend = WRITTEN_ON[name]
    on_devices(devices, "write", mesh, run, backend, config)
    assert ((run / "checkpoints" / "step_00000003" / "arrays").is_dir()) == (devices > 1)
    return run


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_on(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_on("eight", tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(("written", "where"), EVERY_PAIR, indirect=["written"])
def test_checkpoint_restores_bit_for_bit_elsewhere_and_training_continues(written: Path, where: str) -> None:
    """Although training continued while it was written, and donated the same buffers."""
    check_restored(written, where)


def check_restored(written: Path, where: str, config: str = CONFIG) -> None:
    devices, mesh, backend = READ_ON[where]
    losses = json.loads(on_devices(devices, "read", mesh, written, backend, config).splitlines()[-1])
    expected = json.loads((written / "losses.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(losses, expected, rtol=FLOAT32_TRAINING.relative)


@pytest.mark.release
@pytest.mark.parametrize("where", ["two_by_two", "mlx"])
@pytest.mark.parametrize("config", ["states", "choices"])
def test_checkpoint_of_later_parts_restores_elsewhere(
    config: str, where: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = f"tests/data/meshes/{config}.yaml"
    check_restored(written_on("eight", tmp_path_factory.getbasetemp(), path), where, path)


@pytest.mark.parametrize(
    "written",
    ["eight", "mlx", *(pytest.param(name, marks=pytest.mark.release) for name in ("two_by_two", "one"))],
    indirect=True,
)
def test_one_shard_is_read_alone(written: Path) -> None:
    checkpoint, _, _ = load_latest_checkpoint(written / "checkpoints")
    with np.load(written / "weights.npz") as weights:
        for name in weights:
            assert checkpoint.weights.shapes[name] == weights[name].shape
            part = tuple(slice(length // 2, length) for length in weights[name].shape)
            np.testing.assert_array_equal(checkpoint.weights.reader(name)(part), weights[name][part])


def test_any_damage_is_detected(sharded: Path, tmp_path: Path) -> None:
    """A flipped bit, a missing byte and a missing file, for each of the files."""
    source = sharded / "checkpoints" / "step_00000003"
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert len(files) > 8
    for number, file in enumerate(files):
        for what in ("flipped", "shorter", "missing"):
            copy = tmp_path / f"{what}{number}" / source.name
            shutil.copytree(source, copy)
            content = bytearray((copy / file).read_bytes())
            content[len(content) // 2] ^= 1
            if what == "missing":
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(content if what == "flipped" else content[:-1])
            with pytest.raises(CheckpointError, match=r"is damaged: |format version"):
                load_checkpoint(copy)


def test_manifest_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_00000003"
    shutil.copytree(sharded / "checkpoints" / "step_00000003", copy)
    for name in ("arrays/../../outside", "/etc/hostname", "arrays//x", "arrays/.hidden", "other/x"):
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        manifest.pop("sha256")
        manifest["files"] = {**manifest["files"], name: {"bytes": 1, "sha256": "0" * 64}}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        (copy / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"manifest.json lists "):
            load_checkpoint(copy)
        shutil.copy(sharded / "checkpoints" / "step_00000003" / "manifest.json", copy)
