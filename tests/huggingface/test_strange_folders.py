"""Folders as other programs leave them: Git LFS pointers, an adapter beside or in place of the model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import write_tensors
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import tokenizer_of_model_folder
from moezoo.core.data.token_shards import open_shard
from moezoo.core.errors import CheckpointError, DataError, MoezooError, RunError
from moezoo.core.generation.config import read_generation_config
from moezoo.core.huggingface.checkpoint import describe_checkpoint, open_checkpoint
from moezoo.core.huggingface.layout import small_files
from moezoo.core.runs.open import checkpoint_folder
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 123456\n"


def read_tokenizer(folder: Path) -> object:
    return tokenizer_of_model_folder(folder, 7)


def read_generation(folder: Path) -> object:
    return read_generation_config(folder, {})


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", open_checkpoint),
        ("model.safetensors.index.json", open_checkpoint),
        ("model-00002-of-00002.safetensors", open_checkpoint),
        ("tokenizer.json", read_tokenizer),
        ("tokenizer_config.json", read_tokenizer),
        ("chat_template.jinja", read_tokenizer),
        ("generation_config.json", read_generation),
    ],
)
def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    folder = write_checkpoint("mixtral", tmp_path, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).write_text(POINTER)
    with pytest.raises(MoezooError, match=r"Git LFS pointer: run `git lfs pull` in its folder") as caught:
        read(folder)
    assert f"{folder / name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_git_lfs_pointer_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text(POINTER)
    with pytest.raises(DataError, match="Git LFS pointer"):
        open_shard(tmp_path / "a.npy", "a.npy")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_named_and_not_copied(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint("mixtral", tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    write_tensors(folder / name, {"a.lora_a": np.zeros((2, 3), np.float32)}, {})
    checkpoint = open_checkpoint(folder)
    [note] = checkpoint.description.notes
    assert note.startswith(f"the adapter beside the model (adapter_config.json, {name}) is not applied")
    assert describe_checkpoint(folder).notes == [note]
    assert list(small_files(folder)) == ["config.json"]


def test_an_adapter_without_its_model_is_refused_as_one(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has an adapter \(adapter_model\.safetensors\) but not the weights"):
        open_checkpoint(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(RunError, match=r"is an adapter, without the model.*BASE --adapter FOLDER"):
        checkpoint_folder(folder)


@pytest.mark.parametrize("length", ["16", [16], {"text": 16}, 3])
def test_the_tokenizers_maximum_length_is_not_read(tmp_path: Path, length: object) -> None:
    folder = write_tokenizer(tmp_path)
    expected = HuggingFaceTokenizer(str(folder)).encode_chat([{"role": "user", "content": "the cat sat on the mat"}])
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HuggingFaceTokenizer(str(folder))
    assert len(tokenizer.encode("the cat sat on the mat")) > 3
    found = tokenizer.encode_chat([{"role": "user", "content": "the cat sat on the mat"}])
    assert found.tolist() == expected.tolist()
