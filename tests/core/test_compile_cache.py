"""Where the JAX backend keeps compiled programs. Each case is a process: JAX reads its settings once."""

import os
import subprocess
import sys
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
    """What a process with these settings says its folder is, and what its program gives."""
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


def test_programs_are_kept_in_the_users_cache_folder_small_ones_too(tmp_path):
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / "moezoo" / "jax"))
    assert value == "4.0"
    kept = sorted(os.listdir(folder))
    assert any(name.startswith("jit__lambda") for name in kept)
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (folder, "4.0")
    assert sorted(os.listdir(folder)) == kept  # the second process found them


def test_what_a_killed_process_left_half_written_is_written_again(tmp_path):
    folder = Path(run(XDG_CACHE_HOME=str(tmp_path))[0])
    (entry,) = folder.glob("jit__lambda*-cache")
    whole = entry.stat().st_size
    entry.write_bytes(entry.read_bytes()[: whole // 2])
    Path(str(entry).removesuffix("cache") + "atime").unlink()  # JAX would have written this one next
    assert run(XDG_CACHE_HOME=str(tmp_path))[1] == "4.0"  # warnings are errors there
    assert entry.stat().st_size >= whole * 0.9


def test_what_jax_was_told_holds(tmp_path):
    own = tmp_path / "own"
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(own))[0] == str(own)
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false") == ("off", "4.0")
    assert not (tmp_path / "moezoo").exists()


def test_a_folder_that_cannot_be_made_is_said_and_training_goes_on(tmp_path):
    (tmp_path / "moezoo").write_text("a file in the way")
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"off: cannot write and lock {tmp_path}/moezoo/jax")
    assert value == "4.0"


def test_a_folder_whose_lock_cannot_be_had_is_said_and_training_goes_on(tmp_path):
    (tmp_path / "moezoo" / "jax" / ".lockfile").mkdir(parents=True)
    folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"off: cannot write and lock {tmp_path}/moezoo/jax")
    assert value == "4.0"


def test_a_lock_that_another_does_not_let_go_is_not_awaited_for_ever(tmp_path):
    (tmp_path / "moezoo" / "jax").mkdir(parents=True)
    with FileLock(tmp_path / "moezoo" / "jax" / ".lockfile"):
        folder, value = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith("off: ")
    assert value == "4.0"
