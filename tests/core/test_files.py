import hashlib
import os
import stat

import pytest

from moezoo.core.errors import RunError
from moezoo.core.files import make_folder, remove_folder, rename_folder, sha256_of, write_atomically


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
    with pytest.raises(RunError, match=r"cannot write .*/nowhere/a: .*nowhere.* does not exist\. Create it first"):
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
