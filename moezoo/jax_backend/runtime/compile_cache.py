"""Compiled programs kept on disk, so that the second start of a command does not compile again.

JAX's key has a fingerprint of the device in it, which changes with the instructions that XLA may use on the CPU (seen
with `--xla_cpu_max_isa`). That a folder is safe to share between machines has not been tried.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

MAX_BYTES = 1 << 30  # a small model's training leaves 8 MB; what was used longest ago goes first


def use_compile_cache() -> str:
    """Let JAX keep its compiled programs, and say where; to be called before the first of them is compiled.

    What JAX was told (JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false) holds. Otherwise they go to the
    user's cache folder. A folder that cannot be written or locked is said, and no error: each run compiles again.
    """
    config: Any = jax.config  # has its options as attributes, which type checkers do not see
    if not config.jax_enable_compilation_cache:
        return "off"
    if config.jax_compilation_cache_dir:
        return str(config.jax_compilation_cache_dir)
    folder = _user_cache() / "moezoo" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
        if usable:
            _forget_half_written(folder)
    except (OSError, NotImplementedError):  # the latter where a file system has no locks
        usable = False
    if not usable:
        return f"off: cannot write and lock {folder}; set JAX_COMPILATION_CACHE_DIR to another folder"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # Small programs too: putting a model together compiles dozens, none of which takes JAX's threshold of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(folder)


def _forget_half_written(folder: Path) -> None:
    """Remove what a process that was killed left: JAX would warn of it at every start, and never write it again.

    JAX writes an entry and then, beside it, when it was used: an entry alone was not finished. Its lock is held.
    """
    with FileLock(folder / ".lockfile", timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink()


def _user_cache() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    return Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
