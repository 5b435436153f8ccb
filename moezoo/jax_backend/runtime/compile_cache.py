"""Persistent compilation cache, so that the second start of a command does not recompile.

JAX's cache key includes a fingerprint of the device, which depends on the instructions that XLA may use on the CPU
(seen with `--xla_cpu_max_isa`). Sharing a cache folder between machines has not been tested.
"""

import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock
from jax._src import compilation_cache, lru_cache  # no public API has the cache's reads and writes

from moezoo.core.files import reason_of

MAX_BYTES = 1 << 30  # training a small model writes 8 MB; the least recently used entry is evicted first


def use_compile_cache() -> str:
    """Enable JAX's compilation cache and return its folder, or why it is off. Call it before the first compilation.

    Settings of JAX (JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false) take precedence. The default is
    the user's cache folder. A folder that cannot be written or locked is reported, not an error: each run recompiles.
    """
    config: Any = jax.config  # its options are attributes that type checkers do not know
    if not config.jax_enable_compilation_cache:
        return "off"
    if config.jax_compilation_cache_dir:
        return str(config.jax_compilation_cache_dir)
    folder = _user_cache() / "moezoo" / "jax" / "verified"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
        if usable:
            _remove_incomplete_entries(folder)
    except (OSError, NotImplementedError):  # NotImplementedError: a file system without locks
        usable = False
    if not usable:
        return f"off: cannot write and lock {folder}; set JAX_COMPILATION_CACHE_DIR to another folder"
    vars(compilation_cache)["LRUCache"] = VerifiedCache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # Cache small programs too: building a model compiles dozens, all below JAX's threshold of one second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(folder)


_DIGEST_BYTES = hashlib.sha256().digest_size


class VerifiedCache(lru_cache.LRUCache):
    """JAX's cache folder with the SHA-256 of each entry in front of it; a damaged entry is removed, so made again.

    Trap: JAX runs what it reads. Its compressed entries have a checksum with zlib, but not with zstd (if that package
    is installed, or in Python 3.14): a flipped bit then ends the process. And it never writes a damaged entry again.
    """

    def put(self, key: str, value: bytes) -> None:
        try:
            super().put(key, hashlib.sha256(value).digest() + value)
        except OSError as error:  # a full disk; JAX would stumble over the incomplete entry at each later one
            for ending in ("cache", "atime"):
                Path(self.path, f"{key}-{ending}").unlink(missing_ok=True)
            what = f"the compile cache cannot be written ({reason_of(error)})"
            warnings.warn(f"{what}; its programs are compiled again at the next start", stacklevel=2)

    def get(self, key: str) -> bytes | None:
        entry: bytes | None = super().get(key)
        if entry is None:
            return None
        digest, value = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
        if digest == hashlib.sha256(value).digest():
            return value
        file = Path(self.path) / f"{key}-cache"
        warnings.warn(f"the compile cache is damaged and the program is compiled again ({file})", stacklevel=2)
        file.unlink(missing_ok=True)
        return None


def _remove_incomplete_entries(folder: Path) -> None:
    """Remove incomplete entries of killed processes: JAX would warn about them at every start and never rewrite them.

    JAX writes an entry, then a file with its access time: an entry without one is incomplete. Holds JAX's own lock.
    """
    with FileLock(folder / ".lockfile", timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink()


def _user_cache() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    return Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
