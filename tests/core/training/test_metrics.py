import errno
import os
import zlib

import numpy as np
import pytest

from moezoo.core.errors import RunError
from moezoo.core.training.metrics import (
    LayerRecord,
    MetricsFile,
    RoutingStatistics,
    StepRecord,
    layer_losses,
    layer_state,
    read_metrics,
    routing_statistics,
)


def test_layer_state_has_short_names_and_cutoffs_are_averages():
    state = {
        "layers.0.moe.router.selection_bias": np.array([0.25, -0.5], np.float32),
        "layers.1.moe.router.cutoff": np.array([0.02, 0.04], np.float32),
        "layers.1.moe.router.cutoff_weight": np.array([0.1], np.float32),
    }
    assert layer_state(state, 0) == {"selection_bias": [0.25, -0.5]}
    assert layer_state(state, 1) == {"cutoff": [0.2, 0.4]}
    assert layer_state(state, 10) == {}


def test_layer_losses_match_the_exact_layer_index():
    losses = {"loss": 1.0, "layers.1.router_z": 2.0, "layers.11.router_z": 3.0}
    assert layer_losses(losses, 1) == {"router_z": 2.0}


def test_load_is_a_share_and_worst_load_is_relative_to_uniform():
    (row,) = routing_statistics([3], [np.array([6, 2, 0, 0])], [2])
    assert row == RoutingStatistics(layer=3, load=(0.75, 0.25, 0.0, 0.0), worst_load=3.0, dropped=0.25)


def test_a_layer_that_chose_no_expert_because_of_nan_has_no_load():
    (row,) = routing_statistics([3], [np.zeros(4, np.int64)], [0])
    assert (row.load, row.worst_load, row.dropped) == ((0, 0, 0, 0), 0, 0)


def test_training_record_is_written_with_its_keys_in_order(tmp_path):
    layers = tuple(
        LayerRecord(RoutingStatistics(layer, (0.75, 0.25), worst, 0.0), {"router_z": 2.0}, {"cutoff": [0.5, 0.25]})
        for layer, worst in ((1, 1.5), (3, 1.25))
    )
    losses = {"loss": 2.5, "cross_entropy": float("nan"), "router_z": 2.0, "router_z_weighted": 0.5}
    record = StepRecord(7, 640, losses, 1.5, 0.001, None, layers)
    assert (record.loss, record.weighted_losses) == (2.5, {"router_z": 0.5})
    worst = record.worst_layer
    assert worst is not None
    assert (worst.layer, worst.worst_load, worst.worst_expert) == (1, 1.5, 0)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(record)
    layer = '{{"layer": {}, "load": [0.75, 0.25], "worst_load": {}, "dropped": 0.0, "losses": {{"router_z": 2.0}}, {}}}'
    rows = ", ".join(layer.format(*row, '"cutoff": [0.5, 0.25]') for row in ((1, 1.5), (3, 1.25)))
    text = (tmp_path / "metrics.jsonl").read_text()
    before, _, checksum = text.rpartition(', "crc32": ')
    assert checksum == f'"{zlib.crc32(before.encode()):08x}"}}\n'
    assert before + "}\n" == (
        '{"step": 7, "tokens": 640, "loss": 2.5, "cross_entropy": null, "router_z": 2.0, "router_z_weighted": 0.5, '
        f'"gradient_norm": 1.5, "learning_rate": 0.001, "tokens_per_second": null, "routing": [{rows}]}}\n'
    )


# --- the file ---------------------------------------------------------------------------------------------------------


class Line:
    """A record of a step or a validation."""

    def __init__(self, step, kind="loss", value=1.5):
        self.values = {"step": step, kind: value}

    def to_dict(self):
        return self.values


def metrics_file(path, *records):
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    return file


def test_lines_are_unique_by_step_and_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    final = Line(2, "validation_loss", 3.0)
    metrics_file(path, Line(1), Line(2), final)
    MetricsFile(path, keep_to_step=2).write(final)  # as a finished run that is resumed
    assert read_metrics(path) == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.5}, final.values]
    assert len(path.read_bytes().splitlines()) == 3
    doubled = path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(doubled)  # as an earlier version left it
    assert len(read_metrics(path)) == 3
    MetricsFile(path, keep_to_step=1)
    assert read_metrics(path) == [{"step": 1, "loss": 1.5}]


def test_every_flipped_bit_of_a_line_is_named_with_its_number_or_changes_no_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_file(path, Line(1), Line(2, value=0.75), Line(3))
    good, content = read_metrics(path), path.read_bytes()
    lines = content.splitlines(keepends=True)
    for place in range(len(lines[0]), len(lines[0] + lines[1])):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            problems = []
            found = read_metrics(path, problems)
            named = any(f"line 2 of {path} is damaged: " in problem for problem in problems)
            intact = found == good
            assert named or intact, (place, bit, found, problems)
            assert found[0] == good[0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"step": 2, "loss": \xff}\n', "byte 21 is not UTF-8"),
        (b'{"step": 2, "loss": }\n', "it is not JSON"),
        (b'[2, "loss"]\n', "it has no step"),
        (b'{"step": 2, "loss": 2.5, "crc32": "00000000"}\n', "its checksum differs"),
        (b'{"step": 2, "lo', "it has no end"),
    ],
)
def test_damaged_line_is_named_and_removed_when_the_run_is_resumed(tmp_path, line, problem):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + line)  # the first line has no checksum: of an earlier version
    (said,) = MetricsFile(path, keep_to_step=9).problems
    assert f"line 2 of {path} is damaged: {problem}" in said
    assert said.endswith("; the line was removed")
    assert path.read_bytes() == b'{"step": 1, "loss": 2.5}\n'


def test_missing_or_empty_file_of_a_resumed_run_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert MetricsFile(path).problems == []
    for _ in ("empty", "missing"):
        problems = MetricsFile(path, keep_to_step=3).problems
        assert problems == [f"{path} is missing or empty; the steps up to 3 will not be in it"]
        path.unlink()


def test_full_disk_keeps_the_earlier_lines_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = metrics_file(path, Line(1))
    before, real = path.read_bytes(), os.write

    for room in (0, 7):
        parts = [room] if room else []

        def write(descriptor, line, parts=parts):
            if not parts:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, line[: parts.pop()])

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: no space left on device\."):
            file.write(Line(2))
        assert path.read_bytes() == before
