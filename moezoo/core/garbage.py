"""Setting of Python's garbage collector."""

import gc

_NEW_CONTAINERS = 50_000


def collect_seldom() -> None:
    """Look for reference cycles after 50,000 new containers in place of Python's 700 (3.12: 2,000).

    Imports and tracing create half a million containers that stay, so that the collector looks at them again and again
    and finds nothing: on JAX 0.26 of the 3.65 s from the start of a process to its first training step.
    For commands, not for the library: the setting is the process's.
    """
    gc.set_threshold(_NEW_CONTAINERS, *gc.get_threshold()[1:])
