import json
import os

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import write_tensors
from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.folder import StoredTensor, TensorFolder

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors():
    draw = np.random.default_rng(0)
    return {
        "embed.weight": draw.standard_normal((7, 5)).astype(ml_dtypes.bfloat16),
        "layers.0.w": draw.standard_normal((3, 5)).astype(np.float32),
        "layers.1.w": draw.standard_normal((3, 5)).astype(np.float16),
        "scales": draw.integers(0, 255, (4,)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu),
    }


def single(folder):
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors(), {"format": "pt"})
    return folder


def sharded(folder):
    folder.mkdir(exist_ok=True)
    everything, weight_map = list(tensors().items()), {}
    for shard, items in zip(SHARDS, (everything[:2], everything[2:]), strict=True):
        write_tensors(folder / shard, dict(items), {"format": "pt"})
        weight_map |= {name: shard for name, _ in items}
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 1.5}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [single, sharded])
def test_every_tensor_is_read_in_its_stored_dtype(tmp_path, write):
    folder = TensorFolder(write(tmp_path))
    assert folder.tensors.keys() == tensors().keys()
    for name, expected in tensors().items():
        found = folder.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        assert folder.size_bytes(name) == expected.nbytes


def test_a_stored_tensor_has_file_dtype_and_shape(tmp_path):
    folder = TensorFolder(sharded(tmp_path))
    assert folder.tensors["embed.weight"] == StoredTensor(SHARDS[0], "BF16", (7, 5))
    assert folder.tensors["scales"] == StoredTensor(SHARDS[1], "F8_E8M0", (4,))


@pytest.mark.parametrize("write", [single, sharded])
def test_headers_are_those_of_the_files(tmp_path, write):
    for name, header in TensorFolder(write(tmp_path)).headers.items():
        content = (tmp_path / name).read_bytes()
        assert content[: 8 + len(header)] == len(header).to_bytes(8, "little") + header


def test_a_tensor_is_read_into_a_slice_of_a_stack(tmp_path):
    folder = TensorFolder(single(tmp_path))
    stack = np.zeros((2, 3, 5), np.float32)
    folder.read("layers.0.w", out=stack[1])
    np.testing.assert_array_equal(stack, np.stack([np.zeros((3, 5)), tensors()["layers.0.w"]]))
    for unfit in (stack, stack[0].T, stack[0].astype(np.float16), np.zeros((3, 10), np.float32)[:, ::2]):
        with pytest.raises(CheckpointError, match=r"layers\.0\.w is float32 \[3, 5\] and cannot be read into"):
            folder.read("layers.0.w", out=unfit)


def test_one_file_of_another_name_is_read_without_an_index(tmp_path):
    os.rename(single(tmp_path) / "model.safetensors", tmp_path / "weights.safetensors")
    assert TensorFolder(tmp_path).tensors["scales"].file == "weights.safetensors"


def test_an_index_of_one_file_is_read_and_an_unlisted_file_refused(tmp_path):
    single(tmp_path)
    write_index(tmp_path, dict.fromkeys(tensors(), "model.safetensors"))
    assert len(TensorFolder(tmp_path).tensors) == len(tensors())
    sharded(tmp_path)
    assert "an index that does not list it" in refusal(tmp_path)
