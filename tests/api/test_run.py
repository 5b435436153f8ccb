"""Training from Python: what it takes, prints and returns."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import moezoo
from moezoo.core.errors import RunError, SpecError
from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.reporter import SilentReporter


class Steps(SilentReporter):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, record: StepRecord) -> None:
        self.seen.append(record.step)


def test_metrics_are_columns_with_a_row_per_step(owls: Path) -> None:
    run = moezoo.Run(owls / "runs" / "owls")
    metrics = run.metrics
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert np.isfinite(metrics["loss"]).all()
    assert {len(column) for column in metrics.values()} == {8}
    assert np.flatnonzero(np.isfinite(metrics["validation_loss"])).tolist() == [3, 7]
    loss, validation = metrics["loss"][-1], metrics["validation_loss"][-1]
    assert repr(run) == f"<Run {run.path}: step 8, loss {loss:.4f}, validation_loss {validation:.4f}>"


def test_a_run_is_trained_from_a_mapping_resumed_and_records_both_sessions(
    owls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, steps = yaml.safe_load((owls / "owls.yaml").read_text()), Steps()
    first = moezoo.train(content, out=tmp_path / "run", backend="mlx", overrides=["training.steps=2"], reporter=steps)
    out = capsys.readouterr().out
    assert steps.seen == [1, 2]
    assert first.evaluation is not None
    assert first.picture.is_file()
    assert out.startswith("2 layers of width 20, 2 of 5 experts; ")
    assert "step      2/2  eta 0:00:00  loss " in out
    config = moezoo.load_config(content, ["training.steps=4"])
    run = moezoo.train(config, out=tmp_path / "run", backend="mlx", resume=True, progress=False)
    assert run.metrics["step"].tolist() == [1, 2, 3, 4]
    assert run.load("mlx").step == 4
    assert capsys.readouterr().out == ""
    first, second = run.sessions
    assert (first["first_step"], first["last_step"], first["error"]) == (0, 2, None)
    assert (second["first_step"], second["last_step"]) == (2, 4)
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    assert first["versions"]["moezoo"] == moezoo.__version__
    assert "mlx" in first["versions"]
    assert first["facts"]["backend"] == "mlx"
    assert first["command"].startswith("moezoo.train(")
    assert first["data"] == json.loads((run.path / "data.json").read_text())["sources"]
    (run.path / "sessions.jsonl").write_bytes(b"[]\n{\n")
    assert run.sessions == []
    assert run.problems == [f"2 lines of {run.path / 'sessions.jsonl'} are damaged and were ignored"]


def test_one_override_needs_no_list(owls: Path) -> None:
    assert moezoo.load_config(owls / "owls.yaml", "training.steps=3").training.steps == 3


def test_a_config_without_a_file_needs_a_folder() -> None:
    with pytest.raises(RunError, match="Set `out`"):
        moezoo.train({})
    with pytest.raises(SpecError, match="cannot be written as YAML"):
        moezoo.load_config({"model": object()})
    with pytest.raises(RunError, match="is not a run folder"):
        moezoo.Run("no/such/run")


def test_columns_of_a_strange_file_are_numbers_or_an_error(owls: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((owls / "runs" / "owls" / "config.yaml").read_bytes())
    lines = [{"step": 1, "loss": None, "tokens": True}, {"step": 2, "loss": [1], "x": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{}\n")
    run = moezoo.Run(folder)
    assert {name: column.tolist() for name, column in run.metrics.items()} == {
        "step": [1, 2],
        "x": [pytest.approx(np.nan, nan_ok=True), 2.0],
    }
    assert len(run.problems) == 1
    assert "line 3" in run.problems[0]
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2**70, "loss": 1.0}) + "\n")
    with pytest.raises(RunError, match="impossible steps"):
        _ = run.metrics
