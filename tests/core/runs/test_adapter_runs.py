"""Runs of an adapter: the base stays as it is, checkpoints hold the adapter alone, and every command opens both."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

import moezoo
from moezoo.cli.main import main
from moezoo.core.checkpoint.safetensors_file import StoredTensors, shapes_of
from moezoo.core.errors import RunError, SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.runs.run_folder import load_run_config
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint

pytestmark = pytest.mark.slow
TOKENS = np.arange(12, dtype=np.int32)[None]
QUANTIZED = Path("tests/data/mlx_folders/qwen3_moe_4bit_router8")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


def config_file(folder: Path, base: Path, **sections: object) -> Path:
    """Write a config of an adapter that trains on random ids."""
    np.save(folder / "batches.npy", np.random.default_rng(0).integers(0, 30, (6, 2, 8)))
    raw = {
        "init_from": str(base),
        "adapter": {"rank": 2, "on": ["attention", "experts", "router"]},
        "data": {"sources": [{"kind": "batches", "path": str(folder / "batches.npy")}]},
        "training": {"steps": 3, "batch_size": 2, "sequence_length": 8, "log_every": 1, "checkpoint_every": 2},
        "optimizer": {"learning_rate": 1e-2, "schedule": {"kind": "constant"}},
        **sections,
    }
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def run(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result


def logits(path: Path, backend: str, **options: object) -> np.ndarray:
    return moezoo.load(path, backend, **options).forward(TOKENS).logits  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "quantized"),
    [
        ("mlx", False),
        pytest.param("mlx", True, marks=pytest.mark.release),
        pytest.param("jax", False, marks=pytest.mark.release),
        pytest.param("jax", True, marks=pytest.mark.release),
    ],
)
def test_run_of_an_adapter_from_training_to_a_whole_checkpoint(backend: str, quantized: bool, tmp_path: Path) -> None:
    require_backend(backend)
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(QUANTIZED, base) if quantized else write_checkpoint("qwen3_moe", base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    words = ("train", config_file(tmp_path, base), "--backend", backend)
    header = run(*words, "--out", out).output
    assert "trained" in header
    table = parameter_table(load_run_config(out).model)
    factors = {row.name for row in table if row.base is not None}
    for step, saved in (("00000002", "weights"), ("00000003", "weights"), ("00000003", "optimizer")):
        stored = shapes_of(StoredTensors(out / "checkpoints" / f"step_{step}" / f"{saved}.safetensors"))
        assert {name.removeprefix("first_moment.").removeprefix("second_moment.") for name in stored} == factors
    assert json.loads((out / "base.json").read_text())["path"] == str(base)
    assert not (out / "huggingface").exists()

    shutil.copytree(out, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000003")
    assert "resumed after step 2" in run(*words, "--out", tmp_path / "again", "--resume").output
    ends = [
        StoredTensors(folder / "checkpoints" / "step_00000003" / "weights.safetensors")
        for folder in (out, tmp_path / "again")
    ]
    for name in factors:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])

    tuned, plain = logits(out, backend), logits(base, backend)
    assert np.abs(tuned - plain).max() > 0.05
    run("convert", out, tmp_path / "merged", "--merge")
    if not quantized:  # merged weights are rounded to the dtype of the scales
        np.testing.assert_allclose(logits(tmp_path / "merged", backend), tuned, atol=1e-5)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a run of an adapter."""
    require_backend("mlx")
    folder = tmp_path_factory.mktemp("trained")
    base = write_checkpoint("qwen3_moe", folder / "base")
    run("train", config_file(folder, base), "--backend", "mlx", "--out", folder / "run", "--set", "training.steps=1")
    return folder


def test_adapters_are_opened_and_switched_by_name(trained: Path, tmp_path: Path) -> None:
    base, adapter = trained / "base", trained / "run"
    tuned, plain = logits(adapter, "mlx"), logits(base, "mlx")
    run("convert", adapter, tmp_path / "peft", "--adapter", "peft")
    np.testing.assert_array_equal(logits(base, "mlx", adapter=tmp_path / "peft"), tuned)
    model = moezoo.load(base, "mlx", adapter=adapter)
    with pytest.raises(SpecError, match="unknown adapter 'other'; expected one of default"):
        model.set_adapter("other")
    model.load_adapter(tmp_path / "peft", "other")
    for name, expected in ((None, plain), ("other", tuned), (None, plain), ("default", tuned)):
        model.set_adapter(name)
        np.testing.assert_array_equal(model.forward(TOKENS).logits, expected)
    with pytest.raises(SpecError, match="the model has no adapter, in whose place"):
        moezoo.load(base, "mlx").load_adapter(adapter, "other")
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(logits(tmp_path / "saved", "mlx"), tuned)
    assert (tmp_path / "saved" / "base.json").exists()
    with pytest.raises(SpecError, match="the model has an adapter, which a Hugging Face checkpoint cannot have"):
        model.save(tmp_path / "whole", "huggingface")


def test_commands_take_an_adapter(trained: Path, tmp_path: Path) -> None:
    base, adapter = trained / "base", trained / "run"
    words = ("generate", "--tokens", "1,2,3", "--max-new-tokens", "4", "--backend", "mlx", "--temperature", "0")
    assert run(*words, base, "--adapter", adapter).output == run(*words, adapter).output
    data = (tmp_path / "ids.npy", "--backend", "mlx", "--sequence-length", "8")
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.int32))
    assert (
        run("eval", base, "--adapter", adapter, "--data", *data).output == run("eval", adapter, "--data", *data).output
    )
    assert "moments" in run("describe", base, "--adapter", adapter).output
    problem = "--adapter is 'other'; expected one of mlx, peft, peft-fused, vllm, or with --merge a folder"
    assert problem in run("convert", adapter, tmp_path / "out", "--adapter", "other", status=1).output


def test_training_goes_on_from_an_adapter(trained: Path, tmp_path: Path) -> None:
    base, adapter = trained / "base", trained / "run"
    run("convert", adapter, tmp_path / "mlx", "--adapter", "mlx")
    for name, init in (("run", adapter), ("folder", {"path": str(base), "adapter": str(tmp_path / "mlx")})):
        config = config_file(
            tmp_path, base, init_from=init if isinstance(init, dict) else str(init), adapter={"rank": 2}
        )
        raw = yaml.safe_load(config.read_text())
        del raw["adapter"]  # of the one that it starts from
        config.write_text(yaml.safe_dump(raw))
        run("train", config, "--backend", "mlx", "--out", tmp_path / name, "--set", "training.steps=1")
        assert json.loads((tmp_path / name / "base.json").read_text())["path"] == str(base)
    first, second = (logits(tmp_path / name, "mlx") for name in ("run", "folder"))
    np.testing.assert_array_equal(first, second)
    assert np.any(first != logits(adapter, "mlx"))


def test_a_missing_or_changed_base_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    adapter, base = folder / "run", folder / "base"
    other = write_checkpoint("olmoe", tmp_path / "other")
    with pytest.raises(RunError, match=r"is an adapter for another base: it was trained on .*, and the content of"):
        moezoo.load(other, "mlx", adapter=adapter)
    record = json.loads((adapter / "base.json").read_text())
    assert record["path"] == str(trained / "base")
    (adapter / "manifest.json").unlink()
    (adapter / "base.json").write_text(json.dumps({**record, "path": str(base)}))
    moezoo.load(adapter, "mlx")
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)  # in the last tensor, of 128 bytes
    with pytest.raises(RunError, match="is an adapter for another base"):
        moezoo.load(adapter, "mlx")
    words = ("train", trained / "tune.yaml", "--backend", "mlx", "--out", adapter, "--resume")
    assert "is an adapter for another base" in run(*words, "--set", "training.steps=2", status=1).output
    shutil.rmtree(base)
    with pytest.raises(RunError, match=rf"{adapter} is an adapter for {base}, which does not exist. Name its new"):
        moezoo.load(adapter, "mlx")
    with pytest.raises(
        RunError, match=r"is no adapter; expected a run that trained one, or a folder with adapter_conf"
    ):
        moezoo.load(other, "mlx", adapter=tmp_path)
