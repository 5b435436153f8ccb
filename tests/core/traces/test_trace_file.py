"""Files of routing traces: written and read in parts, whole or not at all, and checked."""

import json

import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import write_tensors
from moezoo.core.errors import DataError
from moezoo.core.traces.trace import COLUMNS, TraceInfo, TraceRows, trace_of
from moezoo.core.traces.trace_file import open_trace, save_trace, write_trace
from tests.support.traces import synthetic_trace


def test_a_trace_comes_back_from_its_file_bit_for_bit(tmp_path):
    trace = synthetic_trace(num_tokens=50)
    with write_trace(tmp_path / "t.safetensors", trace.info) as writer:
        writer.texts.update(trace.texts)
        for rows in trace.chunks(7):
            writer.add(rows)
    read = open_trace(tmp_path / "t.safetensors")
    assert (read.info, read.texts, read.num_tokens) == (trace.info, trace.texts, 50)
    for name in COLUMNS:
        np.testing.assert_array_equal(read.column(name), trace.column(name))
        np.testing.assert_array_equal(read.column(name, 13, 21), trace.column(name)[13:21])
    save_trace(tmp_path / "again.safetensors", read)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.safetensors", "t.safetensors"]


def test_other_programs_may_record_experts_only(tmp_path):
    info = TraceInfo(layers=(0, 1), num_experts=(8, 8), written_by="vllm")
    expert = np.array([[[0, 7], [-1, -1]], [[1, 2], [3, -1]]])
    save_trace(tmp_path / "t.safetensors", trace_of(info, TraceRows(expert)))
    read = open_trace(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read.rows().expert, expert)
    assert read.rows().weight is None
    with pytest.raises(DataError, match=r"has no weight, which the gate mass needs \(written by vllm\)"):
        read.require("weight", purpose="the gate mass")


@pytest.mark.parametrize("content", [b"", b"the cat sat on the mat"])
def test_another_file_is_no_trace(tmp_path, content):
    (tmp_path / "some.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"some\.txt is not a routing trace: .* that `moezoo trace` wrote"):
        open_trace(tmp_path / "some.txt")


def _fail_while_recording(path):
    trace = synthetic_trace()
    with write_trace(path, trace.info) as writer:
        writer.add(trace.rows())
        raise RuntimeError


def test_a_failed_recording_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        _fail_while_recording(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def _file(path, info=None, **changed):
    trace = synthetic_trace()
    columns = {name: trace.column(name).copy() for name in COLUMNS}
    text = trace.info.model_dump_json() if info is None else json.dumps(json.loads(trace.info.model_dump_json()) | info)
    for name, change in changed.items():
        columns[name] = change(columns[name])
    write_tensors(path, columns, {"format": "moezoo routing trace 1", "trace": text})
    return path


def _with_first(value):
    def change(column):
        column.flat[0] = value
        return column

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": _with_first(8)}, r"expert\[0, 0, 0\] = 8; expected -1 or an expert of its layer"),
        ({"expert": _with_first(-2)}, r"expert\[0, 0, 0\] = -2"),
        ({"weight": _with_first(np.nan)}, r"weight\[0, 0, 0\] = nan; expected a finite number"),
        ({"domain": _with_first(2)}, r"domain\[0\] = 2; expected one of 2"),
        ({"token": _with_first(-1)}, r"token\[0\] = -1; expected 0 or more"),
        ({"margin": lambda column: column[:, :2]}, r"'margin' of shape \[40, 2\]; expected \[40, 3\]"),
        ({"expert": lambda column: column.astype(np.int32)}, r"'expert' of dtype int32"),
        ({"info": {"layers": [0, 1]}}, r"num_experts has 3 counts for 2 layers"),
        ({"info": {"colour": 1}}, r"colour: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_trace_is_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as error:
        open_trace(_file(tmp_path / "t.safetensors", **change)).rows()
    assert "\n" not in str(error.value)


def test_other_files_are_refused_by_name(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"weight": np.zeros(3, np.float32)}, {})
    with pytest.raises(DataError, match=r"model.safetensors is not a routing trace; got the format None"):
        open_trace(tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(_file(tmp_path / "t.safetensors").read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated"):
        open_trace(tmp_path / "cut.safetensors")
