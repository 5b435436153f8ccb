"""Asynchronous sharded checkpoints: each process writes the shards of its own devices. JAX only: MLX has no shards.

Orbax copies arrays from the devices, then writes in the background. moezoo.core.checkpoint.sharded_tensors reads them.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax

from moezoo.core.errors import RunError


class PendingFiles:
    """Pending write of named arrays to a new folder. Every process of the group creates one and calls `finish`."""

    def __init__(self, folder: Path, arrays: Mapping[str, jax.Array]):
        """Start writing; return once the arrays are copied and may be modified or donated."""
        import orbax.checkpoint as ocp

        _report_errors_once()
        self._folder = folder
        # Trap: Zarr version 2, Orbax's default, has no bfloat16 that other libraries can read.
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
        try:
            self._writer.save(folder.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))
        except Exception as error:  # Orbax and tensorstore raise many types
            self._writer.close()
            raise self._failed(error) from error

    def finish(self) -> None:
        """Wait until all processes have written their shards. Raises RunError: a process could not write."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # Orbax re-raises any error of its background thread
            raise self._failed(error) from error
        finally:
            self._writer.close()

    def _failed(self, error: Exception) -> RunError:
        reason = " ".join(str(error).split())
        number = re.search(r"os_error_code='(\d+)'", reason)  # tensorstore's text has every file in between
        reason = os.strerror(int(number[1])).lower() if number else reason[:300]
        return RunError(f"cannot write {self._folder}: {reason}. Free disk space, or use another folder.")


@cache
def _report_errors_once() -> None:
    """Silence what Orbax prints of an error that `finish` raises: tracebacks of threads, arrays and coroutines.

    Orbax closes its event loop after the first array that cannot be written, so tensorstore cannot deliver the results
    of the others, and prints that error of asyncio for each. Their coroutines fail once more when they are deleted.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        coroutine = getattr(unraisable.object, "cr_code", None)
        is_orbax = coroutine is not None and "/orbax/" in coroutine.co_filename
        if not is_orbax and (unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed"):
            others(unraisable)

    sys.unraisablehook = hook
