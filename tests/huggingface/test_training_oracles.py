"""Twenty AdamW steps of transformers, repeated by `moezoo train` from the same weights and batches.

The folders were written by transformers 5.23 in float32, together with the same steps in float64; the checked-in copies
omit what the tests do not need.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import moezoo
from moezoo.cli.main import main
from moezoo.core.huggingface.folder import TensorFolder
from tests.support.backends_available import require_backend
from tests.support.fixtures import FOLDER
from tests.support.tolerances import FLOAT32, FLOAT32_TRAINING, TRAINED_LOGITS, assert_close

BACKENDS = ["jax", "mlx"]
CASES = ["train_mixtral", "train_deepseek_v3"]
# In transformers the selection bias is a buffer, which training does not update.
INIT_FROM: dict[str, dict[str, object]] = {"train_mixtral": {}, "train_deepseek_v3": {"selection_bias_rate": 0.0}}
STEPS = 20


def config_of(case: str) -> dict[str, object]:
    """Return the training config of the oracles."""
    return {
        "init_from": {"path": str(FOLDER / case), **INIT_FROM[case]},
        "data": {"sources": [{"kind": "batches", "path": str(FOLDER / case / "train.npz"), "key": "batches"}]},
        "training": {"steps": STEPS, "batch_size": 4, "sequence_length": 32, "log_every": 1},
        "optimizer": {
            "learning_rate": 1e-3,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "schedule": {"kind": "constant"},
        },
    }


@dataclass(frozen=True)
class Trained:
    """A run folder, its metrics at each step, and the expected values."""

    path: Path
    backend: str
    case: str
    metrics: list[dict[str, float]]
    expected: dict[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        return np.array([line[name] for line in self.metrics])


@cache
def trained_in(folder: Path, backend: str, case: str) -> Trained:
    path, run = folder / f"{case}_{backend}.yaml", folder / f"{case}_{backend}"
    path.write_text(yaml.safe_dump(config_of(case)), encoding="utf-8")
    words = ["train", str(path), "--backend", backend, "--out", str(run)]
    result = CliRunner().invoke(main, words, env={"MOEZOO_CACHE": str(folder / "cache")})
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with np.load(FOLDER / case / "train.npz") as expected:
        return Trained(run, backend, case, [line for line in lines if "loss" in line], dict(expected))


@pytest.fixture(scope="module", params=[(backend, case) for case in CASES for backend in BACKENDS], ids="-".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    backend, case = request.param
    require_backend(backend)
    return trained_in(tmp_path_factory.getbasetemp(), backend, case)


def test_every_loss_and_gradient_norm_matches_float64(trained: Trained) -> None:
    expected = trained.expected
    assert [line["step"] for line in trained.metrics] == list(range(1, STEPS + 1))
    assert_close(trained.column("loss"), expected["total_loss_fp64"], FLOAT32)
    assert_close(trained.column("cross_entropy"), expected["ce_loss_fp64"], FLOAT32)
    assert_close(trained.column("gradient_norm") / expected["grad_norm_fp64"], np.ones(STEPS), FLOAT32_TRAINING)
    if not np.isnan(expected["aux_loss_fp64"]).any():
        assert_close(trained.column("pooled_balance"), expected["aux_loss_fp64"], FLOAT32)


def test_the_trained_model_gives_the_same_logits(trained: Trained) -> None:
    tokens = trained.expected["batches"][0][:1]
    logits = moezoo.load(trained.path, trained.backend).forward(tokens).logits
    assert_close(logits, trained.expected["final_logits"], TRAINED_LOGITS)


def test_every_exported_tensor_has_moved_as_far(trained: Trained, tmp_path: Path) -> None:
    moezoo.load(trained.path, trained.backend).save(tmp_path / "export", format="huggingface")
    start, end = TensorFolder(FOLDER / trained.case), TensorFolder(tmp_path / "export")
    names = [str(name) for name in trained.expected["names"]]
    assert sorted(end.tensors) == sorted(start.tensors) == sorted(names)
    final = np.array([np.linalg.norm(end.read(name).astype(np.float64)) for name in names])
    moved = np.array([np.linalg.norm(end.read(name).astype(np.float64) - start.read(name)) for name in names])
    buffer = np.array([name.endswith("e_score_correction_bias") for name in names])
    np.testing.assert_array_equal(moved[buffer], 0.0)
    assert_close(final / trained.expected["final_norm"], np.ones(len(names)), FLOAT32)
    expected = trained.expected["update_norm"][~buffer]
    assert_close(moved[~buffer] / expected, np.ones(len(expected)), FLOAT32_TRAINING)
