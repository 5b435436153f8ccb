"""The lock of a run: one process at a time, and locks that ended processes left behind."""

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

from moezoo.core.errors import RunError
from moezoo.core.runs.run_lock import Holder, RunLock, check_unlocked, process_start, read_holder

_HOLD = """
import sys
from pathlib import Path
from moezoo.core.runs.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def left_by(path, **changes):
    """Write a lock file as a killed process leaves it, by default this very process."""
    start = process_start(os.getpid())
    holder = {"pid": os.getpid(), "host": platform.node(), "since": "2026-01-02 03:04:05", "process_start": start}
    path.touch()
    path.write_text(json.dumps({**holder, "inode": path.stat().st_ino, **changes}))


def without_flock(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_second_process_is_refused_with_the_first_ones_name_until_that_is_killed(tmp_path):
    path = tmp_path / "lock.json"
    first = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "locked\n"
        since = read_holder(path).since
        expected = f"{tmp_path} is being trained by process {first.pid} on {platform.node()} (since {since}); "
        for attempt in (RunLock, check_unlocked):
            with pytest.raises(RunError) as refused:
                attempt(path)
            assert str(refused.value).startswith(expected)
            assert f"`kill {first.pid}`" in str(refused.value)
            assert "\n" not in str(refused.value)
    finally:
        first.kill()
        first.communicate()
    check_unlocked(path)
    lock = RunLock(path)
    assert (lock.left_by.pid, lock.left_by.since) == (first.pid, since)
    assert read_holder(path).pid == os.getpid()
    lock.release()
    assert os.listdir(tmp_path) == []
    RunLock(path).release()


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
def test_stale_lock_is_taken_over(tmp_path, monkeypatch, locks):
    path = tmp_path / "lock.json"
    ended = subprocess.Popen(["true"])
    ended.wait()
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_flock)
    for changes in ({"pid": ended.pid, "process_start": None}, {"process_start": "1 ticks after boot"}):
        left_by(path, **changes)
        lock = RunLock(path)
        assert lock.left_by.since == "2026-01-02 03:04:05"
        own = (os.getpid(), platform.node(), read_holder(path).since, process_start(os.getpid()))
        assert read_holder(path) == Holder(*own, path.stat().st_ino)
        lock.check()
        lock.release()
    for content in (b"", b"[1]", b"{}", b'{"pid": "1"}', b"\xff"):
        path.write_bytes(content)
        lock = RunLock(path)
        assert lock.left_by is None
        lock.release()


def test_lock_of_another_host_is_stale_with_flock_and_held_without(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    left_by(path, host="elsewhere")
    lock = RunLock(path)
    assert lock.left_by.host == "elsewhere"
    lock.release()
    monkeypatch.setattr(fcntl, "flock", without_flock)
    left_by(path, host="elsewhere", pid=7)
    with pytest.raises(
        RunError, match=rf"process 7 on elsewhere.* stop it, or .* If that process has ended, delete {path}"
    ):
        RunLock(path)
    left_by(path)
    with pytest.raises(RunError, match="is being trained by process"):
        RunLock(path)


def test_lock_says_when_its_folder_was_moved_deleted_or_taken(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run / "lock.json")
    lock.check()
    run.rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"run folder .*run was moved or deleted while it was trained"):
        lock.check()
    run.mkdir()
    other = RunLock(run / "lock.json")
    with pytest.raises(RunError, match="moved or deleted"):
        lock.check()
    lock.release()
    assert (run / "lock.json").exists(), "the lock of another process stays"
    other.release()


def test_copy_of_a_folder_that_is_trained_is_not_locked(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    lock = RunLock(run / "lock.json")
    shutil.copytree(run, copy)
    check_unlocked(copy / "lock.json")
    other = RunLock(copy / "lock.json")
    assert other.left_by is None
    with pytest.raises(RunError, match="is being trained"):
        check_unlocked(run / "lock.json")
    other.release()
    lock.release()


def test_lock_that_cannot_be_written_is_one_error_and_leaves_no_file(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"cannot lock the run: .*lock\.json: no such file or directory\. Check"):
        RunLock(tmp_path / "none" / "lock.json")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(RunError, match="no space left on device"):
        RunLock(tmp_path / "lock.json")
    assert os.listdir(tmp_path) == []
