import hashlib
import json
import os
import random
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moezoo.core.checkpoint.safetensors_file import (
    SafetensorsFile,
    StoredTensors,
    shapes_of,
    write_stream,
    write_tensors,
)
from moezoo.core.checkpoint.safetensors_header import TensorEntry, encode_header
from moezoo.core.errors import CheckpointError

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "int64",
    "uint64",
)
NUM_CORRUPTIONS = 400


def small_tensors():
    draw = np.random.default_rng(0)
    return {
        "layers.0.w": draw.standard_normal((3, 5)).astype(np.float32),
        "layers.1.w": draw.standard_normal((2, 7)).astype(np.float16),
        "bias": draw.standard_normal(3),
        "mask": np.array([True, False, True]),
        "step": np.array(7, np.int64),
        "nothing": np.zeros((0, 4), np.float32),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def file_with(tmp_path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_written_file_is_read_by_moezoo_and_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, small_tensors(), {"z": "1", "format": "pt"})
    assert_same(StoredTensors(path), small_tensors())
    assert_same(safetensors.numpy.load(path.read_bytes()), small_tensors())
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"z": "1", "format": "pt"}


def bytes_of(folder, tensors, metadata):
    write_tensors(folder / "bytes.safetensors", tensors, metadata)
    return (folder / "bytes.safetensors").read_bytes()


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_file_is_byte_identical_to_safetensors(tmp_path, metadata):
    expected = safetensors.numpy.save(small_tensors(), metadata or None)
    assert bytes_of(tmp_path, small_tensors(), metadata) == expected


def test_returned_size_and_digest_match_the_file(tmp_path):
    size, digest = write_tensors(tmp_path / "a", small_tensors(), {})
    content = (tmp_path / "a").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_dtype_round_trips(tmp_path, dtype):
    known = getattr(ml_dtypes, dtype) if dtype.startswith(("bfloat", "float8")) else dtype
    tensors = {
        "x": np.arange(6).reshape(2, 3).astype(known),
        "scalar": np.ones((), known),
        "none": np.ones(0, known),
    }
    write_tensors(tmp_path / "a", tensors, {})
    assert_same(StoredTensors(tmp_path / "a"), tensors)


def test_strided_and_big_endian_arrays_are_stored_by_value(tmp_path):
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_tensors(tmp_path / "a", {"t": tensor.T, "s": tensor[::2, 1:], "b": tensor.astype(">f4")}, {})
    found = StoredTensors(tmp_path / "a")
    np.testing.assert_array_equal(found["t"], tensor.T)
    np.testing.assert_array_equal(found["s"], tensor[::2, 1:])
    np.testing.assert_array_equal(found["b"], tensor)
    assert found["b"].dtype == np.float32


def test_order_of_tensors_and_metadata_does_not_change_the_bytes(tmp_path):
    tensors, metadata = small_tensors(), {"a": "1", "b": "2", "c": "3"}
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert bytes_of(tmp_path, tensors, metadata) == bytes_of(tmp_path, *backwards)


def test_stored_tensors_are_lazy_and_know_shapes_and_dtypes(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a", small_tensors(), {})
    stored, read = StoredTensors(tmp_path / "a"), []
    one = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: read.append(name) or one(file, name))
    assert stored.shapes == {name: value.shape for name, value in small_tensors().items()} == shapes_of(stored)
    assert stored.dtypes == {name: value.dtype for name, value in small_tensors().items()}
    assert "mask" in stored
    assert "head" not in stored
    assert set(stored) == set(small_tensors())
    assert read == []
    np.testing.assert_array_equal(stored["bias"], small_tensors()["bias"])
    assert read == ["bias"]
    with pytest.raises(KeyError):
        stored["head"]


def test_header_has_the_position_of_each_tensor(tmp_path):
    path = file_with(tmp_path, {"b": entry(offsets=(4, 12)), "a": entry("BF16", (1, 2), (0, 4))}, bytes(12))
    start = path.stat().st_size - 12
    assert SafetensorsFile(path).entries == {
        "b": TensorEntry("F32", (2,), start + 4, 8),
        "a": TensorEntry("BF16", (1, 2), start, 4),
    }


def test_arrays_are_writable(tmp_path):
    write_tensors(tmp_path / "a", small_tensors(), {})
    StoredTensors(tmp_path / "a")["bias"][:] = 0


@pytest.mark.parametrize(
    ("header", "data_bytes", "problem"),
    [
        (b"[]", 0, "does not begin with"),
        (b"{", 0, "not UTF-8 JSON"),
        (b'{"a\xff": 1}', 0, "not UTF-8 JSON"),
        (b'{"a\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', 0, "not UTF-8 JSON"),
        (b"{" + b'"a":{' * 100_000, 0, "not UTF-8 JSON"),
        (b'{"a": 1, "a": 2}', 0, "has the key 'a' twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', 0, "'dtype' twice"),
        (b'{"a": NaN}', 0, "NaN, which is not JSON"),
        (b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}', 0, "negative number -0"),
        ({"__metadata__": {"a": 1}}, 0, "not a map from text to text"),
        ({"a": 3}, 0, "the entry of 'a' is not"),
        ({"a": entry(extra=1)}, 8, "the entry of 'a' is not"),
        ({"a": entry("F31")}, 8, "the dtype of 'a' is unknown; got 'F31'"),
        ({"a": entry(shape=(2.0,))}, 8, "the shape of 'a' is not a list of sizes"),
        ({"a": entry(shape=(True, 2))}, 8, "the shape of 'a' is not a list of sizes"),
        ({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, 0, "impossibly large"),
        ({"a": entry(offsets=(0, 8, 9))}, 8, "are not two positions"),
        ({"a": entry("F4", (3,), (0, 2))}, 2, "does not end on a whole byte"),
        ({"a": entry(offsets=(0, 9))}, 9, "needs 8 bytes, but has offsets"),
        ({"a": entry(offsets=(8, 0))}, 8, "needs 8 bytes, but has offsets"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps the tensor before it"),
        ({"a": entry(), "b": entry(offsets=(0, 8))}, 8, "overlaps the tensor before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' leaves a hole before it"),
        ({"a": entry()}, 7, "but the file has"),
        ({"a": entry()}, 9, "but the file has"),
    ],
)
def test_invalid_header_error_names_the_file(tmp_path, header, data_bytes, problem):
    path = file_with(tmp_path, header, bytes(data_bytes))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header has 100 bytes, but only 2 follow"),
        (struct.pack("<Q", 2**63) + b"{}", "the format allows at most 100000000"),
    ],
)
def test_invalid_header_length_raises(tmp_path, content, problem):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        SafetensorsFile(tmp_path / "a")


def test_missing_file_and_folder_raise(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "a")
    with pytest.raises(CheckpointError, match="it is a folder"):
        SafetensorsFile(tmp_path)


def test_packed_elements_are_read_as_bytes(tmp_path):
    header = {"a": entry("F4", (2, 4), (0, 4)), "b": entry("F4", (2, 3), (4, 7)), "c": entry("F6_E2M3", (4,), (7, 10))}
    found = StoredTensors(file_with(tmp_path, header, bytes(range(10))))
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [[0, 1], [2, 3]],
        "b": [4, 5, 6],  # a row does not end on a whole byte
        "c": [7, 8, 9],
    }


def test_boolean_that_is_neither_0_nor_1_raises(tmp_path):
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        StoredTensors(file_with(tmp_path, {"a": entry("BOOL", (2,), (0, 2))}, b"\x01\x02"))["a"]


def test_unsupported_tensors_raise_before_the_old_file_is_changed(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, small_tensors(), {})
    for tensors, problem in (
        ({"x": np.array(["text"])}, "x has dtype <U4, which safetensors does not support; expected one of bool"),
        ({"x": np.zeros(2, np.complex128)}, "x has dtype complex128"),
        ({"__metadata__": np.zeros(2)}, "cannot be named __metadata__"),
        ({"x\ud800": np.zeros(2)}, "not valid Unicode"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            write_tensors(path, tensors, {})
    assert_same(StoredTensors(path), small_tensors())


def test_file_truncated_while_it_is_read_raises_and_does_not_crash(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_tensors(path, {"x": np.zeros(1 << 20, np.uint8)}, {})
    empty = np.empty

    def cut_then_allocate(*args):
        os.truncate(path, 1000)
        return empty(*args)

    monkeypatch.setattr(np, "empty", cut_then_allocate)
    with pytest.raises(CheckpointError, match="was truncated while x was read"):
        StoredTensors(path)["x"]


def corrupted(content, draw):
    """Return the content with one random corruption, accidental or malicious."""
    length = int.from_bytes(content[:8], "little")
    kind = draw.choice(["cut", "append", "flip", "flip header", "length", "offsets", "dtype", "shape", "twice", "swap"])
    spot = draw.randrange(len(content))
    if kind == "cut":
        return content[:spot]
    if kind == "append":
        return content + draw.randbytes(draw.randint(1, 9))
    if kind in ("flip", "flip header"):
        spot = spot if kind == "flip" else draw.randrange(8, 8 + length)
        return content[:spot] + bytes([content[spot] ^ (1 << draw.randrange(8))]) + content[spot + 1 :]
    if kind == "length":
        return struct.pack("<Q", max(0, length + draw.choice([-8, -1, 1, 8, 2**40]))) + content[8:]
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    if kind == "offsets":
        header[name]["data_offsets"][draw.randrange(2)] += draw.choice([-8, -1, 1, 8])
    elif kind == "dtype":
        header[name]["dtype"] = draw.choice(["F32", "BF16", "I8", "F4", "F6_E2M3", "C64", "F128", "", "f32"])
    elif kind == "shape":
        header[name]["shape"] = draw.choice([[], [0], [2, 7], [-1], [1.0], "x", None, [2**62, 4], [15, 1]])
    elif kind == "swap":
        other = draw.choice([name for name in header if name != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    if kind == "twice":
        text = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    text += b" " * draw.choice([0, -len(text) % 8])
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_corruptions_are_accepted_only_if_safetensors_accepts_them(tmp_path):
    content = bytes_of(tmp_path, small_tensors(), {"format": "pt"})
    path = tmp_path / "a.safetensors"
    accepted, refused, refused_only_here, refused_when_read = 0, 0, [], []
    for seed in range(NUM_CORRUPTIONS):
        broken = corrupted(content, random.Random(seed))
        path.write_bytes(broken)
        try:
            theirs = {name: (value["dtype"], bytes(value["data"])) for name, value in safetensors.deserialize(broken)}
        except safetensors.SafetensorError:
            theirs = None
        try:
            ours = SafetensorsFile(path).entries
        except CheckpointError as error:
            refused += 1
            if theirs is not None:
                refused_only_here.append(str(error))
            continue
        accepted += 1
        assert theirs is not None, f"seed {seed}: safetensors refuses it"
        found = {
            name: (entry.dtype, broken[entry.start_byte : entry.start_byte + entry.size_bytes])
            for name, entry in ours.items()
        }
        assert found == theirs, f"seed {seed}"
        try:
            values = dict(StoredTensors(path))
        except CheckpointError as error:
            refused_when_read.append(str(error))
        else:
            read = {name: array.tobytes() for name, array in values.items()}
            assert read == {name: data for name, (_, data) in theirs.items()}
    assert all("twice" in text for text in refused_only_here)  # safetensors keeps the last of two duplicates
    assert all("NumPy cannot hold" in text or "neither 0 nor 1" in text for text in refused_when_read)
    assert accepted > NUM_CORRUPTIONS // 10
    assert refused > NUM_CORRUPTIONS // 2


# --- one tensor at a time -----------------------------------------------------------------------------------


def streamable(tmp_path):
    write_tensors(tmp_path / "a", small_tensors(), {"format": "pt"})
    return SafetensorsFile(tmp_path / "a")


def test_stream_may_have_any_order(tmp_path):
    file = streamable(tmp_path)
    for order in (list(file.entries), list(reversed(file.entries))):
        write_stream(tmp_path / "b", file.header, ((name, file.read(name)) for name in order))
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_header_is_encoded_from_dtypes_and_shapes(tmp_path):
    file = streamable(tmp_path)
    described = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    assert encode_header(described, {"format": "pt"}) == file.header


def test_packed_elements_are_written_as_bytes(tmp_path):
    header = encode_header({"a": ("F4", (2, 4))}, {})
    write_stream(tmp_path / "a", header, [("a", np.arange(4, dtype=np.uint8).reshape(2, 2))])
    assert StoredTensors(tmp_path / "a")["a"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pairs: pairs[1:], "missing"),
        (lambda pairs: [*pairs, pairs[0]], "appears twice"),
        (lambda pairs: [*pairs, ("more", pairs[0][1])], "more is not in the header"),
        (lambda pairs: [(name, array.reshape(-1)[:1]) for name, array in pairs], "according to the header"),
        (lambda pairs: [(name, array.astype(np.float32)) for name, array in pairs], "according to the header"),
    ],
)
def test_stream_that_does_not_match_its_header_keeps_the_old_file(tmp_path, change, problem):
    file = streamable(tmp_path)
    before = (tmp_path / "a").read_bytes()
    pairs = [(name, file.read(name)) for name in file.entries]
    with pytest.raises(CheckpointError, match=problem):
        write_stream(tmp_path / "a", file.header, change(pairs))
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_invalid_header_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*: its header does not begin with '{'"):
        write_stream(tmp_path / "a", b"[]", [])
    assert os.listdir(tmp_path) == []


def test_file_changed_after_its_header_was_read_raises(tmp_path):
    file = streamable(tmp_path)
    write_tensors(tmp_path / "a", small_tensors(), {"format": "pt"})
    with pytest.raises(CheckpointError, match="a was changed after it was opened"):
        file.read("bias")


def test_pipe_raises_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is a pipe"):
        SafetensorsFile(tmp_path / "pipe")


def test_arrays_are_aligned_for_zero_copy(tmp_path):
    file = streamable(tmp_path)
    assert {file.read(name).ctypes.data % 64 for name in file.entries if name != "nothing"} == {0}
