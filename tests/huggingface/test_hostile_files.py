"""Damaged and malicious files: one clear error with the file name, before any large allocation."""

import json
import os
import random
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moezoo
from moezoo.core.checkpoint.safetensors_file import SafetensorsFile
from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.folder import TensorFolder
from tests.huggingface.test_families import main_cases
from tests.support.backends_available import require_backend
from tests.support.fixtures import cases, read_fixture, text_config, write_checkpoint

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture
def folder(tmp_path):
    """A valid checkpoint in two shards, to be corrupted."""
    return write_checkpoint("mixtral", tmp_path / "checkpoint", shards=2)


@pytest.fixture(autouse=True)
def no_loader_of_a_backend(monkeypatch):
    """Fail if a backend's own file loader is called: it may crash the process."""
    import safetensors.numpy

    mx = require_backend("mlx")

    def reached(*_, **__):
        raise AssertionError("another loader was called")

    for module, name in ((mx, "load"), (safetensors, "safe_open"), (safetensors.numpy, "load_file")):
        monkeypatch.setattr(module, name, reached)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(path, change):
    """Edit the JSON object of a file with `change`."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path, change, data=lambda data: data):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(content[8 + length :]))


def refusal(folder, kind=CheckpointError):
    """Check that opening fails with a one-line error with a path, without allocating more than the headers need."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            moezoo.load(folder, backend="mlx")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def holder(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


# --- safetensors files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(folder, kept):
    path = shards(folder)[1]
    size = path.stat().st_size
    os.truncate(path, kept % size)
    assert f"{path} is not a valid safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(shape=[2**40, 2**40]),
        lambda entry: entry.update(shape=[entry["shape"][0], 2**31]),
        lambda entry: entry.update(data_offsets=[0, 2**62]),
        lambda entry: entry.update(data_offsets=[8, 4]),
        lambda entry: entry.update(shape=[-1, -64]),
        lambda entry: entry.update(dtype="F64"),
        lambda entry: entry.update(dtype="pickle"),
        lambda entry: entry.pop("shape"),
    ],
)
def test_an_inconsistent_header_is_refused_by_name(folder, change):
    path = holder(folder, GATE)
    edit_header(path, lambda header: change(header[GATE]))
    text = refusal(folder)
    assert f"{path} is not a valid safetensors file" in text


def test_a_file_that_is_huge_but_empty_is_refused_by_its_header(folder):
    path = shards(folder)[0]
    os.truncate(path, 1 << 40)  # sparse
    assert f"{path} is not a valid safetensors file" in refusal(folder)


def test_a_header_of_a_tebibyte_is_refused_unread(folder):
    path = shards(folder)[0]
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "its header has 1099511627776 bytes" in refusal(folder)


@pytest.mark.parametrize(("stored", "problem"), [("I32", "is I32; expected"), ("U32", "is U32; expected")])
def test_a_tensor_of_another_dtype_is_refused_by_name(folder, stored, problem):
    path = holder(folder, GATE)
    width = {"F32": 4, "BF16": 2, "F16": 2}

    def change(header):
        assert width[header[GATE]["dtype"]] == 4
        header[GATE]["dtype"] = stored

    edit_header(path, change)
    text = refusal(folder)
    assert GATE in text
    assert path.name in text
    assert problem in text


def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    path = holder(folder, GATE)
    edit_header(path, lambda header: header[GATE].update(shape=header[GATE]["shape"][::-1]))
    text = refusal(folder)
    assert GATE in text
    assert path.name in text


def test_a_file_that_shrinks_or_changes_after_opening_is_an_error_and_not_a_crash(folder):
    checkpoint = open_checkpoint(folder)
    for path in shards(folder):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{shards(folder)[0]} was changed|{shards(folder)[1]} was changed"):
        dict(checkpoint.weights)


# --- the index --------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_refused_by_name(folder):
    path = shards(folder)[1]
    path.unlink()
    assert f"{path} is missing" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        7,
        None,
        "a\0.safetensors",
        "a\n.safetensors",
    ],
)
def test_an_index_that_names_another_place_is_refused(folder, name):
    outside = folder.parent / "other.safetensors"
    shutil.copy(holder(folder, GATE), outside)
    edit(folder / INDEX, lambda index: index["weight_map"].update({GATE: name}))
    text = refusal(folder)
    assert INDEX in text
    assert GATE in text


def test_a_link_out_of_the_folder_is_refused(folder):
    path, outside = shards(folder)[0], folder.parent / "outside.safetensors"
    os.rename(path, outside)
    path.symlink_to(outside)
    assert f"{path} is a link to" in refusal(folder)


def test_a_link_within_the_folder_is_accepted(folder):
    path = shards(folder)[0]
    os.rename(path, folder / "renamed.bin")
    path.symlink_to("renamed.bin")
    assert TensorFolder(folder).tensors


def test_a_link_to_itself_and_a_folder_and_a_pipe_are_refused(folder):
    path = shards(folder)[0]
    path.unlink()
    path.symlink_to(path.name)
    assert str(path) in refusal(folder)
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(folder)
    path.rmdir()
    os.mkfifo(path)
    assert str(path) in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 100_000, "\xff"])
def test_an_invalid_index_is_refused_by_name(folder, content):
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    assert str(folder / INDEX) in refusal(folder)


def test_a_duplicate_tensor_is_refused(folder):
    text = (folder / INDEX).read_text()
    name = json.dumps(GATE)
    (folder / INDEX).write_text(text.replace(f"{name}:", f'{name}: "x.safetensors", {name}:'))
    assert f"{folder / INDEX} cannot be read as JSON (the key '{GATE}' is a duplicate)" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    path, other = holder(folder, GATE), None
    other = next(shard for shard in shards(folder) if shard != path)
    content = SafetensorsFile(path).read(GATE)

    def add(header):
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header[GATE] = {"dtype": "F32", "shape": list(content.shape), "data_offsets": [end, end + content.nbytes]}

    assert content.dtype == np.float32
    edit_header(other, add, lambda data: data + content.tobytes())
    text = refusal(folder)
    assert f"'{GATE}' is both in" in text


def test_a_tensor_in_another_file_than_the_index_says_is_refused(folder):
    path = holder(folder, GATE)
    other = next(shard for shard in shards(folder) if shard != path)
    edit(folder / INDEX, lambda index: index["weight_map"].update({GATE: other.name}))
    assert f"maps '{GATE}' to {other.name}, but it is in {path.name}" in refusal(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].pop(GATE))
    assert f"{path} has '{GATE}', which {INDEX} does not list" in refusal(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].update({GATE: path.name, "more": path.name}))
    assert f"maps 'more' to {path.name}, but no file has it" in refusal(folder)


def test_shards_without_an_index_are_refused(folder):
    (folder / INDEX).unlink()
    assert f"no {INDEX}" in refusal(folder)
    shards(folder)[0].unlink()
    assert f"no {INDEX}" in refusal(folder)  # the file name says one of two


def test_pickle_is_refused_with_advice(folder):
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    assert "has no safetensors files" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "Convert them to safetensors" in refusal(folder)


def test_weights_that_are_not_finite_are_a_warning_with_names(folder):
    path = holder(folder, GATE)
    entry = SafetensorsFile(path).entries[GATE]
    with open(path, "r+b") as file:
        file.seek(entry.start_byte)
        file.write(np.float32(np.nan).tobytes())
    loaded = moezoo.load(folder, backend="mlx")
    assert any("layers.0.moe.router" in problem and "NaN" in problem for problem in loaded.problems)


# --- config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_local_experts", 0),
        ("num_experts_per_tok", 1000),
        ("num_experts_per_tok", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_local_experts", 10**9),
        ("hidden_size", 10**30),
        ("hidden_size", "64"),
        ("num_attention_heads", 7.5),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("model_type", "no_such_family"),
        ("surprise", 1),
    ],
)
def test_an_impossible_config_is_refused_with_its_file(folder, field, value):
    edit(folder / "config.json", lambda config: config.update({field: value}))
    assert str(folder / "config.json") in refusal(folder, SpecError)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2_000},
        {"num_local_experts": 100_000},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**9},
    ],
)
def test_a_config_of_a_far_larger_model_is_refused_before_names_are_generated(folder, change):
    edit(folder / "config.json", lambda config: config.update(change))
    text = refusal(folder)
    assert "describes a model of" in text
    assert "Use the config.json that belongs to these files" in text


def test_a_config_of_another_shape_is_refused(folder):
    edit(folder / "config.json", lambda config: config.update(intermediate_size=config["intermediate_size"] + 1))
    assert "config.json" in refusal(folder)


# --- random corruption ------------------------------------------------------------------------------------------

ODD = [None, 0, -1, 1, 3, 10**9, 10**400, True, "", "x", [], [0], ["x"], {}, {"rope_type": "foo"}, 1.5, float("inf")]
ODD += [float("nan"), [[]], [10**9], 1e308, "full_attention"]


def places_in(value, path=()):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places_in(inner, (*path, key))


def spoil_config(config, draw):
    """Change one to three fields: integers mostly to other integers, everything else to invalid values."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        *path, last = draw.choice(list(places_in(config)))
        at = config
        for key in path:
            at = at[key]
        if draw.random() < 0.1:
            del at[last]
        elif type(at[last]) is int and draw.random() < 0.7:
            at[last] = draw.choice([at[last] + 1, at[last] - 1, at[last] * 2, at[last] // 2, 1, 2, 3])
        else:
            at[last] = json.loads(json.dumps(draw.choice(ODD)))


@pytest.mark.parametrize("case", cases())
def test_odd_values_in_any_field_are_parsed_or_refused_with_the_file(case, tmp_path):
    """Twelve configs of each family, and six of each of its options, which have most fields in common."""
    attempts = 12 if case in main_cases() else 6
    draw = random.Random(case)
    folder = write_checkpoint(case, tmp_path)
    fixture = read_fixture(case).description
    problems = set()
    for attempt in range(attempts):
        config = json.loads(json.dumps(fixture["hub_config" if attempt % 2 else "config"]))
        # Most fields around a text model concern other modalities, and have no effect.
        spoil_config(text_config(config) if attempt % 4 else config, draw)
        (folder / "config.json").write_text(json.dumps(config))
        problems.add(problem_of(folder))
    assert len(problems) > attempts // 4


def problem_of(folder):
    """Return the error of opening a folder and reading all its weights; None if it loads."""
    try:
        checkpoint = open_checkpoint(folder)
        shapes = {name: value.shape for name, value in checkpoint.weights.items()}
    except (CheckpointError, SpecError) as error:
        problem = str(error)
    else:
        assert shapes == dict(checkpoint.weights.shapes)
        return None
    assert str(folder) in problem
    assert "\n" not in problem
    return problem


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_corrupted_files_load_or_give_one_error(folder, data):
    """Flip, cut, insert or swap bytes in one of the files: it loads, or one error names a file."""
    work = folder.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    path = data.draw(st.sampled_from(sorted(work.iterdir())))
    content = bytearray(path.read_bytes())
    # Corrupt lengths, headers and JSON rather than tensor data.
    region = (
        min(len(content), 8 + int.from_bytes(content[:8], "little")) if path.suffix == ".safetensors" else len(content)
    )
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "replace", "repeat"]))
    at = data.draw(st.integers(0, region - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at : at + data.draw(st.integers(1, 64))]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    elif kind == "replace":
        piece = data.draw(st.sampled_from([b"0", b"9", b"-1", b'"', b"}", b"]", b"null", b"F16", b"99999999999999"]))
        content[at : at + len(piece)] = piece
    else:
        content[at:at] = content[at : at + data.draw(st.integers(1, 200))]
    path.write_bytes(content)
    problem_of(work)
