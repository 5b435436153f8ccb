import hashlib
import os
import stat

import pytest

from moezoo.core.checkpoint.manifest import read_manifest
from moezoo.core.config.run_config import load_config
from moezoo.core.data.grammar.grammar import load_grammar
from moezoo.core.data.load_tokenizer import load_tokenizer
from moezoo.core.data.token_shards import open_shard
from moezoo.core.errors import MoezooError, RunError
from moezoo.core.files import (
    located,
    make_folder,
    read_bounded,
    remove_folder,
    rename_folder,
    sha256_of,
    write_atomically,
)
from moezoo.core.generation.config import read_generation_config
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.huggingface.layout import open_sidecar
from moezoo.core.training.metrics import read_metrics
from tests.support.hostile import at_most


class Killed(BaseException):
    """Simulated kill of the process; nothing in the package may catch it and continue."""


def test_write_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "a.bin", b"\x00\xff")
    write_atomically(tmp_path / "b.txt", "größer\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "größer\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "b.txt"]


def test_file_has_default_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_before_the_rename_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    write_atomically(path, "old")

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_file_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "a", "text")
    assert calls == ["file", "rename", "folder"]


def test_missing_folder_error_names_it(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*/nowhere/a: .*/nowhere does not exist\. Create it first"):
        write_atomically(tmp_path / "nowhere" / "a", "text")


def test_folder_at_the_path_error_names_it(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*/a: is a directory"):
        write_atomically(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == ["a"]


def test_unwritable_folder_error_names_it(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))  # root may write anywhere, so the error is simulated

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=r"cannot write .*/a: permission denied\. Use another folder"):
        write_atomically(tmp_path / "a", "text")


def test_full_disk_error_names_the_path(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"cannot write .*/a: no space left on device"):
        write_atomically(tmp_path / "a", "text")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(RunError, match=r"cannot read .*/b: .*does not exist"):
        sha256_of(tmp_path / "b")


def test_make_folder_creates_missing_parents(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot create the folder"):
        make_folder(tmp_path / "file" / "b")


def test_rename_never_overwrites(tmp_path):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b")
    with pytest.raises(RunError, match=r"cannot rename .*/a to b: the target exists"):
        rename_folder(tmp_path / "a", tmp_path / "b")
    rename_folder(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_remove_folder_does_not_follow_a_link(tmp_path):
    make_folder(tmp_path / "kept")
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_folder(tmp_path / "link")
    remove_folder(tmp_path / "missing")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["file"]


# --- reads -----------------------------------------------------------------------------------------------------------


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_sparse(path):
    path.touch()
    os.truncate(path, 200 << 30)


def make_folder_there(path):
    path.mkdir()


ODD_FILES = [make_pipe, make_device, make_sparse, make_folder_there]


REASONS = ["it is a pipe", "it is a device", "it has 214748364800 bytes, more than 99", "it is a folder"]


@pytest.mark.parametrize(("make", "reason"), list(zip(ODD_FILES, REASONS, strict=True)))
def test_only_a_regular_file_of_bounded_size_is_read(tmp_path, make, reason):
    make(tmp_path / "a")
    with at_most(5), pytest.raises(OSError, match=reason):
        read_bounded(tmp_path / "a", 99)


def test_a_small_file_is_read_whole_and_one_that_grows_is_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 99)
    assert read_bounded(tmp_path / "a", 99) == b"x" * 99
    with pytest.raises(OSError, match="it has 99 bytes, more than 98"):
        read_bounded(tmp_path / "a", 98)
    with pytest.raises(OSError, match=r"it has \d+ bytes, more than 9"):
        read_bounded("/proc/self/status", 9)  # its size is 0 until it is read
    with pytest.raises(OSError, match="NUL"):
        read_bounded("a\0b", 9)


READERS = {
    "config.yaml": lambda path: load_config(path),
    "config.json": lambda path: Fields.read(path),
    "generation_config.json": lambda path: read_generation_config(path.parent, {}),
    "model.safetensors.index.json": lambda path: TensorFolder(path.parent),
    "model.safetensors": lambda path: TensorFolder(path.parent),
    "headers.json": lambda path: open_sidecar(path.parent),
    "manifest.json": lambda path: read_manifest(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer_config.json": lambda path: load_tokenizer(path.parent),
    "metrics.jsonl": lambda path: read_metrics(path),
    "grammar.yaml": lambda path: load_grammar(path),
    "shard.npy": lambda path: open_shard(path, str(path)),
    "shard.bin": lambda path: open_shard(path, str(path)),
}


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("name", READERS)
def test_each_small_file_that_is_no_regular_one_is_one_line_of_error(tmp_path, name, make):
    make(tmp_path / name)
    with at_most(5), pytest.raises(MoezooError) as caught:
        READERS[name](tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_relative_path_is_shown_with_what_it_is_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("a/b") == f"a/b ({tmp_path}/a/b)"
    assert located("a/../b") == f"a/../b ({tmp_path}/b)"
    assert located(tmp_path / "a") == f"{tmp_path}/a"
