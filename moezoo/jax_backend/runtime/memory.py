"""Memory that JAX's steps on the CPU take over from each other. JAX only: MLX has an allocator of its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax._src import xla_bridge  # no public API tells whether JAX has started its threads

from moezoo.core.malloc import keep_freed_memory, return_freed_memory


@functools.cache
def reuse_memory(*, for_training: bool) -> str:
    """Let each step reuse the memory of the last one; return a description for the run's header.

    Call it before anything queries JAX's devices, which starts its threads. Without effect on a GPU or TPU's memory,
    and on several CPU devices of one process, which have a thread each.
    """
    if xla_bridge.backends_are_initialized():
        return "returned to the system: JAX had started before moezoo"
    # XLA's compiler has threads, and the small pieces that it leaves in one arena slowed down a step by 5 to 25 %.
    kept = keep_freed_memory(of_all_threads=False)
    if not for_training:  # a token of S takes 1.1 to 1.2 times as long with synchronous dispatch
        return f"{kept}; XLA computes in its own threads"
    # Trap: with asynchronous dispatch on the CPU, a thread of XLA allocates a step's temporary arrays, just before it
    # frees those of the last step: they would be mapped anew in each step or, kept, exist two or three times.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return kept


def returning_memory(function: Any) -> Callable[..., Any]:
    """Wrap a compiled function: a call that compiles then returns to the system what files and compilers left free.

    Not in a process that trains: its next step would map all that memory anew.
    """

    def call(*inputs: Any) -> Any:
        known = function._cache_size()
        result = function(*inputs)
        config: Any = jax.config  # type checkers do not know its values
        if function._cache_size() > known and config.values["jax_cpu_enable_async_dispatch"]:
            return_freed_memory()
        return result

    return call
