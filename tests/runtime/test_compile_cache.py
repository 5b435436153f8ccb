"""The folder of JAX's compilation cache. Each case runs in a process: JAX reads its settings once."""

import errno
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.backends_available import require_backend

pytestmark = pytest.mark.slow

_PROGRAM = """
from moezoo.backends import load_backend
print(load_backend("jax").facts()["compile cache"])
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: x * 3 + 1)(jnp.ones(()))))
"""


@pytest.fixture(autouse=True)
def _jax() -> None:
    require_backend("jax")


def run(**settings: str) -> tuple[str, str]:
    """Run a process with these settings; return the cache folder that it reports and its program's result."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, value = done.stdout.splitlines()
    return folder, value


def test_programs_are_cached_in_the_users_cache_folder_even_small_ones(tmp_path):
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / "moezoo" / "jax"))
    assert value == "4.0"
    cached = sorted(os.listdir(folder))
    [entry] = (name for name in cached if name.startswith("jit__lambda") and name.endswith("-cache"))
    content = Path(folder, entry).read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest()
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (folder, "4.0")
    assert sorted(os.listdir(folder)) == cached  # the second process found them


@pytest.mark.release
def test_an_incomplete_entry_of_a_killed_process_is_rewritten(tmp_path):
    folder = Path(run(XDG_CACHE_HOME=str(tmp_path))[0])
    (entry,) = folder.glob("jit__lambda*-cache")
    whole = entry.stat().st_size
    entry.write_bytes(entry.read_bytes()[: whole // 2])
    Path(str(entry).removesuffix("cache") + "atime").unlink()  # JAX would have written this file next
    assert run(XDG_CACHE_HOME=str(tmp_path))[1] == "4.0"  # warnings are errors in this process
    assert entry.stat().st_size >= whole * 0.9


@pytest.mark.parametrize("at", [0, 31, 32, 40, -1])
def test_a_damaged_entry_is_said_and_written_again(tmp_path, at):
    from moezoo.jax_backend.runtime.compile_cache import MAX_BYTES, VerifiedCache

    cache = VerifiedCache(str(tmp_path), max_size=MAX_BYTES)
    cache.put("key", b"executable")
    assert cache.get("key") == b"executable"
    [entry] = tmp_path.glob("*-cache")
    damaged = bytearray(entry.read_bytes())
    damaged[at] ^= 4
    entry.write_bytes(damaged)
    with pytest.warns(
        UserWarning, match=r"the compile cache is damaged and the program is compiled again \(.*key-cache"
    ):
        assert cache.get("key") is None
    cache.put("key", b"executable")
    assert cache.get("key") == b"executable"


def test_a_full_disk_is_said_once_and_leaves_no_entry(tmp_path, monkeypatch):
    from moezoo.jax_backend.runtime.compile_cache import MAX_BYTES, VerifiedCache

    cache = VerifiedCache(str(tmp_path), max_size=MAX_BYTES)
    cache.put("first", b"executable")
    real = type(cache.path).write_bytes

    def full(path, content):
        real(path, content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        patch.setattr(type(cache.path), "write_bytes", full)
        for _ in range(2):
            cache.put("second", b"executable")
    [warning] = (str(warning.message) for warning in said)
    assert warning.startswith(
        "the compile cache cannot be written (no space left on device); its programs are compiled"
    )
    assert cache.get("second") is None
    cache.put("second", b"executable")
    assert cache.get("second") == cache.get("first") == b"executable"


@pytest.mark.release
def test_settings_of_jax_take_precedence(tmp_path):
    own = tmp_path / "own"
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(own))[0] == str(own)
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false") == ("off", "4.0")
    assert not (tmp_path / "moezoo").exists()


@pytest.mark.release
def test_a_folder_that_cannot_be_created_is_reported_and_training_continues(tmp_path):
    (tmp_path / "moezoo").write_text("a file in the way")
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"off: cannot write and lock {tmp_path}/moezoo/jax")
    assert value == "4.0"


def test_a_folder_that_cannot_be_locked_is_reported_and_training_continues(tmp_path):
    (tmp_path / "moezoo" / "jax" / "verified" / ".lockfile").mkdir(parents=True)
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"off: cannot write and lock {tmp_path}/moezoo/jax")
    assert value == "4.0"


@pytest.mark.release  # it waits for ten seconds
def test_waiting_for_a_lock_held_by_another_process_times_out(tmp_path):
    folder = tmp_path / "moezoo" / "jax" / "verified"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lockfile"):
        folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith("off: ")
    assert value == "4.0"
