"""Round trip from Hugging Face to moezoo and back: every file is equal bit for bit."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.export import export_checkpoint
from moezoo.core.runs.convert import convert
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import save_run
from tests.support.fixtures import cases, write_checkpoint

pytestmark = pytest.mark.slow

NOT_COPIED = {".npz"}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix not in NOT_COPIED
    }


def round_trip(source: Path, tmp_path: Path) -> None:
    """Check the round trip directly, and through a run folder."""
    checkpoint = open_checkpoint(source)
    weights = {name: np.array(value) for name, value in checkpoint.weights.items()}
    export_checkpoint(weights, checkpoint.layout, tmp_path / "straight")
    assert digests(tmp_path / "straight") == digests(source)
    opened = open_model(source)
    save_run(tmp_path / "run", opened.config, opened.tokenizer, weights, 0, opened.layout)
    run = open_model(tmp_path / "run")
    assert run.layout is not None
    export_checkpoint(run.weights, run.layout, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)


@pytest.mark.parametrize("case", cases())
def test_round_trip_of_a_fixture(case: str, tmp_path: Path) -> None:
    round_trip(write_checkpoint(case, tmp_path / "source", shards=3), tmp_path)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_round_trip_through_a_model(backend: str, tmp_path: Path) -> None:
    source = write_checkpoint("qwen3_moe", tmp_path / "source")
    model = moezoo.load(source, backend=backend)
    model.save(tmp_path / "back", format="huggingface")
    assert digests(tmp_path / "back") == digests(source)
    model.save(tmp_path / "run")
    moezoo.load(tmp_path / "run", backend=backend).save(tmp_path / "again", format="huggingface")
    assert digests(tmp_path / "again") == digests(source)


def test_a_trained_model_is_written_with_the_spellings_of_mlx_lm(tmp_path: Path) -> None:
    """Beside those of transformers 5, in which the source has them."""
    opened = open_model(write_checkpoint("qwen3_moe", tmp_path / "source"))
    for step in (0, 10):
        run = tmp_path / f"run_{step}"
        save_run(run, opened.config, opened.tokenizer, opened.weights, step, opened.layout)
        convert(run, tmp_path / f"out_{step}")
    source, unchanged, trained = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out_0", "out_10")
    )
    assert unchanged == source
    assert trained == source | {"num_experts": 7, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32"}
    assert "num_experts" not in source


@pytest.mark.parametrize(("case", "codes"), [("deepseek_v3_fp8", "_scale_inv"), ("gpt_oss_mxfp4", "_scales")])
def test_changed_quantized_weights_are_written_unquantized_under_the_same_names(
    case: str, codes: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(case, tmp_path / "source"))
    changed = {name: np.asarray(value, np.float32) * np.float32(1.01) for name, value in checkpoint.weights.items()}
    notes = export_checkpoint(changed, checkpoint.layout, tmp_path / "out")
    assert "without quantization" in notes[0]
    again = open_checkpoint(tmp_path / "out")
    names = {name.removesuffix("_blocks") for name in checkpoint.layout.tensors if not name.endswith(codes)}
    assert set(again.layout.tensors) == names
    for name, value in again.weights.items():
        np.testing.assert_allclose(np.asarray(value, np.float32), changed[name], rtol=2**-8)
