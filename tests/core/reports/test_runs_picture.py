"""Runs are drawn over each other, and their report says how they ended and in which fields they differ."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import dump_config, load_config
from moezoo.core.errors import RunError
from moezoo.core.reports.run_curves import read_curves, smoothed
from moezoo.core.reports.run_table import read_runs
from moezoo.core.reports.runs_picture import MAX_RUNS, draw_runs
from tests.support.small_run import write_config


def write_run(folder: Path, load: list[list[float]], *overrides: str, steps: int = 40, batch: int = 3) -> Path:
    """A run folder whose layers have the same load in every step; [] is a dense model."""
    folder.mkdir()
    config = load_config(write_config(folder), ["data.tokenizer={kind: byte}", "model.vocab_size=256", *overrides])
    (folder / "config.yaml").write_text(dump_config(config))
    routing = [
        {"layer": layer, "load": share, "worst_load": max(share) * len(share), "dropped": 0.25 * layer}
        for layer, share in enumerate(load)
    ]
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 24 * batch * step, "loss": 3.0, "cross_entropy": 2 + 1 / step}
        lines.append({**line, "router_z_weighted": 0.01, "tokens_per_second": None if step == 1 else 100.0})
        lines[-1]["routing"] = routing
        if step % 20 == 0:
            lines.append({"step": step, "validation_loss": 2.5, "inference_loss": 2.6, "optimum": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_have_the_measures_of_balance(tmp_path):
    run = write_run(tmp_path / "run", [[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    curves = read_curves(run / "metrics.jsonl", [])
    np.testing.assert_allclose(curves.max_vio[7], [0, 1, 3])
    np.testing.assert_allclose(curves.entropy[7], [1, 0.5, 0])
    np.testing.assert_allclose(curves.dropped[7], [0, 0.25, 0.5])
    assert curves.weighted["router_z"][0] == 0.01
    assert math.isnan(curves.tokens_per_second[0])
    assert smoothed(curves.tokens_per_second)[1] == 100


def test_report_says_how_runs_ended_and_in_what_they_differ(tmp_path):
    one = write_run(tmp_path / "one", [[0.5, 0.5, 0.0, 0.0]])
    other = write_run(tmp_path / "other", [], "training.seed=7", "optimizer.kind=lion", steps=1)
    report = read_runs([one, other]).to_json()
    assert report["runs"][0] == {
        **{"name": "one", "path": str(one), "step": 40, "training": 2 + 1 / 40, "validation": 2.5},
        **{"MaxVio": 1, "entropy": 0.5, "dropped": 0, "tokens/s": 100},
    }
    assert [report["runs"][1][name] for name in ("validation", "MaxVio", "dropped", "tokens/s")] == [None] * 4
    assert report["differences"]["training.seed"] == [0, 7]
    assert report["differences"]["optimizer.kind"] == ["adamw", "lion"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [write_run(tmp_path / folder / "run", [], steps=1) for folder in "ab"]
    assert [run.name for run in read_runs(runs).runs] == [str(run) for run in runs]


def test_short_dense_and_other_models_share_a_picture(tmp_path):
    runs = [
        write_run(tmp_path / "moe", [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]),
        write_run(tmp_path / "dense", [], "training.seed=1", batch=6),
        write_run(tmp_path / "short", [[0.1] * 10], steps=1),
    ]
    draw_runs(read_runs(runs), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 50_000


def test_more_runs_than_lines_are_refused(tmp_path):
    run = write_run(tmp_path / "run", [], steps=1)
    with pytest.raises(RunError, match=rf"got {MAX_RUNS + 1} runs; expected at most {MAX_RUNS}"):
        draw_runs(read_runs([run] * (MAX_RUNS + 1)), tmp_path / "plot.png")
