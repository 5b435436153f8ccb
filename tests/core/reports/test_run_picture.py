"""The picture of a run can be drawn from any metrics file that a run writes."""

import json
import struct
import zlib

import numpy as np
import pytest

from moezoo.core.errors import RunError
from moezoo.core.reports.run_picture import draw_run


def metrics(folder, steps=30, layers=2, experts=4, validate=10):
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        routing = []
        for layer in range(layers):
            share = rng.dirichlet(np.full(experts, 5.0))
            routing.append({"layer": layer + 1, "load": share.tolist(), "dropped": 0.0})
        loss = 3 * np.exp(-step / 10) + 1.5
        lines.append({"step": step, "tokens": 64 * step, "cross_entropy": loss, "loss": loss, "routing": routing})
        if step % validate == 0:
            lines.append({"step": step, "validation_loss": loss + 0.1})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pixels(path):
    """Width, height and the decoded bytes of a PNG, so that an empty or truncated picture fails."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    body, place = b"", 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            body += data[place + 8 : place + 8 + length]
        place += 12 + length
    return width, height, zlib.decompress(body)


@pytest.mark.parametrize("optimum", [None, 1.4])
def test_picture_is_one_complete_png(tmp_path, optimum):
    draw_run(metrics(tmp_path), tmp_path / "picture.png", optimum)
    width, height, body = pixels(tmp_path / "picture.png")
    assert width > 1000
    assert height > 600
    assert len(set(body)) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "picture.png"]


def test_picture_is_deterministic(tmp_path):
    path = metrics(tmp_path)
    draw_run(path, tmp_path / "a.png", 1.4)
    draw_run(path, tmp_path / "b.png", 1.4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_dense_model_has_no_heat_maps(tmp_path):
    draw_run(metrics(tmp_path, layers=0), tmp_path / "dense.png", None)
    draw_run(metrics(tmp_path, layers=2), tmp_path / "moe.png", None)
    assert pixels(tmp_path / "dense.png")[1] < pixels(tmp_path / "moe.png")[1]


def test_many_layers_and_experts_fit_on_one_page(tmp_path):
    draw_run(metrics(tmp_path, steps=3, layers=24, experts=128), tmp_path / "picture.png", None)
    width, height, _ = pixels(tmp_path / "picture.png")
    assert height < 1.5 * width


@pytest.mark.parametrize("steps", [1, 2, 1500])
def test_short_and_long_runs_are_drawn(tmp_path, steps):
    draw_run(metrics(tmp_path, steps=steps, validate=max(1, steps // 3)), tmp_path / "picture.png", 1.4)
    assert len(set(pixels(tmp_path / "picture.png")[2])) > 100


def test_collapsed_router_is_drawn(tmp_path):
    lines = [
        {"step": step, "cross_entropy": 2.0, "routing": [{"layer": 0, "load": [1.0, 0.0, 0.0]}]} for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_run(tmp_path / "metrics.jsonl", tmp_path / "picture.png", None)
    assert len(set(pixels(tmp_path / "picture.png")[2])) > 100


def test_step_with_a_nonfinite_loss_is_skipped(tmp_path):
    path = metrics(tmp_path)
    draw_run(path, tmp_path / "without.png", None)
    path.write_text(path.read_text() + json.dumps({"step": 31, "cross_entropy": None}) + "\n")
    draw_run(path, tmp_path / "picture.png", None)
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_truncated_last_line_is_skipped(tmp_path):
    path = metrics(tmp_path)
    draw_run(path, tmp_path / "without.png", None)
    path.write_text(path.read_text() + '{"step": 31, "cross_en')
    draw_run(path, tmp_path / "picture.png", None)
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_metrics_without_a_training_step_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 2.0}\n')
    with pytest.raises(RunError, match="no training step to draw"):
        draw_run(tmp_path / "metrics.jsonl", tmp_path / "picture.png", None)
    assert not (tmp_path / "picture.png").exists()


def test_steps_of_two_models_are_an_error(tmp_path):
    path = metrics(tmp_path, steps=3, layers=2)
    more = [{"step": 4, "cross_entropy": 2.0, "routing": [{"layer": 1, "load": [0.5, 0.5]}]}]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in more))
    with pytest.raises(RunError, match="does not match the first step"):
        draw_run(path, tmp_path / "picture.png", None)


@pytest.mark.parametrize(
    "change",
    [
        {"cross_entropy": float("inf")},
        {"cross_entropy": 1e300},
        {"step": 10**90},
        {"cross_entropy": "2"},
        {"routing": [{"layer": 1, "load": [0.5, float("nan")]}]},
    ],
)
def test_numbers_that_fit_on_no_axis_are_an_error(tmp_path, change):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "cross_entropy": 2.0, **change}) + "\n")
    with pytest.raises(RunError, match=r"an invalid line|not match the first step|no training step"):
        draw_run(tmp_path / "metrics.jsonl", tmp_path / "picture.png", None)
