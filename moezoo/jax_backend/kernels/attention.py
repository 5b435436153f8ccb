"""Chunk sizes of attention by platform."""

from moezoo.jax_backend.runtime.platform import platform


def chunk_length(length: int) -> int:
    """Return the number of queries per chunk: 64 on the CPU, else all of them.

    On the CPU the scores of a chunk stay in cache, which is four times faster at T = 384 (writings/performance.md).
    """
    return 64 if platform() == "cpu" else length
